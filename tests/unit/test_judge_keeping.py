"""What a judging does not lose, mix up or misname.

1. Results of more prompts are not replaced by those of fewer, by --limit or by --max-cost.
2. Two deployments behind one address share neither answers nor results.
3. A question that was asked and paid for is not told as one that was not asked, and its reply is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm.errors import DataError
from minillm.judge import judge
from minillm.judge.ask import NOT_AGAIN, NOT_ASKED
from tests.chat_server import Json, Server, points, settings, shown


def rows(out: Path) -> list[Json]:
    return [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]


def kept(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("judge.json", "judgements.jsonl")}


def test_fewer_prompts_do_not_replace_more_before_anything_is_asked(server: Server, good: Path) -> None:
    server.answer = points
    judge(good, settings=settings(server), limit=4)
    out, asked = good / "judge", len(server.requests)
    before = kept(out)
    (out / "cache.jsonl").unlink()
    with pytest.raises(DataError, match=r"of 4 prompts, this one has 2[\s\S]*--limit[\s\S]*--fresh"):
        judge(good, settings=settings(server), limit=2)
    assert kept(out) == before and len(server.requests) == asked
    judge(good, settings=settings(server), limit=4)
    assert judge(good, settings=settings(server))["prompts"] == 6  # more are welcome
    assert judge(good, settings=settings(server), limit=2, fresh=True)["prompts"] == 2


@pytest.mark.parametrize("single", [False, True])
def test_a_lower_limit_of_cost_does_not_replace_more_judged_prompts(
    server: Server, good: Path, bad: Path, single: bool
) -> None:
    server.answer = lambda body: points(body) if single else "Verdict: tie"
    server.usage = {"prompt_tokens": 400, "completion_tokens": 10}
    told: Json = {"max_tokens": 20, "concurrency": 1}
    out = good / "j"
    judge(good, bad, single=single, settings=settings(server, **told), out=out)
    before = kept(out)
    (out / "cache.jsonl").unlink()
    dear = settings(server, max_cost=4500, **told)
    with pytest.raises(DataError, match=r"judged prompts[\s\S]*cache[\s\S]*--max-cost[\s\S]*--fresh"):
        judge(good, bad, single=single, settings=dear, out=out)
    assert kept(out) == before
    answered = len((out / "cache.jsonl").read_text().splitlines())
    assert answered > 0
    again = judge(good, bad, single=single, settings=settings(server, **told), out=out)
    assert again["cost"]["cached"] == answered  # what was paid for is kept


def test_two_deployments_behind_one_host_and_path_share_nothing(server: Server, good: Path, tmp_path: Path) -> None:
    server.answer = lambda body: "Scores: 5 5"
    first, other = (settings(server, url=f"{server.url}?deployment={name}") for name in "ab")
    out = tmp_path / "out"
    judge(good, settings=first, out=out)
    with pytest.raises(DataError, match="differ in: address"):
        judge(good, settings=other, out=out)
    server.answer = lambda body: "Scores: 8 4" if "good" in shown(body)[0] else "Scores: 4 8"
    record = judge(good, settings=other, out=out, fresh=True)
    assert record["cost"]["cached"] == 0 and record["score"]["mean"] == 200.0
    assert judge(good, settings=first, out=out, fresh=True)["score"]["mean"] == 100.0  # its own answers
    assert b"deployment=" not in b"".join(file.read_bytes() for file in out.iterdir())


@pytest.mark.parametrize(
    ("response", "reason", "reply"),
    [
        ("Both are nice.", "no scores in the reply", "Both are nice."),
        ((200, {}, "not json"), "an answer that is not JSON", ""),
    ],
)
def test_a_question_that_was_asked_is_not_told_as_not_asked(
    server: Server, good: Path, response: Any, reason: str, reply: str
) -> None:
    """The limit pays for two prompts, and for the first try of a third, whose second it does not."""
    server.usage = {"prompt_tokens": 400, "completion_tokens": 10}
    good_ones = [points] * 4
    server.answer = lambda body: good_ones.pop()(body) if good_ones else response
    one = most(server, good)
    limit = 4 * 410 + one + 100 if isinstance(response, str) else 4 * 410 + 2 * one - 100
    record = judge(good, settings=settings(server, max_cost=limit, max_tokens=20, concurrency=1))
    assert record["judged"] == 2 and len(server.requests) == 5
    assert record["unanswered"] == {NOT_ASKED: 7, f"{reason}, {NOT_AGAIN}": 1}
    found = rows(good / "judge")[4]
    assert (found["verdict"], found["reply"]) == (None, reply)


def most(server: Server, good: Path) -> int:
    """Tokens that a question to this judge is held to cost at most."""
    from minillm.judge.cost import OVERHEAD
    from minillm.judge.prompts import FORMS, TEMPLATE, question

    content = question(TEMPLATE, FORMS["single"], prompt="Question 0?", first="good 0", second="gold 0")[0][0][
        "content"
    ]
    return len(content.encode()) + OVERHEAD + 20
