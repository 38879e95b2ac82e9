"""An endpoint that is slow, rude, broken, indiscreet or dear, as a real server on this machine.

1. What is transient is tried again and what is not is told at once; what stays unjudged is counted, never guessed.
2. The key is in no file, no message and no log, whatever the server does with it.
3. Nothing is asked twice, and nothing is spent beyond the limit.
"""

from __future__ import annotations

import email.utils
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.errors import ConfigError, DataError
from minillm.judge import JudgeSettings, judge
from minillm.judge import ask as ask_module
from minillm.judge.client import REDACTED, ChatClient, Failed, retry_after
from minillm.judge.cost import Meter, OverBudget, Tokens
from minillm.judge.settings import KEY_NAME, EndpointError, read_key
from minillm.progress import Progress
from tests.chat_server import Answering, Json, Server, evaluation, failing, fair, points, settings, shown

KEY = "sk-secret-0123456789abcdef"


@pytest.mark.parametrize(
    "response",
    [
        (500, {}, "oops"),
        (502, {}, b"\xff\xfe"),
        (503, {"Retry-After": "0"}, "{}"),
        (200, {}, "not json"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"message": {"content": null}}]}'),
        (200, {"Content-Encoding": "gzip"}, "not gzip"),
        (200, {"Content-Length": "999"}, "cut short"),
        "I would rather not say.",
        "Scores: 7",
        "Scores: 0 11",
        "Scores: 7 9\nor perhaps the other way round",
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value))[:40],
)
def test_what_is_transient_is_tried_again(server: Server, good: Path, response: Any) -> None:
    server.answer = failing(2, response, points)
    record = judge(good, settings=settings(server, concurrency=1))
    assert record["score"]["mean"] == 75.0 and record["unjudged"] == 0
    assert record["cost"]["requests"] == 14


def test_an_unreadable_reply_is_shown_to_the_judge_with_a_request_for_its_last_line(server: Server, good: Path) -> None:
    server.answer = failing(1, "Both are nice.", points)
    judge(good, settings=settings(server, concurrency=1))
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and "Scores: X Y" in server.requests[1]["messages"][2]["content"]


def test_what_stays_unreadable_is_counted_and_never_guessed(server: Server, good: Path) -> None:
    server.answer = lambda body: "Scores: good enough" if "gold 3" in shown(body) else points(body)
    record = judge(good, settings=settings(server))
    assert (record["judged"], record["unjudged"]) == (5, 1)
    assert record["unanswered"] == {"no scores in the reply": 2} and record["score"]["mean"] == 75.0
    rows = [json.loads(line) for line in (good / "judge" / "judgements.jsonl").read_text().splitlines()]
    assert [row["reply"] for row in rows if row["verdict"] is None] == ["Scores: good enough"] * 2


def test_a_rate_limit_is_waited_for_as_long_as_it_says(server: Server, good: Path) -> None:
    times: list[float] = []

    def answer(body: Json) -> Any:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}') if len(times) == 1 else points(body)

    server.answer = answer
    record = judge(good, settings=settings(server, concurrency=1))
    assert times[1] - times[0] >= 1 and record["unjudged"] == 0
    assert times[2] - times[1] < 1  # the control: nothing else waits


def test_a_wait_that_is_too_long_ends_the_judging(server: Server, good: Path) -> None:
    server.answer = lambda body: (429, {"Retry-After": "3600"}, "")
    with pytest.raises(EndpointError, match="asks to wait 3600 s"):
        judge(good, settings=settings(server))


def test_a_retry_date_is_read() -> None:
    later = email.utils.format_datetime(email.utils.localtime().replace(microsecond=0))
    assert retry_after(later) == pytest.approx(0, abs=2)
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert [retry_after(text) for text in (None, "soon", "-3", "nan", "1e9", "2.5")] == [
        None,
        None,
        None,
        None,
        None,
        2.5,
    ]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses access .* MINILLM_JUDGE_KEY in the environment"),
        (403, "refuses access"),
        (404, "knows no model 'judge'.*--url .*--model"),
        (302, "HTTP 302"),
        (402, "HTTP 402"),
    ],
)
def test_what_no_further_try_mends_is_told_after_one(server: Server, good: Path, status: int, words: str) -> None:
    server.answer = lambda body: (
        status,
        {"Location": "http://127.0.0.1:9/"},
        '{"error": {"message": "no\\u001b[31m"}}',
    )
    with pytest.raises(EndpointError, match=f"(?s){words}") as raised:
        judge(good, settings=settings(server, concurrency=1))
    assert len(server.requests) == 1 and "\x1b" not in str(raised.value)
    assert not (good / "judge" / "judge.json").exists()


