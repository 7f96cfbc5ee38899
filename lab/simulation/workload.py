"""What the users of a simulated federation do: random graphs with deadlines, created, polled and sometimes cancelled.

Theory. A client is a node like any other, and honest: it keeps one request id over all tries of one intent, tries again through
any replica, and writes down what it was told and when. What it was told is what the promises are about (I4, I5).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from baton import requestid
from baton.errors import BatonError
from baton.v1 import graph_pb2, run_pb2
from control_plane.core.commands import Refused
from lab.checking.history import Said
from lab.simulation.chance import chance
from lab.simulation.processes import ReplicaProcess
from lab.simulation.watching import Watchers
from lab.virtual_time import SeededEntropy, VirtualClock

TRY_SECONDS = 6.0
"""For one try at one replica."""

GIVE_UP = 40.0
"""Seconds after which a client stops trying to create or cancel."""

POLL = 4.0


@dataclass(frozen=True, slots=True)
class Wish:
    """One run to be."""

    run_id: str
    at: float
    lifetime: float
    spec: graph_pb2.GraphSpec
    cancel_after: float | None
    named: bool


@dataclass(frozen=True, slots=True)
class Load:
    """What kind of runs users want."""

    lifetime: tuple[float, float] = (20.0, 50.0)
    """Seconds from a run's creation to its deadline."""
    hurried: float = 0.15
    """Share of runs with a lifetime of 6 to 20 seconds instead."""
    longest: float = 70.0
    """Seconds of the longest task."""
    stubborn: float = 0.1
    """Share of tasks that ignore TERM."""
    kept: float = 1.0
    """How many of the tasks that would wait for their lost cluster (F7: a quarter) do so."""
    marathons: int = 2
    """Runs that come first and whose tasks outlast L + G of the leases: what a lost cluster is caught with."""
    crowds: int = 1
    """Runs of many quick tasks at once: batches, and clusters that are full."""


def wishes(rng: random.Random, runs: int, span: float, load: Load | None = None) -> list[Wish]:
    """Random runs over `span` seconds."""
    load = load or Load()
    found = []
    for number in range(runs):
        life = rng.uniform(*load.lifetime) if rng.random() >= load.hurried else rng.uniform(6.0, 20.0)
        cancel = rng.uniform(0.5, 30.0) if rng.random() < 0.12 else None
        at, spec, named = rng.uniform(0.0, span), _graph(rng, load), rng.random() < 0.5
        found.append(Wish(f"run-{number}", at, life, spec, cancel, named))
    for number in range(load.marathons):
        spec = _marathon(rng)
        found.append(Wish(f"marathon-{number}", rng.uniform(0.0, 1.5), rng.uniform(64.0, 72.0), spec, None, named=True))
    for number in range(load.crowds):
        at, spec = rng.uniform(0.0, span), _crowd(rng)
        found.append(Wish(f"crowd-{number}", at, rng.uniform(*load.lifetime), spec, None, named=False))
    return sorted(found, key=lambda wish: wish.at)


def _crowd(rng: random.Random) -> graph_pb2.GraphSpec:
    """Many tasks that are ready at once and end at once."""
    spec = graph_pb2.GraphSpec()
    for index in range(rng.choice((28, 32, 36))):
        task = spec.tasks.add(id=f"t{index}")
        task.process.argv.extend(["sim", rng.choice(("0.3", "0.3", "1.0")), "0", "0", f"t{index}"])
        task.retry.max_attempts = 3
        task.retry.initial_backoff.FromMilliseconds(500)
        task.termination_grace.FromMilliseconds(1000)
    return spec


