"""A stage: the simulated federation with a script in place of the nemesis, for stories that are told on purpose.

Theory. A seed finds what nobody thought of; a story shows what somebody wants to see, and goes the same way every time: clocks
that are right, a network without delays, waits of average length where chance would spread them. When the script is over
everything is mended and the world waits until it is quiet, so that the same checkers judge the record as judge any seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from baton.errors import BatonError
from baton.v1 import admin_pb2, graph_pb2
from control_plane.core import events as ev
from control_plane.core.model import ALL_SHARDS, shard_of
from control_plane.store import keys
from lab.checking.history import Owned, Record, Restored
from lab.simulation.nodes import SimLoop
from lab.simulation.processes import ClusterProcess, ReplicaProcess
from lab.simulation.record import read_journal
from lab.simulation.removal import Swap, swapped
from lab.simulation.workload import Wish
from lab.simulation.world import QUIET, Shape, World
from lab.virtual_time import SeededEntropy

CURTAIN = 6.0
"""Seconds until all replicas own their shards and every cluster is READY: what comes before is no part of a story."""

STEP = 0.05
"""Seconds between looks of `until`."""

PATIENCE = 120.0
"""Seconds that `until` waits at most; a script that waits longer is wrong."""

Script = Callable[["Stage"], Awaitable[None]]


class Stage(World):
    """See the module."""

    def __init__(self, loop: SimLoop, clusters: int) -> None:
        super().__init__(0, Shape(clusters=clusters, drift=False, shuffle=False, faults=()), loop)
        self.ground.links.max_delay = 0.0
        self._work: list[asyncio.Task[None]] = []
        self.zero = 0.0
        """When the story begins."""

    # -- what a script may do ------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """What happens, in one sentence."""
        self.nemesis.notes.append((self.loop.time(), text))

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def until(self, see: Callable[[], bool]) -> None:
        """Let time pass until `see` says so. Raises AssertionError after PATIENCE."""
        end = self.loop.time() + PATIENCE
        while not see():
            if self.loop.time() > end:
                raise AssertionError("the script waits for what does not come")
            await asyncio.sleep(STEP)

    def want(self, run_id: str, tasks: Sequence[graph_pb2.Task], *, lifetime: float = 300.0) -> None:
        """A client wants a run, and follows it to its end."""
        wish = Wish(run_id, 0.0, lifetime, graph_pb2.GraphSpec(tasks=tasks), None, named=True)
        self._work.append(self.loop.create_task(self.client.fulfil(wish)))

    def runs(self, task: int, n: int = 1) -> ClusterProcess | None:
        """The cluster on which attempt n of the task of that index lives now."""
        for cluster in self.clusters:
            if any((key.task, key.n) == (task, n) for key in cluster.host.living()):
                return cluster
        return None

    async def running(self, task: int, n: int = 1) -> ClusterProcess:
        """Wait until that attempt lives; its cluster."""
        found: list[ClusterProcess] = []

        def look() -> bool:
            cluster = self.runs(task, n)
            found.extend([cluster] if cluster is not None else [])
            return bool(found)

        await self.until(look)
        return found[0]

    def owner(self, run_id: str) -> ReplicaProcess:
        """The replica that owns the run's shard."""
        kv = self.ground.etcd.keyspace.live[keys.owner(shard_of("default", run_id))]
        name = Owned.of(0.0, 0, "", kv.value).replica
        return next(replica for replica in self.replicas if replica.name == name)

    def cut(self, cluster: ClusterProcess) -> None:
        """No message passes between a cluster and any replica."""
        for replica in self.replicas:
            self.ground.links.cut(cluster.name, replica.name)
            self.ground.links.cut(replica.name, cluster.name)

    def heal(self, cluster: ClusterProcess) -> None:
        """Undo `cut`."""
        for replica in self.replicas:
            self.ground.links.heal(cluster.name, replica.name)
            self.ground.links.heal(replica.name, cluster.name)

    def happened(self, kind: type[ev.Event]) -> int:
        """How many events of that class are in the journal."""
        return sum(isinstance(each.event, kind) for each in read_journal(self.ground.etcd.recorded.record))

    def settle_restore(self) -> None:
        """From here on nobody may show what the restore has undone."""
        self.nemesis.restored[-1] = replace(self.nemesis.restored[-1], settled=self.loop.time())

    def restore(self, backup: object, revision: int) -> None:
        """The store becomes the backup again, which was made at `revision` (J12)."""
        self.ground.etcd.restore(backup)  # type: ignore[arg-type]  # what its `snapshot` gave
        self.nemesis.restored.append(Restored(self.loop.time(), revision))
        for shard in ALL_SHARDS:
            kv = self.ground.etcd.keyspace.live.get(keys.owner(shard))
            value = kv.value if kv is not None else b""
            self.nemesis.owners.append(Owned.of(self.loop.time(), revision, shard, value))
        self.client.restored = self.client.watchers.restored = True

    async def confirm_restored(self) -> None:
        """The operator says that it was on purpose, again and again until he is heard."""
        live = self.ground.etcd.keyspace.live
        await self.until(lambda: keys.RESTORED_SUSPECTED in live)
        while keys.RESTORED_SUSPECTED in live:
            request = admin_pb2.ConfirmRestoredRequest(request_id=self.client.request_id())
            with suppress(BatonError, ConnectionError, TimeoutError):
                await self.replicas[0].call("ConfirmRestored", request, 5.0)
            await asyncio.sleep(1.0)

    # -- from the beginning to the end ------------------------------------------------------------------------------------

    async def play(self, script: Script) -> Record:
        """The whole story."""
        for replica in self.replicas:
            replica.start()
        for cluster in self.clusters:
            cluster.start()
        await asyncio.sleep(CURTAIN)
        self.zero = self.loop.time()
        await script(self)
        self.nemesis.heal()
        self.nemesis.notes.pop()  # that everything is healed is no part of the story
        healed = self.loop.time()
        if self._work:
            await asyncio.wait(self._work, timeout=PATIENCE)
        left = [f"run {run} is not final for its client" for run in sorted(self.client.created - self.client.final)]
        for task in self._work:
            task.cancel()
        await asyncio.sleep(QUIET)
        living = [f"{cluster.name}: {key.text()}" for cluster in self.clusters for key in cluster.host.living()]
        return self._record(healed, living, left + self._unclean())


def perform(script: Script, clusters: int = 3) -> tuple[Record, float]:
    """Play a script in a world of its own: the record, and when the story began."""
    loop = SimLoop(None)
    asyncio.set_event_loop(loop)

    async def whole() -> tuple[Record, float]:
        stage = Stage(loop, clusters)
        return await stage.play(script), stage.zero

    try:
        with swapped((Swap(SeededEntropy, "uniform", _average),)):
            found: tuple[Record, float] = loop.run_until_complete(whole())
        return found
    finally:
        loop.bury()
        asyncio.set_event_loop(None)
        loop.close()


def _average(_entropy: SeededEntropy) -> float:
    return 0.5


def task(name: str, seconds: float, *, after: Sequence[str] = (), **words: object) -> graph_pb2.Task:
    """A task that works for so long, once."""
    made = graph_pb2.Task(id=name, parents=after, **words)  # type: ignore[arg-type]  # fields of a task
    made.process.argv.extend(["sim", f"{seconds:.3f}", "0", "0", name])
    made.retry.max_attempts = 2
    made.retry.max_infrastructure_losses = 5
    made.termination_grace.FromMilliseconds(1000)
    return made
