"""`python -m bench.artifacts [--megabytes N] [--json]`: an artifact through the gateway of a real replica, and what it costs.

Theory: "flat memory" is a statement about the peak, so the peak is what is measured: the kernel's high-water mark of resident
memory, reset before each transfer, of the replica and of the process that sends and proves. Content is random, for zlib would
otherwise make the transfer a fiction. The store is a directory, each object synced.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio

from baton.artifact_wire import Incoming, put_chunk, put_end, put_header
from baton.artifacts import CHUNK_BYTES, pack
from baton.v1 import agent_pb2, artifact_pb2, artifact_pb2_grpc
from lab.federation import Federation
from lab.layout import Layout, Settings

MIB = 1024 * 1024
OPTIONS = (("grpc.max_receive_message_length", 4 * MIB),)
SECONDS = 900.0
"""For one transfer: 1 GiB at little more than a megabyte a second."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one artifact cost. Growth: peak of resident memory during the transfer over what was resident before it."""

    megabytes: int
    put_mb_per_second: float
    get_mb_per_second: float
    replica_put_growth_mb: float
    replica_get_growth_mb: float
    client_put_growth_mb: float
    client_get_growth_mb: float


class Peak:
    """Growth of a process's resident memory in a block, in MiB."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.growth = 0.0

    def __enter__(self) -> Peak:
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        self._before = self._field("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.growth = round((self._field("VmHWM") - self._before) / 1024, 1)

    def _field(self, name: str) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


async def transfer(address: str, pid: int, megabytes: int) -> Figures:
    """Put an artifact at a replica and read it back. Raises what goes wrong."""
    attempt = agent_pb2.AttemptRef(run_uid="bench", task=0, n=1, nonce=os.urandom(8).hex())
    block = os.urandom(CHUNK_BYTES - 8)

    async def upload() -> AsyncIterator[artifact_pb2.PutArtifactRequest]:
        header = artifact_pb2.PutArtifactHeader(namespace="default", attempt=attempt, name="large", cluster_uid="bench")
        yield put_header(header)
        for index in range(megabytes):
            yield put_chunk(await asyncio.to_thread(pack, index, index.to_bytes(8, "big") + block))
        yield put_end(megabytes)

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = artifact_pb2_grpc.ArtifactServiceStub(channel)
        started = time.monotonic()
        with Peak(pid) as replica_put, Peak(os.getpid()) as client_put:
            answer = await stub.PutArtifact(upload(), timeout=SECONDS)
        put_seconds = time.monotonic() - started

        source = agent_pb2.ArtifactSource(
            namespace="default", attempt=attempt, cluster_uid="bench", artifact=answer.artifact
        )
        incoming = Incoming(answer.artifact.digest)
        started = time.monotonic()
        with Peak(pid) as replica_get, Peak(os.getpid()) as client_get:
            async for message in stub.GetArtifact(artifact_pb2.GetArtifactRequest(source=source), timeout=SECONDS):
                await asyncio.to_thread(incoming.take, message)
        get_seconds = time.monotonic() - started
    if not incoming.complete or incoming.size != megabytes * MIB:
        raise RuntimeError("what came back is not what was sent")
    return Figures(
        megabytes=megabytes,
        put_mb_per_second=round(megabytes / put_seconds, 1),
        get_mb_per_second=round(megabytes / get_seconds, 1),
        replica_put_growth_mb=replica_put.growth,
        replica_get_growth_mb=replica_get.growth,
        client_put_growth_mb=client_put.growth,
        client_get_growth_mb=client_get.growth,
    )


async def measure(directory: Path, megabytes: int) -> Figures:
    """The figures, of a federation of one replica and one cluster in an empty directory."""
    federation = Federation(Layout(directory), Settings(replicas=1, clusters=("eu",)))
    await federation.start()
    try:
        port, pid = federation.links.replica_ports["replica-1"], federation.part("replica-1").pid
        # The first transfer loads what every later one uses, so it is not what is measured.
        await transfer(f"127.0.0.1:{port}", pid, 8)
        return await transfer(f"127.0.0.1:{port}", pid, megabytes)
    finally:
        await federation.stop()


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.artifacts", description="Cost of one large artifact.")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-artifacts-") as directory:
        figures = asyncio.run(measure(Path(directory), given.megabytes))
    if given.json:
        print(json.dumps(asdict(figures)))
    else:
        for name, value in asdict(figures).items():
            print(f"{name:28} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
