"""One question to its end: from the cache, or asked as often as need be, or given up with a reason."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.judge.cache import Cache, fingerprint
from minillm.judge.client import ChatClient, Failed, Refused, Reply, Unreadable
from minillm.judge.cost import Meter, OverBudget
from minillm.judge.prompts import Form, Verdict, again
from minillm.judge.settings import EndpointError, JudgeSettings

LONGEST_BACKOFF = 30.0
LONGEST_WAIT = 300.0
"""Seconds; a server that asks for a longer wait is not waited for."""
GIVE_UP = 20
"""Questions without an answer, one after another, after which the endpoint is held to be of no use."""
NOT_ASKED = "not asked: the cost limit"
NOT_AGAIN = "not asked again: the cost limit"
"""Stands behind what came of the tries before."""

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one question. ``verdict`` None: unjudged, for ``reason``."""

    verdict: Verdict | None
    reply: str = ""
    """As the endpoint gave it, but for the key."""
    model: str = ""
    reason: str = ""
    cached: bool = False


class Asker:
    """Asks questions of one form, from several threads, with one cache and one purse."""

    def __init__(self, client: ChatClient, cache: Cache, meter: Meter, *, settings: JudgeSettings, form: Form) -> None:
        self._client, self._cache, self._meter = client, cache, meter
        self._settings, self._form = settings, form
        self._lock, self._failures = threading.Lock(), 0
        self.stop = threading.Event()
        """Set when nothing more is to be asked; who waits then stops waiting."""

    @property
    def workers(self) -> int:
        """How many questions may be asked at a time."""
        return self._settings.concurrency

    def ask(self, messages: Messages) -> Answer:
        """The answer to one question. Raises ``EndpointError`` where the endpoint is of no use to any question."""
        key = fingerprint(
            endpoint=self._settings.completions,  # whole: a query may choose the deployment
            model=self._settings.model,
            messages=messages,
            settings={"max_tokens": self._settings.max_tokens, "temperature": 0, "seed": 0},
            form=self._form.name,
        )
        if (row := self._cache.get(key)) is not None:
            return Answer(verdict=row["verdict"], reply=row["reply"], model=row["model"], cached=True)
        try:
            answer = self._tried(messages)
        except OverBudget:
            return Answer(verdict=None, reason=NOT_ASKED)
        except EndpointError:
            self.stop.set()  # here, so that this thread and the others do not go on to their next questions
            raise
        if answer.verdict is not None:
            self._cache.put({"key": key, "verdict": answer.verdict, "reply": answer.reply, "model": answer.model})
        self._count(answer)
        return answer

    def _tried(self, messages: Messages) -> Answer:
        """Asks until a verdict comes or the tries are used up. Raises ``OverBudget`` where the first is too dear."""
        reason, reply, asked, tries = "", Reply(text="", model="", used=None), messages, self._settings.retries + 1
        for attempt in range(tries):
            if self.stop.is_set():
                raise OverBudget
            try:
                reply = self._once(asked)
            except OverBudget:
                if attempt == 0:
                    raise
                reason = f"{reason}, {NOT_AGAIN}"
                break
            except Refused as failure:
                return Answer(verdict=None, reason=failure.reason)
            except Failed as failure:
                reason = failure.reason
                if attempt + 1 == tries and failure.down:
                    raise self._down(failure) from None
                if attempt + 1 < tries:
                    self._wait(failure, attempt)
                continue
            verdict = self._form.read(reply.text)
            said, model = self._client.redact(reply.text), self._client.redact(reply.model)
            if verdict is not None:
                return Answer(verdict=verdict, reply=said, model=model)
            reason = f"no {self._form.name} in the reply"
            asked = again(messages, reply.text, self._form)
        return Answer(verdict=None, reason=reason, reply=self._client.redact(reply.text))

    def _once(self, messages: Sequence[dict[str, str]]) -> Reply:
        """One request, paid for."""
        held = self._meter.hold(sum(len(m["content"].encode("utf-8", "replace")) for m in messages), self.stop)
        used, charged = None, False
        try:
            reply = self._client.send(messages)
            used, charged = reply.used, True
            return reply
        except Failed as failure:
            charged = failure.charged
            used = failure.used if isinstance(failure, Unreadable) else None
            raise
        finally:
            self._meter.settle(held, used=used, charged=charged)

    def _wait(self, failure: Failed, attempt: int) -> None:
        # Jitter, so that threads that were refused together do not come back together.
        backoff = min(LONGEST_BACKOFF, self._settings.backoff * 2**attempt) * random.uniform(0.5, 1.0)
        asked = failure.wait_s or 0.0
        if asked > LONGEST_WAIT:
            raise EndpointError(
                f"{self._settings.shown} asks to wait {asked:.0f} s ({failure.reason})\n"
                "  run the same command again then: what was answered is kept"
            )
        self.stop.wait(max(backoff, asked))

    def _down(self, failure: Failed) -> EndpointError:
        return EndpointError(
            f"{self._settings.shown} cannot be reached: {failure.down}\n"
            "  start the server, or check --url; the same command goes on from there: what was answered is kept"
        )

    def _count(self, answer: Answer) -> None:
        with self._lock:
            self._failures = self._failures + 1 if answer.verdict is None else 0
            if self._failures >= GIVE_UP:
                self.stop.set()
                raise EndpointError(
                    f"{self._settings.shown}: {GIVE_UP} questions in a row without a verdict, the last one: "
                    f"{answer.reason}\n  mend that; what was answered is kept"
                )
