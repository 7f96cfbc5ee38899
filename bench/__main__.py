"""`scripts/bench`: measures and says it, for people or as one JSON object."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import NAMES, Measured, measure
from lab.etcd_binary import EtcdNotFound

MAX_SCALE = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measures wide, chain and many; all three if none is named."
    )
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tasks", type=_scale, help="tasks of wide, hops of chain, graphs of many, instead of the standard"
    )
    parser.add_argument(
        "--keep", type=Path, help="a directory that does not exist yet, for the processes' logs and data"
    )
    parser.add_argument(
        "--instant", action="store_true", help="nothing is run: what control plane and agent cost alone"
    )
    parser.add_argument(
        "--any-etcd", action="store_true", help="also with an etcd that is not supported: to see that it runs"
    )
    arguments = parser.parse_args(argv)
    try:
        found = asyncio.run(_all([arguments.name] if arguments.name else NAMES, arguments))
    except (EtcdNotFound, RuntimeError, TimeoutError) as error:
        print(f"scripts/bench: {str(error) or 'a part did not get ready in time'}", file=sys.stderr)
        return 1
    if not arguments.json:
        for name, each in found.items():
            _tell(name, each)
    else:
        print(json.dumps(found[arguments.name] if arguments.name else _merged(found)))
    return 0


def _scale(text: str) -> int:
    number = int(text)
    if not 2 <= number <= MAX_SCALE:
        raise argparse.ArgumentTypeError(f"{number} is not from 2 to {MAX_SCALE}")
    return number


async def _all(names: Sequence[str], asked: argparse.Namespace) -> dict[str, Measured]:
    """One after the other: they would measure each other otherwise."""
    how = {"keep": asked.keep, "instant": asked.instant, "any_etcd": asked.any_etcd}
    return {name: await measure(name, asked.tasks, **how) for name in names}


def _merged(found: dict[str, Measured]) -> Measured:
    """All in one object: the figures that have one meaning at the top, each benchmark whole under its name."""
    headline = ("tasks_per_second", "hop_ms_p50", "hop_ms_p99", "graphs_per_second")
    top = {key: each[key] for each in found.values() for key in headline if key in each}
    return {
        **top,
        "hop_floor_ms_p50": found["chain"]["hop_floor_ms_p50"],
        "calibration_seconds": min(each["calibration_seconds"] for each in found.values()),
        "etcd_version": found["chain"]["etcd_version"],
        "cpu_seconds": {name: each["cpu_seconds"] for name, each in found.items()},
        "peak_memory_bytes": {name: each["peak_memory_bytes"] for name, each in found.items()},
        **found,
    }


def _tell(name: str, each: Measured) -> None:
    figures = {
        "wide": "{tasks_per_second} tasks/s ({tasks} tasks in {seconds} s, accepted after {seconds_to_accept} s)",
        "chain": "{hop_ms_p50} ms a hop (p99 {hop_ms_p99} ms, floor {hop_floor_ms_p50} ms, {tasks} tasks)",
        "many": "{graphs_per_second} graphs/s ({graphs} graphs in {seconds} s, accepted after {seconds_to_accept} s)",
    }[name].format(**each)
    roles = ", ".join(f"{role} {micros}" for role, micros in each["cpu_us_per_task"].items())
    memory = ", ".join(f"{role} {size >> 20}" for role, size in each["peak_memory_bytes"].items())
    print(f"{name}: {figures}")
    print(f"  CPU us per task: {roles} (all {sum(each['cpu_us_per_task'].values())}); peak memory MiB: {memory}")
    print(
        f"  etcd {each['etcd_version']}; calibration {each['calibration_seconds']} s; floor {each['floor_ms_p50']} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