def _marathon(rng: random.Random) -> graph_pb2.GraphSpec:
    """Two tasks that outlast L + G (20 s) wherever they began, rerun if their cluster is lost, and one that waits for both."""
    spec = graph_pb2.GraphSpec()
    for index, parents in enumerate(((), (), ("t0", "t1"))):
        seconds = 0.3 if parents else rng.uniform(26.0, 32.0)
        task = spec.tasks.add(id=f"t{index}", parents=parents, on_cluster_lost=1)
        task.process.argv.extend(["sim", f"{seconds:.3f}", "0", "0", f"t{index}"])
        task.retry.max_attempts = 2
        task.termination_grace.FromMilliseconds(1000)
    return spec


def _graph(rng: random.Random, load: Load) -> graph_pb2.GraphSpec:
    spec = graph_pb2.GraphSpec()
    size = rng.choice((3, 5, 5, 8, 12))
    for index in range(size):
        parents = [f"t{p}" for p in range(index) if rng.random() < min(0.6, 1.6 / max(1, index))]
        failures = rng.choice((0, 0, 0, 0, 0, 0, 1, 2))
        seconds = rng.choice((0.0, 0.3, 0.3, 1.0, 1.0, 1.0, 3.0, 3.0, 8.0, 25.0)) * rng.uniform(0.5, 1.0)
        seconds = min(seconds, load.longest)
        stubborn = int(rng.random() < load.stubborn)
        task = spec.tasks.add(id=f"t{index}", parents=parents)
        task.process.argv.extend(["sim", f"{seconds:.3f}", str(failures), str(stubborn), f"t{index}"])
        task.retry.max_attempts = rng.choice((1, 2, 3, 3))
        task.retry.initial_backoff.FromMilliseconds(500)
        task.trigger_rule = rng.choice((0, 0, 0, 0, 0, 0, 0, 2, 2, 3, 4, 4))  # type: ignore[assignment]  # the enum's numbers
        policy = rng.choice((1, 1, 1, 1, 1, 1, 2, 3))
        task.on_cluster_lost = policy if rng.random() < load.kept else 1  # type: ignore[assignment]  # as above
        task.hedge = rng.random() < 0.1 and task.on_cluster_lost == 1
        task.termination_grace.FromMilliseconds(1000)
    return spec


