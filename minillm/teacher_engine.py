"""The frozen model that is imitated, where its card puts it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from minillm.engine_settings import read_engine_settings
from minillm.engines import initialise, load_for
from minillm.errors import ModelError
from minillm.models import CausalLM, ModelReader
from minillm.probes import probe_head, probe_packing
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights


class Teacher:
    """The frozen model that is imitated: never in training mode, never with a gradient."""

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        *,
        ranks: Ranks,
        placement: str,
        precision: str,
        real_ids: int | None = None,
    ) -> None:
        """``placement``: ``replicated`` (whole on every rank) or ``zero3`` (sharded over the ranks)."""
        self.ranks, self.placement = ranks, placement
        engine_config = read_engine_settings("teacher-zero3")
        sharded = placement == "zero3"
        model = load_for(load, engine_config, precision=precision, shard=sharded)
        model.eval()
        self.root = CausalLM(model)
        if real_ids is not None:
            self.root.head.real_ids = real_ids
        if not sharded:
            probe_head(model, self.root)
        self.root.eval().requires_grad_(False)
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.root.parameters())
        self.whole_bytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.root.parameters())
        self.root.to(ranks.device)
        self._engine = None
        if sharded:
            self._engine = initialise(self.root, ranks=ranks, precision=precision, config=engine_config, optimiser=None)
            self._engine.eval()
        probe_packing(self.root, call=self._engine, name="teacher")
        self.reader = ModelReader(self._engine or self.root, device=ranks.device, lockstep=sharded)

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadWeights]:
        """The head's rows of real ids, gathered for the block where they are sharded."""
        if self.placement != "zero3":
            yield self.root.head.weights()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.root.head.parameters())):
            yield self.root.head.weights()

    def check_share(self) -> list[int]:
        """Bytes of the teacher that each rank keeps between forwards; ``ModelError`` if a sharded one keeps more than
        its share."""
        kept = [int(n) for n in self.ranks.gather_rows(torch.tensor([self.resident_bytes()], device=self.ranks.device))]
        # Every tensor is padded to a multiple of the number of ranks, and a released one leaves a placeholder element.
        spare = 8 * self.ranks.size * sum(1 for _ in self.root.parameters())
        if self.placement == "zero3" and max(kept) > self.whole_bytes / self.ranks.size + spare:
            raise ModelError(
                f"the sharded teacher keeps {max(kept):,} of {self.whole_bytes:,} bytes on a rank; "
                f"wanted about 1/{self.ranks.size} of them.\n"
                "  is stage3_param_persistence_threshold 0 in the engine file?"
            )
        return kept

    def close(self) -> None:
        """Frees the weights; the teacher cannot be used afterwards."""
        if self._engine is not None:
            self._engine.destroy()
        del self._engine, self.root, self.reader
        gc.collect()

    def resident_bytes(self) -> int:
        """Bytes of the teacher's weights that stay on this rank between forwards."""
        total = 0
        for parameter in self.root.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            total += parameter.numel() * parameter.element_size()
            # A released ZeRO-3 parameter keeps an empty placeholder; what stays is its shard.
            total += 0 if shard is None else shard.numel() * shard.element_size()
        return total
