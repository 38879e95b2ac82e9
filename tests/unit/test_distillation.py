"""MiniLLM's neighbours: whose text a batch is, what its loss is (against a plain twin), and what a run refuses.

Legend: N learnt tokens, V real ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import divergences
from minillm.config import MinillmStage, OptimiserConfig, RunConfig
from minillm.distillation import Distil
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.objectives import Minillm
from minillm.pairs import check_pair
from minillm.preflight import read_split
from minillm.references import References
from minillm.teacher_engine import Teacher
from minillm.text_mix import FollowedShare, Replay, Written, sources
from minillm.text_stages import (
    DistilStage,
    GkdStage,
    ImitkdStage,
    KdStage,
    RklStage,
    SftStage,
    SkewFklStage,
    SkewRklStage,
    asks_teacher,
)
from minillm.types import Decoding, Example, Prompt
from tests import tiny
from tests.unit.test_objectives import IDS, OPTIMISER, PLAIN, RANKS, REAL, Work, folder, prompts, teacher

__all__ = ["folder", "prompts", "teacher"]  # fixtures
BATCH = 6
KINDS: list[tuple[type[DistilStage], dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = [
    (ImitkdStage, {}, divergences.forward_kl),
    (GkdStage, {"beta": 0.3, "student_share": 0.5}, lambda q, p: divergences.jensen_shannon(q, p, beta=0.3)),
    (RklStage, {}, divergences.reverse_kl),
    (SkewFklStage, {"student_share": 0.5}, lambda q, p: divergences.skew_forward_kl(q, p, skew=0.1)),
    (SkewRklStage, {"student_share": 0.5, "skew": 0.2}, lambda q, p: divergences.skew_reverse_kl(q, p, skew=0.2)),
]


def stage(kind: type[DistilStage], **changes: Any) -> DistilStage:
    return kind(**{"steps": 4, "batch": BATCH, "optimiser": OPTIMISER, **changes})


@contextmanager
def working(
    chosen: DistilStage, folder: Path, prompts: Sequence[Prompt], teacher: Teacher, *, decoding: Decoding = PLAIN,
    student: str = "student", seed: int = 3,
) -> Iterator[Work]:  # fmt: skip
    objective = Distil(chosen, prompts=prompts, decoding=decoding, teacher=teacher, ids=IDS, ranks=RANKS, seed=seed)
    with Work(folder / student, objective, updates=chosen.steps * chosen.updates_per_step) as work:
        yield work


def plain_loss(
    folder: Path, text: Sequence[Example], of: Callable[[Tensor, Tensor], Tensor], *, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """The sum of the divergence over the text's tokens by rows and LONGEST, row by row, with transformers alone."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    total = torch.zeros(())
    for row in text:
        ids_1L = torch.tensor([row.ids + row.response_ids])
        at = slice(len(row.ids) - 1, ids_1L.shape[1] - 1)
        logq_NV, logp_NV = (
            (model(ids_1L).logits[0, at, :REAL] / temperature).log_softmax(-1) for model in (student, teacher)
        )
        total = total + of(logq_NV, logp_NV.detach()).sum()
    loss = total / (len(text) * PLAIN.max_new_tokens)
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


