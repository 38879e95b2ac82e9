"""What the tests of ``minillm judge`` share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm.judge.settings import KEY_NAME, OPENAI_KEY_NAME
from tests.chat_server import Server, evaluation


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in (KEY_NAME, OPENAI_KEY_NAME):
        monkeypatch.delenv(name, raising=False)
    served = Server()
    yield served
    served.close()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "good", [f"good {n}" for n in range(6)])


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return evaluation(tmp_path / "bad", [f"bad {n}" for n in range(6)])
