"""The pairwise objective in the loop: its gradient is that of whole logits, and how a step is cut changes nothing.

1. The gradient of a step is that of a plain twin, for every value, link and target.
2. Micro-batches, packing and the length of other rows change no figure.
3. Another reference is refused: in the file, and in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm.cards import Card
from minillm.config import RunConfig
from minillm.errors import CacheError, CheckpointError, UnsupportedCombination
from minillm.frozen_models import Frozen, reference_of
from minillm.loading import inspect, load
from minillm.micro_batches import Limits
from minillm.pairs import Pair, check_pair
from minillm.pairwise_loss import soft_target
from minillm.preference_reference import Prepared, prepared, require_targets, target_of
from minillm.preference_stage import PreferenceStage
from minillm.preferences import Preferences, pair_measures
from minillm.ranks import Ranks
from minillm.state import State
from minillm.student_engine import Student
from minillm.types import PreferencePair, Prompt
from tests import tiny

RANKS = Ranks()
OPTIMISER = {"lr": 1e-2, "schedule": "constant"}
EOS = tiny.WORDS.index(tiny.EOS)
HALF = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, another student of the same family, and a teacher; in float64 nothing hides behind rounding."""
    top = tmp_path_factory.mktemp("models")
    tiny.save_model(top / "reference", "gpt2", seed=1, rows=32)
    tiny.save_model(top / "student", "gpt2", seed=2, rows=32)
    tiny.save_model(top / "teacher", "gpt2", seed=3, rows=32)
    tiny.save_prompts(top / "prompts.jsonl")
    return top


def some_pairs(count: int = 7, *, seed: int = 0, logps: bool = False) -> list[PreferencePair]:
    """Pairs whose responses have 1 to 7 tokens, EOS included."""
    noise = torch.Generator().manual_seed(seed)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most, (1,), generator=noise))
        return tuple(torch.randint(2, len(tiny.WORDS), (length,), generator=noise).tolist())

    made = []
    for number in range(count):
        prompt = Prompt(uid=f"pair-{number}", text="", ids=ids(6))
        made.append(
            PreferencePair(
                prompt=prompt, chosen="", rejected="", chosen_ids=(*ids(7), EOS), rejected_ids=(*ids(7), EOS),
                source="ab"[number % 2], teacher_logps=(-3.0 - number, -4.5) if logps else None,
            )
        )  # fmt: skip
    return made


def a_stage(**changes: Any) -> PreferenceStage:
    return PreferenceStage(**{"steps": 1, "batch": 7, "optimiser": OPTIMISER, "beta": 0.3, **changes})


def run_of(folder: Path, **changes: Any) -> RunConfig:
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl", **changes
    )


def student_of(folder: Path, name: str = "student") -> Student:
    card = Card(name=name, model=str(folder / name))
    return Student(
        lambda: load(card, inspect(card), seed=0, dtype=torch.float64),
        ranks=RANKS, settings="zero0", precision="fp32", optimiser=a_stage().optimiser, updates=1,
        real_ids=len(tiny.WORDS),
    )  # fmt: skip


def known_for(
    stage: PreferenceStage, folder: Path, into: Path, pairs: Sequence[PreferencePair], *,
    reference: str = "reference", goes_on: bool = False, validation: Sequence[PreferencePair] | None = None,
    teacher: bool = False, said: list[str] | None = None,
) -> Any:  # fmt: skip
    config = run_of(folder)
    pair: Pair = check_pair(config)
    cards = {name: Card(name=name, model=str(folder / name), dtype="float32") for name in (reference, "teacher")}
    frozen = None
    if teacher:
        frozen = dataclasses.replace(
            reference_of(config, cards["teacher"], inspect(cards["teacher"]), pair=pair, ranks=RANKS), what="teacher"
        )
    return prepared(
        config, stage, card=cards[reference], facts=inspect(cards[reference]), pair=pair, learnt=pairs,
        validation=validation, teacher=frozen, ranks=RANKS, folder=into, goes_on=goes_on, limits=Limits(rows=4),
        say=(lambda _: None) if said is None else said.append,
    )  # fmt: skip


