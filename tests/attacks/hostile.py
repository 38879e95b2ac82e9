"""What the attacks share: payloads that leave a mark when they run, and commands as a user gives them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MOST_LINES = 4
"""A refusal is one line and its remedy."""
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What no terminal may be sent: control characters, and marks that show text in another order."""
OUTSIDE = {"secret.json": '{"a": "a secret"}', "deep/secret.txt": "another secret"}


class Outcome(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with what a run needs and works, one that nobody may touch, and the mark that no payload may leave."""

    top: Path

    @property
    def marker(self) -> Path:
        return self.top / "marker"

    @property
    def outside(self) -> Path:
        return self.top / "outside"

    @property
    def config(self) -> Path:
        return self.top / "good.yaml"

    @property
    def student(self) -> Path:
        return self.top / "student"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def pickled(marker: Path) -> bytes:
    """A pickle that makes ``marker`` when read; proved to work before it is used."""
    payload = pickle.dumps({"model.embed_tokens.weight": Bomb(marker)})
    pickle.loads(payload)
    fired(marker)
    return payload


def fired(marker: Path) -> None:
    """The control of a payload: read carelessly, it does run. The mark is gone afterwards."""
    assert marker.exists(), "the payload is a dud, so that nothing was shown"
    marker.unlink()


def held(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(outcome: Outcome, kind: str, *words: str) -> None:
    """The command ended as for any mistake of a user's: a typed error in few lines, which cannot steer a terminal."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert lines and lines[0].startswith(f"{kind}: ") and len(lines) <= MOST_LINES, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    quiet(outcome)
    for word in words:
        assert word in outcome.err, outcome.err


def quiet(outcome: Outcome) -> None:
    """Nothing that a command printed can steer a terminal."""
    found = [STEERING.search(text) for text in outcome[1:]]
    assert found == [None, None], outcome


def change(file: Path, **values: Any) -> None:
    """Sets values of a JSON object in a file, which need not be there."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**before, **values}), encoding="utf-8")
