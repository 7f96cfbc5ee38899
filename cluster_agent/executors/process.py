"""The process executor: the agent's end of the guard (PROTOCOL G1-G3).

The guard does the work and outlives us; this adapter finds or starts it, turns calls into batches and its messages into
events. It decides nothing. A guard that does not answer in time is *unknown*, never dead: only its released lock proves
that it is gone, and then events say GuardLost and end. They also end when another agent took the guard over. Then, or
after ConnectionError from a call, `connect` again.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cluster_agent
from baton.clock import Clock
from baton.time_limits import time_limit
from cluster_agent.executors.base import (
    AttemptKey,
    CensusEntry,
    ExecutorEvent,
    Exited,
    Features,
    GuardLost,
    Refused,
    Started,
    StartRequest,
    Stopped,
)
from cluster_agent.executors.contact import READ_BYTES, RETRY_SECONDS, Greeting, hear_census, is_dead
from cluster_agent.guard.protocol import (
    Frames,
    Message,
    ProtocolError,
    SocketDirectory,
    code_to_wire,
    encode,
    exit_from_wire,
    for_pip,
    start_batches,
)

CONNECT_SECONDS = 15.0
"""To find or start a guard and hear its census. A new guard may wait 8 s for an earlier one's work to be dead."""

CALL_SECONDS = 10.0
"""For the guard to take a batch or answer a read. It ticks every 150 ms; one that is silent this long is stopped or
stuck."""

SILENCE_SECONDS = 2.0
"""Without a tick for so long (the pause bound P of F5) at F, a guard counts as frozen. Smaller kills a guard, and work
that is to be kept, on a busy host; larger eats into K."""

MAX_UNREAD_EVENTS = 10_000
"""Events the agent has not taken; then we stop reading the guard, which bounds its own side. Smaller stalls big
batches."""

FORGET_SECONDS = 0.05
"""How long a `forget` waits for company. Smaller: the guard is woken for it; larger: it keeps what nobody needs."""

CODE_SECONDS = 3600.0
"""Packed code is sent again after so long: the guard keeps unused code for a day. Smaller only sends it more often."""

_ROOT = str(Path(cluster_agent.__file__).resolve().parent.parent)
"""Where the guard finds its code: next to ours."""


