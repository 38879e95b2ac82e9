"""The meter: derivatives against autograd, estimates against their definition, and the command.

Legend: M prompts, J directions, H = 2 halves, N tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import cli
from minillm.bare_student import BareStudent
from minillm.config import RunConfig, dump_config
from minillm.diagnose import gradients, scores, words
from minillm.diagnose.command import run
from minillm.diagnose.gradients import Drawn, draw, stage_of_draws
from minillm.diagnose.measure import Budget, Lots, Whole, covariance, figures_of, mean_product, spread
from minillm.diagnose.names import DEFAULTS, REFERENCE, changes_of, chosen, name_of
from minillm.diagnose.run import Diagnosis, Sizes, diagnose
from minillm.diagnose.scores import direction, token_scores
from minillm.errors import ConfigError, DataError
from minillm.loading import load
from minillm.models import CausalLM
from minillm.objectives import Minillm
from minillm.pairs import check_pair
from minillm.preflight import decoding_record, read_split
from minillm.ranks import Ranks
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.teacher_engine import Teacher
from tests import tiny

RANKS = Ranks(threads=1)
DIRECTIONS = 3


def stage(**changes: Any) -> MinillmStage:
    return MinillmStage(
        **{"steps": 1, "prompts": 8, "optimiser": OptimiserConfig(lr=1e-3), "teacher_mix": 0.0, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("diagnose")
    for family in ("gpt2", "llama"):
        tiny.save_model(made / f"{family}-teacher", family, seed=1, rows=40)
        tiny.save_model(made / f"{family}-student", family, seed=2)
    tiny.save_prompts(made / "prompts.jsonl")
    return made


def config(folder: Path, *, family: str = "gpt2", **changes: Any) -> RunConfig:
    return tiny.minillm_config(
        folder, teacher=folder / f"{family}-teacher", student=folder / f"{family}-student",
        prompts=folder / "prompts.jsonl", **changes,
    )  # fmt: skip


class Bench:
    """A pair in float64, prompts, and rollouts of them."""

    def __init__(self, run: RunConfig, *, prompts: int = 10, samples: int = 2, **changes: Any) -> None:
        pair = check_pair(run)
        assert run.data.train is not None and pair.teacher_card is not None and pair.teacher is not None
        teacher_card, facts = pair.teacher_card, pair.teacher
        self.ids = pair.ids
        self.prompts = read_split(run, run.data.train, pair=pair, name="train", need_response=False).prompts[:prompts]
        root = CausalLM(load(pair.student_card, pair.student, seed=0, dtype=torch.float64).eval())
        root.head.real_ids = pair.real_ids
        self.student = BareStudent(root, ranks=RANKS)
        root.packs = "no"
        self.teacher = Teacher(
            lambda: load(teacher_card, facts, seed=0), ranks=RANKS, placement="replicated", precision="fp32",
            real_ids=pair.real_ids,
        )  # fmt: skip
        self.teacher.root.double()
        self.decoding = decoding_record(run.decoding)
        self.stage = stage_of_draws(stage(**changes), prompts=prompts, samples=samples)

    def objective(self) -> Minillm:
        return Minillm(
            self.stage, prompts=self.prompts, decoding=self.decoding, teacher=self.teacher, ids=self.ids, ranks=RANKS,
            seed=0,
        )  # fmt: skip

    def draw(self, *names: str) -> Drawn:
        found, refused = chosen(names, self.stage)
        assert not refused
        return draw(
            self.stage, found, prompts=self.prompts, decoding=self.decoding, student=self.student,
            teacher=self.teacher, ids=self.ids, ranks=RANKS, directions=DIRECTIONS, seed=0,
        )  # fmt: skip


@pytest.fixture
def bench(folder: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*, family: str = "gpt2", decoding: dict[str, Any] | None = None, **changes: Any) -> Bench:
        settings = {"run_decoding": {"max_new_tokens": 6, **(decoding or {})}}
        made.append(Bench(config(folder, family=family, **settings), **changes))
        return made[-1]

    yield make
    for one in made:
        one.teacher.close()


def along(root: CausalLM, value: Tensor) -> list[float]:
    """The gradient of ``value`` along each direction, by the backward pass."""
    params = {f"root.{name}": parameter for name, parameter in root.named_parameters()}
    grads = torch.autograd.grad(value, list(params.values()))
    tangents = [direction(params, seed=0, number=number) for number in range(DIRECTIONS)]
    pairs = [zip(grads, tangent.values(), strict=True) for tangent in tangents]
    return [float(sum((grad * each).sum() for grad, each in pair)) for pair in pairs]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_derivatives_are_those_of_the_backward_pass(
    family: str, decoding: dict[str, Any], bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, through the loss core that training uses; and the same however rows are cut."""
    work = bench(family=family, decoding=decoding, prompts=8, samples=1)
    collected, _ = work.objective().collect(0, work.student)  # type: ignore[arg-type]
    rollout = collected.targets.scored.rollout
    how = {
        "teacher_head": work.teacher.root.head.weights(), "temperature": work.decoding.temperature,
        "directions": DIRECTIONS, "seed": 0,
    }  # fmt: skip
    found = token_scores(work.student.root, rollout, **how)  # type: ignore[arg-type]
    assert found.score_NJ.shape == (int(rollout.mask_BT.sum()), DIRECTIONS)
    for token in (0, 3, len(found.score_NJ) - 1):
        for place, name in enumerate(("logq", "reverse_kl")):
            value = loss_of_token(work, rollout, token=token, name=name)
            assert found[place][token].tolist() == pytest.approx(along(work.student.root, value), rel=1e-4, abs=1e-5)
    monkeypatch.setattr(scores, "WORKING_BYTES", 1)
    for one, other in zip(token_scores(work.student.root, rollout, **how), found, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_what_is_remembered_of_the_student_serves_another_teacher(
    decoding: dict[str, Any], bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, without differentiating again; and another text, temperature or seed is not taken for this one."""
    work = bench(decoding=decoding, prompts=8, samples=1)
    rollout, other = (work.objective().collect(of, work.student)[0].targets.scored.rollout for of in range(2))  # type: ignore[arg-type]
    head = work.teacher.root.head.weights()
    memory: scores.Memory = {}
    another = dataclasses.replace(head, weight_VH=head.weight_VH.flip(0))

    def told(rollout: Any, teacher: Any, memory: Any, *, warmth: float = 0.7, seed: int = 0) -> Any:
        return token_scores(
            work.student.root, rollout, teacher_head=teacher, temperature=warmth, directions=DIRECTIONS, seed=seed,
            memory=memory,
        )  # fmt: skip

    told(rollout, head, memory)
    changed: list[dict[str, Any]] = [{"warmth": 0.9}, {"seed": 1}]
    fresh = [told(other, another, None), *(told(rollout, another, None, **each) for each in changed)]
    again = [told(other, another, memory), *(told(rollout, another, memory, **each) for each in changed)]
    plain = told(rollout, another, None)
    monkeypatch.setattr(scores, "functional_call", None)
    for one, two in zip([*fresh, plain], [*again, told(rollout, another, memory)], strict=True):
        assert torch.equal(one.score_NJ, two.score_NJ) and torch.equal(one.single_NJ, two.single_NJ)
    assert not torch.equal(plain.single_NJ, told(rollout, head, memory).single_NJ)


def loss_of_token(work: Bench, rollout: Any, *, token: int, name: str) -> Tensor:
    from minillm.objectives import rollout_inputs
    from minillm.scoring import TeacherView

    mask_BT = rollout.mask_BT
    rows = range(len(mask_BT))

    def loss(numbers: Any, here: slice) -> Tensor:
        at = torch.arange(here.start, here.start + len(numbers[name]))
        picked: Tensor = numbers[name][at == token].sum()
        return picked

    value, _ = work.student.loss(
        **rollout_inputs(rollout, rows), wanted=("logq", "reverse_kl"), temperature=work.decoding.temperature,
        teacher=TeacherView(head=work.teacher.root.head.weights(), hidden_NH=rollout.teacher_hidden_BTH[mask_BT]),
        support_NC=None if rollout.support_BTC is None else rollout.support_BTC[mask_BT], loss=loss,
    )  # fmt: skip
    return value


@pytest.mark.parametrize("name", ["sampled", "expected+ridge", "sampled+leave_one_out+norm", "expected+g0.9+h2"])
def test_what_is_measured_is_the_gradient_of_a_training_step(name: str, bench: Callable[..., Bench]) -> None:
    """All prompts of a half together, along each direction: what the objective's own update gives with that credit."""
    work = bench()
    drawn = work.draw(name)
    made = stage_of_draws(stage(), prompts=10, samples=2).model_copy(update=changes_of(name))
    for half in range(2):
        objective = work.objective()
        # Returns are those of a stage that has the single-step term; only its loss is left out.
        objective._stage = made
        collected, _ = objective.collect(half, work.student)  # type: ignore[arg-type]
        objective._stage = made.model_copy(update={"single_weight": 0.0})
        with objective.learning(collected, work.student) as updates:  # type: ignore[arg-type]
            (update,) = updates
            loss = torch.stack([of() for of in update.losses]).sum()
        # The loss is divided by sequences and the longest response; lots by samples of a prompt.
        scale = 20 * work.decoding.max_new_tokens / 2
        got = drawn.lots[name].value_HMJ[half].sum(dim=0).tolist()
        assert got == pytest.approx([scale * each for each in along(work.student.root, loss)], rel=1e-6, abs=1e-6)


def test_halves_are_of_the_same_prompts_and_other_text(bench: Callable[..., Bench]) -> None:
    work = bench()
    objective = work.objective()
    first, second = (objective.collect(half, work.student)[0].targets.scored.rollout for half in range(2))  # type: ignore[arg-type]
    assert set(first.prompts.uid_B) == set(second.prompts.uid_B) == {prompt.uid for prompt in work.prompts}
    assert not torch.equal(first.response_BT, second.response_BT)


def random_lots(seed: int, *, prompts: int, samples: int = 2, width: int = 2, draws: int = 1) -> list[Lots]:
    """Lots of a mean, an effect of the prompt and noise of each sample, of known sizes; J entries are the vector."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    mean_J = torch.tensor([0.5, -0.25], dtype=torch.float64)[:width]
    return [
        Lots(
            value_HMJ=mean_J + 0.7 * normal(1, prompts, width) + 3.0 * normal(2, prompts, width) / samples**0.5,
            samples=samples,
        )
        for _ in range(draws)
    ]


def test_estimates_have_the_right_means() -> None:
    """Over many small draws: no bias at any number of prompts. Entries count as averaged directions."""
    lots = random_lots(0, prompts=4, draws=20_000)
    length = torch.tensor([mean_product(one, one) for one in lots])
    total = torch.tensor([covariance(one, one) for one in lots])
    within = torch.tensor([float(one.within_M().mean()) for one in lots])
    parts = torch.tensor([spread(one, one) for one in lots])
    for found, want in (
        (length, (0.5**2 + 0.25**2) / 2), (total, 0.7**2 + 9.0), (within, 9.0),
        (parts[:, 0], 0.7**2), (parts[:, 1], 9.0),
    ):  # fmt: skip
        error = float(found.std() / len(found) ** 0.5)
        assert abs(float(found.mean()) - want) < 4 * error and error < 0.1
    # Negative control: the square of the mean counts noise as length.
    naive = torch.tensor([float(one.mean_MJ.mean(dim=0).square().mean()) for one in lots])
    assert float(naive.mean()) > 3 * (0.5**2 + 0.25**2) / 2


def test_figures_of_scaled_and_shifted_lots() -> None:
    """Twice the vectors: four times the variance; a shift is a bias and no variance; the reference is 1 and 0."""
    (one,) = random_lots(1, prompts=300)
    (single,) = random_lots(2, prompts=300)
    shift = torch.tensor([2.0, 2.0], dtype=torch.float64)
    lots = {
        "sampled": one,
        "twice": Lots(value_HMJ=2 * one.value_HMJ, samples=2),
        "shifted": Lots(value_HMJ=one.value_HMJ + shift, samples=2),
    }
    whole = figures_of(
        lots, single, reference="sampled", twins=dict.fromkeys(lots, "sampled"),
        keeps={"sampled": True, "twice": False, "shifted": False},
        budget=Budget(prompts=25.0, samples=2), tokens_per_sample=3.0, seed=0,
    )  # fmt: skip
    same, twice, shifted = (whole.choices[name] for name in lots)
    assert (same.variance, same.bias_squared, same.interval) == (1.0, 0.0, (1.0, 1.0))
    assert twice.variance == pytest.approx(4.0) and twice.snr == pytest.approx(same.snr)
    assert twice.bias_squared == pytest.approx(1.0)
    assert shifted.variance == pytest.approx(1.0)
    assert shifted.bias_squared == pytest.approx(4.0 / mean_product(one, one))
    assert twice.weight == pytest.approx(same.weight / 2) and twice.error == pytest.approx(same.error)
    assert same.error <= same.error_at_one and 0 < same.weight < 1


def whole_of(lots: Lots, single: Lots) -> Whole:
    return figures_of(
        {"sampled": lots}, single, reference="sampled", twins={"sampled": "sampled"}, keeps={"sampled": True},
        budget=Budget(prompts=25.0, samples=2), tokens_per_sample=3.0, seed=0,
    )  # fmt: skip


def test_absolute_figures_are_those_that_the_lots_were_made_with() -> None:
    """Twice the vectors: four times every absolute figure, and no ratio moves."""
    (one,), (single,) = (random_lots(seed, prompts=100_000) for seed in (7, 8))
    whole, length = whole_of(one, single), (0.5**2 + 0.25**2) / 2
    found = whole.absolute
    assert found.variance == pytest.approx(9.0, rel=0.02) and found.total == pytest.approx(9.49, rel=0.02)
    assert found.interval[0] < found.variance < found.interval[1] < 1.02 * found.variance
    for square, error in (
        (found.squared_length, found.squared_length_error),
        (found.single_squared_length, found.single_squared_length_error),
    ):
        assert abs(square - length) < 4 * error < 0.2 * length
    # The terms have one mean and independent noise: twice the length, twice the variance.
    choice = whole.choices["sampled"]
    assert abs(choice.whole_snr - 4 * length / (2 * 9.49)) < 4 * choice.whole_snr_error < 0.2 * choice.whole_snr
    twice = whole_of(*(Lots(value_HMJ=2 * of.value_HMJ, samples=2) for of in (one, single)))
    for name, value in dataclasses.asdict(found).items():
        assert getattr(twice.absolute, name) == pytest.approx(
            [4 * of for of in value] if name == "interval" else 4 * value
        )
    assert twice.choices["sampled"].whole_snr == pytest.approx(choice.whole_snr)


def test_the_best_weight_is_the_best_of_many() -> None:
    from minillm.diagnose.measure import _best_weight, _squared_error

    (one,), (other,), (single,) = (random_lots(seed, prompts=2000) for seed in (3, 4, 5))
    weight = _best_weight(one, single, other, budget=Budget(prompts=20.0, samples=1))

    def error(at: float) -> float:
        return _squared_error(one, single, other, weight=at, budget=Budget(prompts=20.0, samples=1))

    assert all(error(weight) <= error(weight + off) + 1e-12 for off in (-0.2, -0.01, 0.01, 0.2) if weight + off >= 0)


def test_the_best_weight_is_no_worse_than_none_and_one_with_the_faintest_signal() -> None:
    """Of a few prompts squared biases come out below 0 and count as 0: then the foot of a parabola is not the best."""
    from minillm.diagnose.measure import _best_weight, _foot, _squared_error

    budget, worse = Budget(prompts=20.0, samples=1), 0
    for seed in range(60):
        one, other, single = random_lots(seed, prompts=4, draws=3)

        def error(at: float, one: Lots = one, other: Lots = other, single: Lots = single) -> float:
            return _squared_error(one, single, other, weight=at, budget=budget)

        best = error(_best_weight(one, single, other, budget=budget))
        assert best <= min(error(0.0), error(1.0)) + 1e-12
        worse += error(_foot(one, single, other, budget=budget)) > best + 1e-9
    assert worse > 0  # negative control: the foot by itself


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sampeld", "did you mean 'sampled'"),
        ("expected+rigde", "did you mean 'ridge'"),
        ("expected+g1.5", "'g1.5' is no discount; wanted g and a number from 0 to 1"),
        ("expected+h0", "'h0' is no horizon; wanted h and a whole number from 1"),
        ("expected+ridge+grpo", "'ridge' and 'grpo' are both a baseline; leave one out"),
        ("sampled+g0.9+norm+g0.5", "'g0.9' and 'g0.5' are both a gamma"),
        ("", "wanted sampled, expected"),
    ],
)
def test_a_name_that_says_nothing_is_told(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match="estimator") as caught:
        changes_of(name)
    assert words in str(caught.value)


def test_names_are_read_back() -> None:
    for name in (*DEFAULTS, "sampled+whiten"):
        if "grpo" not in name and "leave_one_out" not in name:
            made, refused = chosen([name], stage())
            assert not refused and name_of(next(each.stage for each in made if each.name == name)) == name


def test_each_choice_brings_its_twin_and_what_is_refused_is_said() -> None:
    made, refused = chosen(["expected+ridge+g0.9+norm", "sampled+leave_one_out"], stage())
    assert {each.name for each in made} == {"sampled", "expected+ridge+g0.9+norm", "sampled+g0.9+norm"}
    assert len(refused) == 1 and "sampled+leave_one_out" in refused[0] and "samples_per_prompt" in refused[0]


def keeping(names: list[str], **changes: Any) -> set[str]:
    made, _ = chosen(names, stage(samples_per_prompt=2, **changes))
    reference = next(each.stage for each in made if each.name == REFERENCE)
    return {each.name for each in made if each.keeps_expectation(reference)}


def test_which_choices_keep_the_expectation() -> None:
    """As tests/exact enumerates it: under mixing the two kinds of return differ, but with exact products of weights."""
    every = ["sampled+ridge", "expected+ridge", "sampled+grpo", "sampled+norm", "sampled+g0.9", "sampled+h3"]
    assert keeping(every) == {"sampled", "sampled+ridge", "expected+ridge"}
    assert keeping(every, teacher_mix=0.2, importance="coin") == {"sampled", "sampled+ridge"}
    exact = {"teacher_mix": 0.2, "importance": "per_decision", "coin_groups": 2}
    assert keeping(every, **exact) == {"sampled", "sampled+ridge", "expected+ridge"}


def test_the_noise_of_an_update_falls_with_prompts_and_with_samples() -> None:
    """Between prompts only with prompts; around them with all responses."""
    (one,) = random_lots(6, prompts=400)
    between, within = spread(one, one)
    assert Budget(prompts=8.0, samples=4).noise(one, one) == pytest.approx(between / 8 + within / 32)
    assert covariance(one, one) == pytest.approx(between + within)


def test_what_a_stage_has_besides_credit_is_left_out_and_said(folder: Path) -> None:
    """The published code's switches would bend the reference itself; a discount of 0 leaves nothing to measure."""
    said: list[str] = []
    sizes = Sizes(prompts=8, samples=2, directions=2)
    whole = diagnose(
        config(folder, estimator="official", lm_batch=2), names=["sampled+g0"], sizes=sizes, say=said.append
    )
    assert {"sampled", "sampled+norm+g0.95"} <= set(whole.whole.choices)
    assert any("published" in line for line in said) and any("discount of 0" in line for line in said)
    with pytest.raises(ConfigError, match="max_new_tokens 1"):
        diagnose(config(folder, run_decoding={"max_new_tokens": 1}), names=["sampled"], sizes=sizes)


def found(folder: Path, **changes: Any) -> Diagnosis:
    names = ["expected+ridge", "sampled+norm"]
    return diagnose(config(folder, **changes), names=names, sizes=Sizes(prompts=8, samples=4, directions=2))


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_a_diagnosis_is_whole(mix: float, folder: Path) -> None:
    one = found(folder, teacher_mix=mix)
    record = json.loads(json.dumps(words.as_json(one)))
    names = {"sampled", "expected+ridge", "sampled+norm", "expected+position_mean"}
    assert set(record["variance"]) == set(record["snr"]) == set(record["choices"]) == names
    assert record["variance"]["sampled"] == 1.0 and record["best"]["name"] in names
    assert record["drawn"]["samples"] == 32 and record["budget"] == 8
    assert (record["drawn"]["effective_share"] == pytest.approx(1.0)) == (mix == 0.0)
    assert any("mixing" in line for line in words.advice(one)) == (mix > 0)
    assert any(row[0].endswith("> expected+position_mean") for row in words.rows(one))


def test_it_gives_the_same_figures_again(folder: Path) -> None:
    assert words.as_json(found(folder)) == words.as_json(found(folder))


def test_nothing_is_kept_for_a_backward_pass_so_nothing_is_recomputed(folder: Path) -> None:
    """Derivatives run forward: activation checkpointing would save nothing, and the diagnosis says so."""
    kept: list[torch.Size] = []
    said: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    run = config(folder, run_engine={"student": "zero0", "activation_checkpointing": True})
    sizes = Sizes(prompts=8, samples=4, directions=2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one = diagnose(run, names=["expected+ridge", "sampled+norm"], sizes=sizes, say=said.append)
        assert kept == []
        pair = check_pair(run)
        load(pair.student_card, pair.student, seed=0)(input_ids=torch.arange(4)[None])
        assert kept, "the control: a forward with gradients does keep some"
    assert words.as_json(one) == words.as_json(found(folder))
    assert sum("engine.activation_checkpointing" in line for line in said) == 1


def test_another_teacher_has_another_name_and_the_same_text(folder: Path) -> None:
    """What makes absolute figures of two teachers comparable; the name moves with the weights and with nothing else."""
    one = found(folder, teacher_mix=0.0)
    other = found(folder, teacher_mix=0.0, run_teacher=str(folder / "gpt2-student"))
    differ = {name for name, value in one.made_from.items() if value != other.made_from[name]}
    assert set(one.made_from) == {"student", "teacher", "train prompts"} and differ == {"teacher"}
    assert one.drawn.tokens == other.drawn.tokens and one.drawn.reverse_kl > 1e-3 > abs(other.drawn.reverse_kl)
    assert other.whole.absolute.variance < 1e-6 * one.whole.absolute.variance
    record = json.loads(json.dumps(words.as_json(one)))
    assert record["made_from"] == one.made_from and record["decoding"]["temperature"] == 1.0


def test_the_command_prints_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(config(folder)), encoding="utf-8")
    text = (
        f"diagnose --config {tmp_path / 'run.yaml'} --prompts 8 --samples 2 --directions 2 "
        f"--estimators expected,sampled+norm --json {tmp_path / 'd.json'} --plot {tmp_path / 'd.png'}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["minillm", *text.split()])
        assert cli._guarded(cli.app) == 0
    printed = capsys.readouterr().out
    assert "Least squared error at 8 responses" in printed and "* sampled+norm" in printed
    assert max(map(len, printed.split("Least")[0].splitlines()[-25:])) <= 120
    record = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert record["versions"]["torch"] and (tmp_path / "d.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": 4}, "--prompts 4: wanted at least 8"),
        ({"samples": 3}, "--samples 3: wanted an even number"),
        ({"names": ["expected+"]}, "nothing is called ''"),
        ({"plot": Path("x.gif")}, "wanted a file ending in .png, .svg, .pdf"),
        ({"prompts": 1000}, "24 prompts, and --prompts wants 1000"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    changes: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.diagnose.run.load", None)
    usual: dict[str, Any] = {
        "names": None, "prompts": 8, "samples": 4, "directions": 2, "seed": 0, "json_file": None, "plot": None
    }  # fmt: skip
    with pytest.raises((ConfigError, DataError)) as caught:
        run(config(folder), **(usual | changes))
    assert words in str(caught.value)


def test_a_configuration_without_distillation_is_refused(folder: Path) -> None:
    sft = config(folder, run_stages=({"kind": "sft", "steps": 1, "batch": 2, "optimiser": {"lr": 1e-3}},))
    with pytest.raises(ConfigError, match="no stage of kind minillm"):
        diagnose(sft, names=["sampled"], sizes=Sizes())


def test_a_sign_that_is_wrong_is_noticed(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison with a training step: credit instead of minus credit."""
    plain = gradients._credit_N
    monkeypatch.setattr(gradients, "_credit_N", lambda targets: -plain(targets))
    with pytest.raises(AssertionError, match="assert"):
        test_what_is_measured_is_the_gradient_of_a_training_step("sampled", bench)
