"""The suite stays on this machine, on one thread."""

from __future__ import annotations

import os
import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443)])
def test_a_connection_off_this_machine_is_refused(address: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match="this machine only"):
        socket.create_connection(address, timeout=0.1)


def test_a_bare_socket_off_this_machine_is_refused() -> None:
    with socket.socket() as sock, pytest.raises(RuntimeError, match="this machine only"):
        sock.connect_ex(("192.0.2.1", 80))


def test_a_connection_within_this_machine_is_allowed() -> None:
    """The negative control: the guard does not simply refuse everything."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client,
    ):
        assert client.getpeername()[0] == "127.0.0.1"


def test_hub_look_ups_are_switched_off() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_torch_runs_on_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1
