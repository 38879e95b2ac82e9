"""Batch algebra: how a step is cut, padded or shared changes nothing, and its gradient is that of a plain twin.

Legend: B rows, T response positions, N kept tokens, V real ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import objectives, updates
from minillm.batches import example_batch
from minillm.cards import Card
from minillm.config import MinillmStage, SftStage
from minillm.errors import DataError
from minillm.loading import inspect, load
from minillm.micro_batches import Limits
from minillm.objectives import Minillm, rollout_inputs
from minillm.order import parts
from minillm.preflight import require_rows
from minillm.prompts import prepare
from minillm.ranks import Ranks
from minillm.references import References, learnt_tokens, likelihood, text_losses
from minillm.rows import Row
from minillm.stages import Start, run_stage
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, Ids, Prompt, Rollout
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
IDS = Ids(eos=(EOS,), pad=0)
LONGEST = 8
PLAIN = Decoding(max_new_tokens=LONGEST)
OPTIMISER = {"lr": 1e-2, "schedule": "constant"}
RANKS = Ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    tiny.save_model(top / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(top / "student", "llama", seed=2, rows=30)
    tiny.save_model(top / "exact", "gpt2", seed=2)  # whose norms, unlike Llama's, compute in float64 if asked to
    return top


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return make_teacher(folder / "teacher")


def make_teacher(folder: Path) -> Teacher:
    card = Card(name="teacher", model=str(folder))
    return Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=RANKS, placement="replicated", precision="fp32", real_ids=REAL
    )


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Of two to five letters, with responses."""
    rows = []
    for n in range(12):
        letters = [tiny.LETTERS[(n * 7 + step * 3) % 26] for step in range(2 + n % 4)]
        rows.append(Row(uid=f"row-{n}", prompt=" ".join(letters), responses=(" ".join(reversed(letters)),)))
    found, _ = prepare(
        rows, tokenizer=tiny.tokenizer(), template="plain", max_prompt_tokens=8, over_long="error",
        max_response_tokens=LONGEST, eos_id=EOS, need_response=True,
    )  # fmt: skip
    return found


class Work:
    """A student and one objective over it; closed when the block ends."""

    def __init__(self, student: Path, objective: Any, *, updates: int, clip: float = 1.0) -> None:
        card = Card(name="student", model=str(student))
        self.objective = objective
        self.student = Student(
            lambda: load(card, inspect(card), seed=0),
            ranks=RANKS,
            settings="zero0",
            precision="fp32",
            optimiser=objective._stage.optimiser,
            updates=updates,
            real_ids=REAL,
        )

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_: object) -> None:
        self.student._engine.destroy()  # not close(), whose collection of garbage takes longer than a run here

    def run(self, steps: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        """Figures of every update, and the weights after the last."""
        lines = []
        for step in range(steps):
            collected, figures = self.objective.collect(step, self.student)
            with self.objective.learning(collected, self.student) as updates:
                for update in updates:
                    total, norm = self.student.update(update.losses)
                    lines.append({**figures, **update.figures(), "total": total, "grad_norm": norm})
        return lines, self.student.state()

    def gradients(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Of the sum of these losses, past the engine (which at stage 0 refuses to be differentiated by others)."""
        engine, self.student._engine = self.student._engine, self.student.root
        try:
            total = torch.stack([loss_of() for loss_of in losses]).sum()
            return list(torch.autograd.grad(total, list(self.student.root.parameters())))
        finally:
            self.student._engine = engine


@pytest.fixture
def minillm(folder: Path, teacher: Teacher, prompts: list[Prompt]) -> Callable[..., Work]:
    def make(
        *, steps: int = 2, student: Path | None = None, guide: Teacher | None = None, seed: int = 3,
        decoding: Decoding = PLAIN, **changes: Any,
    ) -> Work:  # fmt: skip
        fields = {"steps": steps, "prompts": 7, "teacher_mix": 0.2, "optimiser": OPTIMISER, **changes}
        objective = Minillm(
            MinillmStage(**fields), prompts=prompts, decoding=decoding, teacher=guide or teacher, ids=IDS, ranks=RANKS,
            seed=seed,
        )  # fmt: skip
        return Work(student or folder / "student", objective, updates=steps * objective._stage.updates_per_step)

    return make


def sft(folder: Path, prompts: list[Prompt], *, student: str = "student", **changes: Any) -> Work:
    stage = SftStage(**{"steps": 3, "batch": 7, "optimiser": OPTIMISER, **changes})
    return Work(folder / student, References(stage, prompts=prompts, ids=IDS, ranks=RANKS, seed=3), updates=3)


def differences(
    one: tuple[list[dict[str, float]], dict[str, Tensor]], other: tuple[list[dict[str, float]], dict[str, Tensor]]
) -> float:
    """The largest difference of any figure or weight."""
    assert len(one[0]) == len(other[0]) > 0
    gaps = [abs(a[name] - b[name]) for a, b in zip(one[0], other[0], strict=True) for name in a.keys() & b.keys()]
    gaps += [float((one[1][name] - other[1][name]).abs().max()) for name in one[1]]
    assert all(math.isfinite(gap) for gap in gaps)
    return max(gaps)


CLOSE = 1e-5
APART = 1e-4
CUTS: tuple[dict[str, int], ...] = (
    {"micro_batch": 1},
    {"micro_batch": 3},
    {"micro_tokens": 30},
    {"micro_batch": 2, "micro_tokens": 25},
)
RICH = {
    "samples_per_prompt": 2,
    "inner_epochs": 2,
    "teacher_mix": 0.3,
    "coin_groups": 2,
    "lm_coefficient": 0.5,
    "lm_batch": 5,
}


@pytest.mark.parametrize(
    "decoding",
    [
        PLAIN,
        Decoding(max_new_tokens=LONGEST, temperature=0.9, top_k=12),
        Decoding(max_new_tokens=LONGEST, no_repeat_ngram_size=1),
    ],
)
def test_micro_batches_change_neither_loss_nor_weights(decoding: Decoding, minillm: Callable[..., Work]) -> None:
    with minillm(**RICH, decoding=decoding) as whole:
        want = whole.run(2)
    for limits in CUTS:
        with minillm(**RICH, decoding=decoding, **limits) as work:
            assert differences(want, work.run(2)) < CLOSE, limits


def test_another_seed_is_another_run(minillm: Callable[..., Work]) -> None:
    """Negative control of every comparison of runs here."""
    with minillm(**RICH) as one, minillm(**RICH, seed=4) as other:
        assert differences(one.run(1), other.run(1)) > APART


def test_micro_batches_change_nothing_in_fine_tuning(folder: Path, prompts: list[Prompt]) -> None:
    with sft(folder, prompts) as whole:
        want = whole.run(3)
    for limits in CUTS:
        with sft(folder, prompts, **limits) as work:
            assert differences(want, work.run(3)) < CLOSE, limits


def test_a_mean_of_micro_batch_means_would_be_seen(
    minillm: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: with a denominator of the micro-batch's own rows the comparison fails."""
    plain = Minillm._loss

    def own_mean(self: Minillm, rows: Sequence[int], collected: Any, **options: Any) -> Tensor:
        return plain(self, rows, dataclasses.replace(collected, sequences=max(len(rows), 1)), **options) / 3

    with minillm() as whole, minillm(micro_batch=3) as cut_up:
        want = whole.run(2)
        monkeypatch.setattr(Minillm, "_loss", own_mean)
        assert differences(want, cut_up.run(2)) > APART


def test_more_padding_changes_nothing(minillm: Callable[..., Work], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider prompts, wider responses, and garbage wherever no token was sampled."""
    with minillm(**RICH, micro_batch=3) as narrow, minillm(**RICH, micro_batch=3) as wide:
        want = narrow.run(2)
        batch_of, roll_out = objectives.prompt_batch, objectives.roll_out

        def wide_batch(*arguments: Any, **options: Any) -> Any:
            batch = batch_of(*arguments, **options)
            pad = torch.nn.functional.pad
            return dataclasses.replace(
                batch, ids_BP=pad(batch.ids_BP, (5, 0), value=17), mask_BP=pad(batch.mask_BP, (5, 0), value=False)
            )

        monkeypatch.setattr(objectives, "prompt_batch", wide_batch)
        monkeypatch.setattr(objectives, "roll_out", lambda *a, **k: widened(roll_out(*a, **k)))
        assert differences(want, wide.run(2)) < CLOSE


def widened(rollout: Rollout) -> Rollout:
    """The same rollout with four more columns, and garbage off its mask."""

    def states(value: Tensor | None, garbage: float) -> Tensor | None:
        return None if value is None else grown(value, garbage)

    def grown(value: Tensor, garbage: Any) -> Tensor:
        wide = value.new_full((value.shape[0], value.shape[1] + 4, *value.shape[2:]), garbage)
        wide[:, :-4][rollout.mask_BT] = value[rollout.mask_BT]
        return wide

    mask_BT = torch.nn.functional.pad(rollout.mask_BT, (0, 4), value=False)
    return dataclasses.replace(
        rollout,
        mask_BT=mask_BT,
        response_BT=grown(rollout.response_BT, 23),
        teacher_drew_BT=grown(rollout.teacher_drew_BT, True),
        logq_BT=grown(rollout.logq_BT, math.nan),
        student_hidden_BTH=states(rollout.student_hidden_BTH, math.nan),
        teacher_hidden_BTH=states(rollout.teacher_hidden_BTH, math.inf),
    )


def test_empty_micro_batches_that_keep_ranks_in_step_change_nothing(
    minillm: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    with minillm(**RICH, micro_batch=3) as plain, minillm(**RICH, micro_batch=3) as padded:
        want = plain.run(2)
        cut = updates.cut
        monkeypatch.setattr(updates, "cut", lambda *rows, **limits: [*cut(*rows, **limits), [], []])
        assert differences(want, padded.run(2)) == 0.0


BUDGETS = (1, 20, 33, 60, 200)


def doubled(folder: Path) -> Teacher:
    """The teacher in float64."""
    guide = make_teacher(folder / "teacher")
    guide.root.double()
    return guide


def read_by(work: Work) -> list[int]:
    """Grows by the places of every forward from here on."""
    found: list[int] = []
    work.student.root.backbone.register_forward_pre_hook(
        lambda _, __, inputs: found.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    return found


@pytest.mark.parametrize("packs", ["positions", "no"])
def test_the_gradient_of_a_step_is_the_same_for_every_budget_of_tokens(
    packs: Any, minillm: Callable[..., Work], folder: Path
) -> None:
    """In float64, with the anchor, packed and padded; no forward is larger than its budget but for a single row."""
    with minillm(**RICH, student=folder / "exact", guide=doubled(folder)) as work:
        root = work.student.root.double()
        collected, _ = work.objective.collect(0, work.student)
        rollout, stage, root.packs = collected.targets.scored.rollout, work.objective._stage, packs
        longest = int((rollout.prompts.mask_BP.sum(dim=1) + rollout.length_B).max())
        sizes = read_by(work)

        def gradients(**limits: int) -> list[Tensor]:
            sizes.clear()
            work.objective._stage = stage.model_copy(update=limits)
            with work.objective.learning(collected, work.student) as updates:
                return work.gradients(next(iter(updates)).losses)

        want = gradients()
        counts = [len(sizes)]
        for budget in BUDGETS:
            for mine, other in zip(gradients(micro_tokens=budget), want, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
            assert max(sizes) <= max(budget, longest)
            counts.append(len(sizes))
        assert counts[0] == 2 and counts[1] == 14 + 5 and len(set(counts)) > 4
        # Negative control: each micro-batch divided by its own rows, and the mean of these.
        plain = Minillm._loss

        def own_mean(self: Minillm, rows: Sequence[int], of: Any, **options: Any) -> Tensor:
            return plain(self, rows, dataclasses.replace(of, sequences=len(rows)), **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Minillm, "_loss", own_mean)
            collected = dataclasses.replace(collected, anchor=[])
            whole, cut_up = (
                [grad / pieces for grad in gradients(micro_batch=size)] for size, pieces in ((0, 1), (3, 5))
            )
        assert max(float((a - b).abs().max()) for a, b in zip(whole, cut_up, strict=True)) > APART


@pytest.mark.parametrize("packs", ["positions", "no"])
def test_the_gradient_of_fine_tuning_is_the_same_for_every_budget_of_tokens(
    packs: Any, folder: Path, prompts: list[Prompt]
) -> None:
    with sft(folder, prompts, student="exact") as work:
        root = work.student.root.double()
        root.packs = packs
        sizes = read_by(work)

        def gradients(rows: Sequence[Prompt], budget: int) -> list[Tensor]:
            losses, _ = text_losses(
                rows, likelihood(), denominator=learnt_tokens(rows), student=work.student, ids=IDS, ranks=RANKS,
                limits=Limits(places=budget),
            )  # fmt: skip
            return work.gradients(losses)

        want = gradients(prompts, 0)
        for budget in BUDGETS:
            sizes.clear()
            for mine, other in zip(gradients(prompts, budget), want, strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
            assert max(sizes) <= max(budget, *(len(row.ids) + len(row.response_ids) for row in prompts))
        # Negative control: the mean of the halves' means.
        halves = [gradients(prompts[:3], 0), gradients(prompts[3:], 0)]
        assert max(float((w - (a + b) / 2).abs().max()) for w, a, b in zip(want, *halves, strict=True)) > APART


class RankOf:
    """One of several ranks, as far as sharing rows goes; ``others`` is the most that any of them has."""

    def __init__(self, rank: int, size: int, *, others: int = 0) -> None:
        self.rank, self.size, self.others, self.device = rank, size, others, torch.device("cpu")

    def most(self, value: int) -> int:
        """What all ranks agree on."""
        return max(value, self.others)


@pytest.mark.parametrize(
    ("rows", "size", "limits"),
    [
        (7, 2, Limits()),
        (7, 2, Limits(rows=1)),
        (7, 2, Limits(places=20)),
        (5, 4, Limits(rows=1)),
        (5, 4, Limits(places=12)),
        (1, 2, Limits()),
        (2, 3, Limits(places=1)),
    ],
)
def test_ranks_share_a_language_model_step_without_changing_it(
    rows: int, size: int, limits: Limits, folder: Path, prompts: list[Prompt]
) -> None:
    """Also where a rank has fewer micro-batches than another, or no row at all."""
    with sft(folder, prompts) as work:

        def gradients(ranks: Any) -> list[Tensor]:
            losses, sums = text_losses(
                prompts[:rows], likelihood(), denominator=learnt_tokens(prompts[:rows]), student=work.student, ids=IDS,
                ranks=ranks, limits=limits, weight=0.7, name="lm",
            )  # fmt: skip
            counts.append(len(losses))
            found = work.gradients(losses)
            total.append(sums.values["lm"])
            return found

        counts: list[int] = []
        total: list[float] = []
        for rank in range(size):
            gradients(RankOf(rank, size))  # what each needs by itself
        most = max(counts)
        total.clear()
        shares = [gradients(RankOf(rank, size, others=most)) for rank in range(size)]
        # Ranks with different numbers of forwards would wait for each other for ever.
        assert counts[size:] == [most] * size
        want = gradients(RANKS)
        assert sum(total[:size]) == pytest.approx(total[size], rel=1e-5)
        for parts in zip(want, *shares, strict=True):
            assert float((parts[0] - sum(parts[1:])).abs().max()) < CLOSE


def test_fewer_rows_than_ranks_are_refused(prompts: list[Prompt]) -> None:
    require_rows(prompts, ranks=3, per_step=3, what="it")
    with pytest.raises(DataError, match="stage a: 2 rows a step for 3 ranks"):
        require_rows(prompts, ranks=3, per_step=2, what="stage a")
    with pytest.raises(DataError):
        require_rows([], ranks=1, per_step=2, what="it")


@pytest.mark.parametrize(("prompts_per_step", "samples", "refused"), [(2, 1, True), (1, 2, True), (2, 2, False)])
def test_a_stage_with_fewer_rows_than_ranks_is_refused_before_its_student_is_loaded(
    prompts_per_step: int, samples: int, refused: bool, folder: Path, prompts: list[Prompt]
) -> None:
    stage = MinillmStage(steps=1, prompts=prompts_per_step, samples_per_prompt=samples, optimiser=OPTIMISER)
    run = tiny.minillm_config(folder, teacher=folder / "teacher", student=folder / "student", prompts=Path("x.jsonl"))
    card = Card(name="student", model=str(folder / "student"))
    options: dict[str, Any] = {"pair": None, "teacher": None, "validate": None, "folder": None, "model_card": None}

    # Three ranks; what is not refused goes on to the tokenizers' agreement, which was not given.
    with pytest.raises(DataError if refused else AttributeError):
        run_stage(
            run,
            stage,
            start=Start(card=card, facts=inspect(card)),
            prompts=prompts,
            ranks=RankOf(0, 3),
            into=Path("student"),
            **options,
        )


def test_a_coefficient_of_zero_is_bitwise_a_run_without_an_anchor(minillm: Callable[..., Work]) -> None:
    with minillm() as without, minillm(lm_coefficient=0.0, lm_batch=5) as zero:
        one, other = without.run(2), zero.run(2)
    assert one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def repeating(rollout: Rollout, ngram: int) -> int:
    """Responses in which an n-gram of tokens returns."""
    found = 0
    for ids_T, kept_T in zip(rollout.response_BT, rollout.mask_BT, strict=True):
        ids = ids_T[kept_T].tolist()
        runs = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
        found += len(set(runs)) < len(runs)
    return found


@pytest.fixture(scope="module")
def stuck(folder: Path) -> Path:
    """A student that says some letters again and again."""
    return tiny.save_model(folder / "stuck", "gpt2", seed=4, spread=0.6)


MANY: dict[str, Any] = {"prompts": 12, "samples_per_prompt": 3, "teacher_mix": 0.0}


def test_the_log_counts_responses_that_repeat_three_tokens(minillm: Callable[..., Work], stuck: Path) -> None:
    with minillm(student=stuck, **MANY) as work:
        collected, figures = work.objective.collect(0, work.student)
    rollout = collected.targets.scored.rollout
    assert figures["repetition_3"] == repeating(rollout, 3) / 36
    assert len({repeating(rollout, ngram) for ngram in (2, 3, 4)}) == 3 and 0 < figures["repetition_3"] < 1


def test_the_first_line_tells_the_teachers_own_level(minillm: Callable[..., Work], stuck: Path) -> None:
    """Its own responses to the rollout's prompts: a teacher with the repeating student's weights repeats itself, one
    that is another does so by its own measure, and what the student does is the same with or without being compared."""
    with minillm(student=stuck, **MANY) as work, minillm(student=stuck, guide=make_teacher(stuck), **MANY) as mirror:
        _, figures = work.objective.collect(0, work.student)
        _, later = work.objective.collect(1, work.student)
        collected, same = mirror.objective.collect(0, mirror.student)
    names = {"mean_length", "cut_share", "repeated_tokens", "repetition_3"}
    assert {f"teacher_{name}" for name in names} <= figures.keys() and not any(f"teacher_{n}" in later for n in names)
    assert figures["repetition_3"] == same["repetition_3"] == repeating(collected.targets.scored.rollout, 3) / 36
    assert same["teacher_repetition_3"] > figures["teacher_repetition_3"]
    # The same model and prompts, other random numbers: near, and not the student's own figure copied.
    assert abs(same["teacher_mean_length"] - same["mean_length"]) < 1.5
    assert same["teacher_repeated_tokens"] != same["repeated_tokens"]


def test_a_weight_of_zero_is_bitwise_a_run_without_the_cost_of_repetition(minillm: Callable[..., Work]) -> None:
    with minillm() as without, minillm(repetition_weight=0.0, repetition_ngram=1) as zero:
        one, other = without.run(2), zero.run(2)
    assert one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    with minillm(repetition_weight=0.5, repetition_ngram=1) as costly:  # negative control
        assert differences(one, costly.run(2)) > APART


def test_a_cost_of_repetition_drives_it_out(minillm: Callable[..., Work], stuck: Path) -> None:
    """Of a student that is its own teacher, and so stays as it is without a cost."""
    left = {}
    for weight in (0.0, 2.0):
        settings: dict[str, Any] = {"student": stuck, "guide": make_teacher(stuck), "repetition_weight": weight}
        with minillm(steps=11, repetition_ngram=1, **settings, **MANY) as work:
            work.run(11)
            left[weight] = repeating(work.objective.collect(11, work.student)[0].targets.scored.rollout, 1)
    assert left[0.0] > 20 and left[2.0] < 10, left


def test_an_anchor_pulls(minillm: Callable[..., Work]) -> None:
    """Negative control, and the anchor's part of the loss."""
    with minillm(clip=None) as without, minillm(lm_coefficient=0.5, lm_batch=5, clip=None) as anchored:
        one, other = without.run(1), anchored.run(1)
    assert differences(one, other) > APART
    assert other[0][0]["loss"] == pytest.approx(one[0][0]["loss"] + 0.5 * other[0][0]["lm_loss"], abs=1e-6)


def test_the_loss_that_is_reported_is_the_loss_that_is_stepped_on(minillm: Callable[..., Work]) -> None:
    with minillm(**RICH, micro_batch=3) as work:
        for line in work.run(2)[0]:
            assert line["loss"] == pytest.approx(line["total"], abs=1e-6)


def test_without_mixing_every_weight_is_one_and_the_teacher_reads_once(minillm: Callable[..., Work]) -> None:
    with minillm(teacher_mix=0.0) as alone, minillm(teacher_mix=0.0, importance="per_step") as weighted:
        one, other = alone.run(1), weighted.run(1)
    assert one[0] == other[0], "at teacher_mix 0 the kind of weight means nothing"
    for line in one[0]:
        assert (line["importance_ess"], line["teacher_forwards"]) == (1.0, 1.0)
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0


def test_a_teacher_that_is_the_student_teaches_nothing(minillm: Callable[..., Work], folder: Path) -> None:
    """Fixed point: no KL, no advantage, no gradient (oracle 1)."""
    with minillm(guide=make_teacher(folder / "student"), prompts=7) as work:
        (line, *_), _ = work.run(1)
    assert abs(line["reverse_kl"]) < CLOSE and line["advantage_std"] < CLOSE and line["grad_norm"] < CLOSE
    with minillm() as other:
        assert other.run(1)[0][0]["grad_norm"] > 0.1


class Twin:
    """One MiniLLM step spelled out on whole logits of plain transformers models, row by row."""

    def __init__(self, student: Path, teacher: Path) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(student).eval()
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher).eval()

    def loss(self, collected: Any, stage: MinillmStage) -> Tensor:
        rollout: Rollout = collected.targets.scored.rollout
        rows = [self._row(rollout, n) for n in range(len(rollout.stop_B))]
        values = [self._value(row, stage) for row in rows]
        total = torch.zeros(())
        for n, row in enumerate(rows):
            for t in range(len(row["ids"])):
                others = [
                    values[m][t]
                    for m in range(len(rows))
                    if len(values[m]) > t and self._may_serve(rollout, n, m, stage.baseline)
                ]
                advantage = values[n][t] - (sum(others) / len(others) if others else 0.0)
                weight = 0.0 if row["drew"][t] else 1.0 / (1.0 - stage.teacher_mix)
                total = total + row["kl"][t] - weight * advantage * row["logq"][t]
        return total / (len(rows) * LONGEST)

    def _row(self, rollout: Rollout, n: int) -> dict[str, Any]:
        prompt = rollout.prompts.ids_BP[n][rollout.prompts.mask_BP[n]]
        ids = rollout.response_BT[n][rollout.mask_BT[n]]
        text = torch.cat([prompt, ids])[None]
        z_TV = self.student(text).logits[0, len(prompt) - 1 : -1, :REAL].log_softmax(-1)
        with torch.no_grad():
            y_TV = self.teacher(text).logits[0, len(prompt) - 1 : -1, :REAL].log_softmax(-1)
        return {
            "ids": ids,
            "drew": rollout.teacher_drew_BT[n],
            "kl": (z_TV.exp() * (z_TV - y_TV)).sum(-1),
            "logq": z_TV.gather(1, ids[:, None])[:, 0],
            "logp": y_TV.gather(1, ids[:, None])[:, 0],
        }

    def _value(self, row: dict[str, Any], stage: MinillmStage) -> list[float]:
        """The return from the next token on."""
        reward = -row["kl"] if stage.future == "expected" else row["logp"] - row["logq"]
        return [float(reward[t + 1 :].sum().detach()) for t in range(len(reward))]

    def _may_serve(self, rollout: Rollout, n: int, m: int, baseline: str) -> bool:
        same = rollout.prompts.uid_B[n] == rollout.prompts.uid_B[m]
        return {"none": False, "position_mean": not same, "leave_one_out": same and n != m}[baseline]


@pytest.mark.parametrize(
    ("baseline", "future"), [("none", "sampled"), ("position_mean", "expected"), ("leave_one_out", "sampled")]
)
def test_a_step_has_the_gradient_of_its_formula_on_plain_models(
    baseline: str, future: str, minillm: Callable[..., Work], folder: Path
) -> None:
    """Returns from the next token, baselines from the right rows, coin weights, and the constant denominator."""
    with minillm(samples_per_prompt=2, baseline=baseline, future=future, teacher_mix=0.3, micro_batch=5) as work:
        collected, _ = work.objective.collect(0, work.student)
        with work.objective.learning(collected, work.student) as (update,):
            got = work.gradients(update.losses)
        twin = Twin(folder / "student", folder / "teacher")
        loss = twin.loss(collected, work.objective._stage)
        names = [name for name, _ in work.student.root.named_parameters()]
        theirs = dict(objectives_names(twin.student))
        want = torch.autograd.grad(loss, [theirs[name] for name in names])
        assert float(max(w.abs().max() for w in want)) > 1e-2
        for name, mine, other in zip(names, got, want, strict=True):
            assert float((mine - other).abs().max()) < CLOSE, name
            if mine.shape[0] > REAL:
                assert bool((mine[REAL:] == 0).all()), "a padded row never receives a gradient"
        # Negative control: the present reward counted too is another gradient.
        value = Twin._value
        try:
            Twin._value = lambda self, row, stage: [  # type: ignore[method-assign]
                v - float(k.detach()) for v, k in zip(value(self, row, stage), row["kl"], strict=True)
            ]
            twice = torch.autograd.grad(twin.loss(collected, work.objective._stage), [theirs[name] for name in names])
        finally:
            Twin._value = value  # type: ignore[method-assign]
        assert float(max((mine - other).abs().max() for mine, other in zip(got, twice, strict=True))) > APART


def objectives_names(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a plain model under the names of our root module."""
    for name, parameter in model.named_parameters():
        yield name.replace("model.", "backbone.", 1) if name.startswith("model.") else name, parameter


def test_a_smaller_expected_length_scales_the_loss(minillm: Callable[..., Work]) -> None:
    with minillm() as plain, minillm(expected_length=LONGEST / 2) as half:
        one, other = plain.run(1)[0][0], half.run(1)[0][0]
    for name in ("loss", "single_loss", "long_loss"):
        assert other[name] == pytest.approx(2 * one[name], rel=1e-5), name


def test_inner_updates_reuse_one_rollout_and_start_unclipped(minillm: Callable[..., Work]) -> None:
    with minillm(inner_epochs=3, clip=0.01, optimiser={"lr": 0.1, "schedule": "constant"}) as work:
        lines, _ = work.run(1)
    assert len(lines) == 3 and len({line["reverse_kl"] for line in lines}) == 1
    assert lines[0]["clipped_share"] == 0.0 < lines[1]["clipped_share"]


def test_what_tells_of_a_jump_is_logged_as_the_largest_of_a_rollouts_updates(minillm: Callable[..., Work]) -> None:
    """The first update of each rollout clips nothing, so that in a mean of two a share could never reach its alarm."""
    with minillm() as work:
        collected, _ = work.objective.collect(0, work.student)
        with work.objective.learning(collected, work.student) as (update,):
            assert {*update.largest} == {"clipped_share", "clamped_share"}


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_parts_of_a_pass_add_up_to_the_whole_rollout(pieces: int, minillm: Callable[..., Work]) -> None:
    """Gradients of the parts, each over its own rows, weighted by their number: that of one update on all rows."""
    with minillm(inner_batches=pieces) as parted, minillm() as plain:
        whole, _ = plain.objective.collect(0, plain.student)
        with plain.objective.learning(whole, plain.student) as (update,):
            want = plain.gradients(update.losses)
        collected, _ = parted.objective.collect(0, parted.student)
        sizes = [len(part) for part in parts(7, pieces, seed=3, epoch=0, purpose="minillm/inner")]
        with parted.objective.learning(collected, parted.student) as updates:
            found = [parted.gradients(update.losses) for update in updates]
    assert len(found) == pieces and sum(sizes) == 7
    for mine, *of_parts in zip(want, *found, strict=True):
        total = sum(size * one for size, one in zip(sizes, of_parts, strict=True)) / 7
        torch.testing.assert_close(total, mine, rtol=1e-4, atol=1e-6)


def test_a_mean_over_tokens_is_the_sum_over_sequences_but_for_its_size(minillm: Callable[..., Work]) -> None:
    """O8: for one rollout the two losses differ by (sequences x constant) / tokens; however it is cut."""
    with minillm() as plain, minillm(published={"token_mean": True}) as mean:
        (one, *_), _ = plain.run(1)
        (other, *_), _ = mean.run(1)
        with minillm(published={"token_mean": True}, micro_batch=2) as cut:
            (again, *_), _ = cut.run(1)
    size = 7 * LONGEST / one["tokens"]
    for name in ("single_loss", "long_loss", "loss"):
        assert other[name] == pytest.approx(size * one[name], rel=1e-5, abs=1e-7)
        assert again[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)
    assert abs(size - 1) > 0.05


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_teachers_share_of_the_anchor_is_forward_kl(share: float, minillm: Callable[..., Work]) -> None:
    """O9: beside 1 - share of the cross-entropy; at 1 the references' own ids play no part in the gradient."""
    zero = {"single_weight": 0.0, "long_weight": 0.0, "lm_batch": 5}
    with minillm(**zero, lm_coefficient=1.0, lm_teacher_share=share, micro_batch=2) as work:
        collected, _ = work.objective.collect(0, work.student)
        with work.objective.learning(collected, work.student) as (update,):
            got = work.gradients(update.losses)
        rows, teacher, root = collected.anchor, work.objective._teacher, work.student.root
        batch = example_batch(rows, pad_id=IDS.pad, device=RANKS.device)
        before_BL = batch.target_BL.roll(-1, dims=1)

        def logits(of: Any) -> Tensor:
            states_BLH = of("read", ids_BL=batch.ids_BL, mask_BL=batch.mask_BL)
            found: Tensor = of("logits", hidden_NH=states_BLH[before_BL])
            return found

        logq_NV = logits(root).log_softmax(-1)
        p_NV = logits(teacher.root).softmax(-1).detach()
        ids_N = batch.ids_BL[batch.target_BL]
        hard_N = -logq_NV.gather(1, ids_N[:, None])[:, 0]
        loss = ((1 - share) * hard_N - share * (p_NV * logq_NV).sum(-1)).mean()
        for mine, want in zip(got, torch.autograd.grad(loss, list(root.parameters())), strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)


def test_rewards_may_ignore_the_temperature(minillm: Callable[..., Work]) -> None:
    """O11: only rewards change, and only where the temperature is not 1."""
    for decoding, same in ((PLAIN, True), (dataclasses.replace(PLAIN, temperature=0.7), False)):
        found = []
        for switch in (False, True):
            changes = {"future": "sampled", "published": {"untempered_reward": switch}, "teacher_mix": 0.0}
            with minillm(**changes, decoding=decoding) as work:
                collected, _ = work.objective.collect(0, work.student)
                found.append(collected.targets)
        assert torch.equal(found[0].scored.logp_BT, found[1].scored.logp_BT)
        assert torch.equal(found[0].advantage_BT, found[1].advantage_BT) is same


def test_every_pass_deals_the_rows_anew() -> None:
    first, second = (parts(12, 3, seed=3, epoch=epoch, purpose="a/inner") for epoch in (0, 1))
    assert all(sorted(itertools.chain(*dealt)) == list(range(12)) for dealt in (first, second)) and first != second
    assert parts(5, 1, seed=3, epoch=0, purpose="a/inner") == [[0, 1, 2, 3, 4]]


def test_passes_end_where_the_student_has_moved_too_far(minillm: Callable[..., Work]) -> None:
    """Of six updates two are made: before the first it has not moved at all, and in the second it is found to have."""
    fast = {"inner_epochs": 3, "inner_batches": 2, "optimiser": {"lr": 0.1, "schedule": "constant"}}
    with minillm(**fast, inner_kl=1e-6) as work:
        short, _ = work.run(1)
    assert [line["drift"] > 1e-6 for line in short] == [False, True]
    with minillm(**fast, inner_kl=1e6) as work:
        assert len(work.run(1)[0]) == 6


def test_a_prompt_that_stands_twice_in_a_step_gets_other_samples(
    minillm: Callable[..., Work], prompts: list[Prompt]
) -> None:
    with minillm(prompts=len(prompts) + 5) as work:
        collected, _ = work.objective.collect(0, work.student)
    batch = collected.targets.scored.rollout.prompts
    named = list(zip(batch.uid_B, batch.sample_B, strict=True))
    assert len(set(batch.uid_B)) == len(prompts) and len(set(named)) == len(named) == len(prompts) + 5


def always_ends(folder: Path) -> Path:
    """A student whose every next token is the EOS."""
    tiny.save_model(folder, "gpt2", seed=0, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[EOS] = 3.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("limits", [{}, {"micro_batch": 1}, {"micro_tokens": 9}])
def test_a_student_that_says_nothing_still_makes_a_finite_step(
    limits: dict[str, int], minillm: Callable[..., Work], tmp_path: Path
) -> None:
    """Rows of one token: no future, so no policy gradient; the single-step term alone teaches."""
    with minillm(student=always_ends(tmp_path), **limits, teacher_mix=0.0) as work:
        (line, *_), state = work.run(1)
    assert (line["mean_length"], line["cut_share"], line["tokens"]) == (0.0, 0.0, 7.0)
    assert line["long_loss"] == 0.0 == line["advantage_std"]
    assert 0 < line["loss"] == pytest.approx(line["single_loss"]) and math.isfinite(line["grad_norm"])
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_a_training_forward_reads_only_the_columns_its_rows_need(minillm: Callable[..., Work]) -> None:
    with minillm() as work:
        collected, _ = work.objective.collect(0, work.student)
    rollout = collected.targets.scored.rollout
    for row in range(len(rollout.stop_B)):
        inputs = rollout_inputs(rollout, [row])
        width = int(rollout.prompts.mask_BP[row].sum()) + int(rollout.mask_BT[row].sum())
        assert inputs["ids_BL"].shape == (1, width) and bool(inputs["mask_BL"].all())
        assert int(inputs["predict_BL"].sum()) == int(rollout.mask_BT[row].sum())
    together, prompts = rollout_inputs(rollout, [4, 0, 3]), rollout.prompts
    for place, row in enumerate([4, 0, 3]):
        prompt_P, response_T = prompts.ids_BP[row][prompts.mask_BP[row]], rollout.response_BT[row][rollout.mask_BT[row]]
        assert together["ids_BL"][place][together["mask_BL"][place]].tolist() == [*prompt_P, *response_T]
        assert together["ids_BL"][place][together["predict_BL"][place]].tolist() == [*response_T]
    assert bool(together["mask_BL"].all(dim=1).any()), "as wide as the longest row, and no wider"
    nobody = rollout_inputs(rollout, [])
    assert not nobody["predict_BL"].any() and bool(nobody["mask_BL"].all())
