"""First words and last signs of a guard: its greeting with the census (PROTOCOL G3), and the proof that it is dead."""

from __future__ import annotations

import asyncio
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from baton.clock import Clock
from cluster_agent.executors.base import CensusEntry
from cluster_agent.guard.protocol import LOCK, VERSION, Frames, Message, entry_from_wire

DEATH_SECONDS = 2.0
"""After the connection broke, for the kernel to release a dead guard's lock. Longer only delays the news of a
takeover."""

RETRY_SECONDS = 0.02
"""Between looks at a guard that is starting or dying."""

READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a guard says first: hello, census, what came right behind them, and the state of the stream."""

    hello: Message
    entries: list[CensusEntry]
    later: list[Message]
    frames: Frames


async def hear_census(reader: asyncio.StreamReader) -> Greeting:
    """What a guard says first. Raises EOFError when it dies meanwhile, ConnectionError when it cannot be talked to."""
    frames = Frames()
    hello: Message = {}
    entries: list[CensusEntry] = []
    later: list[Message] | None = None
    while later is None:
        data = await reader.read(READ_BYTES)
        if not data:
            raise EOFError("the guard died during its census")
        for message in frames.feed(data):
            if later is not None:
                later.append(message)
            elif message["ev"] == "hello":
                hello = message
            elif message["ev"] == "census":
                entries.extend(entry_from_wire(wire) for wire in message["entries"])
            elif message["ev"] == "ready":
                later = []
            elif message["ev"] == "superseded":
                raise ConnectionError("another agent took this guard over")
    if hello.get("version") != VERSION:
        raise ConnectionError(f"the guard speaks version {hello.get('version')}, this agent {VERSION}")
    return Greeting(hello, entries, later, frames)


async def is_dead(directory: Path, clock: Clock) -> bool:
    """Whether its lock is free; looked at for a while, since the kernel closes a dead process's files one by
    one."""
    deadline = clock.boot() + DEATH_SECONDS
    while True:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if clock.boot() > deadline:
                return False
        finally:
            os.close(fd)
        await clock.sleep(RETRY_SECONDS)
