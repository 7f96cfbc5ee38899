"""Agents and guards that stand still or die (PROTOCOL F2-F5, F8, G1, G4), as real processes.

What is promised in seconds is measured on the boot clock of this host, which is the witness' clock too (federation.py), against
the values of the profile that the clusters run under. What lives and what is dead is asked of the kernel.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from baton.leases import PROFILES
from baton.v1 import run_pb2
from cluster_agent.guard import proctree
from lab.processes import Identity, identify
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, WAIT, Fed

FAST = PROFILES["fast"]

RECOVERY = 3 * (FAST.lost + FAST.guard)
"""Bound of waits for a copy elsewhere, seconds: L + G and three times that for a machine that has much to do."""

LOST = run_pb2.ATTEMPT_STATE_LOST
DONE = run_pb2.ATTEMPT_STATE_SUCCEEDED


async def last_heartbeat(fed: Fed, cluster: str) -> float:
    """When a replica saw the cluster's last heartbeat, on this host's boot clock."""
    found = await fed.client.get_cluster(f"clusters/{cluster}")
    return found.heartbeat_time.ToMilliseconds() / 1000 - CLOCK.wall() + CLOCK.boot()


def guard_of(fed: Fed, cluster: str) -> Identity:
    """The cluster's guard: below the machine, and no child of another guard (those are the keepers it forked)."""
    agent = proctree.read(fed.lab.part(cluster).pid)
    assert agent is not None
    guards = {
        each.pid: each
        for each in proctree.descendants(agent.ppid, proctree.everything())
        if b"\0cluster_agent.guard\0" in Path(f"/proc/{each.pid}/cmdline").read_bytes()
    }
    (guard,) = [each for each in guards.values() if each.ppid not in guards]
    return identify(guard.pid)


@pytest.mark.timeout(240)
async def test_f5_f8_a_frozen_agents_work_is_dead_before_its_copy_starts_and_its_late_result_is_refused(
    fed_here: MakeFederation,
) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        await fed.client.cordon_cluster("clusters/us")  # so that all of it begins on eu
        run = (await fed.run("frozen", [fed.gated("brief", "brief"), fed.gated("endless", "endless")])).name
        endless = (await fed.running(run, "brief", "endless"))["endless"]
        await fed.client.uncordon_cluster("clusters/us")

        frozen = CLOCK.boot()
        await fed.lab.freeze("eu")
        fed.open_gate("brief")
        await fed.eventually(lambda: fed.effects.copies("brief")[0].ended, "brief to end while nobody can tell")
        await fed.eventually(
            lambda: not endless.alive, "the guard to end what nobody renews", FAST.fence + FAST.kill + 30
        )
        dead = CLOCK.boot()
        heard = await last_heartbeat(fed, "eu")
        await fed.running(run, "endless", attempt=2, patience=RECOVERY)
        old, new = fed.effects.copies("endless")
        print(f"dead {dead - frozen:.1f} s after the freeze, copied elsewhere {new.first - frozen:.1f} s after it")
        assert (old.cluster, new.cluster) == ("eu", "us")
        assert dead < new.first
        assert dead <= frozen + FAST.fence + FAST.kill + FAST.pause
        # What a replica saw was sent before; not longer before than an answer may take.
        assert new.first >= heard - FAST.rpc + FAST.lost + FAST.guard

        await fed.lab.thaw("eu")

        async def refused() -> int:
            return (await fed.tasks(run))["brief"].attempts[0].refused_results

        await fed.eventually(refused, "the late result to be refused")
        fed.open_gate("endless")
        tasks = await fed.accepted_once(run)
        assert [each.refused_results for each in tasks["brief"].attempts] == [1, 0]
        for task in tasks.values():
            assert [each.state for each in task.attempts] == [LOST, DONE]
            assert not any(each.overlap_possible for each in task.attempts)
            assert task.attempts[0].evidence in (run_pb2.EVIDENCE_TIMED, run_pb2.EVIDENCE_REPORTED)
        assert (await fed.client.get_run(run)).refused_results == 1
        fed.effects.check()
        await fed.eventually(fed.all_ready, "eu to be of use again")


