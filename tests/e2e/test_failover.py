"""What becomes of work when its cluster is cut off, loses its power, drains or is cordoned (PROTOCOL F5-F8, S3, S6), for each policy.

All work of a test begins on `eu`, because `us` is cordoned until it runs; so a test says what moves, and the scheduler where to.
"""

from __future__ import annotations

import json

import pytest

from baton.leases import PROFILES
from baton.v1 import cluster_pb2, graph_pb2, run_pb2
from lab.processes import Identity
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, NEVER, WAIT, Fed

FAST = PROFILES["fast"]

RECOVERY = 3 * (FAST.lost + FAST.guard)
"""Bound of waits for a copy elsewhere, seconds: L + G and three times that for a machine that has much to do."""

RUNNING = run_pb2.ATTEMPT_STATE_RUNNING
LOST = run_pb2.ATTEMPT_STATE_LOST
STOPPED = run_pb2.ATTEMPT_STATE_STOPPED
DONE = run_pb2.ATTEMPT_STATE_SUCCEEDED

POLITE = """\
trap 'note term; sleep 0.5; note tidied; exit 0' TERM
while [ ! -e "$GATE" ]; do sleep 0.2; note tick; done
"""
"""Work that tidies up when it is told to end."""


async def begin_on_eu(fed: Fed, run_id: str, *tasks: graph_pb2.Task) -> tuple[str, dict[str, Identity]]:
    """Create a run whose tasks all run on eu; its name and their processes. Afterwards us takes work as well."""
    await fed.client.cordon_cluster("clusters/us")
    run = (await fed.run(run_id, tasks)).name
    work = await fed.running(run, *(task.id for task in tasks))
    await fed.client.uncordon_cluster("clusters/us")
    assert {copy.cluster for copy in fed.effects.copies()} == {"eu"}
    return run, work


def clusters_of(fed: Fed, task: str) -> list[str]:
    """Where copies of a task began, in order."""
    return [copy.cluster for copy in fed.effects.copies(task)]