def test_a_question_that_is_refused_alone_is_unjudged_and_asked_once(server: Server, good: Path) -> None:
    told = (400, {}, '{"error": {"message": "maximum context length is 9 tokens, max_tokens is not supported above"}}')
    server.answer = lambda body: told if "gold 0" in shown(body) else points(body)
    record = judge(good, settings=settings(server))
    assert (record["unjudged"], len(server.requests)) == (1, 12) and record["notes"] == []


def test_settings_that_the_endpoint_does_not_take_are_left_out_and_told(server: Server, good: Path) -> None:
    def strict(body: Json) -> Any:
        for name in ("seed", "max_tokens", "temperature"):
            if name in body:
                return (400, {}, json.dumps({"error": {"message": f"Unsupported parameter: '{name}'"}}))
        return points(body)

    server.answer = strict
    record = judge(good, settings=settings(server, concurrency=1))
    assert record["unjudged"] == 0 and len(server.requests) == 15
    assert server.requests[-1]["max_completion_tokens"] == 1024
    assert [note.split(":")[0] for note in record["notes"]] == [
        "the endpoint takes no seed",
        "the endpoint takes no temperature",
    ]


def test_a_server_that_is_slow_or_trickles_is_timed_out(server: Server, good: Path, tmp_path: Path) -> None:
    def slow(body: Json) -> Any:
        if "gold 1" in shown(body):
            time.sleep(1.5)
        return points(body)

    server.answer = slow
    record = judge(good, settings=settings(server, timeout=0.6, retries=0))
    assert record["unanswered"] == {"no answer within 0.6 s": 2} and record["judged"] == 5
    assert record["cost"]["assumed_tokens"] > 0  # it may have been charged

    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def trickle() -> None:
            link, _ = listening.accept()
            with link:
                link.recv(65536)
                link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not done.wait(0.05):
                    try:
                        link.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        start = time.monotonic()
        trickled = JudgeSettings(url=url, model="m", timeout=0.3)
        with ChatClient(trickled, key="") as client, pytest.raises(Failed, match=r"no answer within 0\.3 s"):
            client.send([{"role": "user", "content": "x"}])
        assert time.monotonic() - start < 2
        done.set()
        thread.join(5)


def test_an_endpoint_that_is_down_is_told_and_nothing_is_overwritten(server: Server, good: Path) -> None:
    server.answer = points
    judge(good, settings=settings(server), limit=2)
    out = good / "judge"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    server.close()
    with pytest.raises(EndpointError, match="cannot be reached"):
        judge(good, settings=settings(server))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_endpoint_that_answers_nothing_at_all_replaces_no_results(server: Server, good: Path) -> None:
    server.answer = points
    judge(good, settings=settings(server))
    before = (good / "judge" / "judge.json").read_bytes()
    (good / "judge" / "cache.jsonl").unlink()
    server.answer = lambda body: (500, {}, "down for today")
    with pytest.raises(EndpointError, match=r"no prompt could be judged: HTTP 500: down for today \(12\)"):
        judge(good, settings=settings(server, retries=0))
    assert (good / "judge" / "judge.json").read_bytes() == before


def test_many_failures_in_a_row_end_the_judging_early(server: Server, tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "many", ["good"] * 40)
    server.answer = lambda body: (500, {}, "")
    with pytest.raises(EndpointError, match="20 questions in a row"):
        judge(folder, settings=settings(server, retries=0))
    assert len(server.requests) <= ask_module.GIVE_UP + 2


def outputs(folder: Path) -> str:
    return "".join(f"{file}\n{file.read_bytes()!r}" for file in sorted(folder.rglob("*")) if file.is_file())


def echo(body: Json) -> str:
    return f"Your key is {KEY}.\n{fair(body)}"


INDISCREET: dict[str, Answering] = {
    "reply": echo,
    "unreadable": lambda body: f"no verdict for {KEY}" if "good 0" in shown(body) else fair(body),
    "header": lambda body: (401, {"X-Your-Key": KEY}, ""),
    "error": lambda body: (401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})),
    "text": lambda body: (500, {}, f"{'x' * 190}{KEY}"),
    "steering": lambda body: (403, {}, f"{KEY[:9]}\x1b[31m{KEY[9:]}"),
    "missing": lambda body: (404, {}, KEY),
    "refused": lambda body: (400, {}, KEY),
    "model": lambda body: (
        200,
        {},
        json.dumps({"model": KEY, "choices": [{"message": {"content": f"Verdict: 1\n\nVerdict: {KEY}\nVerdict: 1"}}]}),
    ),
}