class ProcessExecutor:
    """Adapter of the Executor port (executors/base.py) over the guard of `directory`.

    `guard_argv`: how to run the guard, without `--dir`; default: this interpreter.
    """

    def __init__(self, directory: Path, clock: Clock, *, guard_argv: Sequence[str] | None = None) -> None:
        self._directory = directory
        self._clock = clock
        self._guard_argv = tuple(guard_argv or (sys.executable, "-S", "-m", "cluster_agent.guard"))
        self._features: Features | None = None
        self._ticked_at = 0.0
        self._guard_pid = 0
        self._guard_fd = -1
        """pidfd of the guard last connected to: it can be killed when it answers nothing any more."""
        self._told_lost = False
        self._said_bye = False
        """The guard ended in order: nothing of its work is left."""
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._unread: list[ExecutorEvent] = []
        self._changed = asyncio.Condition()
        self._ended = True
        self._codes: dict[str, float] = {}
        """Packed codes this guard has, and when they were sent."""
        self._forgotten: list[str] = []
        """What the guard is still to forget; a census of the next one tells us if that is lost."""
        self._reads: dict[int, asyncio.Future[tuple[bytes, bool]]] = {}
        self._read_id = 0

    async def connect(self) -> Sequence[CensusEntry]:
        """See Executor. Raises ConnectionError when no guard can be had (with its words), TimeoutError when one is
        silent."""
        await self._leave()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = SocketDirectory(self._directory)
        try:
            async with time_limit(CONNECT_SECONDS):
                reader, writer, greeting = await self._meet(place.address)
        finally:
            place.close()
        self._writer, self._ended, self._unread, self._codes = writer, False, [], {}
        return self._begin(reader, greeting)

    def features(self) -> Features:
        """See Executor. Raises ConnectionError before the first `connect`."""
        if self._features is None:
            raise ConnectionError("not connected to a guard")
        return self._features

    def ticked_at(self) -> float:
        """See Executor."""
        return self._ticked_at

    @property
    def guard_pid(self) -> int:
        """Process id of the guard last connected to; 0 before."""
        return self._guard_pid

    async def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """See Executor."""
        await self._ask({"op": "configure", "fence": fence_seconds, "kill": kill_seconds})

    async def renew(self, generation: int, sent_boot: float) -> None:
        """See Executor."""
        await self._ask({"op": "renew", "gen": generation, "sent": sent_boot})

    async def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """See Executor."""
        await self._ask({"op": "adopt", "keys": [key.text() for key in keys], "gen": generation})

    async def start(self, requests: Sequence[StartRequest]) -> None:
        """See Executor."""
        await self._send_codes(requests)
        for batch in start_batches(requests):
            await self._ask({"op": "start", "requests": batch})

    async def _send_codes(self, requests: Sequence[StartRequest]) -> None:
        """Packed code of python tasks goes ahead of the first start that names it, and again after a while."""
        now = self._clock.boot()
        for request in requests:
            call = request.python
            if call is None or not call.code_zip or self._codes.get(call.code, -CODE_SECONDS) + CODE_SECONDS > now:
                continue
            await self._ask(code_to_wire(call))
            self._codes = {code: sent for code, sent in self._codes.items() if sent + CODE_SECONDS > now}
            self._codes[call.code] = now

    async def widen(self, key: AttemptKey, slots: int) -> None:
        """See Executor."""
        await self._ask({"op": "widen", "key": key.text(), "slots": slots})

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:
        """See Executor."""
        await self._ask({"op": "stop", "keys": [key.text() for key in keys], "grace": grace_seconds})

    async def forget(self, keys: Sequence[AttemptKey]) -> None:
        """See Executor."""
        if self._writer is None:
            raise ConnectionError("not connected to a guard")
        if not self._forgotten:
            self._clock.later(FORGET_SECONDS, self._tell_forgotten)
        self._forgotten.extend(key.text() for key in keys)

    def _tell_forgotten(self) -> None:
        """By themselves, as nothing was asked for a moment."""
        if self._forgotten and self._writer is not None:
            self._writer.write(self._forgetting())

    def _forgetting(self) -> bytes:
        """What travels before whatever is asked next."""
        keys, self._forgotten = self._forgotten, []
        return encode({"op": "forget", "keys": keys}) if keys else b""

    async def kill_all(self) -> None:
        """See Executor."""
        await self._ask({"op": "kill_all"})

    async def kill_if_silent(self) -> None:
        """See Executor. SIGKILL also ends a stopped process; the kernel or the keepers then end its work (G4)."""
        asked = self._clock.boot()
        while self._ticked_at < asked:
            if self._clock.boot() >= asked + SILENCE_SECONDS:
                if self._guard_fd >= 0:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self._guard_fd, signal.SIGKILL)
                return
            await self._clock.sleep(RETRY_SECONDS)

    async def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:
        """See Executor; at most 1 MiB a call."""
        self._read_id += 1
        answer: asyncio.Future[tuple[bytes, bool]] = asyncio.get_running_loop().create_future()
        self._reads[self._read_id] = answer
        number = self._read_id
        try:
            await self._ask({"op": "log", "id": number, "key": key.text(), "offset": offset, "limit": limit})
            async with time_limit(CALL_SECONDS):
                return await answer
        finally:
            self._reads.pop(number, None)

    async def events(self) -> AsyncIterator[Sequence[ExecutorEvent]]:
        """See Executor. Ends when the connection has ended and everything was told."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._unread or self._ended)
                batch, self._unread = self._unread, []
                self._changed.notify_all()
            if not batch:
                return
            yield batch

    async def tell(self, events: Sequence[ExecutorEvent]) -> None:
        """What a decorator (executors/carrying.py) has to say, in line with the guard's own news."""
        async with self._changed:
            self._unread.extend(events)
            self._changed.notify_all()

    async def close(self) -> None:
        """See Executor."""
        await self._leave()
        self._hold_guard(-1)

    async def _leave(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
        await self._hang_up()

    async def _meet(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Greeting]:
        """A stream and what the guard said first; a guard that dies meanwhile is replaced."""
        while True:
            reader, writer = await self._join(address)
            try:
                return reader, writer, await hear_census(reader)
            except (ConnectionResetError, EOFError):
                writer.close()
                await self._clock.sleep(RETRY_SECONDS)
            except BaseException:
                writer.close()
                raise

    async def _join(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to the living guard, started if there is none."""
        while True:
            try:
                return await asyncio.open_unix_connection(address)
            except (FileNotFoundError, ConnectionRefusedError):
                if not await self._start_guard():
                    await self._clock.sleep(RETRY_SECONDS)

    async def _start_guard(self) -> bool:
        """True when one was started; False when another is just starting or dying."""
        process = await asyncio.create_subprocess_exec(
            *self._guard_argv,
            "--dir",
            str(self._directory),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**for_pip(os.environ), "PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": _ROOT},
            start_new_session=True,
        )
        try:
            _out, words = await process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            raise
        if process.returncode == 0:
            return True
        if process.returncode == 3:  # guard.__main__.ALREADY
            return False
        raise ConnectionError(f"the guard did not start: {words.decode(errors='replace').strip()}")

    def _begin(self, reader: asyncio.StreamReader, greeting: Greeting) -> list[CensusEntry]:
        hello = greeting.hello
        self._features = Features(hello["isolation"], hello["orphan_killer"], hello["detail"])
        self._guard_pid, self._ticked_at = hello["pid"], hello["at"]
        try:
            self._hold_guard(os.pidfd_open(self._guard_pid))
        except ProcessLookupError:
            self._hold_guard(-1)
        if hello["lost"] and not self._told_lost:
            self._unread.append(GuardLost(killed=True))  # the new guard has seen them dead
        self._told_lost = self._said_bye = False
        for message in greeting.later:
            self._unread.extend(self._take(message))
        self._reading = asyncio.create_task(self._read(reader, greeting.frames))
        return greeting.entries

    async def _read(self, reader: asyncio.StreamReader, frames: Frames) -> None:
        """Until the connection ends."""
        with suppress(ConnectionError, ProtocolError, KeyError, TypeError, ValueError):  # nonsense ends it as well
            while data := await reader.read(READ_BYTES):
                fresh = [event for message in frames.feed(data) for event in self._take(message)]
                if fresh:
                    async with self._changed:
                        await self._changed.wait_for(lambda: len(self._unread) < MAX_UNREAD_EVENTS)
                        self._unread.extend(fresh)
                        self._changed.notify_all()
        if await is_dead(self._directory, self._clock):
            self._told_lost = True
            self._unread.append(GuardLost(killed=self._said_bye or self.features().orphan_killer))
        await self._hang_up()

    def _take(self, message: Message) -> Iterator[ExecutorEvent]:
        """The events in one message."""
        match message["ev"]:
            case "tick":
                self._ticked_at = message["at"]
            case "started":
                yield from (Started(AttemptKey.parse(key), pid, wall) for key, pid, wall in message["starts"])
            case "refused":
                yield Refused(AttemptKey.parse(message["key"]), message["reason"])
            case "exits":
                for wire in message["exits"]:
                    exited: Exited = exit_from_wire(wire)
                    if "pid" in wire:  # it began and ended in one turn of the guard
                        yield Started(exited.key, wire["pid"], exited.start_wall)
                    yield exited
            case "stopped":
                yield from (Stopped(AttemptKey.parse(key)) for key in message["keys"])
            case "bye":
                self._said_bye = True
            case "log":
                answer = self._reads.get(message["id"])
                if answer is not None and not answer.done():
                    answer.set_result((base64.b64decode(message["data"]), message["complete"]))

    def _hold_guard(self, fd: int) -> None:
        if self._guard_fd >= 0:
            os.close(self._guard_fd)
        self._guard_fd = fd

    async def _hang_up(self) -> None:
        self._tell_forgotten()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for answer in self._reads.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the connection to the guard ended"))
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def _ask(self, message: dict[str, Any]) -> None:
        """Send one request. Raises ConnectionError, or TimeoutError when the guard does not read."""
        if self._writer is None:
            raise ConnectionError("not connected to a guard")
        self._writer.write(self._forgetting() + encode(message))
        async with time_limit(CALL_SECONDS):
            await self._writer.drain()
