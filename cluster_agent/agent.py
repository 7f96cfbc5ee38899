"""The composition root: one agent, made of whatever ports it is given. The simulator gives it parts in memory.

Order of a start: the journal is read, then the executor is joined and its census taken, then the session begins: no
Hello leaves before it is known what runs here (S6). Order of an end: the session, the loop, the executor (whose guard
and work go on), the disk.
"""

from __future__ import annotations

import asyncio
import logging

from baton.clock import Clock, Entropy
from cluster_agent.config import AgentConfig
from cluster_agent.conversation import Parts
from cluster_agent.core import events as on
from cluster_agent.core.machine import AgentMachine
from cluster_agent.disk import Disk
from cluster_agent.executors.base import Executor
from cluster_agent.journal import Journal
from cluster_agent.reconciler import Reconciler
from cluster_agent.session import Session
from cluster_agent.translate import HelloFacts
from cluster_agent.transport import Transport

log = logging.getLogger("baton.agent")

VERSION = "0.1.0"
FEATURE_LEVEL = 2
"""Highest event and message level this agent knows (J11)."""

GOODBYE_SECONDS = 5.0
SETTLE_SECONDS = 10.0
"""After all work is dead: this long for the acknowledgements. What is not acknowledged stays in the journal."""

LOOK_SECONDS = 0.1


class Agent:
    """One agent process. `run` once; `stop` from the same loop."""

    def __init__(
        self,
        config: AgentConfig,
        clock: Clock,
        entropy: Entropy,
        transport: Transport,
        executor: Executor,
        disk: Disk,
        *,
        boot_id: str,
    ) -> None:
        """`boot_id`: of the host, read once at start (S6)."""
        self._config = config
        self._clock = clock
        self._entropy = entropy
        self._transport = transport
        self._executor = executor
        self._disk = disk
        self._boot_id = boot_id
        self._stop = asyncio.Event()
        self._drain = False
        self.reconciler: Reconciler | None = None
        """Set while it runs; the simulator's checkers read the machine's state."""

    @property
    def cluster_uid(self) -> str:
        """The cluster's, as the last session's Welcome said it; empty before the first."""
        return self.reconciler.machine.state.cluster_uid if self.reconciler is not None else ""

    def stop(self, *, drain: bool = False) -> None:
        """End `run`. With `drain` all work is killed and reported first, and a goodbye is said (S5)."""
        self._drain = self._drain or drain
        self._stop.set()

    async def run(self) -> None:
        """Serve until `stop`. Raises JournalCorrupt and DiskFailure when it cannot start."""
        config = self._config
        journal, state = await Journal.open(self._disk, self._entropy)
        machine = AgentMachine(state, config.nodes, fence_seconds=config.lease.fence)
        restored = machine.restore(self._boot_id)
        await journal.write(restored.records, state)
        reconciler = Reconciler(machine, journal, self._executor, self._clock, cluster=config.cluster)
        self.reconciler = reconciler
        loop = asyncio.create_task(reconciler.run(config.lease.kill))
        stopping = asyncio.create_task(self._stop.wait())
        serving: asyncio.Task[None] | None = None
        session: Session | None = None
        try:
            joined = asyncio.create_task(reconciler.joined.wait())
            await asyncio.wait((loop, stopping, joined), return_when=asyncio.FIRST_COMPLETED)
            joined.cancel()
            if reconciler.joined.is_set():
                session = Session(self._parts(reconciler, journal.uid))
                reconciler.send = session.send
                serving = asyncio.create_task(session.run())
                await asyncio.wait((loop, serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if session is not None and self._stop.is_set() and self._drain:
                await self._leave(session, reconciler)
        finally:
            tasks = [task for task in (serving, loop, stopping) if task is not None]
            failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception() is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._executor.close()
            await self._transport.close()
            self._disk.close()
        for task in failed:
            task.result()

    def _parts(self, reconciler: Reconciler, journal_uid: str) -> Parts:
        config, features = self._config, self._executor.features()
        facts = HelloFacts(
            cluster=config.cluster,
            instance=self._entropy.token(),
            boot_id=self._boot_id,
            journal_uid=journal_uid,
            labels=config.labels,
            taints=config.taints,
            namespaces=config.namespaces,
            isolation=features.isolation,
            orphan_killer=features.orphan_killer,
            profile=config.lease.profile,
            agent_version=VERSION,
            feature_level=FEATURE_LEVEL,
        )
        log.info("The executor is joined.", extra={"features": features.detail, "cluster": config.cluster})
        return Parts(self._transport, reconciler, self._executor, self._clock, self._entropy, facts, config.lease)

    async def _leave(self, session: Session, reconciler: Reconciler) -> None:
        """S5: kill, wait until all is dead and (a while) until it is acknowledged, say so. No goodbye while one
        lives."""
        machine = reconciler.machine
        await reconciler.post(on.DrainOrdered())
        until = self._clock.boot() + self._config.drain_seconds
        settled_by = float("inf")
        while self._clock.boot() < min(until, settled_by):
            await self._clock.sleep(LOOK_SECONDS)
            if machine.all_dead and settled_by == float("inf"):
                settled_by = self._clock.boot() + SETTLE_SECONDS
            if machine.all_dead and machine.all_settled:
                break
        if not machine.all_dead:
            log.warning("Work is left after the drain; no goodbye is said.")
            return
        said = await session.goodbye(GOODBYE_SECONDS)
        log.info("The agent leaves.", extra={"goodbye": said})