@pytest.mark.parametrize("kind", INDISCREET)
def test_the_key_is_sent_and_stands_nowhere(  # noqa: PLR0917 (pytest fills them by name)
    server: Server,
    good: Path,
    bad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    monkeypatch.setenv(KEY_NAME, KEY)
    caplog.set_level("DEBUG")
    server.answer = INDISCREET[kind]
    words = ["judge", str(good), str(bad), "--url", server.url, "--model", "m", "--json", str(tmp_path / "j.json")]
    code = cli._guarded(lambda **options: cli.app([*words, "--retries", "0"], **options))
    said = capfd.readouterr()
    assert code == (0 if kind in ("reply", "unreadable", "model") else 2)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    everything = outputs(tmp_path) + said.out + said.err + caplog.text
    assert KEY not in everything and KEY[3:] not in everything
    # The control: the server's words are there, and the key would be among them.
    assert REDACTED in everything or kind == "header"


def test_without_a_key_no_authorisation_is_sent(server: Server, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = points
    judge(good, settings=settings(server), limit=1)
    assert all("authorization" not in headers for headers in server.headers)
    monkeypatch.setenv(KEY_NAME, " own-key-first\n")
    judge(good, settings=settings(server), limit=2)
    assert server.headers[-1]["authorization"] == "Bearer own-key-first"


@pytest.mark.parametrize("key", ["sk-with space", "sk-line\nfeed-12345", "sk-ключ-12345"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(server: Server, key: str) -> None:
    with pytest.raises(ConfigError, match="MINILLM_JUDGE_KEY: holds characters") as raised:
        read_key(settings(server), {KEY_NAME: key})
    assert key not in str(raised.value)


def test_a_key_in_the_address_or_the_model_is_refused(server: Server) -> None:
    for changes in ({"url": f"{server.url}?api={KEY}"}, {"model": KEY}):
        with pytest.raises(ConfigError, match="stands in --url or --model") as raised:
            read_key(settings(server, **changes), {KEY_NAME: KEY})
        assert KEY not in str(raised.value)
    with pytest.raises(ConfigError, match="name or password") as raised:
        settings(server, url=f"https://me:{KEY}@example.org/v1")
    assert KEY not in str(raised.value)


def test_a_second_judging_asks_nothing(server: Server, good: Path) -> None:
    server.answer = points
    first = judge(good, settings=settings(server), limit=4)
    assert len(server.requests) == 8
    again = judge(good, settings=settings(server))
    assert len(server.requests) == 12 and again["cost"]["cached"] == 8
    third = judge(good, settings=settings(server, concurrency=1, retries=0))
    assert len(server.requests) == 12 and third["cost"]["requests"] == 0
    assert third["score"] == first["score"] | {"ci95": third["score"]["ci95"]} == again["score"]


def test_another_model_template_or_length_of_reply_is_another_question(
    server: Server, good: Path, tmp_path: Path
) -> None:
    """The control of the test above: the cache does not answer everything."""
    server.answer = points
    template = tmp_path / "own.txt"
    template.write_text("Which is better?\n{answer_1}\n{answer_2}\nto {prompt}\n")
    out = tmp_path / "out"
    for n, (changes, more) in enumerate(
        [({}, {}), ({"model": "other"}, {}), ({"max_tokens": 99}, {}), ({}, {"template": template})], start=1
    ):
        judge(good, settings=settings(server, **changes), out=out, fresh=True, **more)
        assert len(server.requests) == 12 * n


def test_broken_lines_of_the_cache_are_told_and_asked_again(server: Server, good: Path) -> None:
    server.answer = points
    judge(good, settings=settings(server))
    file = good / "judge" / "cache.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = "{"
    lines[1] = json.dumps(json.loads(lines[1]) | {"verdict": [1, 99]})
    file.write_text("\n".join(lines)[:-5])  # the last one without its end, too
    told: list[str] = []
    record = judge(good, settings=settings(server), say=told.append)
    assert len(server.requests) == 12 + 3 and record["score"]["mean"] == 75.0
    assert any("3 broken lines of cache.jsonl are passed over (line 1, 2, 12)" in line for line in told)
    judge(good, settings=settings(server))
    assert len(server.requests) == 12 + 3  # what was added after the ragged end can be read


def test_an_interrupted_judging_keeps_its_answers(server: Server, good: Path) -> None:
    calls: list[int] = []

    def answer(body: Json) -> Any:
        calls.append(1)
        return (401, {}, "") if len(calls) > 5 else points(body)

    server.answer = answer
    with pytest.raises(EndpointError):
        judge(good, settings=settings(server, concurrency=1))
    server.requests.clear()
    server.answer = points
    record = judge(good, settings=settings(server))
    assert len(server.requests) == 12 - 5 and record["cost"]["cached"] == 5


def test_ctrl_c_keeps_the_answers_and_leaves_the_results(
    server: Server, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(bar: Progress, done: int, numbers: object) -> None:
        if done == 4:
            raise KeyboardInterrupt

    server.answer = points
    words = ["judge", str(good), "--url", server.url, "--model", "judge", "--concurrency", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        assert cli._guarded(lambda **options: cli.app(words, **options)) == 130
    assert "a judge its answers" in capsys.readouterr().err
    kept = (good / "judge" / "cache.jsonl").read_text().splitlines()
    assert len(kept) >= 4 and not (good / "judge" / "judge.json").exists()
    server.requests.clear()
    assert judge(good, settings=settings(server))["cost"]["cached"] == len(kept)


def test_results_of_another_judging_are_refused_until_fresh(server: Server, good: Path, bad: Path) -> None:
    server.answer = points
    out = good / "j"
    judge(good, settings=settings(server), out=out)
    before = (out / "judge.json").read_bytes()
    with pytest.raises(DataError, match="differ in: evaluations"):
        judge(bad, settings=settings(server), out=out)
    assert (out / "judge.json").read_bytes() == before
    judge(bad, settings=settings(server), out=out, fresh=True)
    assert (out / "judge.json").read_bytes() != before
    (out / "judge.json").write_text("[]")
    with pytest.raises(DataError, match="not the results of a judging"):
        judge(bad, settings=settings(server), out=out)


def test_cost_is_counted_in_tokens_and_in_money(server: Server, good: Path) -> None:
    server.answer = points
    record = judge(good, settings=settings(server, price_in=10.0, price_out=100.0))
    wanted = {"requests": 12, "prompt_tokens": 1200, "completion_tokens": 120, "assumed_tokens": 0, "money": 0.024}
    assert record["cost"] == {**wanted, "limit": None, "stopped_by_limit": False, "cached": 0}


@pytest.mark.parametrize("prices", [{}, {"price_in": 1e6, "price_out": 1e6}])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_limit_stops_before_it_is_crossed_and_a_higher_one_goes_on(
    server: Server, good: Path, prices: Json, concurrency: int
) -> None:
    server.answer = points
    server.usage = {"prompt_tokens": 400, "completion_tokens": 10}
    told = {"max_tokens": 20, "concurrency": concurrency, **prices}
    record = judge(good, settings=settings(server, max_cost=3500, **told))
    spent = record["cost"]["prompt_tokens"] + record["cost"]["completion_tokens"]
    assert record["cost"]["stopped_by_limit"] and 0 < spent <= 3500
    assert 0 < record["judged"] < 6 and "not asked: the cost limit" in record["unanswered"]
    asked = len(server.requests)
    full = judge(good, settings=settings(server, **told))
    assert full["judged"] == 6 and len(server.requests) == 12 and full["cost"]["cached"] == asked


def test_what_others_hold_back_is_waited_for(server: Server) -> None:
    """A limit that pays for both requests as they turn out, but not for the most that both may cost at a time."""
    meter = Meter(settings(server, max_cost=300, max_tokens=100))
    first, second = meter.hold(36, threading.Event()), []
    thread = threading.Thread(target=lambda: second.append(meter.hold(36, threading.Event())))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and second == []
    meter.settle(first, used=Tokens(10, 10), charged=True)
    thread.join(5)
    assert second == [first] and not meter.stopped
    with pytest.raises(OverBudget):
        meter.settle(second[0], used=Tokens(100, 50), charged=True)
        meter.hold(36, threading.Event())


def test_a_limit_that_pays_for_no_question_is_told(server: Server, good: Path) -> None:
    with pytest.raises(ConfigError, match="max_cost: got 50, less than judging one prompt may cost"):
        judge(good, settings=settings(server, max_cost=50))
    assert server.requests == []


def test_a_server_that_counts_nothing_is_charged_with_the_most_that_was_possible(server: Server, good: Path) -> None:
    server.answer, server.usage = points, None
    record = judge(good, settings=settings(server), limit=1)
    cost = record["cost"]
    assert cost["assumed_tokens"] == cost["prompt_tokens"] + cost["completion_tokens"] > 2 * 1024


def test_no_more_requests_are_under_way_than_was_said(server: Server, good: Path) -> None:
    def answer(body: Json) -> str:
        time.sleep(0.05)
        return points(body)

    server.answer = answer
    judge(good, settings=settings(server, concurrency=3))
    assert 2 <= server.most_busy <= 3
