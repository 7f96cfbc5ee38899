"""Chaos on real processes (issue 5, point 4): a round that loses a cluster and a brief one, of a fixed and of a fresh seed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from baton.clock import SystemEntropy
from lab import processes
from lab.chaos import offsets

FIXED = 38
"""Its first round cuts a cluster off for 24 s, longer than L + G, so that work moves."""

ROUND_SECONDS = 330
"""For a campaign of one round to end by itself, also if a promise is broken (patience, settling and rest of `lab.chaos.campaign`)."""


def chaos(seed: int, *flags: str) -> str:
    command = [sys.executable, "-m", "lab.chaos", "--seed", str(seed), "--rounds", "1", *flags]
    done = subprocess.run(
        command,
        env=processes.environment(),
        capture_output=True,
        text=True,
        timeout=ROUND_SECONDS,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(2 * ROUND_SECONDS + 30)
def test_a_round_of_chaos_with_a_lost_cluster_keeps_every_promise_and_a_fresh_seed_too() -> None:
    said = chaos(FIXED)
    assert re.search(r"^chaos: 1 rounds survived, [1-9]\d* faults of [1-9]\d* kinds, 0 violations$", said, re.MULTILINE)
    checked = re.search(
        r"^checked: (\d+) journal events, (\d+) processes, (\d+) answers, (\d+) watch events", said, re.MULTILINE
    )
    assert checked is not None
    assert all(int(count) > 0 for count in checked.groups())
    moved = re.search(r"attempts moved: (\d+)$", said, re.MULTILINE)
    assert moved is not None
    assert int(moved[1]) > 0
    fresh = int(SystemEntropy().token(4), 16)
    print(f"fresh seed: scripts/chaos --seed {fresh} --rounds 1 --brief")
    chaos(fresh, "--brief")


def test_where_a_host_has_time_namespaces_a_cluster_has_a_boot_clock_of_its_own() -> None:
    why = offsets.why_not()
    command = [*offsets.shifted(5_000), "cat", "/proc/uptime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert bool(why) == (done.returncode != 0 or float(done.stdout.split()[0]) < 4_000)
    assert offsets.shifted(0) == []
