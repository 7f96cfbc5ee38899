"""The guard's loop, one turn at a time: its sign of life while it is busy (PROTOCOL G2), and who is obeyed (G3)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from cluster_agent.executors.base import AttemptKey, Features, StartRequest
from cluster_agent.guard import host, isolation
from cluster_agent.guard.cgroups import RECORD, Groups
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import KEEPERS, Frames, Message, SocketDirectory, encode, start_batches
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


def messages(agent: socket.socket) -> list[Message]:
    """What came."""
    data = b""
    with suppress(BlockingIOError):
        while part := agent.recv(1 << 20):
            data += part
    return list(Frames().feed(data))


def events(agent: socket.socket) -> list[str]:
    """What came, by its kind."""
    return [message["ev"] for message in messages(agent)]


@pytest.fixture
def dial(tmp_path: Path, server: Server) -> Iterator[Callable[[], socket.socket]]:
    """Agents of this process: each call is one more connection, which waits until the server looks."""
    with ExitStack() as opened:

        def connect() -> socket.socket:
            place = opened.enter_context(closing(SocketDirectory(tmp_path)))
            connection = opened.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(place.address)
            connection.setblocking(False)
            return connection

        yield connect


KEY = AttemptKey("0193a1b2c3d4", 0, 1, "beef")
[BATCH] = start_batches([StartRequest(KEY, 1, ("true",), {})])
START = encode({"op": "start", "requests": BATCH})
"""In a generation without a lease: carried out, it is a tombstone in the next census; void, it leaves nothing."""


def turn(server: Server) -> None:
    """Poll and serve: everything sent and connected so far is seen."""
    server._serve(server._epoll.poll(0.0))


def listed(agent: socket.socket) -> list[str]:
    """The attempts of the census that this connection was told."""
    return [entry["key"] for message in messages(agent) if message["ev"] == "census" for entry in message["entries"]]


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


def test_g1_an_agent_that_dies_amid_its_requests_does_not_take_the_guard_with_it(
    server: Server, agent: socket.socket
) -> None:
    """A sign of life is due between two of them, and finds nobody: the rest is void."""
    server._requests.extend([{"op": "configure", "fence": 9.0, "kill": 3.0}] * 2)
    server._ticked = 0.0
    agent.close()
    server._work()
    assert server._connection is None
    assert not server._requests


def test_g3_what_is_read_after_a_new_agent_came_is_void_though_the_poll_saw_only_the_old_one(
    server: Server, dial: Callable[[], socket.socket]
) -> None:
    """As when the guard is stopped between its poll and its read."""
    old = dial()
    turn(server)
    old.sendall(START)
    polled = server._epoll.poll(0.0)
    new = dial()
    server._serve(polled)
    assert listed(new) == []
    assert events(old)[-1] == "superseded"
    turn(server)
    last = dial()
    turn(server)
    assert listed(last) == []


def test_g3_what_waits_for_its_turn_is_void_when_a_new_agent_comes(
    server: Server, dial: Callable[[], socket.socket]
) -> None:
    """Read, but not carried out: a batch takes longer than a slice."""
    old = dial()
    turn(server)
    old.sendall(START)
    server._converse()
    assert server._requests
    new = dial()
    turn(server)
    assert listed(new) == []


def test_g3_what_was_carried_out_before_the_new_agent_came_is_in_its_census(
    server: Server, dial: Callable[[], socket.socket]
) -> None:
    old = dial()
    turn(server)
    old.sendall(START)
    turn(server)
    new = dial()
    turn(server)
    assert listed(new) == [KEY.text()]


def test_g3_of_two_agents_that_wait_the_later_one_is_served(server: Server, dial: Callable[[], socket.socket]) -> None:
    first, second = dial(), dial()
    turn(server)
    turn(server)
    assert events(first)[-1] == "superseded"
    second.sendall(START)
    turn(server)
    assert events(second)[-1] == "refused"
