"""The soak: runs of the embedded world that are killed, stopped, damaged and started again for hours, by a seed.

Round after round of one run, each with its own disturbances; at its end a round must have left every line of the log,
every student and every answer of the run that nothing happened to. ``events.jsonl`` in the folder has a line for each
life of a run (what was done to it, how it ended, and where it had begun, which is how the one before went on) and for
each damage; the soak itself goes on from it when it is killed.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from minillm import exits
from minillm.checkpoint_manifest import folder_name
from minillm.checkpoints import REMOVED, STAGING, steps_in
from minillm.store import RunFolder
from tests.campaign import damage, lives, recipes
from tests.campaign.journal import Journal, table
from tests.campaign.lives import Life, WentOn

ROUNDS = ((2, 1), (2, 2), (2, 1), (2, 2), (1, 3))
"""Ranks and the run's seed, round after round."""
KINDS = {
    "kill rank": 4, "kill launcher": 2, "kill all": 3, "stop rank": 1, "terminate": 3, "interrupt": 2,
    "terminate rank": 2, "terminate twice": 1, "full disk": 1,
}  # fmt: skip
"""What may be done to a life, and how often."""
OF_RANKS = {"kill rank", "kill launcher", "stop rank", "terminate rank"}
"""Those that need a launcher."""
CODES = {
    "kill rank": {exits.RANK_LOST}, "kill launcher": {-signal.SIGKILL}, "kill all": {-signal.SIGKILL},
    "stop rank": {exits.RANK_LOST},
    # Before a handler is there, a signal ends the process as it ends any other.
    "terminate": {exits.STOPPED, exits.by_signal(signal.SIGTERM), -signal.SIGTERM},
    "interrupt": {exits.STOPPED, exits.INTERRUPTED, -signal.SIGINT},
    "terminate rank": {exits.STOPPED, exits.by_signal(signal.SIGTERM), exits.RANK_LOST},
    "terminate twice": {exits.STOPPED, exits.by_signal(signal.SIGTERM), -signal.SIGTERM},
    "full disk": {exits.SAVE_FAILED}, "nothing": set[int](),
}  # fmt: skip
"""Exit codes that they may have, beside 0 of a run that was done before."""
MOST = 16
"""Lives of a round that something is done to; then it may end."""
WRONG_IN_A_ROW = 3
"""Lives that went wrong, one after the other, after which a round is given up."""
EARLY, EARLY_S, TRAINS_S = 0.2, 12.0, 9.0
"""Share of moments that are drawn from the seconds after a start, and those; the others are so many seconds after the
first step."""
DAMAGED = 0.5
"""Share of the times between two lives in which something is damaged."""
LIFE_S = 900.0
"""Seconds in which any life must end, beside whatever else a machine does."""
_BEGINS = ("starting from the beginning", "between forwards")
"""What a life has said once an earlier log is gone, where it goes on from nothing."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What is done to a life, drawn before it begins."""

    kind: str
    rank: int
    early: bool
    seconds: float


