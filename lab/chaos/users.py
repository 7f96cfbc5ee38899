"""Who uses a federation under chaos: graphs are created, polled, watched and audited, and what users are told is kept (I4-I6, I16)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from baton import audit
from baton.audit import Verdict
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.errors import NOT_APPLIED, BatonError
from baton.v1 import graph_pb2, run_pb2
from lab.chaos.effects import workload
from lab.checking.history import Said, Watched

LIFETIME = 900.0
"""Seconds from a run's creation to its deadline: far beyond the patience of a round, so that progress is what ends runs."""

POLL = 1.0
"""Seconds between two looks at a run."""

CALL_SECONDS = 8.0
"""For one call, all tries of the client library included."""


def graph(rng: random.Random, directory: Path, *, longest: float) -> graph_pb2.GraphSpec:
    """A few tasks; each needs a CPU, so that clusters are full now and then."""
    spec = graph_pb2.GraphSpec()
    for index in range(rng.choice((2, 3, 5, 6))):
        parents = [f"t{parent}" for parent in range(index) if rng.random() < 0.4]
        seconds = min(longest, rng.choice((0.0, 0.5, 1.0, 3.0, 8.0)))
        _add(spec, directory, f"t{index}", seconds, rng.choice((0, 0, 0, 0, 1)), parents)
    return spec


def marathon(directory: Path, seconds: float, width: int) -> graph_pb2.GraphSpec:
    """Tasks that live through most of a round, side by side: what a lost cluster is caught with."""
    spec = graph_pb2.GraphSpec()
    for index in range(width):
        _add(spec, directory, f"long{index}", seconds, 0, [])
    _add(spec, directory, "join", 0.0, 0, [f"long{index}" for index in range(width)])
    return spec


def _add(
    spec: graph_pb2.GraphSpec, directory: Path, name: str, seconds: float, failures: int, parents: Sequence[str]
) -> None:
    task = spec.tasks.add(id=name, parents=parents, process=workload(directory, seconds, failures))
    task.resources.cpu_millis = 1000
    task.resources.memory_bytes = 16 << 20
    task.retry.max_attempts = 3
    task.retry.initial_backoff.FromMilliseconds(500)
    task.retry.max_infrastructure_losses = 50
    task.termination_grace.FromMilliseconds(500)


class Users:
    """All of them. `zero`: the boot clock at the beginning."""

    def __init__(self, endpoints: Sequence[str], zero: float) -> None:
        self._clock, self._zero = SystemClock(), zero
        self._endpoints = list(endpoints)
        self.said: list[Said] = []
        self.watched: list[Watched] = []
        self.deadlines: dict[str, float] = {}
        self.names: dict[str, str] = {}
        """Run id -> full name, of runs whose creation was answered."""
        self.ended: dict[str, int] = {}
        """Run id -> final state, as a client read it."""

    def _now(self) -> float:
        return self._clock.boot() - self._zero

    async def fulfil(self, run_id: str, spec: graph_pb2.GraphSpec) -> None:
        """One run, from its creation to its end as the client sees it, and to the end of its watch."""
        async with AsyncClient(self._endpoints, timeout=CALL_SECONDS) as client:
            run = await self._create(client, run_id, spec)
            watching = asyncio.create_task(self._watch(run_id, run.name))
            try:
                await self._poll(client, run_id, run.name)
                await watching
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _create(self, client: AsyncClient, run_id: str, spec: graph_pb2.GraphSpec) -> run_pb2.Run:
        """Until it is answered: one request id over all tries."""
        request_id, wall = client.new_request_id(), self._clock.wall() + LIFETIME
        self.deadlines[run_id] = self._now() + LIFETIME
        while True:
            called = self._now()
            try:
                run = await client.create_run(spec, deadline=wall, run_id=run_id, request_id=request_id)
            except BatonError as error:
                self._refused("CreateRun", run_id, called, error)
                await asyncio.sleep(POLL)
                continue
            self._told("CreateRun", run_id, called, run)
            self.names[run_id] = run.name
            return run

    async def _poll(self, client: AsyncClient, run_id: str, name: str) -> None:
        while run_id not in self.ended:
            await asyncio.sleep(POLL)
            called = self._now()
            try:
                run = await client.get_run(name)
            except BatonError as error:
                self._refused("GetRun", run_id, called, error)
                continue
            self._told("GetRun", run_id, called, run)
            if run.state >= run_pb2.RUN_STATE_SUCCEEDED:
                self.ended[run_id] = run.state

    async def _watch(self, run_id: str, name: str) -> None:
        """The library's watch goes over the death of replicas by itself: every event once."""
        async with AsyncClient(self._endpoints, timeout=CALL_SECONDS) as client:
            async for message in client.watch_run(name, patience=LIFETIME):
                for event in message.events:
                    rows = ", ".join(f"{change.index} {change.state} {change.attempt}" for change in event.changes)
                    content = f"{event.kind} {event.state} {rows}"
                    self.watched.append(Watched(self._now(), f"watcher of {run_id}", run_id, event.number, content))

    def _told(self, op: str, run_id: str, called: float, run: run_pb2.Run) -> None:
        number = int(run.etag.rpartition(".")[2] or 0)
        self.said.append(Said(op, run_id, called, self._now(), ok=True, uid=run.uid, state=run.state, number=number))

    def _refused(self, op: str, run_id: str, called: float, error: BatonError) -> None:
        sure = error.applied == NOT_APPLIED
        said = Said(op, run_id, called, self._now(), ok=False, detail=str(error), reason=error.reason, refused=sure)
        self.said.append(said)

    async def audit(self, run_id: str) -> tuple[Verdict, list[str]]:
        """What the product's own audit says of a finished run (`baton audit`), and its violations in words."""
        async with AsyncClient(self._endpoints, timeout=30.0) as client:
            run = await client.get_run(self.names[run_id])
            tasks = [task async for task in client.list_tasks(run.name)]
            events = [event async for message in client.watch_run(run.name) for event in message.events]
        found = audit.audit(run, tasks, self._clock.wall(), events)
        return found.verdict, [each.text for each in found.findings if each.verdict is Verdict.VIOLATED]
