"""A TCP proxy on loopback that fails on demand: the network between two processes, with a switch.

Theory: a cut cable does not close connections. Both ends keep their sockets, hear nothing, and must notice by their own
deadlines; this is the failure that leases exist for (PROTOCOL F5, S3), and the one that killing a process cannot show.
So `DROP` keeps every socket and moves no byte, in neither direction, for old connections and new ones; after `PASS` what
was held goes on, as after a healed partition. `RESET` is the other kind: connections die at once and new ones are
refused. `DELAY` holds each piece for a time, in order, without narrowing the way (a long line, not a slow one). `DROP_UP` and
`DROP_DOWN` are a cut in one direction: to the target, and from it. `strand` makes connections half open: the far end is
gone, and the near one is never told.

A proxy belongs to one asyncio loop. Its memory is bounded: at most `HELD` pieces per direction of a connection; beyond
that it stops reading, and the sender's own buffers fill, as on a real network.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from baton.clock import SystemClock
from baton.time_limits import time_limit

PIECE_BYTES = 1 << 16
"""Bytes moved at a time; smaller costs more turns of the loop, larger more memory per connection."""

HELD = 64
"""Pieces that may be under way in one direction (4 MiB): more than 100 MB/s over a delay of 40 ms."""

CONNECT_SECONDS = 5.0
"""For the far side to take a connection; it is a process on this host, which does so at once or not at all."""

BACKLOG = 256
"""Connections that may wait to be accepted; fewer, and a fleet that comes back at once is refused."""


class Mode(Enum):
    """What the network does."""

    PASS = "pass"  # noqa: S105  # no password
    DROP = "drop"
    DROP_UP = "drop up"
    DROP_DOWN = "drop down"
    RESET = "reset"
    DELAY = "delay"


@dataclass(slots=True)
class _Connection:
    """What one connection holds."""

    writers: list[asyncio.StreamWriter]
    stranded: asyncio.Event


class Proxy:
    """One listening port that leads to one target. `start` before use, `close` at the end."""

    def __init__(self, target: Callable[[], tuple[str, int] | None]) -> None:
        """`target` is asked for each connection: (host, port), or None when there is nobody to connect to."""
        self._target = target
        self._clock = SystemClock()
        self._mode = Mode.PASS
        self._delay = 0.0
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self._up.set()
        self._down.set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    @property
    def port(self) -> int:
        """The loopback port it listens on; 0 before `start`."""
        return self._port

    @property
    def address(self) -> str:
        """host:port for clients."""
        return f"127.0.0.1:{self._port}"

    @property
    def mode(self) -> Mode:
        """What it does now."""
        return self._mode

    @property
    def connections(self) -> int:
        """Connections that are open, held ones included."""
        return len(self._connections)

    async def start(self, port: int = 0) -> None:
        """Listen on `port` of loopback, 0 for any free one. Raises OSError."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, backlog=BACKLOG)
        self._port = self._server.sockets[0].getsockname()[1]

    def set(self, mode: Mode, *, delay_seconds: float = 0.0) -> None:
        """Change what the network does, for all connections at once. `delay_seconds` is of DELAY, one way."""
        self._mode = mode
        self._delay = delay_seconds if mode is Mode.DELAY else 0.0
        for gate, closed in ((self._up, Mode.DROP_UP), (self._down, Mode.DROP_DOWN)):
            if mode in (Mode.DROP, closed):
                gate.clear()
            else:
                gate.set()
        if mode is Mode.RESET:
            self.reset()

    def reset(self) -> None:
        """Break every connection with RST, whatever the mode; new ones are served as the mode says."""
        for task, connection in self._connections.items():
            for writer in connection.writers:
                _abort(writer)
            task.cancel()

    def strand(self) -> None:
        """Make every connection half open: the far side sees a reset, the near one hears nothing ever again, until it gives up.
        New connections are served as the mode says."""
        for connection in self._connections.values():
            connection.stranded.set()

    async def close(self) -> None:
        """Stop listening and break everything."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections)
        self.reset()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or self._mode is Mode.RESET:
            _abort(writer)
            return
        connection = self._connections[task] = _Connection([writer], asyncio.Event())
        try:
            await self._serve(reader, writer, connection)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # either end has gone, the far side refused, or we were told to break it: the near side sees a reset
        finally:
            for each in self._connections.pop(task).writers:
                _abort(each)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection) -> None:
        await self._up.wait()
        target = self._target()
        if target is None:
            return
        async with time_limit(CONNECT_SECONDS):
            far_reader, far_writer = await asyncio.open_connection(*target)
        connection.writers.append(far_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, self._up)),
            asyncio.create_task(self._pump(far_reader, writer, self._down)),
        ]
        both, stranding = asyncio.gather(*pumps), asyncio.create_task(connection.stranded.wait())
        try:
            await asyncio.wait((both, stranding), return_when=asyncio.FIRST_COMPLETED)
            if both.done():
                both.result()
        finally:
            for each in (*pumps, stranding):
                each.cancel()
            await asyncio.gather(both, *pumps, stranding, return_exceptions=True)
        if connection.stranded.is_set():
            _abort(far_writer)
            while await reader.read(PIECE_BYTES):
                pass  # heard by nobody

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
        """One direction until its end; then the other side's writing end is closed, as the sender closed its own."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD)
        filling = asyncio.create_task(self._fill(reader, line, way))
        try:
            while True:
                due, piece = await line.get()
                if (wait := due - self._clock.boot()) > 0:
                    await asyncio.sleep(wait)
                await way.wait()
                if not piece:
                    break
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
            await filling
        finally:
            filling.cancel()
            await asyncio.gather(filling, return_exceptions=True)

    async def _fill(
        self, reader: asyncio.StreamReader, line: asyncio.Queue[tuple[float, bytes]], way: asyncio.Event
    ) -> None:
        while True:
            await way.wait()
            try:
                piece = await reader.read(PIECE_BYTES)
            except ConnectionError:
                await way.wait()  # a cut network does not tell that the other end died
                raise
            await line.put((self._clock.boot() + self._delay, piece))
            if not piece:
                return


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the peer sees an error and no orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