class Soak:
    """A soak in a folder."""

    def __init__(
        self, folder: Path, *, minutes: float, seed: int, most: float = inf,
        kinds: Mapping[str, int] = KINDS, damaged: float = DAMAGED,
        rounds: Sequence[tuple[int, int]] = ROUNDS, lives_of_a_round: int = MOST, name: str = "soak",
    ) -> None:  # fmt: skip
        """``most`` events, if they come before so many minutes are over; ``damaged`` as in ``DAMAGED``."""
        self.folder, self._seconds, self._seed, self._most = folder, 60 * minutes, seed, most
        self._kinds, self._damaged, self._rounds, self._name = dict(kinds), damaged, rounds, name
        self._lives_of_a_round = lives_of_a_round
        (folder / "lives").mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder / "events.jsonl")
        self._twins: dict[str, dict[str, Any]] = {}

    def run(self) -> bool:
        """Rounds until the time is over; whether all went as it should."""
        settings = {"seed": self._seed, "stages": recipes.WORLD, "kinds": self._kinds}
        begun = self.journal.of("begun")
        if begun and begun[0]["settings"] != settings:
            raise SystemExit(
                f"{self._name}: {self.folder} holds one with {begun[0]['settings']}, wanted {settings}\n"
                "  go on with its settings, or name another --folder"
            )
        if not begun:
            self.journal.add("begun", settings=settings)
        recipes.make_teacher(self.folder)
        number = len(self.journal.of("round")) + 1
        while not self._over or self.journal.of("life", round=number):
            self._round(number)
            number += 1
        return fine(self.journal)

    @property
    def _over(self) -> bool:
        return self.journal.elapsed >= self._seconds or len(events_of(self.journal)) >= self._most

    def _round(self, number: int) -> None:
        ranks, seed = self._rounds[(number - 1) % len(self._rounds)]
        name = f"round-{number}"
        twin = self._twin(ranks, seed)
        file, run = recipes.write_world(self.folder, name, seed=seed), self.folder / "runs" / name
        wrong = 0
        while wrong < WRONG_IN_A_ROW:
            line = self._life(number, file, run, ranks)
            wrong = wrong + 1 if line["wrong"] else 0
            if line["code"] == exits.DONE:
                break
            self._damage(number, run)
        found = lives.outcome(run) if line["code"] == exits.DONE else {}
        differs = sorted(name for name in twin if found.get(name) != twin[name])
        self.journal.add("round", round=number, ranks=ranks, seed=seed, differs=differs)
        words = f"DIFFERS in {', '.join(differs)}" if differs else "equal to the unbroken run, bit for bit"
        self._say(f"round {number} ({ranks} ranks, seed {seed}): {words}")

    def _twin(self, ranks: int, seed: int) -> dict[str, Any]:
        """What the run leaves that nothing happens to."""
        name = f"twin-{ranks}-{seed}"
        if name not in self._twins:
            run, file = self.folder / "runs" / name, recipes.write_world(self.folder, name, seed=seed)
            if not (run / "run.json").is_file() or RunFolder(run, writes=False).status()["state"] != "done":
                shutil.rmtree(run, ignore_errors=True)  # one that goes on is no unbroken one
            life = lives.start(file, self.folder / f"{name}.log", ranks=ranks)
            code = life.ended(2 * LIFE_S)
            if code != exits.DONE:
                raise SystemExit(f"{self._name}: the unbroken run ended with {code}, wanted 0\n{life.text()[-2000:]}")
            self._twins[name] = lives.outcome(run)
        return self._twins[name]

    def _life(self, number: int, file: Path, run: Path, ranks: int) -> dict[str, Any]:
        before = self.journal.of("life", round=number)
        draw = random.Random(f"{self._seed}/{number}/{len(before)}")
        whole, there, left = lives.whole_checkpoints(run), names(run), left_over(run)
        plan = self._planned(draw, run, ranks, whole, disturbed=len(before) < self._lives_of_a_round)
        largest = largest_file(run, whole) if plan.kind == "full disk" else None
        life = lives.start(file, self.folder / "lives" / f"{run.name}-{len(before):03d}.log", ranks=ranks,
                           largest_file=largest)  # fmt: skip
        wrong = []
        try:
            if plan.kind not in {"nothing", "full disk"} and self._moment(life, run, plan):
                disturb(life, plan)
            code = life.ended(LIFE_S)
        except TimeoutError as error:
            code, wrong = life.process.returncode, [str(error)]
        stood, began = lives.steps_logged(run), life.went_on()
        if alive := life.left_over():
            wrong.append(f"ranks {alive} outlived the launcher by {lives.OUTLIVES_S:.0f} s")
        if code not in {exits.DONE, *CODES[plan.kind]}:
            wrong.append(f"exit code {code}: {life.text()[-1000:]}")
        if began is not None:
            wrong += wrongly_begun(began, life.text(), whole=whole, there=there, left=left_over(run) & left)
        elif begun_over(life.text(), code=code, whole=whole):
            wrong.append(f"began from nothing, wanted {whole[0]}")
        line = self.journal.add(
            "life", round=number, kind=plan.kind, target=target_of(plan), early=plan.early, checkpoint=began and
            began.checkpoint, began=None if began is None else in_all(began), stood=stood, code=code, wrong=wrong,
        )  # fmt: skip
        self._tell(line)
        return line

    def _planned(self, draw: random.Random, run: Path, ranks: int, whole: list[str], *, disturbed: bool) -> Planned:
        kinds = {kind: weight for kind, weight in self._kinds.items() if ranks > 1 or kind not in OF_RANKS}
        if not whole or largest_file(run, whole) is None or in_all_of(run, whole) > sum(recipes.WORLD.values()) - 40:
            kinds.pop("full disk", None)
        kind = draw.choices([*kinds], [*kinds.values()])[0]
        early = draw.random() < EARLY
        seconds = draw.uniform(0.3, EARLY_S) if early else draw.uniform(0.0, TRAINS_S)
        rank = draw.randrange(ranks)
        if not disturbed or self._over:
            kind = "nothing"
        return Planned(kind, rank, early, seconds)

    def _moment(self, life: Life, run: Path, plan: Planned) -> bool:
        """Waits for the moment of a plan; whether the run was still there."""
        while not plan.early and not _trains(life, run):
            if time.monotonic() - life.began > LIFE_S or not life.sleep(0.05):
                return False
        if not life.sleep(plan.seconds):
            return False
        while len(life.pids()) < life.ranks and plan.kind in {"kill rank", "stop rank", "terminate rank"}:
            if not life.sleep(0.05):
                return False
        return True

    def _damage(self, number: int, run: Path) -> None:
        """Damages something, every second time, while the run is down."""
        count = len(self.journal.of("life", round=number))
        draw = random.Random(f"{self._seed}/{number}/{count}/damage")
        whole = lives.whole_checkpoints(run)
        if draw.random() >= self._damaged or len(self.journal.of("damage", round=number, after=count)):
            return
        kinds = list(damage.BESIDE) if whole else []
        if len(whole) > 1 and names(run)[:2] == whole[:2]:  # never both of the newest
            kinds += 2 * damage.OF_A_CHECKPOINT
        if kinds:
            kind = draw.choice(kinds)
            # Noted first: a soak that is killed in between must not damage a second one.
            line = self.journal.add("damage", round=number, after=count, kind=kind, stood=lives.steps_logged(run))
            what = damage.damaged(run, kind, draw)
            self._say(f"round {number}  {line['kind']}: {what}")

    def _tell(self, line: dict[str, Any]) -> None:
        at = f"{line['kind']}{line['target']}"
        began = "no step yet" if line["began"] is None else f"step {line['began']}"
        self._say(f"round {line['round']}  from {began}  {at} at step {line['stood']}, code {line['code']}"
                  + "".join(f"  WRONG: {each}" for each in line["wrong"]))  # fmt: skip

    def _say(self, words: str) -> None:
        left, events = (self._seconds - self.journal.elapsed) / 60, len(events_of(self.journal))
        count = (
            f"{max(0.0, left):5.1f} min left  {events:3d} events" if left < inf else f"{events:3d} of {self._most:.0f}"
        )
        print(f"{time.strftime('%H:%M:%S')}  {count}  {words}", flush=True)


