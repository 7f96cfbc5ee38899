"""`scripts/bench`, as small as can be: it runs everything it measures, and its JSON has what issue 4 names. No speed is asserted."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from bench.usage import cpu_by_role, peak_by_role, spent

ROLES = {"etcd", "replica", "client", "agent", "guard", "workers"}

SECONDS = 150.0
"""For one benchmark of a few tasks: three on an idle machine, most of them starts of processes."""


async def bench(checkout: Path, *arguments: str) -> dict[str, object]:
    words = [sys.executable, "-m", "bench", "--json", "--any-etcd", *arguments]
    process = await asyncio.create_subprocess_exec(
        *words, cwd=checkout, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@pytest.mark.timeout(170)
@pytest.mark.parametrize(
    ("name", "figures"),
    [("wide", {"tasks_per_second"}), ("chain", {"hop_ms_p50", "hop_ms_p99"}), ("many", {"graphs_per_second"})],
)
async def test_each_benchmark_tells_its_figures_beside_calibration_and_floor(
    checkout: Path, name: str, figures: set[str]
) -> None:
    found = await bench(checkout, name, "--tasks", "6")
    common = {"hop_floor_ms_p50", "calibration_seconds", "etcd_version", "cpu_seconds", "peak_memory_bytes"}
    assert found.keys() >= common | figures
    for field in (*figures, "hop_floor_ms_p50", "calibration_seconds"):
        value = found[field]
        assert isinstance(value, float), field
        assert value > 0.0, field
    for field in ("cpu_seconds", "peak_memory_bytes"):
        of = found[field]
        assert isinstance(of, dict), field
        assert of.keys() == ROLES, field
        assert all(value >= 0 for value in of.values())
    memory = found["peak_memory_bytes"]
    assert isinstance(memory, dict)
    assert all(memory[role] > 1 << 20 for role in ROLES)


def test_what_a_role_spent_counts_processes_that_came_meanwhile() -> None:
    assert spent({"workers": 1.0}, {"workers": 1.5, "guard": 0.25}) == {"workers": 0.5, "guard": 0.25}
    assert spent({"workers": 1.0}, {"workers": 0.5}) == {"workers": 0.0}


def test_processes_that_are_gone_cost_nothing() -> None:
    assert cpu_by_role({"agent": [1 << 30]}) == {"agent": 0.0}
    assert peak_by_role({"agent": [1 << 30]}) == {"agent": 0}
