"""A student without an engine: for measurements that take gradients for themselves and update nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minillm.models import CausalLM, ModelReader
from minillm.probes import probe_packing
from minillm.ranks import Ranks


class BareStudent:
    """As much of ``student_engine.Student`` as an objective asks of it, whole on every rank."""

    updates_done = 0

    def __init__(self, root: CausalLM, *, ranks: Ranks) -> None:
        self.root = root
        self._device = ranks.device
        probe_packing(root, name="student")

    @contextlib.contextmanager
    def whole(self) -> Iterator[ModelReader]:
        """A reader over the weights."""
        yield ModelReader(self.root, device=self._device, lockstep=False)

    def loss(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``student_engine.Student.loss``."""
        result: tuple[Tensor, dict[str, Tensor]] = self.root("train", **inputs)
        return result