@pytest.mark.timeout(180)
async def test_g1_work_goes_on_when_its_agent_is_killed_and_is_not_run_again(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        await fed.client.cordon_cluster("clusters/us")
        tasks = [fed.gated("meanwhile", "meanwhile"), fed.gated("one", "all"), fed.gated("two", "all")]
        run = (await fed.run("orphans", tasks)).name
        before = await fed.running(run, "meanwhile", "one", "two")
        await fed.client.uncordon_cluster("clusters/us")
        generation = (await fed.client.get_cluster("clusters/eu")).generation

        killed = CLOCK.boot()
        await fed.lab.kill("eu", agent_only=True)
        fed.open_gate("meanwhile")
        await fed.eventually(lambda: fed.effects.copies("meanwhile")[0].ended, "a task to end without an agent")
        await fed.lab.start_again("eu")
        await fed.eventually(fed.all_ready, "eu to be ready")
        away = CLOCK.boot() - killed
        assert away < FAST.fence, f"this machine took {away:.1f} s to start an agent: longer than its lease"
        # Past F + K of the dead agent's last word: only the new agent's heartbeats can have kept the work alive.
        await fed.eventually(lambda: CLOCK.boot() > killed + FAST.fence + FAST.kill, "the old lease to pass")
        after = {copy.task: copy.process for copy in fed.effects.living(run=run)}
        assert after == {task: before[task] for task in ("one", "two")}
        fed.open_gate("all")
        ended = await fed.accepted_once(run)
        assert [len(task.attempts) for task in ended.values()] == [1, 1, 1]
        assert len(fed.effects.copies()) == 3
        assert (await fed.client.get_cluster("clusters/eu")).generation == generation


@pytest.mark.timeout(180)
async def test_g4_work_dies_with_its_guard_and_is_told_so(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu",)) as fed:
        # One application attempt each: a loss must not be counted as one. A report by the same journal lets even `wait`
        # work be run again (F7). `dear` bears one loss, the others ten.
        tasks = [
            fed.gated("plain", "go", max_attempts=1),
            fed.gated("waits", "go", max_attempts=1, on_cluster_lost=WAIT),
        ]
        run = (await fed.run("guarded", tasks)).name
        dear = (await fed.run("dear", [fed.gated("dear", "go", max_losses=1)])).name
        generation = (await fed.client.get_cluster("clusters/eu")).generation
        for n in (1, 2):
            work = {**await fed.running(run, "plain", "waits", attempt=n), **await fed.running(dear, "dear", attempt=n)}
            await kill_guard(fed, work)

            async def told(n: int = n) -> bool:
                found = {**await fed.tasks(run), **await fed.tasks(dear)}
                return all(task.attempts[n - 1].state == LOST for task in found.values())

            await fed.eventually(told, "the losses to be told")
        await fed.running(run, "plain", "waits", attempt=3)
        fed.open_gate("go")
        for task in (await fed.accepted_once(run)).values():
            assert [each.state for each in task.attempts] == [LOST, LOST, DONE]
            assert {each.evidence for each in task.attempts[:2]} == {run_pb2.EVIDENCE_REPORTED}
            assert not any(each.overlap_possible for each in task.attempts)
        failed = await fed.client.wait_run(dear)
        assert failed.state == run_pb2.RUN_STATE_FAILED
        assert "lost" in (await fed.tasks(dear))["dear"].reason
        fed.effects.check()
        assert (await fed.client.get_cluster("clusters/eu")).generation == generation


async def kill_guard(fed: Fed, work: dict[str, Identity]) -> None:
    """SIGKILL to the guard alone; the kernel must have killed its work before K is over (it needs milliseconds)."""
    guard, killed = guard_of(fed, "eu"), CLOCK.boot()
    os.kill(guard.pid, signal.SIGKILL)
    await fed.eventually(lambda: not any(each.alive for each in work.values()), "the work to die with its guard")
    print(f"dead {CLOCK.boot() - killed:.2f} s after the guard")
    assert CLOCK.boot() - killed < FAST.kill