def disturb(life: Life, plan: Planned) -> None:
    """Does to a life what is planned for it."""
    launcher, ranks = life.process.pid, life.pids()
    match plan.kind:
        case "kill rank":
            lives.send(ranks[plan.rank], signal.SIGKILL)
        case "stop rank":
            lives.send(ranks[plan.rank], signal.SIGSTOP)
        case "terminate rank":
            lives.send(ranks[plan.rank], signal.SIGTERM)
        case "kill launcher":
            lives.send(launcher, signal.SIGKILL)
        case "kill all":
            for pid in {launcher, *ranks}:
                lives.send(pid, signal.SIGKILL)
        case "interrupt":
            lives.send(launcher, signal.SIGINT)
        case "terminate":
            lives.send(launcher, signal.SIGTERM)
        case "terminate twice":
            lives.send(launcher, signal.SIGTERM)
            if life.sleep(1.2):
                lives.send(launcher, signal.SIGTERM)


def _trains(life: Life, run: Path) -> bool:
    """Whether a life has made a step of its own."""
    began = life.went_on()
    if began is None and not any(words in life.text() for words in _BEGINS):
        return False
    return lives.steps_logged(run) > (in_all(began) if began else 0)


def names(run: Path) -> list[str]:
    """Checkpoints of a run, whole or not, newest first."""
    return [folder_name(step) for step in steps_in(run / "checkpoints")]


def left_over(run: Path) -> set[str]:
    """Folders of saves and removals that broke off."""
    return {path.name for path in (run / "checkpoints").glob(".*") if path.name.startswith((STAGING, REMOVED))}


