"""A small HTTP port beside a process: answers GET for a few paths, and nothing else.

Theory. It serves operators and scrapers on the process's own loop, so it must not be able to hold it up: the request is small, its
time and the number of connections are bounded, every answer ends its connection, and what takes long is the routes' to do in
a thread. There is no identity in it, so it listens on loopback unless it is told otherwise in so many words.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

from baton.time_limits import time_limit

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""At one time; more are closed at once. A scraper needs one."""

HEAD_BYTES = 8 * 1024
"""Of a request line and its headers: what browsers send is a tenth of it."""

HEAD_SECONDS = 5.0
ANSWER_SECONDS = 30.0
"""For a request to arrive, and for its answer to be made and taken."""

TEXT, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"

_WORDS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class NotLoopback(ValueError):
    """The address can be reached from other machines, and nobody said that it may."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    body: bytes
    kind: str = TEXT
    status: int = 200


Route = Callable[[str], Awaitable[Answer | None]]
"""(path, without its query) -> the answer; None: there is no such thing."""


def check_address(address: str, *, anywhere: bool) -> tuple[str, int]:
    """Host and port of host:port. Raises ValueError; NotLoopback if others can reach it and `anywhere` is not set."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    if not anywhere and not _loopback(host):
        raise NotLoopback(
            f"{address} can be reached from other machines, and whoever asks there is not asked who they are"
        )
    return host, int(port)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class WebPort:
    """One listener. `start`, then `address` is where it listens; `close` ends it."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._open: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        self._server = await asyncio.start_server(self._connected, host, port, limit=HEAD_BYTES)
        bound = self._server.sockets[0].getsockname()
        self.address = f"[{host}]:{bound[1]}" if ":" in host else f"{host}:{bound[1]}"

    async def close(self) -> None:
        """End, cutting answers under way."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._open) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._open.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked went away, was too slow, or sent too much; or the port ends
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with time_limit(HEAD_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
        async with time_limit(ANSWER_SECONDS):
            answer = await self._answer(method, unquote(rest.partition(" ")[0].partition("?")[0]))
            lines = (
                f"HTTP/1.1 {answer.status} {_WORDS.get(answer.status, 'Error')}",
                f"Content-Type: {answer.kind}",
                f"Content-Length: {len(answer.body)}",
                "X-Content-Type-Options: nosniff",
                "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'",
                "Connection: close",
            )
            writer.write("\r\n".join((*lines, "", "")).encode() + (b"" if method == "HEAD" else answer.body))
            await writer.drain()

    async def _answer(self, method: str, path: str) -> Answer:
        if method not in ("GET", "HEAD"):
            return Answer(b"only GET and HEAD are answered here\n", status=405)
        try:
            found = await self._route(path)
        except Exception:  # a route's failure is the asker's answer, not this process's end
            log.exception("a page could not be made", extra={"path": path[:200]})
            return Answer(b"this page could not be made; the process's log says why\n", status=503)
        return found or Answer(b"there is no such page\n", status=404)
