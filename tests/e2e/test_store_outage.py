"""The store dies and comes back while work goes on (PROTOCOL J6, O3, S4, F5, F7; DESIGN promise 4)."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from baton.leases import PROFILES
from lab.layout import ETCD
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, NEVER, RERUN, WAIT, Copy, Fed

SHORT_OUTAGE = 10.0
LONG_OUTAGE = 120.0
"""Seconds: promised."""


@pytest.mark.timeout(180)
async def test_a_run_completes_over_the_death_of_etcd(fed_here: MakeFederation) -> None:
    """Killed three times while results come in, so that some commit is cut off in the middle (J6)."""
    async with fed_here() as fed:
        chains = [
            fed.task(f"link-{chain}-{n}", "sleep 0.3\n", after=[f"link-{chain}-{n - 1}"] if n else [], cpu_millis=50)
            for chain in range(3)
            for n in range(20)
        ]
        run = await fed.run("story", [*chains, fed.gated("gated", "go"), fed.quick("last", after=["gated"])])
        watcher = fed.watch(run.name)
        for done in (3, 10, 16):
            await fed.eventually(partial(fed.effects.copies, f"link-0-{done}"), f"link {done}")
            await fed.lab.kill(ETCD)
            await fed.lab.start_again(ETCD)
        (gated,) = fed.effects.copies("gated")
        assert not gated.ended
        fed.open_gate("go")
        tasks = await fed.accepted_once(run.name)
        await watcher.ended()
        fed.effects.check()
        repeated = [task.id for task in tasks.values() if len(task.attempts) > 1]
        assert not repeated, f"work was repeated though no cluster was lost: {repeated}"


@pytest.mark.timeout(330)
async def test_work_rides_out_an_etcd_that_is_down(fed_here: MakeFederation) -> None:
    """Ten seconds are nothing to anybody; two minutes end only work that may be copied, for its lease runs out (F5)."""
    lease = PROFILES["balanced"]
    async with fed_here(profile="balanced", clusters=("eu", "us")) as fed:
        kept = [*(fed.gated(f"wait-{n}", "go", on_cluster_lost=WAIT) for n in range(2))]
        kept.append(fed.gated("never", "go", on_cluster_lost=NEVER))
        mortal = [fed.gated(f"rerun-{n}", "go", on_cluster_lost=RERUN) for n in range(3)]
        work = [task.id for task in (*kept, *mortal)]
        run = await fed.run("story", [*kept, *mortal, fed.quick("last", after=work)])
        watcher = fed.watch(run.name)
        first = await fed.eventually(lambda: _alive(fed, work), "all work to run")
        mine = {task.id for task in kept}

        await _down_for(fed, SHORT_OUTAGE)
        await fed.eventually(fed.all_ready, "the clusters to be ready")
        assert _processes(fed) == {copy.task: copy.process for copy in first}, "a short outage touched work"
        assert len(fed.effects.copies()) == len(work)

        await fed.lab.kill(ETCD)
        began = CLOCK.boot()
        # F counts from a heartbeat before the kill, and K later all is dead: no bound that is looser is promised.
        await asyncio.sleep(lease.fence + lease.kill + lease.pause)
        survivors = _processes(fed)
        await asyncio.sleep(LONG_OUTAGE - (CLOCK.boot() - began))
        assert survivors.keys() == mine, "at F + K only work that is never copied lives"
        assert _processes(fed) == survivors == {copy.task: copy.process for copy in first if copy.task in mine}
        assert len(fed.effects.copies()) == len(work), "something was started without a store"
        await fed.lab.start_again(ETCD)

        second = await fed.eventually(lambda: _alive(fed, work), "the ended work to run again")
        assert {copy.task: copy.process for copy in second if copy.task in mine} == survivors
        assert {copy.fence for copy in second if copy.task not in mine} == {"1.2"}
        fed.open_gate("go")
        tasks = await fed.accepted_once(run.name)
        await watcher.ended()
        fed.effects.check()
        for task in tasks.values():
            copies = fed.effects.copies(task.id)
            assert len(copies) == (2 if task.id.startswith("rerun") else 1), copies
        clusters = [each async for each in fed.client.list_clusters()]
        assert {each.generation for each in clusters} == {1}, "a cluster was lost while the store had no quorum (S4)"


def _alive(fed: Fed, work: list[str]) -> list[Copy]:
    """One living copy of each piece of work; nothing if one is missing."""
    living = fed.effects.living()
    return living if sorted(copy.task for copy in living) == sorted(work) else []


def _processes(fed: Fed) -> dict[str, object]:
    return {copy.task: copy.process for copy in fed.effects.living()}


async def _down_for(fed: Fed, seconds: float) -> None:
    await fed.lab.kill(ETCD)
    await asyncio.sleep(seconds)
    await fed.lab.start_again(ETCD)
