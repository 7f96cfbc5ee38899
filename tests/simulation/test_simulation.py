"""The simulator on a few seeds (DESIGN 12.3): promises hold, equal seeds are equal, nodes live and die like processes.

Simulations run in processes of their own: with a fixed hash seed one seed means one run, here as in `scripts/sim`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane.core import events as ev
from control_plane.core.model import Evidence, Stamp
from lab.checking.history import Record, Violation, Written
from lab.simulation import cli
from lab.simulation.kinds import DERIVED, KINDS
from lab.simulation.nodes import Life, Node, SimLoop
from lab.simulation.record import stale_returns
from lab.simulation.story import tell
from lab.simulation.world import Shape, World

FIXED = (1, 4)
"""Seeds that every run tries: the base and how many."""

FRESH = 1
"""New seeds of each run and mode; they are printed, and a failing one can be replayed."""

ROOT = Path(__file__).parents[2]

SKEW = "a replica one version behind,an agent one version behind,host suspended,message reordered"
"""Classes of faults whose traces are looked for."""

QUICK = (
    "store out of space,keepalive that lies,ring flapping,link of a cluster flapping,wall clock stepped at a deadline"
)
"""Others, and what comes of them."""


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """A simulation in this process turns logs off."""
    yield
    logging.disable(logging.NOTSET)


def sim(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "lab.simulation", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


def test_fixed_seeds_keep_every_promise() -> None:
    done = sim("--seeds", str(FIXED[1]), "--seed-base", str(FIXED[0]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"sim: {FIXED[1]} seeds" in done.stdout.splitlines()[-1]


def test_fresh_seeds_keep_every_promise() -> None:
    base = random.SystemRandom().randrange(10**9)
    print(f"fresh seeds: scripts/sim --seeds {FRESH} --seed-base {base}")
    done = sim("--seeds", str(FRESH), "--seed-base", str(base))
    assert done.returncode == 0, f"fresh seeds from {base}\n{done.stdout}{done.stderr}"


def test_runs_move_on_once_all_is_healed() -> None:
    """Liveness mode (I15): faults stop, and no deadline ends what would be stuck."""
    done = sim("--liveness", "--seeds", "1", "--seed-base", "7")
    assert done.returncode == 0, done.stdout + done.stderr


def test_fresh_seeds_move_on_once_all_is_healed() -> None:
    base = random.SystemRandom().randrange(10**9)
    print(f"fresh seeds: scripts/sim --liveness --seeds {FRESH} --seed-base {base}")
    done = sim("--liveness", "--seeds", str(FRESH), "--seed-base", str(base))
    assert done.returncode == 0, f"fresh liveness seeds from {base}\n{done.stdout}{done.stderr}"


def test_what_a_class_of_faults_did_is_counted() -> None:
    done = sim("--seeds", "4", "--seed-base", "20", "--faults", SKEW)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in (*SKEW.split(","), "message late", "message overtook another", "older replica refused"):
        assert rows(done.stdout)[kind] > 0, f"{kind}\n{done.stdout}"


def rows(table: str) -> dict[str, int]:
    return {row[1]: int(row[2]) for row in re.finditer(r"^(\S.*?) +(\d+)$", table, re.MULTILINE)}


def test_a_full_store_lies_and_flapping_are_survived_and_counted() -> None:
    done = sim("--seeds", "8", "--seed-base", "40", "--faults", QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in (*QUICK.split(","), "store write refused for want of space"):
        assert rows(done.stdout)[kind] > 0, f"{kind}\n{done.stdout}"
    done = sim("--seeds", "2", "--seed-base", "40", "--faults", "keepalive that lies")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout)["keepalive acknowledged by a stale leader"] > 0, done.stdout


def test_every_row_is_in_the_table_and_a_silent_one_says_0() -> None:
    done = sim("--seeds", "1", "--faults", "store compacted")
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert list(table) == [*KINDS, *DERIVED]
    assert {kind for kind in KINDS if table[kind]} <= {"store compacted"}


def test_what_is_counted_has_a_row() -> None:
    done = [cli.try_seed(seed, Shape()) for seed in (60, 61)]
    assert {kind for verdict in done for kind in verdict.hits} <= {*KINDS, *DERIVED}


def test_every_class_of_faults_has_its_strike() -> None:
    async def story(loop: SimLoop) -> set[str]:
        return set(World(1, Shape(), loop).nemesis.strikes)

    assert on_loop(story) == set(KINDS)


def test_a_strike_that_does_nothing_is_neither_counted_nor_told() -> None:
    async def story(loop: SimLoop) -> tuple[list[tuple[float, str]], set[str]]:
        world = World(1, Shape(faults=("replica killed", "agent frozen", "store restored", "guard killed")), loop)
        await world.nemesis.run(20.0)  # nobody was ever started
        return world.nemesis.notes, set(world.hits) & set(KINDS)

    assert on_loop(story) == ([], set())


def verdict(seed: int, *, hits: dict[str, int], violations: tuple[Violation, ...] = ()) -> cli.Verdict:
    return cli.Verdict(seed, violations, Counter(hits), 1, 60.0, 50, 1, 60, 1.0, "")


def test_a_class_that_never_struck_in_many_seeds_is_named_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    hits = dict.fromkeys([*KINDS, *DERIVED], 1)
    missing = {**hits, "ring flapping": 0, "watch lag": 0}
    sum_up = cli._sum_up
    assert sum_up([verdict(seed, hits=hits) for seed in range(500)], Shape(), 1.0) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 violations, rows at 0: none")
    assert sum_up([verdict(seed, hits=missing) for seed in range(500)], Shape(), 1.0) == 1
    *_, named, last = capsys.readouterr().out.splitlines()
    assert named == "sim: never struck in 500 seeds: ring flapping"
    assert last.endswith("rows at 0: ring flapping, watch lag")
    assert sum_up([verdict(seed, hits=missing) for seed in range(100)], Shape(), 1.0) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("rows at 0: ring flapping, watch lag")
    only = Shape(faults=("store compacted",))
    assert sum_up([verdict(seed, hits=missing) for seed in range(500)], only, 1.0) == 0, (
        "what was not wanted is no miss"
    )


def test_the_last_line_names_the_invariant(capsys: pytest.CaptureFixture[str]) -> None:
    broken = (Violation("I9 no overlap", 1.0, "x"), Violation("J8 reads", 2.0, "y"), Violation("J8 reads", 3.0, "z"))
    assert cli._sum_up([verdict(7, hits={}, violations=broken)], Shape(), 2.0) == 1
    assert "violations in 1 (7: I9 no overlap and J8 reads)" in capsys.readouterr().out.splitlines()[-1]


CONTRADICTIONS = (
    "--seed 2 --seeds 5",
    "--seed 2 --seed-base 5",
    "--seeds 0",
    "--seeds -3",
    "--jobs 0",
    "--all",
    "--faults no-such",
    "--faults=",
    "--sabotage owner-compare --faults re-send",
    "--sabotage owner-compare --liveness",
    "--sabotage owner-compare,re-send --seed 1",
    "--sabotage list --seed 1",
    "--sabotage owner-compare --exhaustive",
    "--remove guard-time",
    "--slice a",
    "--minutes 3",
    "--exhaustive --minutes -1",
    "--exhaustive --minutes nan",
    "--exhaustive --remove no-such",
    "--exhaustive --remove all --slice a",
    "--exhaustive --seeds 3",
)


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_mean_nothing_are_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(flags.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sim: error: ")
    if "no-such" in flags:
        assert "no-such" in said
        assert "there are: " in said


def test_both_helps_name_every_flag_and_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = " ".join(capsys.readouterr().out.split())
    done = subprocess.run([ROOT / "scripts" / "sim", "--help"], capture_output=True, text=True, timeout=60, check=True)
    shown = " ".join(done.stdout.split())
    for word in (*KINDS, *set(re.findall(r"--[a-z-]+", known)) - {"--help"}):
        assert word in known
        assert word in shown


def test_a_closed_standard_output_ends_quietly() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lab.simulation", "--seed", "3"]
    done = subprocess.run(
        command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=110, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_simulation_that_stops_is_told_as_in_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._one(3, Shape(pace=0.0), whole=False) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("seed 3: the simulation stopped at 0.0 s: ZeroDivisionError")
    assert last.endswith("violations in 1 (3: the simulation stopped)")


# -- what is told and counted of a record ------------------------------------------------------------------------------------

RUN, OTHER = "a" * 24, "b" * 24
CLUSTER = "c" * 16


def written(at: float, event: ev.Event, nonce: str = "d" * 16) -> Written:
    return Written(at, int(at), "00", Stamp(at, nonce, 1, 1), event)


def opened(generation: int) -> ev.SessionOpened:
    return ev.SessionOpened(
        CLUSTER, generation, "boot", "j", "i", "r0", "fast", 15.0, 5.0, (), (), False, True, (), "1"
    )


def lost_and_back() -> list[Written]:
    return [
        written(1.0, ev.ClusterAdded(CLUSTER, "c0")),
        written(1.0, opened(1)),
        written(2.0, ev.RunCreated(RUN, "default", "nightly", 100.0, 0, 2)),
        written(3.0, ev.AttemptsPlaced(RUN, CLUSTER, 1, (0, 1), (1, 1))),
        written(20.0, ev.ClusterLost(CLUSTER, 1, Evidence.TIMED, "no heartbeat")),
        written(21.0, ev.AttemptsLost(RUN, (0,), (1,), Evidence.TIMED)),
    ]


def test_a_late_return_counts_only_with_work_that_was_lost() -> None:
    journal = lost_and_back()
    assert stale_returns(journal) == 0
    back = [*journal, written(30.0, opened(2)), written(31.0, ev.StopsConfirmed(RUN, (1,), (1,)))]
    assert stale_returns(back) == 0
    twice = [
        *back,
        written(32.0, ev.StopsConfirmed(RUN, (0,), (1,))),
        written(33.0, ev.ResultsRefused(RUN, (0,), (1,), ("",))),
    ]
    assert stale_returns(twice) == 1


def test_a_story_has_short_names_and_ends_with_what_was_broken() -> None:
    record = Record([*lost_and_back(), written(2.0, ev.RunSealed(RUN))], [], [], {}, healed=40.0, ended=60.0, died=[])
    text = f"AttemptId(run='{RUN}', task=1, n=1, nonce='{'d' * 16}') on {CLUSTER}, run {OTHER}, {RUN}.0.1.{'d' * 16} is left"
    lines = tell(record, [Violation("I9 no overlap", 25.0, text)])
    assert "    3.000      [00] nightly: task 0 #1, task 1 #1: placed on c0, session 1" in lines
    assert not any("RunSealed" in line or RUN in line for line in lines)
    short = "nightly/task 1 #1 on c0, run bbbbbb, nightly/task 0 #1 is left"
    assert f"   25.000  !!! I9 no overlap: {short}" in lines
    assert lines[-1] == f"!!! I9 no overlap at 25.000 s: {short}"
    assert any("(RunSealed)" in line for line in tell(record, [], whole=True))


def test_one_seed_is_one_run() -> None:
    first, second = sim("--seed", "3", "--all"), sim("--seed", "3", "--all")
    assert re.search(r"^trace [0-9a-f]{32}$", first.stdout, re.MULTILINE), first.stdout + first.stderr
    assert first.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]


def test_what_ran_before_in_a_process_changes_nothing() -> None:
    """A failing seed of a thousand must fail alone, too: no order may come from addresses."""
    story = "from lab.simulation import cli, world; print(*(cli.try_seed(s, world.Shape()).digest for s in (5001, 5003) * 2))"
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run([sys.executable, "-c", story], env=environment, capture_output=True, text=True, check=True)
    first, second, *again = done.stdout.split()
    assert [first, second] == again


# -- nodes -----------------------------------------------------------------------------------------------------------------


def on_loop(story: object) -> object:
    loop = SimLoop()
    try:
        return loop.run_until_complete(story(loop))  # type: ignore[operator]
    finally:
        loop.bury()
        loop.close()


def test_a_suspended_node_is_late_by_the_time_asleep() -> None:
    async def story(loop: SimLoop) -> list[str]:
        heard: list[str] = []

        async def live(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            heard.append(f"{name}@{loop.time():.0f}")

        asleep, awake = Node("asleep", loop), Node("awake", loop)
        asleep.spawn(live("due while asleep", 3.0))
        asleep.spawn(live("due later", 20.0))
        awake.spawn(live("another's", 20.0))
        await asyncio.sleep(1.0)
        asleep.suspend()
        await asyncio.sleep(10.0)
        asleep.thaw()
        await asyncio.sleep(30.0)
        return list(heard)

    assert on_loop(story) == ["due while asleep@13", "another's@20", "due later@30"]


def test_a_frozen_node_goes_on_where_it_was_and_a_dead_one_never() -> None:
    async def story(loop: SimLoop) -> list[str]:
        heard: list[str] = []

        async def live(name: str) -> None:
            try:
                for beat in range(4):
                    await asyncio.sleep(1.0)
                    heard.append(f"{name}{beat}@{loop.time():.0f}")
            finally:
                heard.append(f"{name} ended")

        frozen, dead = Node("frozen", loop), Node("dead", loop)
        frozen.spawn(live("f"))
        dead.spawn(live("d"))
        await asyncio.sleep(1.5)
        frozen.freeze()
        dead.kill()
        await asyncio.sleep(10.0)
        frozen.thaw()
        await asyncio.sleep(10.0)
        assert dead.life is Life.DEAD
        return list(heard)

    heard = on_loop(story)
    # Its sleep was over at 2, but it woke at 11.5; a dead one does not even run its `finally`.
    assert heard == ["f0@1", "d0@1", "f1@12", "f2@12", "f3@14", "f ended"]
