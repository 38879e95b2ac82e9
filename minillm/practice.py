"""What the passes over a rollout read of it: the part of its targets that a checkpoint inside a step holds.

Legend: B this rank's rows, P prompt positions, T response positions, L = P + T, H hidden width, C bytes of packed
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from minillm.state import State
from minillm.types import PromptBatch, Rollout, Targets
from minillm.updates import nobody

_MAY_BE_MISSING = ("support_BTC", "single_weight_BT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Practice:
    """Fields of ``Targets``, ``Scored`` and ``Rollout`` under their names there; nothing of how they came about."""

    prompts: PromptBatch
    response_BT: Tensor
    mask_BT: Tensor
    teacher_hidden_BTH: Tensor
    logq_BT: Tensor
    """Of ``Scored``: what a ratio is over."""
    advantage_BT: Tensor
    importance_BT: Tensor
    support_BTC: Tensor | None
    single_weight_BT: Tensor | None

    @classmethod
    def of(cls, targets: Targets) -> Self:
        """What is read of these."""
        scored, rollout = targets.scored, targets.scored.rollout
        assert rollout.teacher_hidden_BTH is not None, "a rollout to learn from keeps the teacher's states"
        return cls(
            prompts=rollout.prompts, response_BT=rollout.response_BT, mask_BT=rollout.mask_BT,
            teacher_hidden_BTH=rollout.teacher_hidden_BTH, logq_BT=scored.logq_BT, advantage_BT=targets.advantage_BT,
            importance_BT=targets.importance_BT, support_BTC=rollout.support_BTC,
            single_weight_BT=targets.single_weight_BT,
        )  # fmt: skip

    def state(self) -> State:
        """All but the prompts, which a step has by its number."""
        tensors = {name: getattr(self, name) for name in self.__slots__ if name != "prompts"}
        return State({}, {name: value.contiguous() for name, value in tensors.items() if value is not None})

    @classmethod
    def from_state(cls, state: State, *, prompts: PromptBatch) -> Self:
        """The same again, on the prompts' device."""
        missing = dict.fromkeys(_MAY_BE_MISSING)
        tensors: dict[str, Any] = {name: value.to(prompts.ids_BP.device) for name, value in state.tensors.items()}
        return cls(prompts=prompts, **{**missing, **tensors})


def rollout_inputs(rollout: Rollout | Practice, rows: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of a training forward over some rows of a rollout, right-padded to the longest of them; a dummy row if
    there are none."""
    prompts = rollout.prompts
    if not rows:
        return nobody(prompts.ids_BP.device)
    index = torch.as_tensor(rows, device=prompts.ids_BP.device)
    mask_BP, mask_BT = prompts.mask_BP[index], rollout.mask_BT[index]
    mask_BL = torch.cat([mask_BP, mask_BT], dim=1)
    # Prompts end and responses begin at one column; without the gaps on both sides no row is wider than the longest.
    longest = int(mask_BL.sum(dim=1).max())
    order_BL = mask_BL.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    return {
        "ids_BL": torch.cat([prompts.ids_BP[index], rollout.response_BT[index]], dim=1).gather(1, order_BL),
        "mask_BL": mask_BL.gather(1, order_BL),
        "predict_BL": torch.cat([torch.zeros_like(mask_BP), mask_BT], dim=1).gather(1, order_BL),
    }