def step_of(stage: PreferenceStage, known: Prepared, student: Student) -> tuple[dict[str, float], list[Tensor]]:
    """Figures and gradients of a step's losses; no optimiser step is made."""
    objective = Preferences(stage, known=known, ids=check_ids(), ranks=RANKS, seed=0)
    picked, figures = objective.collect(0, student)
    engine, student._engine = student._engine, student.root  # at stage 0 it refuses to be differentiated by others
    try:
        with objective.learning(picked, student) as updates:
            (update,) = updates
            total = torch.stack([loss_of() for loss_of in update.losses]).sum()
            figures |= update.figures()
        return figures, list(torch.autograd.grad(total, list(student.root.parameters())))
    finally:
        student._engine = engine


def check_ids() -> Any:
    from minillm.types import Ids

    return Ids(eos=(EOS,), pad=0)


def logits_of(model: Any, row: Sequence[int], prompt: int) -> Tensor:
    """Of the tokens after the prompt, over the real ids."""
    logits: Tensor = model(input_ids=torch.tensor([row])).logits[0, prompt - 1 : -1, : len(tiny.WORDS)]
    return logits.double()


def twin(stage: PreferenceStage, folder: Path, pairs: Sequence[PreferencePair], targets: Sequence[float]) -> Any:
    """(Losses: the whole one, the pairs' and the cross-entropy; accuracy, margin, gradients by the models' own
    parameter names), pair by pair from whole logits, with the formulas written out once more."""
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32)
    total, right, margin = torch.zeros((), dtype=torch.float64), 0, 0.0
    nll, chosen_tokens = torch.zeros((), dtype=torch.float64), 0
    for one, soft in zip(pairs, targets, strict=True):
        m, k = [], []
        for response in (one.chosen_ids, one.rejected_ids):
            row, prompt = [*one.prompt.ids, *response], len(one.prompt.ids)
            logq_TV = logits_of(student, row, prompt).log_softmax(-1)
            with torch.no_grad():
                ref_TV = logits_of(reference, row, prompt).log_softmax(-1)
            y_T1 = torch.tensor(response)[:, None]
            ratio_T = (logq_TV - ref_TV).gather(1, y_T1)[:, 0]
            m.append(ratio_T.mean() if stage.link == "ipo" else ratio_T.sum())
            k.append((ref_TV.exp() * (ref_TV - logq_TV)).sum())
            if response is one.chosen_ids:
                nll, chosen_tokens = nll - logq_TV.gather(1, y_T1).sum(), chosen_tokens + len(response)
        h = m[0] - m[1]
        if stage.value == "tdpo1":
            h = h - (k[1] - k[0])
        if stage.value == "tdpo2":
            h = h - stage.alpha * (k[1] - k[0].detach())
        b, e = stage.beta, stage.label_noise
        yes, no = -torch.nn.functional.logsigmoid(b * h), -torch.nn.functional.logsigmoid(-b * h)
        loss = {
            "sigmoid": soft * yes + (1 - soft) * no,
            "robust": ((1 - e) * yes - e * no) / (1 - 2 * e),
            "hinge": torch.relu(1 - b * h),
            "ipo": (h - 1 / (2 * b)) ** 2,
        }[stage.link]
        total, right, margin = total + loss, right + int(h.detach() > 0), margin + b * h.item()
    n = len(pairs)
    whole = total / n + stage.sft_weight * nll / chosen_tokens
    whole.backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return [whole.item(), (total / n).item(), (nll / chosen_tokens).item()], right / n, margin / n, grads


CASES: list[dict[str, Any]] = [
    {},
    {"sft_weight": 0.7},
    {"value": "tdpo1"},
    {"value": "tdpo2"},
    {"value": "tdpo2", "alpha": 1.5, "sft_weight": 0.2},
    {"sequential_kl": True},
    {"link": "ipo"},
    {"link": "hinge"},
    {"link": "robust", "label_noise": 0.2},
    {"target": "smoothed", "label_noise": 0.1},
    {"target": "soft"},
    {"target": "soft", "value": "tdpo2"},
]


