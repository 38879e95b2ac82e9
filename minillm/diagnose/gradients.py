"""Text drawn from the student, and of each prompt and choice of credit the projected gradient that it makes.

Legend: B rows of this rank, M prompts, T response positions, N kept tokens of this rank, J directions, H = 2 halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.advantages import RowNames, targets_of
from minillm.bare_student import BareStudent
from minillm.diagnose.measure import Lots
from minillm.diagnose.names import Estimator
from minillm.diagnose.scores import Memory, token_scores
from minillm.objectives import Minillm
from minillm.published import PublishedConfig
from minillm.ranks import Ranks
from minillm.sampling import INDEPENDENT
from minillm.stage_config import MinillmStage
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, Ids, Prompt, Targets

HALVES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was made of all prompts, the same on every rank."""

    lots: dict[str, Lots]
    """By estimator, of the long-horizon term of the loss."""
    single: Lots
    tokens: int
    """Sampled by all ranks, in both halves."""
    samples: int
    effective_share: float
    """(sum w)^2 / (n sum w^2) of the reference's importance weights over tokens: 1 without teacher mixing."""
    outside_clip: float
    """Share of tokens whose weight is outside the stage's clip band around 1: those that a clip on weight times ratio
    (the paper's Algorithm 1) would touch before any update."""
    reverse_kl: float
    """Per response, nats, at the states that were visited."""


def stage_of_draws(stage: MinillmStage, *, prompts: int, samples: int) -> MinillmStage:
    """The stage whose rollouts are measured: each is one half, and hardly two prompts share coins."""
    changes = {
        "prompts": prompts, "samples_per_prompt": samples, "coin_groups": _groups(stage, prompts), "baseline": "none",
        "estimator": "exact", "published": PublishedConfig(), "repetition_weight": 0.0,
        "lm_coefficient": 0.0, "lm_batch": 0, "lm_teacher_share": 0.0, "inner_epochs": 1, "inner_batches": 1,
        "inner_kl": None, "dual_clip": None, "non_finite": "stop", "anchor": None,
    }  # fmt: skip
    return MinillmStage(**{**stage.model_dump(), **changes})


def draw(
    stage: MinillmStage,
    estimators: Sequence[Estimator],
    *,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    student: BareStudent,
    teacher: Teacher,
    ids: Ids,
    ranks: Ranks,
    directions: int,
    seed: int,
    told: Callable[[int], None] = lambda half: None,
    memory: Memory | None = None,
) -> Drawn:
    """Both halves of every prompt, and every estimator's gradient of them. All ranks must call it.

    ``stage`` is that of ``stage_of_draws``; ``told`` hears of each half that is done; a ``memory`` spares this student
    what it did for another teacher.
    """
    objective = Minillm(stage, prompts=prompts, decoding=decoding, teacher=teacher, ids=ids, ranks=ranks, seed=seed)
    place = {prompt.uid: number for number, prompt in enumerate(prompts)}
    of_names: dict[str, list[Tensor]] = {each.name: [] for each in estimators}
    single: list[Tensor] = []
    sums = torch.zeros(5, dtype=torch.float64)
    for half in range(HALVES):
        collected, figures = objective.collect(half, student)  # type: ignore[arg-type]
        scored = collected.targets.scored
        with teacher.head() as head:
            scores = token_scores(
                student.root, scored.rollout, teacher_head=head, temperature=decoding.temperature,
                directions=directions, seed=seed, memory=memory,
            )  # fmt: skip
        prompt_B = [place[uid] for uid in scored.rollout.prompts.uid_B]
        names = RowNames.of(scored.rollout, prompt=prompt_B, row=collected.mine, coin_groups=stage.coin_groups)

        def summed(value_NJ: Tensor, mask_BT: Tensor = scored.rollout.mask_BT, names: RowNames = names) -> Tensor:
            """Per prompt and sample, over the tokens of all ranks, [M, J]."""
            prompt_N = names.prompt_B[:, None].expand_as(mask_BT)[mask_BT]
            total_MJ = torch.zeros(len(prompts), directions, dtype=torch.float64, device=value_NJ.device)
            return ranks.sum(total_MJ.index_add_(0, prompt_N, value_NJ.double())) / stage.samples_per_prompt

        for each in estimators:
            targets = targets_of(scored, each.stage, names=names, ranks=ranks, longest=decoding.max_new_tokens)
            # The loss has minus the credit.
            of_names[each.name].append(summed(-_credit_N(targets)[:, None] * scores.score_NJ))
        weight_BT = collected.targets.single_weight_BT  # every choice here has the stage's importance weights
        weight_N = None if weight_BT is None else weight_BT[scored.rollout.mask_BT]
        single.append(summed(scores.single_NJ if weight_N is None else weight_N[:, None] * scores.single_NJ))
        sums += _sums(collected.targets, clip=stage.clip or 0.0, tokens=figures["tokens"], ranks=ranks)
        told(half)
    weight, square, outside, tokens, kl = sums.tolist()
    rows = HALVES * stage.rows_per_step

    def lots(parts: list[Tensor]) -> Lots:
        return Lots(value_HMJ=torch.stack(parts).cpu(), samples=stage.samples_per_prompt)

    return Drawn(
        lots={name: lots(parts) for name, parts in of_names.items()},
        single=lots(single),
        tokens=int(tokens),
        samples=rows,
        effective_share=weight**2 / max(tokens * square, 1e-30),
        outside_clip=outside / max(tokens, 1.0),
        reverse_kl=kl / rows,
    )


def _groups(stage: MinillmStage, prompts: int) -> int:
    """Coin groups of prompts: many more than prompts, so that hardly two share one."""
    return INDEPENDENT * prompts if stage.teacher_mix > 0 else 1


def _credit_N(targets: Targets) -> Tensor:
    mask_BT = targets.scored.rollout.mask_BT
    return (targets.importance_BT * targets.advantage_BT)[mask_BT]


def _sums(targets: Targets, *, clip: float, tokens: float, ranks: Ranks) -> Tensor:
    mask_BT = targets.scored.rollout.mask_BT
    weight_N = targets.importance_BT[mask_BT].double()
    outside_N = ((weight_N - 1.0).abs() > clip).double()
    mine: Any = [weight_N.sum(), weight_N.square().sum(), outside_N.sum(), targets.scored.reverse_kl_BT.sum()]
    weight, square, outside, kl = ranks.sum(torch.stack([of.double() for of in mine])).tolist()
    return torch.tensor([weight, square, outside, tokens, kl], dtype=torch.float64)
