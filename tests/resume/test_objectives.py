"""Every kind of stage, broken off after every update, inside steps too, goes on to the same bits; and whatever of its
state is lost shows.

Resumed runs have new objects, begin from bytes (JSON and safetensors), and find the process's random generators
anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minillm import distillation, objectives
from minillm.alarm_config import AlarmsConfig
from minillm.alarms import Alarms
from minillm.config import MinillmStage
from minillm.errors import CheckpointError
from minillm.moments import Progressed
from minillm.practice import Practice
from minillm.shadow import Shadow
from minillm.stage_base import BaseStage
from minillm.state import State, States
from minillm.student_engine import Student
from minillm.text_mix import FollowedShare, Written, packed, unpacked
from minillm.text_stages import (
    GkdStage,
    ImitkdStage,
    KdStage,
    RklStage,
    SeqkdStage,
    SftStage,
    SkewFklStage,
    SkewRklStage,
)
from tests.resume.toy import OPTIMISER, Ran, Saved, Toy, lines, prompts, save_models

TEXT: dict[str, Any] = {"steps": 4, "batch": 4, "optimiser": OPTIMISER, "validate_every": 1}
OWN: dict[str, Any] = {"steps": 3, "batch": 4, "optimiser": OPTIMISER, "inner_epochs": 2, "validate_every": 2}
RISING: dict[str, Any] = {**OWN, "steps": 5, "validate_every": 1, "share_step": 0.4, "replay": 3}
ROLLOUT: dict[str, Any] = {
    "prompts": 4, "optimiser": OPTIMISER, "inner_epochs": 2, "inner_batches": 2, "teacher_mix": 0.3, "validate_every": 2
}  # fmt: skip
RINGS: dict[str, Any] = {"entropy": {"limit": 100.0}}
"""Below a hundred times the first: from the fifth rollout on, of whose mean it is."""
STAGES: dict[str, BaseStage] = {
    "sft": SftStage(**TEXT, patience=2),
    "kd": KdStage(**TEXT, teacher_share=0.5, keep={"metric": "rouge_l", "mode": "max"}),
    "seqkd": SeqkdStage(**TEXT, length_window=2, micro_batch=2),
    "imitkd": ImitkdStage(**OWN, student_share=0.5),
    "gkd": GkdStage(**OWN),
    "rkl": RklStage(**OWN, micro_batch=3),
    "skew_fkl": SkewFklStage(**RISING),
    "skew_rkl": SkewRklStage(**{**RISING, "student_share": 0.7}),
    "minillm": MinillmStage(**ROLLOUT, steps=2),
    "anchored": MinillmStage(
        **ROLLOUT, steps=2, lm_coefficient=0.5, lm_batch=2, lm_teacher_share=0.5, published={"token_mean": True}
    ),
    "ridge": MinillmStage(**ROLLOUT, steps=2, baseline="ridge", importance="per_decision", coin_groups=4),
    "held": MinillmStage(**ROLLOUT, steps=2, anchor={"weight": 0.5, "rate": 0.2}),
    "drifting": MinillmStage(**ROLLOUT, steps=3, inner_kl=0.02),
    "alarmed": MinillmStage(**{**ROLLOUT, "inner_epochs": 1, "inner_batches": 1}, steps=6, alarms=RINGS),
    "rolled back": MinillmStage(
        **{**ROLLOUT, "inner_epochs": 1, "inner_batches": 1},
        steps=7,
        alarms={"entropy": {"limit": 100.0, "action": "rollback"}},
    ),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"), models=save_models(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def unbroken(toy: Toy) -> Callable[[str], Ran]:
    found: dict[str, Ran] = {}

    def of(kind: str) -> Ran:
        if kind not in found:
            found[kind] = toy.run(STAGES[kind])
        return found[kind]

    return of


def differs(ran: Ran, whole: Ran, begin: Saved) -> list[str]:
    """In which respects a run from a moment is not what the unbroken one was after that moment."""
    at = whole.saved.index(begin) + 1
    update, step = begin.place[1], begin.place[0] + begin.place[2]
    pairs: dict[str, tuple[object, object]] = {
        "trace": (ran.trace, whole.trace[at:]),
        "state": (ran.states, whole.states[at:]),
        "published": (ran.published, [one for one in whole.published if one[0] > update]),
        "collected": (ran.collected, [one for one in whole.collected if one >= step]),
        "log": (lines(ran.log), lines(whole.log)),
        "outcome": (ran.outcome, whole.outcome),
    }
    # In words, in which one NaN is equal to another.
    return [name for name, (mine, theirs) in pairs.items() if repr(mine) != repr(theirs)]


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_goes_on_from_every_update_to_the_same_bits(
    kind: str, toy: Toy, unbroken: Callable[[str], Ran]
) -> None:
    whole = unbroken(kind)
    assert whole.trace[-1][3] and [line[1] for line in whole.trace] == list(range(1, len(whole.trace) + 1))
    for begin in whole.saved:
        assert differs(toy.run(STAGES[kind], begin=begin, log=whole.log), whole, begin) == [], begin.place


@pytest.mark.parametrize("kind", ["skew_fkl", "anchored", "alarmed", "rolled back"])
def test_a_stage_that_is_broken_off_after_every_update_is_the_unbroken_one(
    kind: str, toy: Toy, unbroken: Callable[[str], Ran]
) -> None:
    whole, trace, published = unbroken(kind), [], []
    ran = toy.run(STAGES[kind], until=1)
    for number in range(2, len(whole.trace) + 1):
        assert ran.done.interrupted and not ran.done.over and len(ran.trace) == 1
        trace, published = trace + ran.trace, published + ran.published
        ran = toy.run(STAGES[kind], begin=ran.saved[-1], log=ran.log, until=number)
    assert ran.done.interrupted and ran.done.over
    assert trace + ran.trace == whole.trace and ran.states == whole.states[-1:]
    assert lines(ran.log) == lines(whole.log)
    assert repr(published + ran.published) == repr(whole.published)


def test_the_stages_here_do_what_they_are_here_for(unbroken: Callable[[str], Ran]) -> None:
    def figures(kind: str, name: str) -> list[float]:
        return [line[name] for line in lines(unbroken(kind).log) if line["kind"] == "train"]

    assert figures("skew_fkl", "student_share")[0] == 0 < figures("skew_fkl", "student_share")[-1]
    assert max(figures("skew_fkl", "kept_rows")) > 0 < max(figures("skew_rkl", "kept_rows"))
    mask_BT = unbroken("minillm").saved[0].states().own.tensors["collected/mask_BT"]
    assert len(set(mask_BT.sum(dim=1).tolist())) > 1, "responses of several lengths"
    assert [line[2] for line in unbroken("minillm").trace] == [True, True, True, False] * 2
    ends = [line[1] for line in unbroken("drifting").trace if not line[2]]
    assert len(ends) == 3 and ends[-1] < 12, "ended by inner_kl before the fourth of four"
    rung = [line["step"] for line in lines(unbroken("alarmed").log) if line["kind"] == "alarm"]
    assert rung == [5], "once, though it goes on ringing"
    assert unbroken("rolled back").done.stopped_early and unbroken("rolled back").done.step == 5
    assert unbroken("sft").done.stopped_early and unbroken("sft").done.best_step == 1
    assert unbroken("kd").done.best is None and unbroken("kd").done.stale == 4


def counted(of: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return of(*arguments, **options)

    return call


def test_nothing_is_sampled_scored_or_learnt_twice(toy: Toy, unbroken: Callable[[str], Ran]) -> None:
    """From the third of four updates of a rollout to the fourth: one forward and backward pass, and no other."""
    for kind, forwards in (("minillm", 1), ("anchored", 2), ("gkd", 1)):
        whole = unbroken(kind)
        begin = next(one for one in reversed(whole.saved[:4]) if one.place[2])
        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((objectives, "roll_out"), (objectives, "score"), (distillation, "roll_out")):
                patch.setattr(module, name, pytest.fail)
            asked = list[int]()
            patch.setattr(Student, "loss", counted(Student.loss, asked))
            ran = toy.run(STAGES[kind], begin=begin, log=whole.log, until=begin.place[1] + 1)
        assert ran.collected == [] and ran.trace == whole.trace[begin.place[1] : begin.place[1] + 1]
        assert len(asked) == forwards


# What is lost, piece by piece.

WHERE = {
    "progress": "sft", "alarms": "alarmed", "objective": "skew_fkl", "step": "minillm", "text": "gkd", "own": "minillm",
    "own/collected/single_weight_BT": "ridge", "objective.replay.lengths": "skew_rkl",
    "shared/objective/anchor": "held",
}  # fmt: skip
"""A stage in which a piece, or a piece of such a part, has a say."""
FRESH: dict[str, Any] = {
    **{f"progress.{name}": value for name, value in Progressed().state().record.items()},
    **{f"alarms.{name}": value for name, value in Alarms(AlarmsConfig()).state().record.items()},
    **{f"objective.followed.{name}": value for name, value in FollowedShare(0.0, 0.4, 0.1).state().record.items()},
    "step.figures": {},
    "step.learnt": [],
}
"""What a piece is where nothing is taken up."""


ANCHOR = "objective/anchor"


def pieces(states: States) -> set[str]:
    """Everything that a checkpoint of these says, by name; an anchor's weights are one piece."""
    shared = {ANCHOR if name.startswith(ANCHOR) else name for name in states.shared.tensors}
    found = {f"shared/{name}" for name in shared} | {f"own/{name}" for name in states.own.tensors}
    for part, record in states.shared.record.items():
        for name, value in record.items():
            of_owner = part == "objective"
            found |= {f"{part}.{name}.{inner}" for inner in value} if of_owner else {f"{part}.{name}"}
    assert all(record == {} for record in states.own.record.values())
    return found


