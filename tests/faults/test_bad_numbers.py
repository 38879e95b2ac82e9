"""Numbers that are not finite: no update is made from them on any rank, the batch is written down, and where a stage
may leave rows out, it does so by name, up to a bound, and trains as if it had never had them.

Of the engine's own state tests/resume/test_engine.py has the proof, at every ZeRO stage.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minillm.bad_batches import written_down
from minillm.config import MinillmStage
from minillm.errors import NonFinite
from minillm.objectives import Minillm
from minillm.sampling import pack_support
from minillm.scored_rows import with_rows
from minillm.scoring import HeadWeights, score
from minillm.stage_base import BaseStage
from minillm.state import State, States
from minillm.store import RunFolder
from minillm.text_stages import GkdStage, KdStage
from minillm.types import Ids
from tests.dist.ranks import start_ranks
from tests.resume.test_objectives import OWN, TEXT, differs
from tests.resume.toy import OPTIMISER, REAL, Toy, engine_hash, lines, put_back, save_models
from tests.unit.test_scoring import Case, OwnHead, V, a_rollout

ROLLOUT: dict[str, Any] = {
    "prompts": 6, "steps": 3, "inner_epochs": 2, "inner_batches": 2, "validate_every": 0, "optimiser": OPTIMISER,
    "alarms": {"repetition": None},  # for it the teacher would have to write text
}  # fmt: skip
STAGES: dict[str, BaseStage] = {
    "minillm": MinillmStage(**ROLLOUT),
    "anchored": MinillmStage(**ROLLOUT, lm_coefficient=0.5, lm_batch=2, lm_teacher_share=0.5),
    "gkd": GkdStage(**OWN),
    "kd": KdStage(**TEXT, teacher_share=0.5),
}
FAR = 10
"""A position that some rows reach, and others do not."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), models=save_models(tmp_path_factory.mktemp("models")))


@contextmanager
def poisoned(model: Any, *, position: int = FAR, value: float = math.nan) -> Iterator[None]:
    """A model with no numbers from a position on, which the shorter rows never reach."""
    (weight_PH,) = (p for name, p in model.root.named_parameters() if "wpe" in name)
    before_PH = weight_PH.detach().clone()
    with torch.no_grad():
        weight_PH[position] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight_PH.copy_(before_PH)


def last_run(toy: Toy) -> Path:
    return toy.folder / f"run-{toy._runs}"


def dumped(folder: Path, rank: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The one batch that a run left."""
    (file,) = folder.glob(f"bad-batches/*/rank{rank:05d}.json")
    tensors = file.with_suffix(".safetensors")
    return json.loads(file.read_text(encoding="utf-8")), load_file(tensors) if tensors.exists() else {}


# What counts as a bad score, and whose.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "position"), [(0, 0), (0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_state_that_is_no_number_is_found_at_its_row(whose: str, row: int, position: int, value: float) -> None:
    case, rollout = Case(), a_rollout(uids=("first", "second"))
    hidden_BTH = getattr(rollout, f"{whose}_hidden_BTH")
    hidden_BTH[row, position] = value
    with pytest.raises(NonFinite, match=rf"'{('first', 'second')[row]}', response position {position}") as found:
        score(rollout, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)
    assert found.value.rows == (row,)
    assert [one["uid"] for one in found.value.batch.record["rows"]] == ["first", "second"]
    numbers = found.value.batch.tensors["reverse_kl_BT"]
    assert not bool(numbers[row, position].isfinite()) and int((~numbers.isfinite()).sum()) == 1
    rest = with_rows(rollout, [1 - row])  # control: without the row all is well
    score(rest, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)


@pytest.mark.parametrize(
    ("columns", "value"), [([3], math.nan), ([3], math.inf), (list(range(V)), -math.inf), (list(range(V)), math.nan)]
)
def test_a_column_that_is_no_number_is_found_in_every_row(columns: list[int], value: float) -> None:
    case, rollout = Case(), a_rollout()
    with pytest.raises(NonFinite) as found:
        score(rollout, student=OwnHead(case.head), teacher_head=with_bias(case, columns, value), temperature=1.0)
    assert found.value.rows == (0, 1)


def with_bias(case: Case, columns: list[int], value: float) -> HeadWeights:
    """The teacher's head with another bias in some columns."""
    head = case.teacher.head
    bias_V = torch.zeros(V, dtype=head.weight_VH.dtype) if head.bias_V is None else head.bias_V.detach().clone()
    bias_V[columns] = value
    return HeadWeights(weight_VH=head.weight_VH, bias_V=bias_V, scale=head.scale, softcap=head.softcap)


def test_a_token_that_nobody_may_draw_may_have_no_probability() -> None:
    """Minus infinity is how a model forbids a token: right where the student cannot draw it either."""
    case, rollout = Case(), a_rollout()
    taken = set(rollout.response_BT[rollout.mask_BT].tolist())
    forbidden = next(column for column in range(V) if column not in taken)
    head = with_bias(case, [forbidden], -math.inf)
    with pytest.raises(NonFinite, match="reverse_kl is inf"):
        score(rollout, student=OwnHead(case.head), teacher_head=head, temperature=1.0)
    allowed_BTV = torch.ones(*rollout.mask_BT.shape, V, dtype=torch.bool)
    allowed_BTV[..., forbidden] = False
    object.__setattr__(rollout, "support_BTC", pack_support(allowed_BTV))
    found = score(rollout, student=OwnHead(case.head), teacher_head=head, temperature=1.0)
    assert bool(found.reverse_kl_BT.isfinite().all())


# A stage that meets one ends there, with its batch on the disk and nothing changed.


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("after", [0, 1])
def test_a_stage_ends_before_the_update_and_leaves_the_batch(kind: str, after: int, toy: Toy) -> None:
    stage = STAGES[kind]
    whole = toy.run(stage)
    begin = next((one for one in whole.saved if one.place[0] == after and not one.place[2]), None)
    kept = whole.saved.index(begin) + 1 if begin is not None else 0
    position = 4 if kind == "kd" else FAR  # references are shorter
    with poisoned(toy.teacher, position=position), pytest.raises(NonFinite, match="no update was made") as found:
        toy.run(stage, begin=begin, log=whole.log)
    student = toy._students[not stage.on_policy][0]
    now = engine_hash(student)
    assert student.updates_done == kept
    put_back(student, toy._students[not stage.on_policy][1] if begin is None else begin.engine)
    assert now == engine_hash(student)
    log = lines((last_run(toy) / "metrics.jsonl").read_bytes()) if begin is not None else []
    assert log == lines(whole.log)[: len(log)] and len([line for line in log if line["kind"] == "train"]) == after
    about, _ = dumped(last_run(toy))
    assert f"the batch stands in {last_run(toy) / 'bad-batches' / f'toy-{after + 1:06d}'}" in str(found.value)
    assert (about["stage"], about["step"], about["update"], about["rank"]) == ("toy", after, kept, 0)
    known = {prompt.uid: list(prompt.ids) for prompt in toy.prompts}
    assert about["rows"] and all(row.get("prompt_ids", row.get("ids")) == known[row["uid"]] for row in about["rows"])


def test_the_batch_of_a_rollout_has_each_tokens_numbers(toy: Toy) -> None:
    with poisoned(toy.teacher), pytest.raises(NonFinite):
        toy.run(STAGES["minillm"])
    about, tensors = dumped(last_run(toy))
    assert len(about["rows"]) == 6 and "row 'row-" in about["reason"]
    far = [len(row["prompt_ids"]) + len(row["response_ids"]) > FAR + 1 for row in about["rows"]]  # the last is not read
    bad = (~tensors["logp_BT"].isfinite()).any(dim=1).tolist()
    # Rows of one packed sequence are lost with each other: a weight of 0 times no number is no number.
    assert 0 < sum(far) <= sum(bad) < 6 and all(of >= those for of, those in zip(bad, far, strict=True))
    assert f"it is in {sum(bad)} of the 6 rows" in about["reason"]
    assert bool(tensors["logq_BT"].isfinite().all())


def test_a_student_without_numbers_ends_the_rollout_with_its_prompts(toy: Toy) -> None:
    whole = toy.run(STAGES["minillm"])
    begin = whole.saved[3]
    weights = begin.engine[0]
    name = next(name for name in weights if "wpe" in name)
    weights[name][3] = math.nan
    with pytest.raises(NonFinite, match="NaN or"):
        toy.run(STAGES["minillm"], begin=begin, log=whole.log)
    about, tensors = dumped(last_run(toy))
    assert len(about["rows"]) == 6 and "response_ids" not in about["rows"][0] and tensors == {}


def test_validation_leaves_its_batch_too(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = State({"rows": [{"uid": "held-out-7"}]}, {"logp_BT": torch.tensor([[math.nan]])})

    def broken(student: Any) -> dict[str, float]:
        raise NonFinite("logp is nan for row 'held-out-7'", batch=batch)

    monkeypatch.setattr("tests.resume.toy.validate", broken)
    with pytest.raises(NonFinite, match="the batch stands in"):
        toy.run(MinillmStage(**{**ROLLOUT, "validate_every": 1}))
    about, tensors = dumped(last_run(toy))
    assert about["rows"] == batch.record["rows"] and bool(tensors["logp_BT"].isnan()) and about["step"] == 1


def test_a_rank_without_the_batch_says_where_the_other_one_wrote_it(tmp_path: Path, toy: Toy) -> None:
    where = {"stage": "toy", "step": 4, "update": 9}
    for error, words in (
        (NonFinite("on rank 1: logp is nan", batch_of=1), "bad-batches/toy-000005, written by rank 1"),
        (NonFinite("on rank 1: nothing to show"), None),
    ):
        folder = RunFolder(tmp_path / "run", writes=True)
        with pytest.raises(NonFinite) as found, written_down(folder, ranks=toy.ranks, place=lambda: where):
            raise error
        assert (words is None and found.value is error) or str(words) in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_batch_follows_no_link(toy: Toy, tmp_path: Path) -> None:
    batch, outside = State({"rows": [{"uid": "a"}]}), tmp_path / "outside"
    where = {"stage": "toy", "step": 0, "update": 0}
    outside.mkdir()
    for link in ("bad-batches", "bad-batches/toy-000001"):
        run = tmp_path / link.replace("/", "-")
        (run / link).parent.mkdir(parents=True)
        (run / link).symlink_to(outside)
        folder = RunFolder(run, writes=True)
        with pytest.raises(NonFinite, match="is a link"), written_down(folder, ranks=toy.ranks, place=lambda: where):
            raise NonFinite("nan", batch=batch)
    assert list(outside.iterdir()) == []
    with (
        pytest.raises(NonFinite, match="stands in"),
        written_down(RunFolder(tmp_path / "own", writes=True), ranks=toy.ranks, place=lambda: where),
    ):
        raise NonFinite("nan", batch=batch)  # control


def test_a_batch_that_cannot_be_written_hides_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillm.bad_batches.write_text", full)
    with poisoned(toy.teacher), pytest.raises(NonFinite) as found:
        toy.run(STAGES["minillm"])
    assert "is nan for row" in str(found.value)
    assert "could not be written to" in str(found.value) and "No space left on device" in str(found.value)


# No response is without a token, so no step is without one (F10, F11).


def test_a_student_that_always_ends_at_once_is_stepped_on_its_ends(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.resume.toy.IDS", Ids(eos=tuple(range(REAL)), pad=0))
    for stage in (
        MinillmStage(**{**ROLLOUT, "samples_per_prompt": 2}, length_norm=True, baseline="leave_one_out"),
        MinillmStage(**ROLLOUT, published={"token_mean": True}),
        GkdStage(**{**OWN, "student_share": 1.0}),
    ):
        ran = toy.run(stage)
        train = [line for line in lines(ran.log) if line["kind"] == "train"]
        assert ran.done.over and [line["mean_length"] for line in train] == [0.0] * stage.steps
        assert [line["tokens"] for line in train] == [float(stage.rows_per_step)] * stage.steps
        assert all(math.isfinite(line[name]) for line in train for name in ("loss", "grad_norm"))
        assert all(line["grad_norm"] > 0 for line in train)


# Rows that may be left out.

DROPS: dict[str, Any] = {"non_finite": "drop_row", "max_dropped_rows": 18}
PAIRS: dict[str, Any] = {**ROLLOUT, "prompts": 4, "samples_per_prompt": 2, "inner_batches": 1}
ONE: dict[str, Any] = {**ROLLOUT, "inner_batches": 1}
DROPPING = {
    "position_mean": MinillmStage(**ONE, **DROPS),
    "grpo": MinillmStage(**PAIRS, **DROPS, baseline="grpo"),
    "leave_one_out": MinillmStage(**PAIRS, **DROPS, baseline="leave_one_out"),
    "ridge": MinillmStage(**ONE, **DROPS, baseline="ridge"),
    "whitened": MinillmStage(**ONE, **DROPS, whiten="masked", published={"token_mean": True}),
    "untempered": MinillmStage(
        **ONE, **DROPS, future="sampled", published={"untempered_reward": True}, lm_coefficient=0.1, lm_batch=2
    ),
}
NEAR = 1e-5
"""Most that a weight differs after two updates whose batches were of other sizes."""


def one_step(toy: Toy, stage: MinillmStage, *, without: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The weights after a step and what it told; ``without`` rows that are never asked for."""
    student = toy.student(dropout=False)
    objective = toy.objective(stage)
    assert isinstance(objective, Minillm)
    if without:
        rows, _ = objective._rows(0)
        left = [row for number, row in enumerate(rows) if number not in without]
        objective._rows = lambda step: (left, list(range(len(left))))  # type: ignore[method-assign]
    collected, figures = objective.collect(0, student)
    with objective.learning(collected, student) as updates:
        for update in updates:
            student.update(update.losses)
    weights = {name: value.clone() for name, value in student.root.state_dict().items()}
    return {"weights": weights, "figures": figures, "gone": collected.gone, "news": objective.news()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    # Keys' biases have no gradient but rounding, and Adam steps them all the same.
    return max(float((one[name] - other[name]).abs().max()) for name in one if not name.endswith("c_attn.bias"))


@pytest.mark.parametrize("kind", DROPPING)
def test_a_row_that_is_left_out_might_as_well_not_have_been_there(kind: str, toy: Toy) -> None:
    stage = DROPPING[kind]
    with poisoned(toy.teacher):
        dropped = one_step(toy, stage)
    assert 0 < len(dropped["gone"]) < stage.rows_per_step
    never = one_step(toy, stage, without=dropped["gone"])
    assert apart(dropped["weights"], never["weights"]) < NEAR
    assert dropped["figures"] == pytest.approx(never["figures"], rel=1e-5, abs=1e-6, nan_ok=True)
    whole = one_step(toy, stage)  # control
    assert whole["gone"] == frozenset() and whole["news"] == []
    assert apart(dropped["weights"], whole["weights"]) > 100 * NEAR


def test_what_is_left_out_is_named_counted_and_goes_on_to_the_same_bits(toy: Toy) -> None:
    """From every update, inside steps too: rows that are gone stay gone, and the count is state."""
    stage = MinillmStage(**ROLLOUT, **DROPS)
    with poisoned(toy.teacher):
        whole = toy.run(stage)
        told = [line for line in lines(whole.log) if line["kind"] == "left_out"]
        assert len(told) > 1 and told[-1]["by_now"] == sum(len(line["uids"]) for line in told)
        known = {prompt.uid for prompt in toy.prompts}
        assert all(set(line["uids"]) <= known for line in told)
        for begin in whole.saved:
            assert differs(toy.run(stage, begin=begin, log=whole.log), whole, begin) == [], begin.place

        def forgetful(states: States) -> None:
            states.shared.record["collected"].pop("gone", None)

        inside = next(one for one in whole.saved if one.place[2] and "gone" in one.states().shared.record["collected"])
        with pytest.raises(RuntimeError, match="must match the size"):  # control
            toy.run(stage, begin=inside, log=whole.log, change=forgetful)

        def uncounted(states: States) -> None:
            states.shared.record["objective"]["left_out"] = 0

        after = next(one for one in whole.saved if one.place[0] == 1 and not one.place[2])
        assert "log" in differs(toy.run(stage, begin=after, log=whole.log, change=uncounted), whole, after)


def test_one_row_more_than_may_be_left_out_ends_the_stage(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    with poisoned(toy.teacher):
        whole = toy.run(MinillmStage(**ROLLOUT, **DROPS))
        counts = [len(line["uids"]) for line in lines(whole.log) if line["kind"] == "left_out"]
        assert "left out" in capsys.readouterr().out
        enough = MinillmStage(**ROLLOUT, **{**DROPS, "max_dropped_rows": sum(counts)})
        assert toy.run(enough).trace == whole.trace
        short = MinillmStage(**ROLLOUT, **{**DROPS, "max_dropped_rows": sum(counts) - 1})
        words = f"({sum(counts)} by now, max_dropped_rows {sum(counts) - 1})"
        with pytest.raises(NonFinite, match=re.escape(words)) as found:
            toy.run(short)
    assert "the first: reverse_kl" in str(found.value) or "the first: logp" in str(found.value)
    log = lines((last_run(toy) / "metrics.jsonl").read_bytes())
    assert [line for line in log if line["kind"] == "train"] == [
        line for line in lines(whole.log) if line["kind"] == "train"
    ][: len(whole.collected) - 1]
    assert dumped(last_run(toy))[1]


def test_a_teacher_that_cannot_write_does_not_end_a_stage_that_leaves_rows_out(toy: Toy) -> None:
    """With the alarms as they are by default, for which it writes text at the first step."""
    plain = {name: value for name, value in ROLLOUT.items() if name != "alarms"}
    with poisoned(toy.teacher):
        ran = toy.run(MinillmStage(**plain, **DROPS))
        told = [line for line in lines(ran.log) if "what" in line]
        assert ran.done.over and [line["what"] for line in told] == ["the teacher's own level"]
        assert not any(name.startswith("teacher_mean") for line in lines(ran.log) for name in line)
        with pytest.raises(NonFinite):
            toy.run(MinillmStage(**plain))
        about, _ = dumped(last_run(toy))
        assert len(about["rows"]) == 6
    assert any("teacher_mean_length" in line for line in lines(toy.run(MinillmStage(**plain, **DROPS)).log))


def test_a_rollout_of_which_no_row_is_left_ends_the_stage(toy: Toy) -> None:
    with poisoned(toy.teacher, position=1), pytest.raises(NonFinite, match="6 of 6 rows of a rollout"):
        toy.run(MinillmStage(**ROLLOUT, **DROPS))


def test_an_update_of_which_no_row_is_left_ends_the_stage(toy: Toy) -> None:
    single = MinillmStage(**{**ROLLOUT, "inner_batches": 6}, **DROPS)
    with poisoned(toy.teacher), pytest.raises(NonFinite, match="no row is left of an update"):
        toy.run(single)


def test_a_rank_whose_rows_are_all_gone_still_joins(tmp_path: Path, toy: Toy) -> None:
    """Two ranks, the second with bad rows only: both make the update that one rank makes of the others' rows."""
    told = start_ranks("tests.faults.bad_numbers_worker", str(save_models(tmp_path)))
    assert "rank 0 stopped: on rank 1: " in told and "rank 1 stopped: " in told, told
    gone = [json.loads((tmp_path / f"rank-{rank}/gone.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert gone[0] == gone[1] and len(gone[0]) == 3
    want = one_step(toy, MinillmStage(**ONE, **DROPS), without=frozenset(gone[0]))["weights"]
    for rank in range(2):
        assert apart(load_file(tmp_path / f"rank-{rank}/weights.safetensors"), want) < NEAR
    assert apart(one_step(toy, MinillmStage(**ONE, **DROPS))["weights"], want) > 100 * NEAR, "control: with all rows"
