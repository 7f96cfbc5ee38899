"""How another terminal speaks to the supervisor: one JSON line there, one back, on a socket in the private directory.

A path over 107 bytes does not fit a socket's address, so both ends go through `/proc/self/fd/N` of the open directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from lab.layout import Layout

SOCKET = "control.sock"
ANSWER_SECONDS = 60.0
"""For an order to be carried out; the slowest is the start of a replica on a machine that is busy."""

MAX_LINE = 1 << 20
"""Bytes of an order or an answer; a status of 32 clusters has 10,000."""


class NotRunning(Exception):
    """No supervisor answers in that directory."""


class Refused(Exception):
    """The supervisor did not do it; the text says why."""

    def __init__(self, message: str, *, unknown_name: bool = False) -> None:
        super().__init__(message)
        self.unknown_name = unknown_name


def ask(layout: Layout, order: str, **words: Any) -> dict[str, Any]:
    """Have an order carried out; the answer. Raises NotRunning, Refused, TimeoutError."""
    if not layout.directory.exists():
        raise NotRunning("no federation was ever started there")
    with _address(layout.directory) as address, socket.socket(socket.AF_UNIX) as line:
        line.settimeout(ANSWER_SECONDS)
        try:
            line.connect(address)
            line.sendall(json.dumps({"order": order, **words}).encode() + b"\n")
            said = b""
            while not said.endswith(b"\n") and (piece := line.recv(65_536)):
                said += piece
        except (FileNotFoundError, ConnectionError) as error:
            raise NotRunning("no supervisor answers") from error
    if not said:
        raise NotRunning("the supervisor ended meanwhile")
    answer: dict[str, Any] = json.loads(said)
    if "refused" in answer:
        raise Refused(answer["refused"], unknown_name=bool(answer.get("unknown_name")))
    return answer


@asynccontextmanager
async def serving(layout: Layout, obey: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> AsyncIterator[None]:
    """Answer orders while the body runs. `obey` raises Refused; the lock is held, so an old socket is a dead one's."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            order = json.loads(await reader.readline())
            answer = await obey(order)
        except Refused as refused:
            answer = {"refused": str(refused), "unknown_name": refused.unknown_name}
        except (ValueError, OSError) as error:
            answer = {"refused": f"the order is not understood: {error}"}
        try:
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except OSError:
            pass  # who asked has gone
        finally:
            writer.close()

    with _address(layout.directory) as address:
        server = await asyncio.start_unix_server(converse, sock=_bound(address), limit=MAX_LINE)
        try:
            yield
        finally:
            server.close()
            _remove(address)


def _bound(address: str) -> socket.socket:
    """A socket there. One that lies there is a dead supervisor's: the lock is ours."""
    _remove(address)
    line = socket.socket(socket.AF_UNIX)
    line.bind(address)
    Path(address).chmod(0o600)
    return line


def _remove(address: str) -> None:
    Path(address).unlink(missing_ok=True)


@contextmanager
def _address(directory: Path) -> Iterator[str]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)
