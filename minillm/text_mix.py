"""Whose text each row of a batch is: a reference, the student's own, or one of the student's that was kept.

All draws are keyed (design D3): a batch is a function of seed, step and what came before, whatever the ranks.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from minillm.errors import CheckpointError
from minillm.prompt_table import named
from minillm.state import State
from minillm.types import Example, Prompt

Source = Literal["reference", "fresh", "kept"]


@dataclass(frozen=True, slots=True)
class Written:
    """A response that a model wrote, as an ``Example``."""

    uid: str
    ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """With the closing EOS, unless it was cut."""


def sources(step: int, rows: int, *, student_share: float, fresh_share: float, key: str) -> list[Source]:
    """Where each row of a batch comes from: a keyed coin decides whether it is the student's, another one whether that
    is fresh."""
    found: list[Source] = []
    for row in range(rows):
        own, fresh = uniform(f"{key}/{step}/{row}/own"), uniform(f"{key}/{step}/{row}/fresh")
        found.append("reference" if own >= student_share else "fresh" if fresh < fresh_share else "kept")
    return found


def uniform(key: str) -> float:
    """A number in [0, 1) that is a function of its key."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big")).random()


def packed(rows: Sequence[Example]) -> State:
    """Rows by the name of their prompt, and what is learnt of them."""
    ids = [token for row in rows for token in row.response_ids]
    return State(
        {"uids": [row.uid for row in rows], "lengths": [len(row.response_ids) for row in rows]},
        {"response_ids": torch.tensor(ids, dtype=torch.int32)},
    )


def unpacked(state: State, prompts: Sequence[Prompt]) -> list[Written]:
    """The same rows again; ``CheckpointError`` where one of their prompts is not there."""
    found = named(prompts, set(state.record["uids"]))
    rows, ids, at = list[Written](), state.tensors["response_ids"].tolist(), 0
    for uid, length in zip(state.record["uids"], state.record["lengths"], strict=True):
        if uid not in found:
            raise CheckpointError(
                f"the checkpoint has a response to row {uid!r}, which the prompts do not have\n"
                "  resume with the prompts that it was made with"
            )
        rows.append(Written(uid, found[uid].ids, tuple(ids[at : at + length])))
        at += length
    return rows


@dataclass(slots=True)
class Replay:
    """The student's last ``capacity`` responses, oldest first (DistiLLM's buffer, Ko et al. 2024)."""

    capacity: int
    rows: list[Written] = field(default_factory=list)

    def add(self, rows: Iterable[Written]) -> None:
        """Keeps them; the oldest make room."""
        self.rows = [*self.rows, *rows][-self.capacity :] if self.capacity else []

    @property
    def full(self) -> bool:
        """Whether it keeps all that it can; one that keeps nothing never is."""
        return 0 < self.capacity == len(self.rows)

    def draw(self, count: int, key: str) -> list[Written]:
        """So many of them by keyed numbers: each once before any comes again. There must be one."""
        places, found = list(range(len(self.rows))), list[Written]()
        for number in range(count):
            # The first `done` places have been dealt in this round; one of the others is swapped to their end.
            done = number % len(places)
            other = done + int(uniform(f"{key}/{number}") * (len(places) - done))
            places[done], places[other] = places[other], places[done]
            found.append(self.rows[places[done]])
        return found

    def state(self) -> State:
        """The rows."""
        return packed(self.rows)

    def restore(self, state: State, prompts: Sequence[Prompt]) -> None:
        """Has them again, ``prompts`` being those that were answered."""
        self.rows = unpacked(state, prompts)


@dataclass(slots=True)
class FollowedShare:
    """The chance of a row being the student's: rises by ``step`` (to 1 at most) where the validation loss has risen by
    ``rise`` since its last rise, at first since the first validation (Ko et al. 2024, adaptive student text)."""

    share: float
    step: float
    rise: float
    since: float | None = None

    def hear(self, loss: float) -> None:
        """The loss of one validation, nats a token; one that is no finite number changes nothing."""
        if not math.isfinite(loss):
            return  # as ``since`` it could never be passed
        if self.since is None:
            self.since = loss
        elif loss >= self.since + self.rise:
            self.share, self.since = min(1.0, self.share + self.step), loss

    def state(self) -> State:
        """The share, and what the next loss is compared with."""
        return State({"share": self.share, "since": self.since})

    def restore(self, state: State) -> None:
        """Has them again."""
        self.share, self.since = state.record["share"], state.record["since"]