class Client:
    """Carries out wishes, and remembers."""

    def __init__(self, rng: random.Random, seed: str, replicas: Sequence[ReplicaProcess]) -> None:
        self._rng, self._replicas = rng, replicas
        self._clock = VirtualClock()
        self.entropy = SeededEntropy(f"{seed}/client")
        self.watchers = Watchers(chance(seed, "watchers"), replicas)
        self.said: list[Said] = []
        self.final: set[str] = set()
        self.created: set[str] = set()
        self.gave_up: set[str] = set()
        self.deadlines: dict[str, float] = {}
        self.asked: dict[str, run_pb2.CreateRunRequest] = {}
        """Creations that were answered."""
        self.names: dict[str, str] = {}
        """Runs by wish -> their ids, which the server may have made."""
        self.restored = False
        """The store has forgotten something: a run that is not found any more is nobody's fault (J12)."""

    async def fulfil(self, wish: Wish) -> None:
        """One run, from its creation to its end as the client sees it."""
        await asyncio.sleep(wish.at)
        deadline = self._clock.wall() + wish.lifetime
        request = run_pb2.CreateRunRequest(
            request_id=requestid.new(self._clock, self.entropy),
            run_id=wish.run_id if wish.named else "",
            spec=wish.spec,
        )
        request.deadline_time.FromNanoseconds(int(deadline * 1e9))
        self.deadlines[wish.run_id] = asyncio.get_running_loop().time() + wish.lifetime
        answer = await self._insist("CreateRun", wish.run_id, request)
        if answer is None:
            self.gave_up.add(wish.run_id)
            return
        run = run_pb2.CreateRunResponse.FromString(answer).run
        self.created.add(wish.run_id)
        self.asked[wish.run_id] = request
        self.names[wish.run_id] = run.name.rpartition("/")[2]
        polling = asyncio.get_running_loop().create_task(self._poll(wish.run_id, run.name))
        if self.watchers.wanted():
            polling = asyncio.get_running_loop().create_task(self._both(polling, self.watchers.follow(run)))
        if wish.cancel_after is not None:
            await asyncio.sleep(wish.cancel_after)
            cancel = run_pb2.CancelRunRequest(
                name=run.name, request_id=requestid.new(self._clock, self.entropy), reason="changed my mind"
            )
            await self._insist("CancelRun", wish.run_id, cancel)
        await polling

    @staticmethod
    async def _both(polling: asyncio.Task[None], watching: Coroutine[Any, Any, None]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(watching)
            await polling

    def request_id(self) -> str:
        """A new one."""
        return requestid.new(self._clock, self.entropy)

    async def repeat(self, run_id: str) -> None:
        """Ask for a creation again that was answered: it must be the same run, or EXPIRED (O8)."""
        await self._try("CreateRun", run_id, self.asked[run_id])

    async def _poll(self, run_id: str, name: str) -> None:
        while run_id not in self.final:
            await asyncio.sleep(POLL * self._rng.uniform(0.5, 1.5))
            answer = await self._try("GetRun", run_id, run_pb2.GetRunRequest(name=name))
            if answer is not None:
                run = run_pb2.GetRunResponse.FromString(answer).run
                if run.state >= run_pb2.RUN_STATE_SUCCEEDED:
                    self.final.add(run_id)
            elif self.restored and self.said[-1].reason == "NOT_FOUND":
                self.final.add(run_id)

    async def _insist(
        self, method: str, run_id: str, request: run_pb2.CreateRunRequest | run_pb2.CancelRunRequest
    ) -> bytes | None:
        until = asyncio.get_running_loop().time() + GIVE_UP
        while asyncio.get_running_loop().time() < until:
            answer = await self._try(method, run_id, request)
            if answer is not None:
                return answer
            if self.said and self.said[-1].op == method and self.said[-1].detail.startswith("refused"):
                return None
            await asyncio.sleep(self._rng.uniform(0.1, 1.0))
        return None

    async def _try(self, method: str, run_id: str, request: object) -> bytes | None:
        loop = asyncio.get_running_loop()
        called = loop.time()
        replica = self._rng.choice(self._replicas)
        try:
            answer = await replica.call(method, request, TRY_SECONDS)
        except (ConnectionError, TimeoutError) as error:
            self.said.append(Said(method, run_id, called, loop.time(), ok=False, detail=f"{replica.name}: {error}"))
            return None
        except BatonError as error:
            word = "unanswered" if error.reason in PASSING else "refused"
            text = f"{word} by {replica.name}: {error.reason} {error.message} (applied: {error.applied})"
            self.said.append(
                Said(
                    method,
                    run_id,
                    called,
                    loop.time(),
                    ok=False,
                    detail=text,
                    reason=error.reason,
                    refused=error.applied == "no",
                )
            )
            return None
        except Refused as error:
            text = f"refused by {replica.name}: {error.reason} {error}"
            self.said.append(Said(method, run_id, called, loop.time(), ok=False, detail=text, reason=error.reason))
            return None
        run = _run_of(method, answer)
        number = int(run.etag.rpartition(".")[2] or 0)
        self.said.append(
            Said(method, run_id, called, loop.time(), True, run.uid, int(run.state), number, f"by {replica.name}")
        )
        return answer


def _run_of(method: str, answer: bytes) -> run_pb2.Run:
    match method:
        case "CreateRun":
            return run_pb2.CreateRunResponse.FromString(answer).run
        case "GetRun":
            return run_pb2.GetRunResponse.FromString(answer).run
    return run_pb2.CancelRunResponse.FromString(answer).run


PASSING = frozenset(
    {"NOT_OWNED", "STORE_UNAVAILABLE", "DRAINING", "TIMED_OUT", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESTORE_SUSPECTED"}
)
"""Reasons that say nothing about the wish."""