@pytest.mark.parametrize(("kind", "changes", "divergence"), KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_batch_has_the_loss_and_gradient_of_its_formula(
    *, kind: type[DistilStage], changes: dict[str, Any], divergence: Any, temperature: float, folder: Path,
    prompts: list[Prompt], teacher: Teacher,
) -> None:  # fmt: skip
    decoding = Decoding(max_new_tokens=PLAIN.max_new_tokens, temperature=temperature)
    with working(stage(kind, **changes), folder, prompts, teacher, decoding=decoding) as work:
        text, figures = work.objective.collect(0, work.student)
        with work.objective.learning(text, work.student) as updates:
            update = next(iter(updates))
        gradients = work.gradients(update.losses)
        want, want_gradients = plain_loss(folder, text, divergence, temperature=temperature)
        assert update.figures()["loss"] == pytest.approx(float(want), rel=1e-4)
        rows = dict(work.student.root.named_parameters())
        assert len(rows) == len(want_gradients)
        for mine, other in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(mine[: len(other)], other, rtol=1e-3, atol=1e-6)
        # Negative control: the other direction of the divergence is seen.
        _, others = plain_loss(folder, text, lambda q, p: divergence(p, q), temperature=temperature)
        assert max(float((a - b).abs().max()) for a, b in zip(want_gradients, others, strict=True)) > 1e-3
        assert figures["tokens"] == sum(len(row.response_ids) for row in text)


@pytest.mark.parametrize("top_k", [0, 3])
def test_on_policy_reverse_kl_is_minillm_with_gamma_0(
    top_k: int, folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    """Weights after three steps of two passes each: same prompts, same text, same loss; not where sampling leaves ids
    out, since MiniLLM reads both models on those that are left."""
    decoding = Decoding(max_new_tokens=PLAIN.max_new_tokens, top_k=top_k)
    found = []
    fields: dict[str, Any] = {"steps": 3, "name": "same", "inner_epochs": 2, "optimiser": OPTIMISER}
    for objective in (
        Distil(
            RklStage(**fields, batch=BATCH), prompts=prompts, decoding=decoding, teacher=teacher, ids=IDS, ranks=RANKS,
            seed=3,
        ),
        Minillm(
            MinillmStage(**fields, prompts=BATCH, gamma=0.0), prompts=prompts, decoding=decoding, teacher=teacher,
            ids=IDS, ranks=RANKS, seed=3,
        ),
    ):  # fmt: skip
        with Work(folder / "student", objective, updates=6) as work:
            for step in range(3):
                collected, _ = objective.collect(step, work.student)
                with objective.learning(collected, work.student) as updates:
                    for update in updates:
                        work.student.update(update.losses)
            found.append([p.detach().clone() for p in work.student.root.parameters()])
    apart = max(float((mine - other).abs().max()) for mine, other in zip(*found, strict=True))
    if top_k:
        assert apart > 1e-3
        return
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_word_level_distillation_is_partly_cross_entropy_and_partly_forward_kl(
    share: float, folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    def gradients(chosen: Any) -> tuple[list[Tensor], float]:
        objective = References(chosen, prompts=prompts, ids=IDS, ranks=RANKS, seed=3, teacher=teacher)
        with Work(folder / "student", objective, updates=1) as work:
            rows, _ = objective.collect(0, work.student)
            with objective.learning(rows, work.student) as updates:
                (update,) = updates
                return work.gradients(update.losses), update.figures()["loss"]

    fields: dict[str, Any] = {"steps": 1, "batch": BATCH, "optimiser": OPTIMISER, "name": "same"}
    mixed, loss = gradients(KdStage(**fields, teacher_share=share))
    hard, hard_loss = gradients(SftStage(**fields))
    soft, soft_loss = gradients(KdStage(**fields, teacher_share=1.0))
    assert loss == pytest.approx(share * soft_loss + (1 - share) * hard_loss, rel=1e-5)
    for each, one, other in zip(mixed, soft, hard, strict=True):
        torch.testing.assert_close(each, share * one + (1 - share) * other, rtol=1e-4, atol=1e-6)
    assert soft_loss != pytest.approx(hard_loss, rel=1e-2)


@pytest.mark.parametrize("cache", [None, "cached"])
def test_word_level_distillation_without_the_teacher_s_share_is_fine_tuning_and_says_so(
    cache: str | None, folder: Path, prompts: list[Prompt]
) -> None:
    """Neither a teacher nor a cache is there to learn from."""
    chosen = KdStage(steps=1, batch=BATCH, optimiser=OPTIMISER, teacher_share=0.0, teacher_cache=cache)
    named = ["kind"] if cache is None else ["kind", "teacher_cache"]
    assert list(chosen.idle_settings(tempered=False).values()) == [named]
    assert not asks_teacher(chosen)
    objective = References(chosen, prompts=prompts, ids=IDS, ranks=RANKS, seed=3)
    with Work(folder / "student", objective, updates=1) as work:
        rows, _ = objective.collect(0, work.student)
        with objective.learning(rows, work.student) as updates:
            (update,) = updates
            assert work.student.update(update.losses)[0] > 0
    # Negative control: any other share asks.
    half = chosen.model_copy(update={"teacher_share": 0.5})
    assert half.idle_settings(tempered=False) == {}
    assert asks_teacher(half) == (cache is None)


def test_a_second_pass_asks_the_teacher_nothing(folder: Path, prompts: list[Prompt], teacher: Teacher) -> None:
    reads: list[int] = []
    with working(stage(RklStage, inner_epochs=3, micro_batch=2), folder, prompts, teacher) as work:
        plain = teacher.reader.read

        def noted(*inputs: Tensor) -> Tensor:
            reads.append(1)
            return plain(*inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher.reader, "read", noted)
            text, _ = work.objective.collect(0, work.student)
            with work.objective.learning(text, work.student) as updates:
                losses = [work.student.update(update.losses)[0] for update in updates]
    assert len(reads) == 3  # micro-batches, of the first pass alone
    assert losses[2] < losses[0]


def uids(rows: Sequence[Example]) -> list[tuple[str, tuple[int, ...]]]:
    return [(row.uid, row.response_ids) for row in rows]


def test_text_is_the_students_or_a_reference_by_a_keyed_coin(
    folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    references = {(row.uid, row.response_ids) for row in prompts}
    counts = {}
    for share in (0.0, 0.5, 1.0):
        with working(stage(GkdStage, student_share=share), folder, prompts, teacher) as work:
            batches = [work.objective.collect(step, work.student) for step in range(4)]
            again = [work.objective.collect(step, work.student)[0] for step in range(4)]
        assert [uids(text) for text, _ in batches] == [uids(text) for text in again]
        counts[share] = sum(each not in references for text, _ in batches for each in uids(text))
        assert counts[share] == sum(figures["student_rows"] for _, figures in batches)
    assert counts[0.0] == 0
    assert counts[1.0] == 4 * BATCH
    assert 0 < counts[0.5] < 4 * BATCH


def test_prompts_without_a_response_serve_for_the_students_own_text(
    folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    bare = [Prompt(uid=f"bare-{row.uid}", text=row.text, ids=row.ids) for row in prompts]
    with working(stage(GkdStage, student_share=0.5), folder, [*prompts[:2], *bare], teacher) as work:
        rows = [row for step in range(4) for row in work.objective.collect(step, work.student)[0]]
    known = {(row.uid, row.response_ids) for row in prompts}
    given = [row for row in rows if (row.uid, row.response_ids) in known]
    assert {row.uid for row in given} == {row.uid for row in prompts[:2]}
    assert any(row.uid.startswith("bare-") for row in rows)


def test_kept_responses_take_over_from_fresh_ones(folder: Path, prompts: list[Prompt], teacher: Teacher) -> None:
    chosen = stage(SkewFklStage, student_share=1.0, steps=20, replay=10)
    with working(chosen, folder, prompts, teacher) as work:
        figures = [work.objective.collect(step, work.student)[1] for step in range(20)]
        assert len(work.objective._replay.rows) == 10
    assert figures[0]["kept_rows"] == 0
    kept = [f["kept_rows"] for f in figures]
    assert sum(kept[:7]) < sum(kept[13:])
    assert all(f["student_rows"] == BATCH for f in figures)
    # A batch of kept ones alone samples nothing.
    assert any(f["sampled_tokens"] == 0 for f in figures[-3:])
    with working(stage(SkewFklStage, student_share=1.0, steps=20, replay=0), folder, prompts, teacher) as work:
        assert work.objective.collect(15, work.student)[1]["kept_rows"] == 0


def test_a_share_that_follows_validation_rises_with_its_loss(
    folder: Path, prompts: list[Prompt], teacher: Teacher
) -> None:
    with working(stage(SkewFklStage, validate_every=1), folder, prompts, teacher) as work:
        shares = []
        for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.2, 9.0):
            shares.append(work.objective.collect(0, work.student)[1]["student_share"])
            work.objective.hear({"loss": loss})
    assert shares == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.2])
    fixed = FollowedShare(0.95, 0.1, 0.1)
    for loss in (1.0, 2.0, 3.0):
        fixed.hear(loss)
    assert fixed.share == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_does_not_end_the_rise_of_the_share(broken: float) -> None:
    """Nothing is above it or below it: were it what later losses are held against, none would raise the share."""
    for losses in ([broken, 1.0, 2.0, 2.0, 3.0], [1.0, broken, 2.0, broken, 3.0]):
        followed, shares = FollowedShare(0.0, 0.25, 0.5), []
        for loss in losses:
            followed.hear(loss)
            shares.append(followed.share)
        assert shares[-1] == 0.5 and shares == sorted(shares), losses


def test_the_draws_of_a_batch_are_keyed_and_have_their_chances() -> None:
    def of(key: str, own: float, fresh: float) -> list[str]:
        return [
            each
            for step in range(500)
            for each in sources(step, 10, student_share=own, fresh_share=fresh, key=key)
        ]  # fmt: skip

    once = of("a", 0.4, 0.25)
    assert once == of("a", 0.4, 0.25)
    assert once != of("b", 0.4, 0.25)
    assert once.count("reference") / 5000 == pytest.approx(0.6, abs=0.02)
    assert once.count("fresh") / 5000 == pytest.approx(0.1, abs=0.015)
    # A larger share makes no row a reference that was the student's: runs that differ in it alone stay comparable.
    assert all(b != "reference" for a, b in zip(once, of("a", 0.7, 0.25), strict=True) if a != "reference")


def test_a_buffer_keeps_the_latest() -> None:
    replay = Replay(3)
    replay.add(Written(str(n), (1,), (2,)) for n in range(5))
    assert [row.uid for row in replay.rows] == ["2", "3", "4"]
    assert {row.uid for n in range(20) for row in replay.draw(1, f"k{n}")} == {"2", "3", "4"}


@pytest.mark.parametrize(
    ("kind", "changes", "error", "words"),
    [
        (GkdStage, {"beta": 0.0}, ConfigError, "beta 0: there the divergence is 0 .* kind: imitkd"),
        (GkdStage, {"beta": 1.0}, ConfigError, "kind: rkl"),
        (SkewFklStage, {}, UnsupportedCombination, "student_share null with validate_every 0"),
        (SkewFklStage, {"validate_every": 1, "share_step": 0.0}, UnsupportedCombination, "null with share_step 0"),
        (SkewFklStage, {"skew": 1.0}, ConfigError, "skew: got 1.0, wanted a number below 1"),
        (RklStage, {"student_share": 0.5}, ConfigError, "student_share: no setting of this name"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: Any, changes: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        stage(kind, **changes)


@pytest.mark.parametrize("kind", ["kd", "imitkd", "gkd", "rkl", "skew_fkl", "skew_rkl"])
def test_each_is_one_word_in_a_configuration_and_wants_a_teacher(kind: str) -> None:
    fields: dict[str, Any] = {"kind": kind, "steps": 2, "batch": 4, "optimiser": OptimiserConfig(lr=1e-3)}
    run: dict[str, Any] = {
        "name": "a", "student": "s", "data": {"train": "world:train", "max_prompt_tokens": 24},
        "decoding": {"max_new_tokens": 8},
    }  # fmt: skip
    if kind.startswith("skew"):
        fields["student_share"] = 0.5
    assert RunConfig(**run, teacher="t", stages=(fields,)).stages[0].kind == kind
    with pytest.raises(UnsupportedCombination, match="distils a teacher"):
        RunConfig(**run, stages=(fields,))


def test_a_step_of_few_own_rows_still_works(folder: Path, prompts: list[Prompt], teacher: Teacher) -> None:
    """A chance so small that most batches have none."""
    with working(stage(ImitkdStage, student_share=0.1), folder, prompts, teacher) as work:
        for step in range(4):
            text, _ = work.objective.collect(step, work.student)
            with work.objective.learning(text, work.student) as updates:
                for update in updates:
                    assert work.student.update(update.losses)[0] > 0


@pytest.mark.parametrize("limit", [2, 5, 100])
def test_responses_may_be_fewer_than_prompts(limit: int, folder: Path, tmp_path: Path) -> None:
    rows = tiny.save_prompts(tmp_path / "prompts.jsonl")
    config = tiny.minillm_config(
        tmp_path, teacher=folder / "teacher", student=folder / "student", prompts=rows,
        run_data={"train": str(rows), "max_prompt_tokens": 8, "train_responses": limit},
    )  # fmt: skip
    pair = check_pair(config)
    split = read_split(config, str(rows), pair=pair, name="train", need_response=False)
    answered = [bool(prompt.response_ids) for prompt in split.prompts]
    kept = min(limit, len(answered))
    assert answered == [True] * kept + [False] * (len(answered) - kept)
    said = any(f"the responses of the first {limit} rows (set by data.train_responses)" in line for line in split.words)
    assert said == (limit < len(answered))
    # Validation and test keep all of theirs.
    test = read_split(config, str(rows), pair=pair, name="test", need_response=False)
    assert all(prompt.response_ids for prompt in test.prompts)