def targets_of(stage: PreferenceStage, known: Prepared) -> Sequence[float]:
    count = len(known.learnt.pairs)
    if known.target == "soft":
        assert known.learnt.soft_targets is not None
        return known.learnt.soft_targets
    return [1.0 - stage.label_noise if stage.target == "smoothed" else 1.0] * count


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: " ".join(map(str, settings.values())) or "dpo")
def test_a_step_has_the_loss_and_gradient_of_whole_logits(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    stage = a_stage(**settings)
    pairs, student = some_pairs(logps=settings.get("target") == "soft"), student_of(folder)
    with known_for(stage, folder, tmp_path, pairs) as known:
        figures, grads = step_of(stage, known, student)
        losses, accuracy, margin, wanted = twin(stage, folder, pairs, targets_of(stage, known))
    assert abs(figures["loss"] - losses[0]) < 2e-6 and abs(figures["margin"] - margin) < 2e-6
    parts = {"pair_loss": losses[1], "sft_loss": losses[2]} if stage.sft_weight else {}
    assert {n: figures[n] for n in ("pair_loss", "sft_loss") if n in figures} == pytest.approx(parts, abs=2e-6)
    assert figures["accuracy"] == pytest.approx(accuracy)
    assert ("chosen_kl" in figures) == stage.keeps_reference
    largest = max(float(grad.abs().max()) for grad in wanted)
    for mine, theirs in zip(sorted(grads, key=_sum), sorted(wanted, key=_sum), strict=True):
        assert float((mine - theirs).abs().max()) < 3e-6 * max(1.0, largest)
    student.close()


def _sum(grad: Tensor) -> tuple[int, float]:
    return grad.numel(), round(float(grad.double().abs().sum()), 3)


def test_the_gradients_of_the_three_values_differ(folder: Path, tmp_path: Path) -> None:
    """The control of the twin above, and of a name that trains something else."""
    pairs, student, found = some_pairs(), student_of(folder), {}
    for value in ("dpo", "tdpo1", "tdpo2"):
        stage = a_stage(value=value)
        with known_for(stage, folder, tmp_path / value, pairs) as known:
            found[value] = step_of(stage, known, student)[1]
    for one, other in (("dpo", "tdpo1"), ("dpo", "tdpo2"), ("tdpo1", "tdpo2")):
        gaps = [float((a - b).abs().max()) for a, b in zip(found[one], found[other], strict=True)]
        assert max(gaps) > 1e-3, (one, other)
    student.close()


def test_micro_batches_change_no_gradient(folder: Path, tmp_path: Path) -> None:
    pairs, student = some_pairs(), student_of(folder)
    for settings in ({"sft_weight": 0.5}, {"value": "tdpo2"}):
        found = []
        for limits in ({}, {"micro_batch": 1}, {"micro_batch": 3}, {"micro_tokens": 30}):
            stage = a_stage(**settings, **limits)
            with known_for(stage, folder, tmp_path, pairs) as known:
                found.append(step_of(stage, known, student))
        for figures, grads in found[1:]:
            assert figures == pytest.approx(found[0][0], abs=1e-6)
            gaps = [float((a - b).abs().max()) for a, b in zip(grads, found[0][1], strict=True)]
            assert max(gaps) < 1e-6
    student.close()


@pytest.mark.parametrize("value", ["dpo", "tdpo1", "tdpo2"])
def test_the_first_loss_is_ln_2_where_the_student_is_the_reference(folder: Path, tmp_path: Path, value: str) -> None:
    """And not where it is another: the control of a reference from the wrong weights."""
    for name, same in (("reference", True), ("student", False)):
        student, stage = student_of(folder, name), a_stage(value=value)
        with known_for(stage, folder, tmp_path / name, some_pairs()) as known:
            figures, _ = step_of(stage, known, student)
        assert (abs(figures["loss"] - math.log(2)) < 1e-5) == same
        assert (abs(figures["chosen_log_ratio"]) < 1e-4) == same
        student.close()


def test_a_student_that_is_its_reference_has_half_of_the_pairs_right(folder: Path, tmp_path: Path) -> None:
    """Both read one batch, so that h is 0 and not a rounding; another student is no tie."""
    for name, tied in (("reference", True), ("student", False)):
        student, stage = student_of(folder, name), a_stage(sequential_kl=True)
        student.root.float()
        with known_for(stage, folder, tmp_path / name, some_pairs(), validation=some_pairs()) as known:
            figures, _ = step_of(stage, known, student)
            with student.whole() as reader:
                found = pair_measures(reader, stage, known, ids=check_ids(), limits=Limits(rows=2), ranks=RANKS)
        assert (figures["accuracy"] == HALF) == (found["preference_accuracy"] == HALF) == tied  # of 7 pairs
        student.close()


def test_validation_measures_what_a_step_does(folder: Path, tmp_path: Path) -> None:
    pairs, student = some_pairs(), student_of(folder)
    for settings in ({}, {"value": "tdpo2"}, {"target": "smoothed", "label_noise": 0.2}, {"sft_weight": 0.5}):
        stage = a_stage(**settings)
        with known_for(stage, folder, tmp_path, pairs, validation=pairs) as known:
            figures, _ = step_of(stage, known, student)
            with student.whole() as reader:
                found = pair_measures(reader, stage, known, ids=check_ids(), limits=Limits(rows=2), ranks=RANKS)
        assert figures["loss"] - figures.get("pair_loss", figures["loss"]) >= (1.0 if stage.sft_weight else 0.0)
        figures["loss"] = figures.get("pair_loss", figures["loss"])  # validation has that of the pairs alone
        assert found == {f"preference_{n}": pytest.approx(figures[n], abs=1e-6) for n in ("loss", "accuracy", "margin")}
    student.close()


# Soft targets


def test_soft_targets_are_the_default_where_pairs_bring_them(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for logps, settings, want in (
        (True, {}, "soft"), (False, {}, "hard"), (True, {"link": "hinge"}, "hard"), (True, {"target": "hard"}, "hard"),
    ):  # fmt: skip
        with known_for(
            a_stage(**settings), folder, tmp_path / f"{want}{len(said)}", some_pairs(logps=logps), said=said
        ) as known:
            assert known.target == want
            assert (known.learnt.soft_targets is None) == (want == "hard")
        assert f"target {want}" in said[-1]
        assert ("(by default)" in said[-1]) == ("target" not in settings)


@pytest.mark.parametrize(
    ("learnt", "held_out", "asks", "want"),
    [
        (True, None, False, "soft"), (True, True, False, "soft"), (True, False, False, "hard"),
        (True, False, True, "soft"), (False, True, True, "hard"), (False, None, False, "hard"),
    ],
)  # fmt: skip
def test_targets_are_soft_by_default_where_all_pairs_can_have_them(
    learnt: bool, held_out: bool | None, asks: bool, want: str
) -> None:
    """A default is never refused; what is asked for is, where it cannot be had."""
    pairs, others = some_pairs(logps=learnt), None if held_out is None else some_pairs(logps=held_out)
    assert target_of(a_stage(), pairs, others, asks=asks) == want
    require_targets(a_stage(), pairs, others, asks=asks)
    bare = [name for name, taught in (("preferences", learnt), ("preferences_validation", held_out)) if taught is False]
    if asks or not bare:
        require_targets(a_stage(target="soft"), pairs, others, asks=asks)
    else:
        with pytest.raises(UnsupportedCombination, match=rf"7 of 7 pairs of data\.{bare[0]} come without"):
            require_targets(a_stage(target="soft"), pairs, others, asks=asks)


def test_a_teacher_is_asked_once_for_soft_targets_that_pairs_do_not_bring(folder: Path, tmp_path: Path) -> None:
    stage, pairs, said = a_stage(target="soft"), some_pairs(), list[str]()
    with pytest.raises(UnsupportedCombination, match=r"target 'soft', but 7 of 7 pairs of data\.preferences"):
        require_targets(stage, pairs, None, asks=False)
    require_targets(stage, pairs, None, asks=True)
    with known_for(stage, folder, tmp_path, pairs, teacher=True, said=said) as known:
        assert known.learnt.soft_targets is not None
        told = [float(torch.tensor(target).logit()) / stage.beta for target in known.learnt.soft_targets]
    assert sum("asked the teacher about 14 responses" in line for line in said) == 1
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("teacher", "reference")}
    for one, h in zip(pairs, told, strict=True):
        want = 0.0
        for sign, response in ((1, one.chosen_ids), (-1, one.rejected_ids)):
            row, prompt = [*one.prompt.ids, *response], len(one.prompt.ids)
            for more, name in ((1, "teacher"), (-1, "reference")):
                with torch.no_grad():
                    logp_TV = logits_of(models[name], row, prompt).log_softmax(-1)
                want += sign * more * float(logp_TV.gather(1, torch.tensor(response)[:, None]).sum())
        assert h == pytest.approx(want, abs=1e-3)


def test_at_the_teacher_the_gradient_with_its_own_targets_is_nothing(folder: Path, tmp_path: Path) -> None:
    pairs = some_pairs()
    norms = {}
    for target in ("soft", "hard"):
        student, stage = student_of(folder, "teacher"), a_stage(target=target)
        with known_for(stage, folder, tmp_path, pairs, teacher=True) as known:
            _, grads = step_of(stage, known, student)
        norms[target] = max(float(grad.abs().max()) for grad in grads)
        student.close()
    assert norms["soft"] < 1e-5
    assert norms["hard"] > 1e-2


def test_soft_targets_are_a_sigmoid() -> None:
    made = soft_target(
        teacher_w_B=torch.tensor([-1.0]), teacher_l_B=torch.tensor([-4.0]), ref_w_B=torch.tensor([-2.0]),
        ref_l_B=torch.tensor([-2.0]), beta=0.5,
    )  # fmt: skip
    assert float(made) == pytest.approx(1 / (1 + math.exp(-1.5)))


# What is kept


def asked(said: Sequence[str]) -> int:
    return sum("asked the reference" in line for line in said)


def test_a_stage_that_goes_on_takes_what_it_kept(folder: Path, tmp_path: Path) -> None:
    pairs, said = some_pairs(), list[str]()
    with known_for(a_stage(), folder, tmp_path, pairs, said=said) as first:
        pass
    assert asked(said) == 1
    for goes_on in (True, False):
        with known_for(a_stage(), folder, tmp_path, pairs, goes_on=goes_on, said=said) as again:
            assert again.learnt.reference == first.learnt.reference
    assert asked(said) == 1


@pytest.mark.parametrize("what", ["weights", "pairs", "order", "numbers", "no JSON"])
def test_what_is_not_the_stages_is_refused_and_never_made_again(folder: Path, tmp_path: Path, what: str) -> None:
    pairs, file = some_pairs(), tmp_path / "reference.json"
    with known_for(a_stage(), folder, tmp_path, pairs, reference="student" if what == "weights" else "reference"):
        pass
    if what == "numbers":
        kept = json.loads(file.read_text())
        kept["chosen"] = kept["chosen"][1:]
        file.write_text(json.dumps(kept))
    if what == "no JSON":
        file.write_text("{")
    now = {"pairs": some_pairs(seed=1), "order": pairs[::-1]}.get(what, pairs)
    before = file.read_bytes()
    with pytest.raises(CacheError, match=r"reference\.json") as told:
        known_for(a_stage(), folder, tmp_path, now, goes_on=True).__enter__()
    assert "--fresh" in str(told.value) and file.read_bytes() == before
    said: list[str] = []
    with known_for(a_stage(), folder, tmp_path, now, said=said):  # a stage that begins makes its own
        assert asked(said) == 1


def test_a_stage_saved_beside_another_reference_does_not_go_on(folder: Path, tmp_path: Path) -> None:
    stage, states = a_stage(value="tdpo2"), {}
    for name in ("reference", "student"):
        with known_for(stage, folder, tmp_path / name, some_pairs(), reference=name) as known:
            objective = Preferences(stage, known=known, ids=check_ids(), ranks=RANKS, seed=0)
            states[name] = objective.state()
            for other, state in states.items():
                if other == name:
                    objective.restore(State(dict(state.record)))
                else:
                    with pytest.raises(CheckpointError, match="saved beside the reference"):
                        objective.restore(state)


def test_a_reference_is_as_precise_as_the_student(folder: Path) -> None:
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        config = run_of(folder, run_engine={"student": "zero2", "precision": precision})
        card = Card(name="reference", model=str(folder / "reference"))
        frozen: Frozen = reference_of(config, card, inspect(card), pair=check_pair(config), ranks=RANKS)
        assert frozen.dtype == dtype
