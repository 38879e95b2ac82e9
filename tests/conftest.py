"""What every test runs under: no network, one thread, no display, no drawing but where it is asked for.

The environment is set before anything imports torch or transformers, and ranks that a test starts inherit it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.counted import (  # noqa: F401 (pytest finds hooks here by their names)
    pytest_collection_finish,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_xdist_node_collection_finished,
)

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # torch reads it when it is imported
    TOKENIZERS_PARALLELISM="false",
)


class NetworkRefused(RuntimeError):
    """A test tried to leave this machine. Not an ``OSError``, which libraries catch to try again."""


def is_loopback(host: object) -> bool:
    """True for this machine under its loopback names and addresses, and for "no host": listen anywhere."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", "localhost.localdomain"):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True, scope="module")
def quick_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports have drawings in files with ``pytestmark = pytest.mark.pictures`` only, and collections are short."""
    from tests import quick

    quick.short_collections()
    drawn = request.node.get_closest_marker("pictures") is not None
    with contextlib.nullcontext() if drawn else quick.undrawn():
        yield


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse connections and look-ups that leave this machine, for the whole session."""
    plain_connect, plain_connect_ex, plain_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse_remote(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            raise NetworkRefused(f"a test connects to {address!r}; tests use this machine only")

    def connect(sock: socket.socket, address: Any) -> None:
        refuse_remote(sock, address)
        plain_connect(sock, address)

    def connect_ex(sock: socket.socket, address: Any) -> int:
        refuse_remote(sock, address)
        return plain_connect_ex(sock, address)

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_loopback(host) and host != socket.gethostname():
            raise NetworkRefused(f"a test looks up {host!r}; tests use this machine only")
        return plain_lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield
