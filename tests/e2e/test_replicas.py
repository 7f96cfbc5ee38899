"""Replicas die and are restarted while work and callers go on (PROTOCOL O1-O5, J7, J10, S2; DESIGN 4)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from baton.client import AsyncClient
from baton.errors import BatonError
from baton.v1 import graph_pb2, run_pb2
from control_plane.core.model import FLEET
from lab.parts import Replica
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, Fed

Item = TypeVar("Item")

LEASE_SECONDS = 5.0
"""The replicas' lease: the default (O1)."""

TAKEOVER_SECONDS = 3.0
"""What may pass after the lease until a dead replica's shards are served: promised."""

CALLERS = 4
CALLS_PER_SECOND = 200
CALL_SECONDS = 10.0
"""The load that a rolling restart must not hurt: promised."""

UNDER_WAY = 400
"""Calls that may wait for their answers: two seconds of them, and the rate is held over a takeover. More would bury this process,
in which the federation's proxies live too, on a host that cannot keep up: nothing then ever gets better."""


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def _story(fed: Fed) -> list[graph_pb2.Task]:
    """Work in every state at any time: a chain of short tasks, some that wait for a gate, and what depends on both."""
    chain = [
        fed.task(f"link-{n}", "sleep 0.5\n", after=[f"link-{n - 1}"] if n else [], cpu_millis=50) for n in range(24)
    ]
    gated = [fed.gated(f"gated-{n}", "go", cpu_millis=50) for n in range(3)]
    last = fed.quick("last", after=[chain[-1].id, *(each.id for each in gated)])
    return [*chain, *gated, last]


async def _runs_on_both(fed: Fed) -> list[run_pb2.Run]:
    """Runs until each replica owns one."""
    owners = await fed.owners()
    runs: list[run_pb2.Run] = []
    while len({owners[run.shard] for run in runs}) < len(fed.lab.settings.replica_names):
        runs.append(await fed.run(f"story-{len(runs)}", _story(fed)))
        assert len(runs) < 20, "all runs land on one replica"
    return runs


@pytest.mark.timeout(150)
async def test_a_killed_replica_is_replaced_within_its_lease_and_three_seconds(fed_here: MakeFederation) -> None:
    async with fed_here() as fed:
        await fed.eventually(fed.balanced, "both replicas to have their shards")
        victim = (await fed.owners())[FLEET]
        survivor = next(name for name in fed.lab.settings.replica_names if name != victim)
        runs = await _runs_on_both(fed)
        watchers = [fed.watch(run.name) for run in runs]
        await fed.eventually(lambda: len(fed.effects.living()) >= 3 * len(runs), "the gated work of all runs")
        await fed.eventually(lambda: fed.effects.copies("link-3"), "some results")
        gated = [copy for run in runs for n in range(3) for copy in fed.effects.living(f"gated-{n}", run=run.name)]
        accepted = {run.name: await _accepted(fed, run.name) for run in runs}
        assert any(accepted.values())

        async with AsyncClient([fed.lab.links.front(survivor)], timeout=30.0) as client:
            killed = CLOCK.boot()
            await fed.lab.kill(victim)
            # One answer of ListRuns is an answer of every run shard, one of ListClusters is one of fleet.
            listed, clusters = await asyncio.gather(_all(client.list_runs()), _all(client.list_clusters()))
            seconds = CLOCK.boot() - killed
        print(f"served again {seconds:.2f} s after SIGKILL")
        assert {run.name for run in listed} == {run.name for run in runs}
        assert len(clusters) == 3
        assert seconds <= LEASE_SECONDS + TAKEOVER_SECONDS
        assert set((await fed.owners()).values()) == {survivor}

        for run in runs:
            now = await _accepted(fed, run.name)
            assert now.items() >= accepted[run.name].items(), "an accepted result was lost"
        still = {copy.process for copy in fed.effects.living()}
        assert {copy.process for copy in gated} <= still, "the death of a replica stopped work"
        fed.open_gate("go")
        for run in runs:
            tasks = await fed.accepted_once(run.name)
            assert accepted[run.name].items() <= {task.id: _outcome(task) for task in tasks.values()}.items()
        for watcher in watchers:
            await watcher.ended()
        fed.effects.check()
        twice = [
            task for task, count in Counter((copy.run, copy.task) for copy in fed.effects.copies()).items() if count > 1
        ]
        assert not twice, f"work was repeated though no cluster was lost: {twice}"


async def _accepted(fed: Fed, run: str) -> dict[str, tuple[bytes, str]]:
    """Accepted results by task, with the fence that they were accepted under."""
    tasks = await fed.tasks(run)
    return {task.id: _outcome(task) for task in tasks.values() if task.state == run_pb2.TASK_STATE_SUCCEEDED}


def _outcome(task: run_pb2.TaskStatus) -> tuple[bytes, str]:
    fences = [each.fence for each in task.attempts if each.state == run_pb2.ATTEMPT_STATE_SUCCEEDED]
    assert len(fences) == 1, task
    return task.result, fences[0]


async def _all(items: AsyncIterator[Item]) -> list[Item]:
    return [each async for each in items]


# -- rolling restart ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Load:
    """Calls at a steady rate, whether or not earlier ones were answered, up to a bound; what failed, and what was created."""

    fed: Fed
    calls: int = 0
    slowest: float = 0.0
    failed: list[str] = field(default_factory=list)
    created: set[str] = field(default_factory=set)
    graphs: Counter[str] = field(default_factory=Counter)
    _under_way: set[asyncio.Task[None]] = field(default_factory=set)

    async def drive(self, number: int, target: str, stop: asyncio.Event) -> None:
        """One client's share of the load until `stop`, then until its last answer."""
        endpoints = self.fed.lab.endpoints
        endpoints = endpoints[number % len(endpoints) :] + endpoints[: number % len(endpoints)]
        period = CALLERS / CALLS_PER_SECOND
        async with AsyncClient(endpoints, timeout=CALL_SECONDS) as client:
            began = CLOCK.boot()
            sent = 0
            while not stop.is_set():
                due = began + sent * period
                await asyncio.sleep(max(0.0, due - CLOCK.boot()))
                while len(self._under_way) >= UNDER_WAY:
                    await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                self._send(client, f"{number}-{sent}", sent, target)
                sent += 1
            await asyncio.gather(*self._under_way)

    def _send(self, client: AsyncClient, name: str, sent: int, target: str) -> None:
        task = asyncio.get_running_loop().create_task(self._call(client, name, sent % 10, target))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _call(self, client: AsyncClient, name: str, kind: int, target: str) -> None:
        """Seven reads to three writes, a small run among them."""
        self.calls += 1
        sent = CLOCK.boot()
        try:
            match kind:
                case 0:
                    spec = graph_pb2.GraphSpec(tasks=[self.fed.quick("one", after=[], clusters=["nowhere"])])
                    run = await client.create_run(spec, deadline=CLOCK.wall() + 600, run_id=f"load-{name}")
                    self.created.add(run.name)
                case 1 | 2:
                    graph = f"graph-{name.partition('-')[0]}-{kind}"
                    spec = graph_pb2.GraphSpec(tasks=[self.fed.quick(f"t-{name}")])
                    await client.put_graph(graph, spec)
                    self.graphs[graph] += 1
                case 3:
                    await client.get_task(f"{target}/tasks/gated")
                case _:
                    await client.get_run(target)
        except BatonError as error:
            self.failed.append(f"{kind} after {CLOCK.boot() - sent:.1f} s: {error!r} ({error.applied})")
        self.slowest = max(self.slowest, CLOCK.boot() - sent)


@pytest.mark.timeout(200)
async def test_a_rolling_restart_fails_no_call(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu",)) as fed:
        target = await fed.run("target", [fed.gated("gated", "go")])
        watcher = fed.watch(target.name)
        await fed.eventually(lambda: fed.effects.living("gated"), "the gated task")
        load, stop = Load(fed), asyncio.Event()
        began = CLOCK.boot()
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(load.drive(number, target.name, stop))
            for name in fed.lab.settings.replica_names:
                await _restart(fed, name)
            stop.set()
        seconds = CLOCK.boot() - began
        print(f"{load.calls} calls in {seconds:.1f} s, slowest {load.slowest:.2f} s, {len(load.created)} runs")
        assert not load.failed, f"{len(load.failed)} of {load.calls} calls failed: {load.failed[:5]}"
        assert load.slowest < CALL_SECONDS + 1.0
        # The rate holds over the restarts themselves; waiting for the last answers is not counted twice.
        assert load.calls >= 0.9 * CALLS_PER_SECOND * (seconds - CALL_SECONDS)

        found = [run.name async for run in fed.client.list_runs()]
        assert Counter(found) == Counter([target.name, *load.created]), "a run was lost, or made twice"
        for graph, puts in load.graphs.items():
            assert (await fed.client.get_graph(f"namespaces/default/graphs/{graph}")).version == puts
        fed.open_gate("go")
        await fed.accepted_once(target.name)
        await watcher.ended()
        fed.effects.check()
        assert len(fed.effects.copies("gated")) == 1


async def _restart(fed: Fed, name: str) -> None:
    """As an operator does it: SIGTERM, wait for the end, start, and go on when it serves its share."""
    part = fed.lab.part(name)
    assert isinstance(part, Replica)
    process = part._process
    assert process is not None
    began = CLOCK.boot()
    await part.stop()
    assert process.returncode == 0, f"{name} did not leave in order: {process.returncode}"
    stopped = CLOCK.boot()
    await part.start()

    await fed.eventually(fed.balanced, f"{name} to have its shards back")
    print(f"{name}: left in {stopped - began:.1f} s, back with its share {CLOCK.boot() - stopped:.1f} s later")
