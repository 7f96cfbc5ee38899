"""The guard's sign of life while it is busy (PROTOCOL G2): the agent's heartbeats wait for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster_agent.executors.base import Features
from cluster_agent.guard import host, isolation
from cluster_agent.guard.cgroups import RECORD, Groups
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import KEEPERS, Frames
from cluster_agent.guard.server import Server
from cluster_agent.guard.workload import Spawner


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    ledger, places, groups = (
        Ledger(tmp_path, host.boot_id()),
        Places(tmp_path),
        Groups("test", tmp_path / RECORD, wanted=False),
    )
    keepers = os.open(tmp_path / KEEPERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    spawner = Spawner(places, groups, isolation.SCAN, keepers, keepers)
    made = Server(tmp_path, ledger, places, spawner, Features(False, False, ""), 0)
    yield made
    made._drop()
    made._listener.close()
    made._epoll.close()
    groups.close()
    ledger.close()
    os.close(keepers)


@pytest.fixture
def agent(server: Server) -> Iterator[socket.socket]:
    """The agent's end of a connection that the server has accepted."""
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        each.setblocking(False)
    server._connection = ours
    server._watch(ours.fileno(), lambda: None)
    yield theirs
    theirs.close()


def events(agent: socket.socket) -> list[str]:
    """What came, by its kind."""
    data = b""
    with suppress(BlockingIOError):
        while part := agent.recv(1 << 20):
            data += part
    return [message["ev"] for message in Frames().feed(data)]


def test_g2_a_guard_with_news_to_tell_still_says_that_it_lives(server: Server, agent: socket.socket) -> None:
    server._send({"ev": "stopped", "keys": ["k"]})  # as a request leaves it that was carried out just now
    server._breathe()
    assert events(agent) == ["stopped", "tick"]


def test_an_agent_that_does_not_read_is_told_no_more_of_it(server: Server, agent: socket.socket) -> None:
    server._send({"ev": "stopped", "keys": ["k" * (4 << 20)]})  # more than a socket takes
    server._breathe()
    waiting = len(server._unsent)
    assert waiting > 0
    server._ticked = 0.0
    server._breathe()
    assert len(server._unsent) == waiting