def lose(states: States, piece: str) -> bool:
    """Puts what is there without being told in a piece's place; whether that is anything else."""
    if "/" in piece:
        side, _, name = piece.partition("/")
        tensors = getattr(states, side).tensors
        if name == ANCHOR:
            for weight in [weight for weight in tensors if weight.startswith(ANCHOR)]:
                tensors[weight] = another(tensors[weight], weight)
            return True
        before = tensors[name]
        tensors[name] = another(before, name)
        return not torch.equal(before, tensors[name])
    *parts, name = piece.split(".")
    record = states.shared.record
    for part in parts:
        record = record[part]
    before = record[name]
    # Rows in another order, where there is no telling what they would be.
    record[name] = FRESH[piece] if piece in FRESH else before[1:] + before[:1]
    return bool(record[name] != before)


def another(value: torch.Tensor, name: str) -> torch.Tensor:
    """Tokens moved by a place, no id forbidden, one token fewer, numbers of 0."""
    if name.endswith("response_ids") or name.endswith("response_BT"):
        return value.roll(1, dims=-1)
    if name.endswith("support_BTC"):
        return torch.full_like(value, 255)
    if name.endswith("mask_BT"):
        return value & (value.cumsum(dim=1) < value.sum(dim=1, keepdim=True).clamp(min=2))
    return torch.zeros_like(value)


ABLATED = sorted(
    {
        *(name for name in FRESH if name != "progress.seconds"),
        *(f"objective.replay.{name}" for name in ("uids", "lengths")),
        *(f"collected.{name}" for name in ("uids", "lengths")),
        *("shared/objective/anchor", "shared/objective/replay/response_ids", "shared/collected/response_ids"),
        *(f"own/collected/{name}" for name in Practice.__slots__ if name != "prompts"),
    }
)


def where(piece: str) -> str:
    """The stage to lose a piece in."""
    part = re.split(r"[./]", piece.removeprefix("shared/"))[0]
    return WHERE.get(piece) or WHERE["text" if part == "collected" else part]


def test_an_anchor_that_begins_again_is_noticed(toy: Toy, unbroken: Callable[[str], Ran]) -> None:
    """At the student as it stands, as where nothing was saved of it."""
    whole = unbroken("held")
    begin = next(saved for saved in whole.saved if not saved.place[2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shadow, "restore", lambda *_, **__: None)
        assert "trace" in differs(toy.run(STAGES["held"], begin=begin, log=whole.log), whole, begin)


@pytest.mark.parametrize("piece", ABLATED)
def test_every_piece_of_the_state_has_a_say(piece: str, toy: Toy, unbroken: Callable[[str], Ran]) -> None:
    """Without it there is a moment from which a run goes on otherwise; so what is saved is needed, and would be missed
    by the comparisons above."""
    kind = where(piece)
    whole = unbroken(kind)
    for begin in whole.saved:
        if piece in pieces(begin.states()) and lose(begin.states(), piece):
            ran = toy.run(STAGES[kind], begin=begin, log=whole.log, change=lambda states: lose(states, piece))
            if set(differs(ran, whole, begin)) - {"state"}:  # that it is still lost says nothing
                return
    pytest.fail(f"{piece} is saved, and nothing comes of it")


def test_there_is_no_other_piece(unbroken: Callable[[str], Ran]) -> None:
    found = {piece for kind in STAGES for saved in unbroken(kind).saved for piece in pieces(saved.states())}
    assert sorted(found - {"progress.seconds"}) == ABLATED


def test_seconds_go_on(toy: Toy, unbroken: Callable[[str], Ran]) -> None:
    whole = unbroken("sft")

    def late(states: States) -> None:
        states.shared.record["progress"]["seconds"] = 1000.0

    ran = toy.run(STAGES["sft"], begin=whole.saved[0], log=whole.log, change=late)
    seconds = [json.loads(line)["seconds"] for line in ran.log.splitlines()]
    assert max(seconds[:2]) < 900.0 and 1000.0 <= min(seconds[2:]) <= ran.done.seconds + 1e-3


def test_at_a_steps_end_no_rank_has_anything_of_its_own(unbroken: Callable[[str], Ran]) -> None:
    """So what is saved there is of use to any number of ranks."""
    for kind in STAGES:
        for saved in unbroken(kind).saved:
            assert saved.place[2] or saved.states().own == State(), kind


def test_a_response_to_a_row_that_is_gone_is_refused() -> None:
    rows = prompts()
    kept = packed([Written(row.uid, row.ids, (3, 1)) for row in rows])
    assert unpacked(kept, reversed(rows)) == [Written(row.uid, row.ids, (3, 1)) for row in rows]
    with pytest.raises(CheckpointError, match="'row-4', which the prompts do not have"):
        unpacked(kept, [row for row in rows if row.uid != "row-4"])
