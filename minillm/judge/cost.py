"""What a judging costs, in tokens and in money, and the limit that no request may cross.

Before a request the most that it can cost is held back: as many tokens as its text has bytes, and the longest reply.
Once it is answered the server's own count takes that place. So the limit is kept whatever the replies are.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from minillm.judge.settings import JudgeSettings

OVERHEAD = 64
"""Tokens that a server's chat template may add to a request."""
MILLION = 1_000_000


class OverBudget(Exception):
    """One more request could cost more than is left."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of prompts and of replies."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


class Meter:
    """Counts what is spent, for several threads."""

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings, self._changed = settings, threading.Condition()
        self._spent, self._held, self._assumed = Tokens(), Tokens(), Tokens()
        self.requests = 0
        self.stopped = False
        """Whether a request was left out for the limit."""

    def hold(self, text_bytes: int, stop: threading.Event) -> Tokens:
        """Holds back what a request can cost at most. Raises ``OverBudget`` where that is more than is left."""
        most = Tokens(text_bytes + OVERHEAD, self._settings.max_tokens)
        limit = self._settings.max_cost
        with self._changed:
            # While others are under way they hold more than they will cost: what is left shows when they are done.
            while limit is not None and self.worth(self._spent + self._held + most) > limit:
                if self._held == Tokens() or stop.is_set():
                    self.stopped = True
                    raise OverBudget
                self._changed.wait(0.5)
            self._held += most
            self.requests += 1
            return most

    def settle(self, held: Tokens, *, used: Tokens | None, charged: bool) -> None:
        """Puts what a request cost in the place of what was held back.

        ``used`` None: the server did not say; then, if it may have ``charged``, all that was held counts.
        """
        with self._changed:
            self._held -= held
            if used is not None:
                self._spent += used
            elif charged:
                self._spent += held
                self._assumed += held
            self._changed.notify_all()

    def worth(self, tokens: Tokens) -> float:
        """Money where there are prices, else tokens."""
        if self._settings.price_in is None or self._settings.price_out is None:
            return float(tokens.prompt + tokens.completion)
        prices = self._settings.price_in, self._settings.price_out
        return (tokens.prompt * prices[0] + tokens.completion * prices[1]) / MILLION

    def record(self) -> dict[str, Any]:
        """Ready for JSON; ``money`` is None without prices."""
        with self._changed:
            return {
                "requests": self.requests,
                "prompt_tokens": self._spent.prompt,
                "completion_tokens": self._spent.completion,
                "assumed_tokens": self._assumed.prompt + self._assumed.completion,
                "money": None if self._settings.price_in is None else round(self.worth(self._spent), 6),
                "limit": self._settings.max_cost,
                "stopped_by_limit": self.stopped,
            }