def largest_file(run: Path, whole: list[str]) -> int | None:
    """A limit that the newest checkpoint's largest file is over, and all that else is written stays under; None where
    there is none."""
    if not whole:
        return None
    sizes = {path.name: path.stat().st_size for path in (run / "checkpoints" / whole[0]).iterdir()}
    limit = max(size for name, size in sizes.items() if name.startswith("engine-")) - 1
    others = [size for name, size in sizes.items() if not name.startswith("engine-")]
    return limit if max([*others, (run / "metrics.jsonl").stat().st_size + 20_000]) < limit else None


def in_all(began: WentOn) -> int:
    """Its step, counted over all stages."""
    before = list(recipes.WORLD)[: list(recipes.WORLD).index(began.stage)]
    return began.step + sum(recipes.WORLD[name] for name in before)


def in_all_of(run: Path, whole: list[str]) -> int:
    """The step of the newest whole checkpoint, counted over all stages."""
    return lives.step_of(run / "checkpoints" / whole[0], recipes.WORLD) if whole else 0


def target_of(plan: Planned) -> str:
    """The rank that is meant."""
    return f" {plan.rank}" if plan.kind in {"kill rank", "stop rank", "terminate rank"} else ""


def wrongly_begun(began: WentOn, text: str, *, whole: list[str], there: list[str], left: set[str]) -> list[str]:
    """What was wrong with where a life went on: it must be the newest that is whole, those before it named."""
    wrong = []
    if began.checkpoint != (whole or [""])[0]:
        wrong.append(f"went on from {began.checkpoint}, wanted {(whole or ['nothing'])[0]}")
    broken = [name for name in there if whole and name > whole[0]]
    wrong += [f"{name} is broken, and nothing says so" for name in broken if f"{name} is not used" not in text]
    return wrong + [f"{name} is still there" for name in sorted(left)]


def begun_over(text: str, *, code: int, whole: list[str]) -> bool:
    """Whether a life that never said that it goes on trained, though there was a checkpoint to go on from. Its bits are
    the right ones all the same, so no comparison would see it."""
    return bool(whole) and code in {exits.DONE, exits.STOPPED} and "done already" not in text


def events_of(journal: Journal) -> list[dict[str, Any]]:
    """Lives that something was done to, and damages."""
    return [line for line in journal.lines if line["what"] == "damage" or _disturbed(line)]


def _disturbed(line: dict[str, Any]) -> bool:
    return bool(line["what"] == "life") and line["kind"] != "nothing" and line["code"] != exits.DONE


def lost(journal: Journal) -> list[int]:
    """Of each life that went on, the steps that the one before had made in vain."""
    found = []
    for number in {line["round"] for line in journal.of("life")}:
        of_round = journal.of("life", round=number)
        found += [
            max(0, before["stood"] - after["began"])
            for before, after in itertools.pairwise(of_round)
            if after["began"] is not None
        ]
    return found


def fine(journal: Journal) -> bool:
    """Whether every round is equal to its twin, and no life went wrong."""
    return bool(journal.of("round")) and not differing(journal)


def differing(journal: Journal) -> list[str]:
    """Rounds that differ from their twins, and what went wrong in lives."""
    differs = [
        f"round {line['round']}: {', '.join(line['differs'])}" for line in journal.of("round") if line["differs"]
    ]
    return differs + [f"round {line['round']}: {each}" for line in journal.of("life") for each in line["wrong"]]


def summary(journal: Journal) -> str:
    """The table at the end."""
    kinds = Counter(line["kind"] for line in events_of(journal))
    rounds, starts, steps = journal.of("round"), journal.of("life"), lost(journal)
    rows: list[tuple[str, object]] = [(kind, kinds[kind]) for kind in sorted(kinds)]
    rows += [
        ("events", sum(kinds.values())), ("rounds", len(rounds)), ("starts", len(starts)),
        ("went on from a checkpoint", len(steps)), ("steps lost", sum(steps)),
        ("steps lost, mean", f"{sum(steps) / max(1, len(steps)):.1f}"),
        ("minutes", f"{journal.elapsed / 60:.1f}"),
        ("rounds that differ", sum(bool(line["differs"]) for line in rounds)),
        ("lives that went wrong", sum(bool(line["wrong"]) for line in starts)),
    ]  # fmt: skip
    words = differing(journal) or ["all rounds equal their unbroken runs, bit for bit"]
    return "\n".join([table(("what", "number"), rows), *words])
