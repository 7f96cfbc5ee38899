"""The three measurements, each on a federation of its own: wide, chain, many.

Times run from the moment the client sends its first request to the end that the run itself records (all processes here share one
clock), so that neither the client's looking nor its interval counts. What is looked at meanwhile is one run, or one list, a few
times a second.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.v1 import run_pb2
from bench import calibration, floor, shapes, usage
from bench.rig import Rig, federation

DEADLINE_SECONDS = 900.0
"""Of every run; a benchmark that needs longer has failed."""

LOOK_SECONDS = 0.1
"""Between looks at a run. Smaller would be measured, larger only makes the bench wait."""

IN_FLIGHT = 64
"""CreateRun calls at once for `many`: a busy service has some dozens of callers; one at a time would measure the round trip."""

WARM_TASKS = 8
"""Of the run before each measurement: connections open, both workers are warm."""

Measured = dict[str, Any]


def size_of(name: str, tasks: int | None) -> int:
    """The scale: tasks, hops or graphs. The issue's numbers if none is asked for."""
    return tasks or {"wide": 10_000, "chain": 200, "many": 1_000}[name]


async def measure(
    name: str, tasks: int | None = None, *, keep: Path | None = None, instant: bool = False, any_etcd: bool = False
) -> Measured:
    """One benchmark beside a calibration and the floor. `keep`: a directory for the processes' files; `instant`: without guard and
    workers; `any_etcd`: also with one that is not supported. Raises RuntimeError when a run does not succeed."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        slow = calibration.seconds()
        async with federation((keep or Path(scratch)) / name, instant=instant, any_etcd=any_etcd) as rig:
            await _run(rig.client, shapes.wide(WARM_TASKS))
            ground = await floor.measure(rig.etcd_endpoint)
            before = usage.cpu_by_role(rig.processes())
            found = await _MEASUREMENTS[name](rig, size_of(name, tasks))
            roles = rig.processes()
            cpu = usage.spent(before, usage.cpu_by_role(roles))
            peak = usage.peak_by_role(roles)
        slow = min(slow, calibration.seconds())
    count = found.pop("cpu_tasks")
    return {
        **found,
        "hop_floor_ms_p50": round(ground.hop, 3),
        "floor_ms_p50": {part: round(value, 3) for part, value in asdict(ground).items() if part != "hop"},
        "calibration_seconds": round(slow, 4),
        "etcd_version": rig.etcd_version,
        "cpu_seconds": cpu,
        "cpu_us_per_task": {role: round(seconds / count * 1e6) for role, seconds in cpu.items()},
        "peak_memory_bytes": peak,
    }


async def _wide(rig: Rig, tasks: int) -> Measured:
    spec, began = shapes.wide(tasks), SystemClock().wall()
    run = await _run(rig.client, spec)
    seconds = _seconds(run.finish_time) - began
    accepted = _seconds(run.create_time) - began
    total = tasks + 2
    return {
        "tasks": total,
        "seconds": round(seconds, 3),
        "seconds_to_accept": round(accepted, 3),
        "tasks_per_second": round(total / seconds, 1),
        "cpu_tasks": total,
    }


async def _chain(rig: Rig, hops: int) -> Measured:
    run = await _run(rig.client, shapes.chain(hops))
    moments = [json.loads(task.result) async for task in rig.client.list_tasks(run.name)]
    gaps = sorted(1000 * (after - before) for before, after in pairwise(moments))
    cuts = statistics.quantiles(gaps, n=100, method="inclusive") if len(gaps) > 1 else gaps * 99
    return {
        "tasks": hops,
        "hop_ms_p50": round(cuts[49], 3),
        "hop_ms_p99": round(cuts[98], 3),
        "hop_ms_mean": round(statistics.mean(gaps), 3),
        "cpu_tasks": hops,
    }


async def _many(rig: Rig, graphs: int) -> Measured:
    spec, clock = shapes.five(), SystemClock()
    left, names = iter(range(graphs)), []
    began = clock.wall()

    async def submit() -> None:
        for _ in left:
            run = await rig.client.create_run(spec, deadline=clock.wall() + DEADLINE_SECONDS)
            names.append(run.name)

    await asyncio.gather(*(submit() for _ in range(IN_FLIGHT)))
    accepted = clock.wall() - began
    # Looked at seldom, and first at one run only: a list of all of them is work for the replica.
    while (await rig.client.get_run(names[-1])).state == run_pb2.RUN_STATE_RUNNING:
        await clock.sleep(LOOK_SECONDS)
    active = (run_pb2.RUN_STATE_RUNNING, run_pb2.RUN_STATE_CANCELLING)
    while [None async for _ in rig.client.list_runs(states=active)]:
        await clock.sleep(LOOK_SECONDS)
    ours = set(names)
    runs = [run async for run in rig.client.list_runs() if run.name in ours]
    for run in runs:
        _check(run)
    if len(runs) < graphs:
        raise RuntimeError(f"{graphs} runs were created and {len(runs)} are known")
    seconds = max(_seconds(run.finish_time) for run in runs) - began
    return {
        "graphs": graphs,
        "seconds": round(seconds, 3),
        "seconds_to_accept": round(accepted, 3),
        "graphs_per_second": round(graphs / seconds, 1),
        "cpu_tasks": graphs * len(spec.tasks),
    }


_MEASUREMENTS: dict[str, Callable[[Rig, int], Awaitable[Measured]]] = {"wide": _wide, "chain": _chain, "many": _many}

NAMES = tuple(_MEASUREMENTS)


async def _run(client: AsyncClient, spec: Any) -> run_pb2.Run:
    """Create a run and wait for its end. Raises RuntimeError if that is no success."""
    clock = SystemClock()
    run = await client.create_run(spec, deadline=clock.wall() + DEADLINE_SECONDS)
    while run.state in (run_pb2.RUN_STATE_RUNNING, run_pb2.RUN_STATE_CANCELLING):
        await clock.sleep(LOOK_SECONDS)
        run = await client.get_run(run.name)
    _check(run)
    return run


def _check(run: run_pb2.Run) -> None:
    if run.state != run_pb2.RUN_STATE_SUCCEEDED or run.accepted_results != run.task_count:
        raise RuntimeError(f"{run.name} ended as {run_pb2.RunState.Name(run.state)}: {run.reason}")


def _seconds(stamp: Timestamp) -> float:
    """A protobuf timestamp as seconds since the epoch."""
    return stamp.seconds + stamp.nanos / 1e9
