"""The guard's loop: one epoll for the agent's socket, the keepers' pipes and their pidfds. One agent at a time.

A new connection closes the old one at once; what of it was not carried out is void, and only then is the census taken
(G3). Whether one waits is looked at before each request, not once a poll: a guard that was stopped between its poll and
its read finds both, and must not carry out the old agent's word although a new agent is there.
An agent that does not read (it may be stopped) costs a bounded buffer: past it the connection is closed, and the agent
learns all from the census when it is back, since exits are kept.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cluster_agent.executors.base import Features
from cluster_agent.guard import host, peers
from cluster_agent.guard.guard import Guard
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import SOCKET, Frames, Message, ProtocolError, SocketDirectory, encode
from cluster_agent.guard.workload import Spawner

TICK_SECONDS = 0.15
"""Between signs of life (the agent's heartbeats wait for one, G2). Smaller burns an idle host; larger delays
heartbeats."""

SWEEP_SECONDS = 60.0
"""Between looks at retention."""

MAX_UNSENT = 32 << 20
"""Events an agent left unread, beside its census. A stopped agent reaches it after some hundred thousand exits."""

END_GRACE_SECONDS = 5.0
"""What workloads get between TERM and KILL when the guard itself is told to end; service managers wait longer than
this."""

READ_BYTES = 1 << 18

BACKLOG = 8
"""Connections that may wait, and that one look goes through. Fewer turns away an agent beside a few intruders; more lets
those keep the guard from its work."""

SLICE_SECONDS = 0.02
"""Requests in a row (about eight spawns) before exits are looked at. Smaller costs polls, larger delays news of
exits."""


CALLS = 32
"""Python calls taken together, in about 2 ms when their workers are warm. Smaller: a write to the ledger for each few; larger holds up
timers and a new agent."""


GATHER_SECONDS = 0.001
"""While every worker has its next calls in its pipe (pythons.DEEP), answers may gather for so long: to be woken for each costs more
than the call. Smaller: more turns; larger: workers run dry, and orders come later."""


class Server:
    """Runs until `end` was asked for (SIGTERM) and nothing is left."""

    def __init__(
        self, directory: Path, ledger: Ledger, places: Places, spawner: Spawner, features: Features, min_free_bytes: int
    ) -> None:
        self._features = features
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._listener = _listen(directory)
        self._watch(self._listener.fileno(), self._accept)
        self._connection: socket.socket | None = None
        self._frames = Frames()
        self._requests: deque[Message] = deque()
        self._unsent = bytearray()
        self._unsent_limit = MAX_UNSENT
        self._ticked = self._swept = 0.0
        self._end_asked = False
        self._ledger, self._groups = ledger, spawner.groups
        self.guard = Guard(ledger, places, spawner, self._send, self._watch, self._unwatch, min_free_bytes)

    def run(self) -> None:
        """The loop."""
        signals, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._ask_end())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._watch(signals, lambda: self._swallow(signals))
        ending = False
        while not (ending and self.guard.idle):
            if self.guard.unhurried and not self._requests:
                select.select([], [], [], GATHER_SECONDS)
            ready = self._epoll.poll(self._patience())
            self._breathe()
            if self._end_asked and not ending:
                ending = True
                self.guard.end(host.boot(), END_GRACE_SECONDS)
            self._serve(ready)
        self._send({"ev": "bye"})
        self._flush()
        self._drop()
        self._groups.close()
        self._ledger.close()

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        """What one poll found."""
        for fd, _event in ready:
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()
        self._work()
        self._survive(lambda: self.guard.settle(host.boot()))
        self._flush()

    def _patience(self) -> float:
        """Seconds until the next tick or order; none while requests wait."""
        if self._requests:
            return 0.0
        now = host.boot()
        times = (self._ticked + TICK_SECONDS, self.guard.next_wakeup(), self.guard.next_telling())
        return max(0.0, min(at for at in times if at is not None) - now)

    def _breathe(self) -> float:
        """Read the clock and do what it orders; returns the time. First thing after each pause, and between
        requests."""
        now = host.boot()
        wakeup = self.guard.next_wakeup()
        if wakeup is not None and wakeup <= now:
            self.guard.enforce(now)
        if now - self._ticked >= TICK_SECONDS:
            self._ticked = now
            self._survive(lambda: self.guard.tick(now))
            self._survive(lambda: self.guard.settle(now))
            self._flush()  # news of the requests just carried out is no sign that the agent does not read
            if self._connection is not None and not self._unsent:  # an agent that does not read needs no more of them
                self._send({"ev": "tick", "at": now})
                self._flush()
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            self._survive(self.guard.sweep)
        return now

    def _survive(self, chore: Callable[[], None]) -> None:
        """A chore that the host refuses waits for its next time: a guard that died of it would kill all work."""
        try:
            chore()
        except OSError as error:
            self._note("A chore was put off.", error=repr(error))

    @staticmethod
    def _note(sentence: str, **fields: str) -> None:
        """A log line as agents and replicas write them, to guard.err, if that can be written at all. (Their formatter is not
        here: what the guard loads is paid at each spawn.)"""
        line = {
            "time": round(host.wall(), 3),
            "level": "warning",
            "logger": "baton.guard",
            "message": sentence,
            **fields,
        }
        with suppress(OSError):
            os.write(2, json.dumps(line).encode() + b"\n")

    def _accept(self) -> bool:
        """Take the connection that waits, if one does; whether there was one."""
        for _ in range(BACKLOG):
            try:
                connection, _address = self._listener.accept()
                refusal = peers.refusal(connection)
            except BlockingIOError:
                return False
            except OSError as error:  # out of descriptors, or it left again: the agent tries again, work must not die
                self._note("A connection was not taken.", error=str(error))
                return False
            if not refusal:
                self._welcome(connection)
                return True
            self._note("A connection was refused.", reason=refusal)
            connection.close()
        return False

    def _welcome(self, connection: socket.socket) -> None:
        """From now on it is the agent's; what the one before it asked and was not carried out is void (G3)."""
        connection.setblocking(False)
        self._drop(superseded=True)
        self._connection = connection
        self._frames, self._unsent, self._unsent_limit = Frames(), bytearray(), MAX_UNSENT
        for message in self.guard.hello(self._features):
            self._unsent += encode(message)
        self._unsent_limit += len(self._unsent)
        self._watch(connection.fileno(), self._converse)

    def _converse(self) -> None:
        """Read once, when everything read before is done: an agent that asks faster than we spawn waits in its
        socket."""
        if self._connection is None or self._requests:
            return
        try:
            data = self._connection.recv(READ_BYTES)
            if not data:
                raise ConnectionResetError("the agent left")
            for message in self._frames.feed(data):
                self._requests.extend(_portions(message))
        except BlockingIOError:
            return
        except ConnectionError:
            self._drop()
        except (ProtocolError, KeyError, TypeError) as error:
            self._refuse(error)

    def _work(self) -> None:
        """Carry out requests in order for a slice of time; exits and timers are looked at between slices, a new agent
        before each."""
        until = host.boot() + SLICE_SECONDS
        while self._requests:
            now = self._breathe()
            if now >= until or self._accept() or not self._requests:  # void, if its agent was found dead meanwhile
                return
            message = self._requests.popleft()
            try:
                if message["op"] == "start one":
                    self.guard.start(message["request"], now)
                elif message["op"] == "start calls":
                    self.guard.start_calls(message["requests"], now)
                else:
                    self.guard.handle(message, now)
            except (KeyError, TypeError, ValueError, OSError) as error:
                self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        """Nonsense, or what the host refuses, costs the other end its connection (it asks for a census), never us our
        life."""
        self._note("A request was refused and the connection closed.", error=repr(error))
        self._drop()

    def _send(self, message: Message) -> None:
        if self._connection is None:
            return
        self._unsent += encode(message)
        if len(self._unsent) > self._unsent_limit:
            self._drop()

    def _flush(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            while self._unsent:
                sent = connection.send(self._unsent[:READ_BYTES])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop()
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)
        self._epoll.modify(connection.fileno(), wanted)

    def _drop(self, *, superseded: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._unwatch(connection.fileno())
        if superseded:
            with suppress(OSError):
                connection.send(encode({"ev": "superseded"}))
        connection.close()
        self._requests.clear()
        self._unsent = bytearray()

    def _watch(self, fd: int, callback: Callable[[], object]) -> None:
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _ask_end(self) -> None:
        self._end_asked = True

    @staticmethod
    def _swallow(fd: int) -> None:
        with suppress(BlockingIOError):
            os.read(fd, 512)


def _portions(message: Message) -> Iterator[Message]:
    """What is carried out without a look at anything else: one request, one spawn, or so many python calls."""
    if message["op"] != "start":
        yield message
        return
    calls: list[Message] = []
    for wire in message["requests"]:
        if "python" in wire and len(calls) < CALLS:
            calls.append(wire)
            continue
        if calls:
            yield {"op": "start calls", "requests": calls}
            calls = []
        if "python" in wire:
            calls.append(wire)
        else:
            yield {"op": "start one", "request": wire}
    if calls:
        yield {"op": "start calls", "requests": calls}


def _listen(directory: Path) -> socket.socket:
    """A fresh socket in the directory; the lock is ours, so an old one is a dead guard's."""
    (directory / SOCKET).unlink(missing_ok=True)
    place = SocketDirectory(directory)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(place.address)
    os.chmod(directory / SOCKET, 0o600)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    place.close()
    return listener
