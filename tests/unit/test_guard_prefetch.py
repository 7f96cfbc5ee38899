"""Recall at the guard, one turn at a time, with a real worker (PROTOCOL G5, F8): what the clock of a whole guard would hide."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster_agent.executors.base import AttemptKey
from cluster_agent.guard import host, isolation
from cluster_agent.guard.answers import read_answer
from cluster_agent.guard.cgroups import RECORD, Groups
from cluster_agent.guard.guard import Guard
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import KEEPERS, Message, code_to_wire, start_to_wire
from cluster_agent.guard.workload import Spawner
from tests.contract.test_prefetch import Marks

PATIENCE_SECONDS = 30.0


class Turns:
    """A guard whose loop turns when the test says so."""

    def __init__(self, directory: Path) -> None:
        self.told: list[Message] = []
        self.ledger = Ledger(directory, host.boot_id())
        self._watched: dict[int, Callable[[], None]] = {}
        self._keepers = os.open(directory / KEEPERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lives = os.pipe2(os.O_CLOEXEC)
        places, groups = Places(directory), Groups("test", directory / RECORD, wanted=False)
        spawner = Spawner(places, groups, isolation.SCAN, self._lives[0], self._keepers)
        self.guard = Guard(
            self.ledger, places, spawner, self.told.append, self._watched.__setitem__, self._unwatch, min_free_bytes=0
        )
        self.ask({"op": "configure", "fence": 300.0, "kill": 4.0})
        self.ask({"op": "renew", "gen": 1, "sent": host.boot()})

    def _unwatch(self, fd: int) -> None:
        self._watched.pop(fd, None)

    def ask(self, message: Message) -> None:
        """A request, carried out at once."""
        self.guard.handle(message, host.boot())

    def turn(self) -> None:
        """Look at everything once."""
        for fd in select.select(list(self._watched), [], [], 0.01)[0]:
            if fd in self._watched:
                self._watched[fd]()
        self.guard.settle(host.boot())

    def until(self, condition: Callable[[], bool], *, turning: bool = True) -> None:
        """Wait for it; the guard turns meanwhile, or stands still."""
        give_up = host.boot() + PATIENCE_SECONDS
        while not condition():
            assert host.boot() < give_up
            if turning:
                self.turn()
            else:
                select.select([], [], [], 0.005)

    def ends(self) -> dict[str, str]:
        """Causes of the exits that were told."""
        return {wire["key"]: wire["cause"] for message in self.told for wire in message.get("exits", ())}

    def close(self) -> None:
        """End all work."""
        self.guard.end(host.boot(), 0.0)
        self.until(lambda: self.guard.idle)
        self.ledger.close()
        for fd in (*self._lives, self._keepers):
            os.close(fd)


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[Turns]:
    made = Turns(tmp_path)
    yield made
    made.close()


@pytest.fixture
def marks(turns: Turns, tmp_path: Path) -> Marks:
    """Its code is at the guard, and one worker is warm."""
    made = Marks(tmp_path / "marks")
    warm = made.request("mark")
    assert warm.python is not None
    turns.ask(code_to_wire(warm.python))
    turns.guard.start_calls([start_to_wire(warm)], host.boot())
    turns.until(lambda: warm.key.text() in turns.ends())
    made.path.unlink()
    return made


def names(*keys: AttemptKey) -> list[str]:
    return [key.text() for key in keys]


def test_g5_an_order_for_a_call_that_is_over_does_not_meet_the_next_one(turns: Turns, marks: Marks) -> None:
    """Its answer is there and unread when the stop comes; the worker is at the next call already."""
    first, following = marks.request("mark"), marks.request("pause", 60.0)
    turns.guard.start_calls([start_to_wire(first), start_to_wire(following)], host.boot())
    turns.until(lambda: len(marks.words) == 2, turning=False)
    turns.ask({"op": "stop", "keys": names(first.key), "grace": 0.0})
    turns.until(lambda: any(message["ev"] == "stopped" for message in turns.told))
    assert turns.ends() == {**turns.ends(), first.key.text(): "exit"}
    for _ in range(20):
        turns.turn()
    assert following.key.text() not in turns.ends()


def test_g5_what_a_dead_worker_did_not_receive_goes_to_another_at_once(turns: Turns, marks: Marks) -> None:
    requests = [marks.request("leave", 3), *(marks.request("mark") for _ in range(3))]
    turns.guard.start_calls([start_to_wire(request) for request in requests], host.boot())
    turns.until(lambda: len(turns.ends()) == 5)  # no tick: what waits is recalled from the dead, not from the slow
    assert marks.words == names(*(request.key for request in requests))
    assert [turns.ledger.exits[name][1]["code"] for name in marks.words] == [3, 0, 0, 0]


@pytest.mark.parametrize("at", [0.0, 0.002, 0.004, 0.006, 0.01, 0.02])
def test_f8_a_worker_that_is_stopped_before_it_is_a_python_costs_its_call_only(
    turns: Turns, tmp_path: Path, at: float
) -> None:
    """Its pipe holds what no worker reads any more, the socket for answers among it."""
    request = Marks(tmp_path / "marks").request("pause", 60.0)
    assert request.python is not None
    turns.ask(code_to_wire(request.python))
    turns.guard.start_calls([start_to_wire(request)], host.boot())
    since = host.boot()
    turns.until(lambda: host.boot() >= since + at)
    turns.ask({"op": "stop", "keys": names(request.key), "grace": 0.0})
    turns.until(lambda: any(message["ev"] == "stopped" for message in turns.told))
    assert turns.ends()[request.key.text()] in ("stop", "spawn")


def test_f8_a_kill_that_meets_a_keeper_in_its_fork_is_seen_to_be_done(turns: Turns, tmp_path: Path) -> None:
    """The keeper collects the workload before `fork` has told it who that is; it once waited for ever, and its attempt with it."""
    ours, armed = os.getpid(), [True]

    def kill() -> None:
        if armed and os.getpid() != ours:
            os.kill(os.getpid(), signal.SIGUSR2)

    os.register_at_fork(after_in_parent=kill)
    request = Marks(tmp_path / "marks").request("pause", 60.0)
    assert request.python is not None
    turns.ask(code_to_wire(request.python))
    turns.guard.start_calls([start_to_wire(request)], host.boot())
    armed.clear()
    turns.until(lambda: request.key.text() in turns.ends())


def test_calls_that_hold_other_resources_do_not_get_each_others_places(turns: Turns, marks: Marks) -> None:
    """One holds a GPU, say: no limit tells them apart, and their numbers are those of two lanes of the agent."""
    plain, other = marks.request("pause", 60.0), marks.request("pause", 60.0)
    assert other.python is not None
    special = replace(other, python=replace(other.python, extended=(("gpu", 1),)))
    turns.guard.start_calls([start_to_wire(plain), start_to_wire(special)], host.boot())
    turns.until(lambda: sorted(marks.words) == sorted(names(plain.key, special.key)))


def test_f4_calls_of_one_batch_are_on_the_ledger_before_one_runs(turns: Turns, marks: Marks, tmp_path: Path) -> None:
    requests = [marks.request("mark") for _ in range(3)]
    turns.guard.start_calls([start_to_wire(request) for request in requests], host.boot())
    written = (tmp_path / "ledger").read_text()
    assert all(name in written for name in names(*(request.key for request in requests)))
    turns.until(lambda: len(turns.ends()) == 4)


def test_the_ledger_reads_what_it_wrote_together(tmp_path: Path) -> None:
    keys = [f"run.{task}.1.cafe" for task in range(3)]
    ledger = Ledger(tmp_path, host.boot_id())
    ledger.started_together(keys, 7, 1.0)
    ledger.exited_together({key: {"key": key} for key in keys[:2]})
    ledger.forget(keys[:1])
    ledger.close()
    again = Ledger(tmp_path, host.boot_id())
    assert list(again.started_keys) == keys[2:]
    assert again.started_keys[keys[2]].generation == 7
    assert list(again.exits) == keys[1:2]
    assert all(again.knows(key) for key in keys)
    again.close()


def test_g5_a_task_that_speaks_to_the_guard_hides_no_answer(turns: Turns, marks: Marks) -> None:
    """Its words are about no call. Were its answer behind them not seen, a stop would meet the call after it."""
    first, following = marks.request("say", '{"key": "other"}'), marks.request("pause", 60.0)
    turns.guard.start_calls([start_to_wire(first), start_to_wire(following)], host.boot())
    turns.until(lambda: len(marks.words) == 2, turning=False)
    turns.ask({"op": "stop", "keys": names(first.key), "grace": 0.0})
    turns.until(lambda: any(message["ev"] == "stopped" for message in turns.told))
    for _ in range(20):
        turns.turn()
    assert turns.ends()[first.key.text()] == "exit"
    assert following.key.text() not in turns.ends()


@pytest.mark.parametrize(
    "said",
    [
        b"5",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b"",
        b'{"key": "a", "fault": []}',
        b'{"key": "a", "from": NaN}',
        b'{"key": "a", "to": 1e300}',
        b'{"key": "a", "to": "soon"}',
    ],
)
def test_nonsense_from_a_worker_soils_it_and_nothing_more(said: bytes) -> None:
    answer = read_answer(said + b"\nrest", "a")
    assert (answer.key, answer.soiled, answer.result) == ("a", True, b"")


def test_f4_a_call_too_large_for_the_pipes_of_this_host_is_told_as_ended_and_holds_up_nobody(
    turns: Turns, marks: Marks
) -> None:
    """A host may give sockets smaller buffers than most; what fits into none must not be lost without a word."""
    worker = next(iter(turns.guard._pythons._workers.values()))
    worker.pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    large, small = marks.request("mark", "x" * 60_000), marks.request("mark")
    turns.guard.start_calls([start_to_wire(large), start_to_wire(small)], host.boot())
    turns.until(lambda: {large.key.text(), small.key.text()} <= turns.ends().keys())
    assert turns.ends()[large.key.text()] == "spawn"
    assert marks.words == [small.key.text()]
