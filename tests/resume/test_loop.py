"""When the loop can be saved, and how it ends there: over an objective that only counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.alarm_config import AlarmsConfig
from minillm.alarms import Alarms
from minillm.errors import Alarmed
from minillm.loop import Keep, run_steps
from minillm.moments import Moment, Progressed
from minillm.ranks import Ranks
from minillm.run_log import OF_THE_PROCESS
from minillm.state import State, States
from minillm.store import RunFolder
from minillm.updates import News, Update
from tests.resume.toy import from_bytes, to_bytes


class Counting:
    """Student and objective in one: ``updates`` a step, whose figures say which they are; ``order`` what happened."""

    def __init__(self, updates: int) -> None:
        self.updates, self.updates_done, self.learning_rate = updates, 0, 0.0
        self.order: list[str] = []

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        self.order.append("update")
        self.updates_done += 1
        self.learning_rate = 1.0 / self.updates_done
        return float(losses[0]()), 1.0

    def collect(self, step: int, student: Any) -> tuple[int, dict[str, float]]:
        self.order.append(f"collect {step}")
        return step, {"entropy": 3.0 - step}

    @contextmanager
    def learning(self, collected: int, student: Any, *, made: int = 0) -> Iterator[Iterator[Update]]:
        yield (self._update(collected, n) for n in range(made, self.updates))
        self.order.append("learnt")

    def hear(self, measured: Mapping[str, float]) -> None:
        self.order.append("hear")

    def news(self) -> list[News]:
        return []

    def shown(self, collected: int) -> State:
        return State({"rows": [{"uid": str(collected)}]})

    def state(self) -> State:
        return State()

    def restore(self, state: State) -> None:
        self.order.append("restore")

    def pack(self, collected: int) -> States:
        return States(State({"collected": collected}), State({}, {"own": torch.tensor([collected])}))

    def unpack(self, states: States, *, step: int) -> int:
        assert states.shared.record["collected"] == int(states.own.tensors["own"]) == step
        return step

    def _update(self, collected: int, n: int) -> Update:
        return Update(
            [lambda: torch.tensor(1.0)], lambda: {"loss": 10.0 * collected + n, "peak": -n}, largest=("peak",)
        )


class Run:
    """One run; ``at`` hears of each moment and says whether it is the last."""

    def __init__(
        self, folder: Path, *, updates: int = 2, steps: int = 2, validate: bool = True, patience: int = 0,
        alarms: Alarms | None = None, begin: States | None = None, before: int = 0,
        at: Callable[[Moment], bool] = lambda moment: False,
    ) -> None:  # fmt: skip
        self.counting = Counting(updates)
        self.counting.updates_done = before
        self.order, self.moments, self.states = self.counting.order, list[Moment](), list[States]()
        self.folder = RunFolder(folder, writes=True)
        if begin is None:
            self.folder.begin("")

        def boundary(moment: Moment) -> bool:
            self.moments.append(moment)
            states = moment.state()
            self.states.append(States(*(from_bytes(to_bytes(state)) for state in states)))
            self.order.append(f"moment {moment.step}{' inside' * moment.inside}{' over' * moment.over}")
            return at(moment)

        def publish(scores: Mapping[str, float]) -> str:
            self.order.append("publish")
            return f"weights {self.counting.updates_done}"

        def measure(student: Any) -> dict[str, float]:
            self.order.append("validate")
            return {"kl": float(student.updates_done)}

        self.folder.listen(lambda line: self.order.append(f"log {line['kind']}"))
        self.done: Progressed = run_steps(
            self.counting, self.counting, stage="a", steps=steps, ranks=Ranks(),  # type: ignore[arg-type]
            folder=self.folder, headline=(), validate=measure if validate else None, validate_every=1,
            keep=Keep(metric="kl", highest=False), patience=patience, publish=publish, alarms=alarms, begin=begin,
            boundary=boundary,
        )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    return lambda **changes: Run(tmp_path / "run", **changes)


def test_a_moment_comes_after_every_update_when_all_else_is_done(run: Callable[..., Run]) -> None:
    found = run()
    assert found.order == [
        "collect 0", "update", "moment 0 inside", "update", "learnt", "log train",
        "validate", "log validation", "hear", "publish", "moment 1",
        "collect 1", "update", "moment 1 inside", "update", "learnt", "log train",
        "validate", "log validation", "hear", "moment 2 over",
    ]  # fmt: skip
    assert [(one.stage, one.step, one.update) for one in found.moments] == [
        ("a", 0, 1),
        ("a", 1, 2),
        ("a", 1, 3),
        ("a", 2, 4),
    ]
    assert found.done.published == "weights 2" and found.done.over and not found.done.interrupted


def test_the_last_moment_of_a_stage_comes_when_its_student_is_handed_on(run: Callable[..., Run]) -> None:
    assert run(validate=False).order[-3:] == ["log train", "publish", "moment 2 over"]
    early = run(steps=9, patience=2)
    assert early.order[-2:] == ["hear", "moment 3 over"] and early.done.stopped_early
    assert [one.over for one in early.moments] == [False] * 5 + [True]
    rolled = run(steps=9, alarms=Alarms(AlarmsConfig(entropy={"limit": 9.0, "action": "rollback"})))  # type: ignore[arg-type]
    assert rolled.order[-3:] == ["log train", "log alarm", "moment 5 over"] and rolled.done.stopped_early


@pytest.mark.parametrize("last", range(1, 5))
def test_a_stage_that_is_ended_at_a_moment_ends_there(last: int, run: Callable[..., Run]) -> None:
    found = run(at=lambda moment: moment.update == last, validate=False)
    after = found.order[found.order.index(next(one for one in reversed(found.order) if one.startswith("moment"))) + 1 :]
    assert found.moments[-1].update == last and after == (["learnt"] if last % 2 else [])  # it lets go of its head
    assert found.done.interrupted and found.done.over == (last == 4) == ("publish" in found.order)
    assert found.order.count("log train") == last // 2


def test_a_step_that_goes_on_is_logged_as_if_it_had_not_stopped(run: Callable[..., Run]) -> None:
    whole = run(updates=3)
    want = timeless(whole)
    assert want[2] == {**want[2], "loss": 11.0, "peak": 0, "lr": 1 / 6}, "the mean, the largest, the last"
    for states, moment in zip(whole.states, whole.moments, strict=True):
        whole.folder.cut_log(0)
        on = run(updates=3, begin=states, before=moment.update)
        assert timeless(on) == want[2 * moment.step :]
        first = [] if moment.over else ["update"] if moment.inside else [f"collect {moment.step}", "update"]
        assert on.order[: 1 + len(first)] == ["restore", *first]
        assert [one.update for one in on.moments] == list(range(moment.update + 1, 7))
        assert on.done.best == whole.done.best and on.done.published == whole.done.published


def timeless(of: Run) -> list[dict[str, Any]]:
    """The log without its seconds."""
    log = of.folder.path / "metrics.jsonl"
    return (
        [{**json.loads(line), **dict.fromkeys(OF_THE_PROCESS)} for line in log.read_bytes().splitlines()]
        if log.exists()
        else []
    )


def test_a_stage_that_is_over_stays_as_it_is(run: Callable[..., Run]) -> None:
    whole = run()
    again = run(begin=whole.states[-1], before=4)
    assert again.order == ["restore"] and again.done == whole.done


def test_an_alarm_that_ends_the_run_leaves_no_moment_of_its_step(run: Callable[..., Run]) -> None:
    """So whoever goes on from the one before hears it again."""

    def alarms() -> Alarms:
        return Alarms(AlarmsConfig(entropy={"limit": 9.0, "action": "stop"}))  # type: ignore[arg-type]

    last: list[tuple[States, int]] = []

    def at(moment: Moment) -> bool:
        last.append((moment.state(), moment.update))
        return False

    with pytest.raises(Alarmed, match="step 5"):
        run(steps=9, updates=1, alarms=alarms(), at=at)
    states, update = last[-1]
    assert update == 4
    with pytest.raises(Alarmed, match="step 5"):
        run(steps=9, updates=1, alarms=alarms(), begin=States(*(from_bytes(to_bytes(one)) for one in states)), before=4)


def test_what_is_saved_at_a_moment_does_not_change_afterwards(run: Callable[..., Run]) -> None:
    held: list[tuple[States, str]] = []

    def at(moment: Moment) -> bool:
        states = moment.state()
        held.append((states, repr(states)))
        return False

    run(at=at, steps=6, alarms=Alarms(AlarmsConfig()))
    assert len(held) == 12 and all(repr(states) == before for states, before in held)


def test_the_rate_is_that_of_this_process(run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(steps=1000, updates=1, validate=False, at=lambda moment: moment.update == 999)
    capsys.readouterr()
    run(steps=1000, updates=1, validate=False, begin=whole.states[-1], before=999)
    said = re.search(r"a 1000/1000  (\S+) steps/s", capsys.readouterr().out)
    assert said is not None and 1 < float(said[1]) < 1e6