@pytest.mark.timeout(240)
async def test_f7_a_cluster_that_is_cut_off_each_policy_does_what_it_says(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        # A takeover of fleet starts every observation anew (S4): SUSPECT could come after F.
        await fed.eventually(fed.balanced, "both replicas to have their shards")
        hedged = fed.gated("hedged", "hedged")
        hedged.hedge = True
        policies = [fed.gated("waits", "end", on_cluster_lost=WAIT), fed.gated("never", "end", on_cluster_lost=NEVER)]
        run, work = await begin_on_eu(fed, "cut", hedged, fed.gated("reruns", "end"), *policies)
        generation = (await fed.client.get_cluster("clusters/eu")).generation

        fed.lab.cut("eu")
        await fed.eventually(lambda: len(fed.effects.living("hedged")) == 2, "the hedge at SUSPECT")
        assert work["reruns"].alive, "a copy at SUSPECT comes long before anything is fenced"
        hedge = (await fed.tasks(run))["hedged"].attempts[-1]
        assert (hedge.n, hedge.cluster, hedge.hedge, hedge.overlap_possible) == (2, "us", True, True)
        fed.open_gate("hedged")

        await fed.eventually(lambda: clusters_of(fed, "reruns") == ["eu", "us"], "a copy elsewhere", RECOVERY)
        assert not work["reruns"].alive
        found = await fed.tasks(run)
        assert found["hedged"].accepted_results == 1, "the hedge's result does not wait for the verdict on eu"
        for task in ("waits", "never"):
            assert work[task].alive, "not stopped at F: no copy of it will start"
            assert [(each.cluster, each.state) for each in found[task].attempts] == [("eu", RUNNING)]

        fed.lab.heal("eu")
        await fed.eventually(fed.all_ready, "eu to be ready")
        assert (await fed.client.get_cluster("clusters/eu")).generation > generation
        fed.open_gate("end")
        tasks = await fed.accepted_once(run)
        for task in ("waits", "never"):
            assert clusters_of(fed, task) == ["eu"]
            assert [each.state for each in tasks[task].attempts] == [DONE]
        assert [each.state for each in tasks["reruns"].attempts] == [LOST, DONE]
        assert not tasks["reruns"].attempts[1].overlap_possible
        assert [each.state for each in tasks["hedged"].attempts][1] == DONE
        fed.effects.check(hedged=["hedged"])


@pytest.mark.timeout(240)
async def test_s6_a_cluster_without_power_says_by_another_boot_id_that_its_work_is_dead(
    fed_here: MakeFederation,
) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        tasks = [
            fed.gated("reruns", "end"),
            fed.gated("waits", "end", on_cluster_lost=WAIT),
            fed.gated("never", "end", on_cluster_lost=NEVER),
        ]
        run, work = await begin_on_eu(fed, "power", *tasks)
        off = CLOCK.boot()
        await fed.lab.kill("eu")
        assert not any(each.alive for each in work.values())
        await fed.running(run, "reruns", attempt=2, patience=RECOVERY)
        assert clusters_of(fed, "reruns") == ["eu", "us"]
        # Nobody here knows that the power is off: the copy may not come before L + G from the last heartbeat.
        assert fed.effects.copies("reruns")[1].first >= off - FAST.heartbeat - FAST.rpc + FAST.lost + FAST.guard
        for task in ("waits", "never"):
            assert clusters_of(fed, task) == ["eu"]
            assert (await fed.tasks(run))[task].attempts[0].state == RUNNING

        await fed.lab.start_again("eu")
        await fed.running(run, "waits", attempt=2)
        fed.open_gate("end")
        ended = await fed.accepted_once(run)
        assert [(each.state, each.evidence) for each in ended["waits"].attempts] == [
            (LOST, run_pb2.EVIDENCE_REPORTED),
            (DONE, run_pb2.EVIDENCE_UNSPECIFIED),
        ]
        assert not any(each.overlap_possible for task in ended.values() for each in task.attempts)
        fed.effects.check()


@pytest.mark.timeout(180)
async def test_a_drained_cluster_hands_its_work_over_and_a_cordoned_one_keeps_it(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        polite = fed.task("polite", POLITE, gate="end")
        polite.termination_grace.seconds = 5
        never = fed.gated("never", "end", on_cluster_lost=NEVER)
        run, work = await begin_on_eu(fed, "moves", polite, never)

        assert (await fed.cli("cordon", "eu")).stdout == "clusters/eu CORDONED\n"
        pinned = (await fed.run("pinned", [fed.quick("pinned", clusters=["eu"])])).name
        free = (await fed.run("free", [fed.quick("free")])).name
        await fed.accepted_once(free)
        assert clusters_of(fed, "free") == ["us"]

        async def why() -> str:
            return (await fed.tasks(pinned))["pinned"].reason

        assert "eu" in await fed.eventually(why, "a reason why the pinned task waits")
        assert work["polite"].alive
        assert clusters_of(fed, "pinned") == []

        drained = CLOCK.boot()
        assert (await fed.cli("drain", "eu")).stdout == "clusters/eu DRAINING\n"
        await fed.running(run, "polite", attempt=2)
        copy = fed.effects.copies("polite")[1]
        print(f"handed over in {copy.first - drained:.1f} s")
        assert copy.cluster == "us"
        assert copy.first - drained < FAST.lost, "a hand-over waits for no lease"
        words = [line.split()[0] for line in fed.effects.path.read_text().splitlines() if " polite 1.1 " in line]
        assert words[-2:] == ["term", "tidied"]
        assert work["never"].alive
        first = (await fed.tasks(run))["polite"].attempts[0]
        assert first.state == STOPPED

        assert (await fed.cli("uncordon", "eu")).stdout == "clusters/eu OPEN\n"
        await fed.accepted_once(pinned)
        assert clusters_of(fed, "pinned") == ["eu"]
        fed.open_gate("end")
        tasks = await fed.accepted_once(run)
        assert [each.state for each in tasks["polite"].attempts] == [STOPPED, DONE]
        assert [each.state for each in tasks["never"].attempts] == [DONE]
        timeline = json.loads((await fed.cli("timeline", "moves", "--json")).stdout)
        assert timeline["summary"]["moved_tasks"] == 1
        eu = await fed.client.get_cluster("clusters/eu")
        assert eu.admission == cluster_pb2.CLUSTER_ADMISSION_OPEN
        fed.effects.check()
