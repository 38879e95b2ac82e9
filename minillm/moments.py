"""The moments at which a stage may be saved, and what it is saved as: after every update, where all is consistent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm.alarms import Alarms
from minillm.state import State, States, together
from minillm.updates import Objective


@dataclass(slots=True, kw_only=True)
class Progressed:
    """Everything the loop itself knows: with the engine's state and the objective's, what a resumed run needs (design
    D11)."""

    step: int = 0
    """Loop steps done (for MiniLLM: rollouts)."""
    best: float | None = None
    """Best value so far of the validation metric that decides which student is kept."""
    best_step: int = 0
    best_figures: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    """Validations since the best."""
    published: str = ""
    """``publish.weights_sha256`` of the student that was published last; "" before there is one."""
    seconds: float = 0.0
    stopped_early: bool = False
    over: bool = False
    """Whether the stage has nothing left to do: its student is handed on."""
    interrupted: bool = False
    """Whether the run was ended at a moment of this stage; of this process only, so no state."""

    def state(self) -> State:
        """All but ``interrupted``."""
        record = dataclasses.asdict(self)
        del record["interrupted"]
        return State(record)

    def restore(self, state: State) -> None:
        """Takes up what ``state`` gave."""
        for name, value in state.record.items():
            setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way."""

    collected: Any
    figures: dict[str, float]
    """Of what was collected."""
    learnt: list[dict[str, float]] = field(default_factory=list)
    """Of each update made so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A point after an update at which a stage may be saved, or ended."""

    stage: str
    step: int
    """Steps done; one that is under way is not."""
    update: int
    """Updates done: no two moments of a stage have the same."""
    inside: bool
    """Whether a step is under way. Then what each rank has of it is of use to that rank alone, and to no other number
    of ranks."""
    over: bool
    """Whether it is the stage's last: its student is handed on."""
    state: Callable[[], States]
    """What the rest of the stage depends on, beside the engine's state. Made when it is called, on every rank; at a
    step's end no rank has anything of its own."""


Boundary = Callable[[Moment], bool]
"""Called on every rank at every moment; whether the stage ends there, which all ranks must say alike."""


def never(moment: Moment) -> bool:
    """Saves nothing and goes on."""
    return False


def moment_at(
    now: Step | None, place: Mapping[str, Any], *, done: Progressed, objective: Objective, alarms: Alarms | None
) -> Moment:
    """The present moment; ``now`` is the step under way, ``place`` the names of the first three fields."""

    def state() -> States:
        shared, own = {"progress": done.state(), "objective": objective.state()}, dict[str, State]()
        if alarms is not None:
            shared["alarms"] = alarms.state()
        if now is not None:
            shared["step"] = State({"figures": {**now.figures}, "learnt": [*now.learnt]})
            shared["collected"], own["collected"] = objective.pack(now.collected)
        return States(together(shared), together(own))

    return Moment(**place, inside=now is not None, over=done.over, state=state)


def taken_up(states: States, *, done: Progressed, objective: Objective, alarms: Alarms | None) -> Step | None:
    """Puts the loop, the objective and the alarms where they stood; the step that was under way."""
    shared = states.shared
    done.restore(shared.part("progress"))
    objective.restore(shared.part("objective"))
    if alarms is not None:
        alarms.restore(shared.part("alarms"))
    if "step" not in shared.record:
        return None
    record = shared.part("step").record
    collected = States(shared.part("collected"), states.own.part("collected"))
    return Step(objective.unpack(collected, step=done.step), record["figures"], record["learnt"])
