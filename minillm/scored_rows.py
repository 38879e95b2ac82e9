"""Rows of a rollout by the numbers of their tokens: laid out, looked at where a number is not finite, left out.

Legend: N kept tokens, B rows, T response positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from minillm.errors import NonFinite
from minillm.state import State
from minillm.types import PromptBatch, Rollout


def spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Per-token values laid back onto [B, T] in row order; 0 off the mask."""
    out_BT = values_N.new_zeros(mask_BT.shape)
    out_BT[mask_BT] = values_N
    return out_BT


def require_finite(values: Mapping[str, Tensor], rollout: Rollout, *, may_be_infinite: Collection[str]) -> None:
    """Raise ``NonFinite`` unless all numbers [N] of the kept tokens are finite, those named at least no NaN.

    The error names the rows in which one is not, and has the rollout and its numbers as its batch.
    """
    bad = {name: v_N.isnan() if name in may_be_infinite else ~v_N.isfinite() for name, v_N in values.items()}
    name = next((name for name, bad_N in bad.items() if bool(bad_N.any())), None)
    if name is None:
        return
    at_N2 = rollout.mask_BT.nonzero()
    row, position = at_N2[int(bad[name].nonzero()[0])].tolist()
    count = len(rollout.stop_B)
    found_B = torch.stack([at_N2[bad_N, 0].bincount(minlength=count) for bad_N in bad.values()]).sum(dim=0)
    rows: list[int] = found_B.nonzero()[:, 0].tolist()
    numbers = {f"{name}_BT": spread(v_N, rollout.mask_BT) for name, v_N in values.items()}
    raise NonFinite(
        f"{name} is {float(values[name][bad[name]][0])} for row {rollout.prompts.uid_B[row]!r}, "
        f"response position {position}; no update was made from it.\n"
        f"  so it is in {len(rows)} of the {count} rows of this rank (one that a model read in one "
        "sequence with a bad one is bad too); look at the models' dtype (fp16 overflows) and at the rows",
        rows=rows, batch=shown(rollout.prompts, rollout, numbers),
    )  # fmt: skip


class Responses(Protocol):
    """What ``Rollout`` and ``Practice`` have alike."""

    @property
    def response_BT(self) -> Tensor: ...

    @property
    def mask_BT(self) -> Tensor: ...


def shown(prompts: PromptBatch, rollout: Responses | None, numbers: Mapping[str, Tensor]) -> State:
    """A batch for a person to look at: each row's uid, sample and tokens, and its ``numbers``, each [B, …]."""
    rows: list[dict[str, Any]] = [
        {"uid": uid, "sample": sample, "prompt_ids": ids_P[mask_P].tolist()}
        for uid, sample, ids_P, mask_P in zip(
            prompts.uid_B, prompts.sample_B, prompts.ids_BP, prompts.mask_BP, strict=True
        )
    ]
    if rollout is not None:
        for row, ids_T, mask_T in zip(rows, rollout.response_BT, rollout.mask_BT, strict=True):
            row["response_ids"] = ids_T[mask_T].tolist()
    return State({"rows": rows}, {name: value.detach().contiguous() for name, value in numbers.items()})


def with_rows(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """The same rollout of these rows alone, in this order, as wide as before."""
    at = _index(rows, rollout.mask_BT)
    student, teacher, support = rollout.student_hidden_BTH, rollout.teacher_hidden_BTH, rollout.support_BTC
    return replace(
        rollout,
        prompts=prompts_of(rollout.prompts, rows),
        response_BT=rollout.response_BT[at], mask_BT=rollout.mask_BT[at], teacher_drew_BT=rollout.teacher_drew_BT[at],
        logq_BT=rollout.logq_BT[at], stop_B=tuple(rollout.stop_B[row] for row in rows),
        student_hidden_BTH=None if student is None else student[at],
        teacher_hidden_BTH=None if teacher is None else teacher[at],
        support_BTC=None if support is None else support[at],
    )  # fmt: skip


def prompts_of(prompts: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    """The same of prompts."""
    at = _index(rows, prompts.mask_BP)
    return PromptBatch(
        uid_B=tuple(prompts.uid_B[row] for row in rows), sample_B=tuple(prompts.sample_B[row] for row in rows),
        ids_BP=prompts.ids_BP[at], mask_BP=prompts.mask_BP[at],
    )  # fmt: skip


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.long, device=like.device)
