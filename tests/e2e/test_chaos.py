"""Chaos on real processes (issue 5, point 4): a round that loses a cluster and a brief one, of a fixed and of a fresh seed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.clock import SystemClock, SystemEntropy
from cluster_agent.guard import proctree
from lab import processes
from lab.chaos import offsets
from lab.chaos.effects import Effects
from lab.chaos.strikes import Deck, Targets
from lab.layout import Layout
from lab.processes import Identity

FIXED = 395
"""Its first round cuts a cluster off for 24 s, longer than L + G, so that work moves; and kills an etcd member and a guard."""

ROUND_SECONDS = 330
"""For a campaign of one round to end by itself, also if a promise is broken (patience, settling and rest of `lab.chaos.campaign`)."""


def chaos(seed: int, scratch: Path, *flags: str) -> str:
    """What a campaign of one round says; it kept every promise."""
    command = [sys.executable, "-m", "lab.chaos", "--seed", str(seed), "--rounds", "1", *flags]
    done = subprocess.run(
        command,
        env={**processes.environment(), "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=ROUND_SECONDS,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(2 * ROUND_SECONDS + 30)
def test_a_round_of_chaos_with_a_lost_cluster_keeps_every_promise_and_a_fresh_seed_too(tmp_path: Path) -> None:
    said = chaos(FIXED, tmp_path)
    assert list(tmp_path.iterdir()) == []
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
    said = chaos(fresh, tmp_path, "--brief", "--keep")
    (kept,) = tmp_path.iterdir()
    assert f"all of it is kept in {kept}\n" in said


# -- interruptions -----------------------------------------------------------------------------------------------------------

LOOK_SECONDS = 0.05
"""Between two looks at a campaign: a strike lasts for seconds."""

TARGETS = Targets(("c1",), ("replica-1",), ("etcd-1", "etcd-2", "etcd-3"))
"""As small as it can be with a store that outlives a member."""


def starting(layout: Layout, family: list[Identity]) -> bool:
    """Whether some parts have been started, and not all."""
    del family
    state = layout.read_state()
    return state.get("stage") == "starting" and len(state.get("processes", [])) > 1


def frozen(layout: Layout, family: list[Identity]) -> bool:
    """Whether a strike goes on that stops a process."""
    states = [proctree.read(each.pid) for each in family]
    return layout.read_state().get("stage") == "running" and any(each and each.state == "T" for each in states)


def seed_of(kind: str) -> int:
    """A seed whose first brief round begins with that strike, for six seconds."""
    for seed in range(1_000_000):
        first = Deck(seed, TARGETS).deal(1, 2, 5, long=False)[0]
        if first.kind == kind and first.seconds == 6.0:
            return seed
    raise AssertionError(f"no seed begins with {kind}")


def family_of(pid: int) -> list[Identity]:
    """It and all below it, workloads and keepers included."""
    return [
        processes.identify(each) for each in (pid, *(p.pid for p in proctree.descendants(pid, proctree.everything())))
    ]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("moment", "kind", "number", "code"),
    [
        (starting, "replica frozen", signal.SIGTERM, 143),
        (frozen, "etcd member frozen", signal.SIGINT, 130),
        (frozen, "agent frozen", signal.SIGTERM, 143),
    ],
    ids=["while it starts", "while an etcd member is frozen", "while an agent is frozen"],
)
def test_an_interruption_ends_with_one_line_and_leaves_no_process(
    moment: Callable[[Layout, list[Identity]], bool], kind: str, number: int, code: int, tmp_path: Path
) -> None:
    sizes = ["--replicas", "1", "--clusters", "1", "--etcd", "3", "--rounds", "1", "--brief"]
    directory = tmp_path / "chaos"
    flags = ["--seed", str(seed_of(kind)), *sizes, "--directory", str(directory)]
    clock, known = SystemClock(), set[Identity]()
    with subprocess.Popen(
        [sys.executable, "-m", "lab.chaos", *flags],
        env=processes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            deadline, family = clock.boot() + 120, family_of(child.pid)
            while not moment(Layout(directory / "fed"), family):
                assert child.poll() is None, child.stderr and child.stderr.read()
                assert clock.boot() < deadline
                time.sleep(LOOK_SECONDS)
                family = family_of(child.pid)
                known |= set(family)
            child.send_signal(number)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, err) == (code, "chaos: interrupted; nothing is left running\n"), out
    assert len(known) > 4
    assert [each for each in known if each.alive] == []
    assert Effects(directory / "effects", {}, 0.0).living() == []


def test_where_a_host_has_time_namespaces_a_cluster_has_a_boot_clock_of_its_own() -> None:
    why = offsets.why_not()
    command = [*offsets.shifted(5_000), "cat", "/proc/uptime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert bool(why) == (done.returncode != 0 or float(done.stdout.split()[0]) < 4_000)
    assert offsets.shifted(0) == []
