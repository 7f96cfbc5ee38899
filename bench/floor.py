"""What a hop costs without any product logic: one worker pipe, one stream round trip, one etcd transaction (DESIGN 13).

Measured one after the other, as a hop does them, against a process that only echoes and the same etcd that the runs use. The
transaction is the journal's own shape (PROTOCOL J4): four compares, two puts, and a failure branch that is not taken.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from baton.clock import SystemClock
from control_plane.store.base import Compare, Get, Put, Txn
from control_plane.store.etcd import EtcdStore
from lab import processes

HOPS = 200
WARM_HOPS = 20
"""Not counted: connections are opened and caches filled in them."""

VALUE = b"x" * 300
"""About what one hop writes to the log."""

MESSAGE = b"x" * 400
"""About a report or a dispatch of one task."""

TXN_SECONDS = 10.0
START_SECONDS = 30.0

METHOD = "/bench.Floor/Echo"

_ECHO_PIPE = """\
import socket, sys
end = socket.socket(fileno=int(sys.argv[1]))
while message := end.recv(65536):
    end.send(message)
"""


@dataclass(frozen=True, slots=True)
class Floor:
    """Medians, milliseconds. `hop` is the median of whole hops, not the sum of the medians."""

    hop: float
    pipe: float
    stream: float
    transaction: float


async def measure(etcd: str, hops: int = HOPS) -> Floor:
    """The floor of this machine, now."""
    store = EtcdStore([etcd], tls=None, key_prefix="bench-floor/", clock=SystemClock())
    try:
        with _worker() as pipe:
            async with _stream() as stream:
                rows = [await _hop(store, pipe, stream, number) for number in range(WARM_HOPS + hops)][WARM_HOPS:]
    finally:
        await store.close()
    columns = [[row[part] * 1000 for row in rows] for part in range(3)]
    medians = [statistics.median(column) for column in columns]
    return Floor(statistics.median(sum(row) * 1000 for row in rows), *medians)


async def _hop(store: EtcdStore, pipe: socket.socket, stream: Any, number: int) -> tuple[float, float, float]:
    clock, loop = SystemClock(), asyncio.get_running_loop()
    began = clock.boot()
    await loop.sock_sendall(pipe, MESSAGE)
    await loop.sock_recv(pipe, 65536)
    piped = clock.boot()
    await stream.write(MESSAGE)
    await stream.read()
    streamed = clock.boot()
    head = b"%d" % number
    before = Compare.equals("head", b"%d" % (number - 1)) if number else Compare.absent("head")
    txn = Txn(
        (Compare.absent("incarnation"), Compare.absent("suspected"), Compare.absent("owner"), before),
        (Put(f"log/{number:016}", VALUE), Put("head", head)),
        (Get("owner"), Get("head")),
    )
    result = await store.txn(txn, timeout=TXN_SECONDS)
    if not result.succeeded:
        raise RuntimeError("the floor's transaction was refused: was this store used before?")
    return piped - began, streamed - piped, clock.boot() - streamed


@contextmanager
def _worker() -> Iterator[socket.socket]:
    """A process at the other end of a socket pair of the kind that workers have."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-S", "-c", _ECHO_PIPE, str(theirs.fileno())]
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    try:
        ours.setblocking(False)
        yield ours
    finally:
        ours.close()
        child.wait(START_SECONDS)


def _echoing() -> subprocess.Popen[bytes]:
    """A process that runs `_serve`."""
    return subprocess.Popen(
        processes.python("bench.floor"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=processes.environment()
    )


@asynccontextmanager
async def _stream() -> AsyncIterator[Any]:
    """An open bidirectional stream to an echoing process."""
    child = _echoing()
    try:
        if child.stdout is None:
            raise RuntimeError("the echo has no voice")
        port = int(await asyncio.wait_for(asyncio.to_thread(child.stdout.readline), START_SECONDS))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream: Any = channel.stream_stream(METHOD)()
            yield stream
            await stream.done_writing()
    finally:
        child.kill()
        child.wait(START_SECONDS)


async def _echo(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _serve() -> None:
    """The echoing process: says its port, then echoes until it is killed."""
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(_echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Floor", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
