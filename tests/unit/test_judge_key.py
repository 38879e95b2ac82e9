"""Where a judge's key may go, and what counts as one.

1. OPENAI_API_KEY goes to https://api.openai.com alone; every other server needs MINILLM_JUDGE_KEY, or none.
2. No key travels unencrypted off this machine, unless the user asks for it by name.
3. What is too short to be a key is not taken out of replies.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm import cli
from minillm.errors import ConfigError
from minillm.judge import JudgeSettings, judge
from minillm.judge.client import REDACTED
from minillm.judge.settings import KEY_NAME, OPENAI_KEY_NAME, read_key
from tests.chat_server import Server, points, settings

OWN, OPENAI = "own-key-0123456789", "sk-openai-0123456789"
BOTH = {KEY_NAME: OWN, OPENAI_KEY_NAME: OPENAI}


def at(url: str, **changes: bool) -> JudgeSettings:
    return JudgeSettings(url=url, model="m", **changes)


@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "https://API.OpenAI.com:443/v1"])
def test_openai_is_sent_its_own_key(url: str) -> None:
    assert read_key(at(url), {OPENAI_KEY_NAME: OPENAI}) == OPENAI
    assert read_key(at(url), BOTH) == OWN  # the judge's own comes first


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org/v1",
        "https://api.openai.com.example.org/v1",
        "https://example.org/api.openai.com/v1",
        "https://notapi.openai.com/v1",
        "http://api.openai.com/v1",
        "http://localhost:8000/v1",
        "http://192.168.0.7:8000/v1",
    ],
)
def test_nobody_else_is_sent_the_key_of_openai(url: str) -> None:
    assert not read_key(at(url), {OPENAI_KEY_NAME: OPENAI})


def test_a_server_that_is_sent_no_key_of_openai_says_which_is_wanted(
    server: Server, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(OPENAI_KEY_NAME, OPENAI)
    server.answer = lambda body: (401, {}, "")
    words = ["judge", str(good), "--url", server.url, "--model", "m", "--retries", "0"]
    assert cli._guarded(lambda **options: cli.app(words, **options)) == 2
    told = capsys.readouterr().err
    assert f"set {KEY_NAME}" in told and f"{OPENAI_KEY_NAME} goes to https://api.openai.com alone" in told
    assert all("authorization" not in headers for headers in server.headers)


@pytest.mark.parametrize("url", ["http://example.org/v1", "http://192.168.0.7:8000/v1", "http://[2001:db8::1]/v1"])
def test_no_key_travels_unencrypted_unless_it_is_asked_for(url: str) -> None:
    with pytest.raises(ConfigError, match=r"unencrypted[\s\S]*https[\s\S]*--unencrypted-key") as raised:
        read_key(at(url), BOTH)
    assert OWN not in str(raised.value)
    assert read_key(at(url, unencrypted_key=True), BOTH) == OWN
    assert not read_key(at(url), {})


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.1:8000/v1", "http://[::1]/v1"])
def test_this_machine_may_be_sent_a_key_in_the_clear(url: str) -> None:
    assert read_key(at(url), BOTH) == OWN


def test_the_command_refuses_before_anything_is_sent(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_NAME, OWN)
    words = ["judge", str(good), "--url", "http://192.0.2.1/v1", "--model", "m"]  # an address that nobody has
    assert cli._guarded(lambda **options: cli.app(words, **options)) == 2
    assert "--unencrypted-key" in capsys.readouterr().err and not (good / "judge").exists()


def test_a_filler_is_sent_and_not_taken_out_of_replies(
    server: Server, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(body: dict[str, object]) -> str:
        return f"There is none better, nonetheless.\n{points(body)}"

    server.answer = answer
    monkeypatch.setenv(KEY_NAME, "none")
    judge(good, settings=settings(server), limit=1)
    assert server.headers[-1]["authorization"] == "Bearer none"
    said = (good / "judge" / "judgements.jsonl").read_text()
    assert "There is none better, nonetheless." in said and REDACTED not in said
