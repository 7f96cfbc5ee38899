"""The simulator on a few seeds (DESIGN 12.3): promises hold, equal seeds are equal, judges see what they are there for.

Simulations run in processes of their own: with a fixed hash seed one seed means one run, here as in `scripts/sim`.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

from cluster_agent.executors.base import AttemptKey
from cluster_agent.executors.fake_workload import Interval
from control_plane.core import events as ev
from control_plane.core.model import AttemptState, Evidence, GraphTask, RunState, Stamp, TaskSpec, TaskState
from lab.simulation.checkers import judge
from lab.simulation.nodes import Life, Node, SimLoop
from lab.simulation.record import Ran, Record, Written
from lab.simulation.workload import Said

FIXED = (1, 4)
"""Seeds that every run tries: the base and how many."""

FRESH = 1
"""New seeds of each run; they are printed, and a failing one can be replayed."""


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


def test_one_seed_is_one_run() -> None:
    first, second = sim("--seed", "3", "--all"), sim("--seed", "3", "--all")
    assert re.search(r"^trace [0-9a-f]{32}$", first.stdout, re.MULTILINE), first.stdout + first.stderr
    assert first.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]


# -- nodes -----------------------------------------------------------------------------------------------------------------


def on_loop(story: object) -> object:
    loop = SimLoop()
    try:
        return loop.run_until_complete(story(loop))  # type: ignore[operator]
    finally:
        loop.bury()
        loop.close()


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


# -- judges: each sees the breach it is there for ---------------------------------------------------------------------------

RUN, SPEC = "run", TaskSpec(("true",))


def written(*events: ev.Event, nonce: str = "n") -> list[Written]:
    begin: tuple[ev.Event, ...] = (
        ev.RunCreated(RUN, "default", "r", 100.0, 0, 2),
        ev.TasksAdded(RUN, (GraphTask("a", (), SPEC), GraphTask("b", (0,), SPEC))),
        ev.RunSealed(RUN),
    )
    return [
        Written(float(place), place, "00", Stamp(0.0, nonce, place, 1), event)
        for place, event in enumerate((*begin, *events), 1)
    ]


def placed(task: int, n: int, **flags: bool) -> ev.AttemptsPlaced:
    return ev.AttemptsPlaced(RUN, "c", 1, (task,), (n,), **flags)


def finished(task: int, n: int, state: AttemptState = AttemptState.SUCCEEDED) -> ev.AttemptsFinished:
    return ev.AttemptsFinished(RUN, (task,), (n,), (state,), (False,), (0,), (b"",), ("",), (0.0,), (0.0,))


def ended(task: int) -> ev.TasksEnded:
    return ev.TasksEnded(RUN, (task,), (TaskState.FAILED,), ("",))


ASKED = Said("CreateRun", "r", 0.0, 9.0, ok=True, uid=RUN)

GOOD = (placed(0, 1), finished(0, 1), placed(1, 1), finished(1, 1))


def found(*events: ev.Event, ran: tuple[Ran, ...] = (), said: tuple[Said, ...] = (ASKED,)) -> set[str]:
    record = Record(written(*events), list(ran), said, {}, healed=50.0, ended=500.0, died=())
    finish = Written(100.0, 100, "00", Stamp(0.0, "n", 100, 1), ev.RunFinished(RUN, RunState.SUCCEEDED, ""))
    record.journal.append(finish)
    return {violation.invariant.partition(" ")[0] for violation in judge(record)}


def life(task: int, n: int, start: float, end: float, cluster: str = "c") -> Ran:
    return Ran(cluster, Interval(AttemptKey(RUN, task, n, "n"), start, end))


def test_a_lawful_journal_is_lawful() -> None:
    assert found(*GOOD, ran=(life(0, 1, 4.5, 5.0), life(1, 1, 6.5, 7.0))) == set()


def test_two_live_attempts_are_seen() -> None:
    assert "I2" in found(placed(0, 1), placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))


def test_a_hedge_is_no_breach() -> None:
    assert found(placed(0, 1), placed(0, 2, hedge=True), finished(0, 2), placed(1, 1), finished(1, 1)) == set()


def test_a_second_acceptance_is_seen() -> None:
    assert "I3" in found(placed(0, 1), finished(0, 1), finished(0, 1), placed(1, 1), finished(1, 1))


def test_a_result_of_a_dead_attempt_is_seen() -> None:
    lost = ev.AttemptsLost(RUN, (0,), (1,), Evidence.TIMED)
    assert "I3" in found(placed(0, 1), lost, finished(0, 1), placed(1, 1), finished(1, 1))


def test_a_number_that_does_not_rise_is_seen() -> None:
    failed = finished(0, 2, AttemptState.FAILED)
    assert "I1" in found(placed(0, 2), failed, placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))


def test_a_final_task_that_changes_is_seen() -> None:
    assert "I6" in found(*GOOD, ended(0))


def test_a_child_before_its_parent_is_seen() -> None:
    assert "I7" in found(placed(0, 1), placed(1, 1), finished(0, 1), finished(1, 1))


def test_a_second_spawn_is_seen() -> None:
    assert "F4" in found(*GOOD, ran=(life(0, 1, 4.5, 4.6), life(0, 1, 5.0, 5.1, "d")))


def test_work_before_its_commit_is_seen() -> None:
    assert "J7" in found(*GOOD, ran=(life(0, 1, 3.0, 4.5),))


def test_an_overlap_is_seen_unless_it_was_declared() -> None:
    lost = ev.AttemptsLost(RUN, (0,), (1,), Evidence.TIMED)
    rest = (finished(0, 2), placed(1, 1), finished(1, 1))
    lives = (life(0, 1, 4.5, 9.0), life(0, 2, 8.0, 9.5))
    assert "I9" in found(placed(0, 1), lost, placed(0, 2), *rest, ran=lives)
    assert found(placed(0, 1), lost, placed(0, 2, overlap=True), *rest, ran=lives) == set()


def test_an_acknowledged_run_that_is_not_there_is_seen() -> None:
    said = Said("CreateRun", "r", 0.0, 9.0, ok=True, uid="other")
    assert "I4" in found(*GOOD, said=(said,))


def test_a_read_that_goes_back_is_seen() -> None:
    first = Said("GetRun", "r", 10.0, 11.0, ok=True, uid=RUN, state=1, number=7)
    said = (first, replace(first, called=12.0, answered=13.0, number=5))
    assert "J8" in found(*GOOD, said=said)
