"""`python -m bench.carrying [--megabytes N] [--json]`: a file from one cluster to another, and what it costs every process.

One task makes a file of random bytes, another one on another cluster reads it: disk, agent, replica, store, replica, agent, disk. What
is measured is the growth of the peak of resident memory (the kernel's high-water mark, reset before) of both agents, both guards and
the replica; workloads are not Baton's. A small file first, which loads what every later one uses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.client import AsyncClient
from baton.v1 import graph_pb2, run_pb2
from bench.artifacts import Peak
from cluster_agent.guard import proctree
from lab.federation import Federation
from lab.layout import Layout, Settings

SECONDS = 1800.0
MAKE = 'head -c "$BYTES" /dev/urandom > "$BATON_ARTIFACTS_DIR/large"; sha256sum < "$BATON_ARTIFACTS_DIR/large" > "$BATON_RESULT"'
READ = 'sha256sum < "$BATON_INPUT_DIR/make/large" > "$BATON_RESULT"'


@dataclass(frozen=True, slots=True)
class Figures:
    """What one file cost."""

    megabytes: int
    seconds: float
    same: bool
    """What was read is what was made."""
    growth_mb: Mapping[str, float]
    """Peak of resident memory over what was resident before, by process."""


def processes(federation: Federation) -> Iterator[tuple[str, int]]:
    """Name and pid of each process of Baton."""
    everything = proctree.everything()
    for name in federation.settings.replica_names:
        yield name, federation.part(name).pid
    for name in federation.settings.clusters:
        yield f"{name} agent", federation.part(name).pid
        machine = federation.part(name).identities()[0].pid
        for each in proctree.descendants(machine, everything):
            words = Path(f"/proc/{each.pid}/cmdline").read_bytes().split(b"\0")
            if b"cluster_agent.guard" in words:
                yield f"{name} guard", each.pid


async def carry(federation: Federation, client: AsyncClient, megabytes: int) -> Figures:
    """One file, from eu to us. Raises RuntimeError if the run fails."""
    env = {"BYTES": str(megabytes * 1_048_576)}
    make = graph_pb2.ProcessTask(argv=["sh", "-c", MAKE], env=env)
    read = graph_pb2.ProcessTask(argv=["sh", "-c", READ])
    small = graph_pb2.Resources(cpu_millis=100)
    tasks = [
        graph_pb2.Task(id="make", process=make, clusters=["eu"], resources=small),
        graph_pb2.Task(id="read", process=read, clusters=["us"], parents=["make"], resources=small),
    ]
    started = time.monotonic()
    with ExitStack() as stack:
        peaks = {name: stack.enter_context(Peak(pid)) for name, pid in processes(federation)}
        run = await client.create_run(graph_pb2.GraphSpec(tasks=tasks), deadline=time.time() + SECONDS)
        ended = await client.wait_run(run.name, patience=SECONDS)
    if ended.state != run_pb2.RUN_STATE_SUCCEEDED:
        raise RuntimeError(f"the run failed: {ended}")
    results = {task.id: task.result async for task in client.list_tasks(run.name)}
    seconds = round(time.monotonic() - started, 1)
    same = results["make"] == results["read"] and bool(results["make"])
    return Figures(megabytes, seconds, same, {name: peak.growth for name, peak in peaks.items()})


async def measure(directory: Path, megabytes: int) -> Figures:
    """The figures, of a federation of one replica and two clusters in an empty directory."""
    federation = Federation(Layout(directory), Settings(replicas=1, clusters=("eu", "us")))
    await federation.start()
    try:
        async with AsyncClient(federation.endpoints) as client:
            await carry(federation, client, 8)
            return await carry(federation, client, megabytes)
    finally:
        await federation.stop()


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.carrying", description="Cost of a file between two clusters."
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-carrying-") as directory:
        figures = asyncio.run(measure(Path(directory), given.megabytes))
    if given.json:
        print(json.dumps(asdict(figures)))
    else:
        for name, value in {**asdict(figures), **figures.growth_mb}.items():
            print(f"{name:28} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
