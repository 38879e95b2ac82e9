"""A11: nothing leaves this machine, but for a model or data set that a configuration names on the hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from tests.attacks.hostile import Place, Run, refused
from tests.conftest import is_loopback


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every host that is looked up or connected to beyond this machine, though the guard refuses it."""
    found: list[object] = []
    plain_lookup, plain_connect = socket.getaddrinfo, socket.socket.connect

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_loopback(host):
            found.append(host)
        return plain_lookup(host, *args, **kwargs)

    def connect(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            found.append(address)
        plain_connect(sock, address)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket.socket, "connect", connect)
    # Online, as on a user's machine: what is not asked for must not even be tried.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield found


def test_a_run_on_files_asks_nobody(asked: list[object], place: Place, run: Run) -> None:
    assert run("distill", "--config", place.config).code == 0
    for command, out in (("evaluate", "e"), ("generate", "g.jsonl")):
        assert run(command, place.student, "--config", place.config, "--out", place.top / out).code == 0
    assert run("report", place.top / "e", "--out", place.top / "r").code == 0
    assert asked == []


def test_control_a_name_of_the_hub_is_asked_for_and_the_guard_refuses(
    asked: list[object], place: Place, run: Run
) -> None:
    refused(run("distill", "--config", place.config, "student=nobody/nothing"), "ModelError", "nobody/nothing")
    assert asked


@pytest.mark.parametrize("name", ["https://example.invalid/m", "file:///etc", "s3://x/y", "//example.invalid/m"])
def test_an_address_is_no_model_and_no_data(name: str, asked: list[object], place: Place, run: Run) -> None:
    assert run("distill", "--config", place.config, f"student={name}").code == 2
    assert run("distill", "--config", place.config, f"data.train={name}.jsonl").code == 2
    assert asked == []
