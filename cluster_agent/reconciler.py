"""The loop that feeds the machine and carries out what it wants, in an order that a crash at any point cannot make
wrong.

One turn:

1. Take everything that arrived (session and executor) as one batch; an empty one is a tick.
2. `machine.step(batch, now)`: state moves, records and actions come out.
3. Write the records; if one of them must survive a power cut, wait until it does (F3, F4).
4. Carry out the actions in order. Only now does anything leave this process.

Where reality deviates:

* **The disk refuses** (full, broken): only actions that take nothing on and forget nothing leave, the rest waits. The
  machine takes no more work, reports go on. Every tick tries to write the whole state anew; when that succeeds, what
  waited leaves.
* **Nothing is due** at a tick: then there is no turn.
* **The executor refuses or is silent**: what it did is unknown. It is joined again beside this loop, and its census
  decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from baton.clock import Clock
from cluster_agent import attempt_log
from cluster_agent.core import events as on
from cluster_agent.core.commands import (
    Action,
    AdoptWork,
    ForgetWork,
    KillAll,
    KillIfSilent,
    RejoinExecutor,
    RenewLease,
    SetBounds,
    StartWork,
    StopWork,
    WidenWork,
)
from cluster_agent.core.machine import AgentMachine
from cluster_agent.disk import DiskFailure
from cluster_agent.executors.base import AttemptKey, Executor
from cluster_agent.journal import Journal
from cluster_agent.waiting import within
from cluster_agent.workload import census, inner, outer, start_request, work_event

log = logging.getLogger("baton.agent")

TICK_SECONDS = 0.25
"""How late a lapse or a resend may be noticed. It must stay well under P (2 s); smaller only burns CPU."""

INBOX = 4096
"""Messages that may wait from the stream, and batches from the executor; then the senders wait (backpressure)."""

EXECUTOR_SECONDS = 3.0
"""An executor call that takes longer is unknown: the executor is joined again. A batch over a local socket takes
milliseconds; much longer and a frozen guard would hold up the lapse."""

JOIN_SECONDS = 20.0
"""To find or start a guard: its adapter needs up to 15 s when an earlier guard's work has to die first."""

REJOIN_PAUSE_SECONDS = 1.0


WITHHELD = (StartWork, WidenWork, AdoptWork, ForgetWork)
"""What waits for a journal that can be written. Receipts and rejections are dropped: owners and resends repeat them."""


class Reconciler:
    """Owns the machine. `send` takes actions for the session; set it before `run`."""

    def __init__(
        self, machine: AgentMachine, journal: Journal, executor: Executor, clock: Clock, *, cluster: str
    ) -> None:
        self.machine = machine
        self.send: Callable[[Action], None] = _nobody
        self._journal = journal
        self._executor = executor
        self._clock = clock
        self._cluster = cluster
        self._inbox: asyncio.Queue[on.Event] = asyncio.Queue(INBOX)
        self._work: asyncio.Queue[list[on.Event]] = asyncio.Queue(INBOX)
        self._wake = asyncio.Event()
        self._rejoin = asyncio.Event()
        self.joined = asyncio.Event()
        """Set once the executor was joined for the first time; its features are known from then on."""
        self.journal_errors = 0
        """Writes that the disk refused."""
        self.heartbeat_seconds = 0.0
        """Round trip of the last heartbeat that was answered; the session's to set."""
        self._writable = True
        self._doubted = False
        self._gathering = False
        """A wake-up is under way for reports that wait for company."""
        self._withheld: list[Action] = []
        self._kill_seconds = machine.state.kill_seconds

    async def post(self, event: on.Event) -> None:
        """Something happened; waits while the inbox is full."""
        await self._inbox.put(event)
        self._wake.set()

    async def run(self, kill_seconds: float) -> None:
        """Until cancelled. `kill_seconds`: K until a Welcome says otherwise."""
        self._kill_seconds = self._kill_seconds or kill_seconds
        self._rejoin.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            tasks.create_task(self._keep_joined())
            tasks.create_task(self._turns(tasks))

    async def _turns(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch: list[on.Event] = []
            while not self._work.empty():
                batch.extend(self._work.get_nowait())
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            await self.turn(batch)
            wait = self.machine.gathering(self._clock.boot())
            if wait > 0.0 and not self._gathering:
                self._gathering = True
                tasks.create_task(self._gathered(wait))

    async def _gathered(self, wait: float) -> None:
        """Reports have waited for company long enough."""
        await self._clock.sleep(wait)
        self._gathering = False
        self._wake.set()

    async def turn(self, batch: list[on.Event]) -> None:
        """One turn of the loop; public for tests and for the simulator's crash points."""
        if not self._writable and await self._written(self._journal.rewrite(self.machine.state)):
            log.warning("The journal can be written again.")
            self._writable = True
            batch.insert(0, on.DiskState(writable=True))
            withheld, self._withheld = self._withheld, []
            await self._carry_all(withheld)
        if self._doubted:
            self._doubted = False
            batch.insert(0, on.ExecutorLost())
        step = self.machine.step(batch, self._clock.boot())
        if self._writable and not await self._written(self._journal.write(step.records, self.machine.state)):
            self._writable = False
            refused = self.machine.step([on.DiskState(writable=False)], self._clock.boot())
            step.actions.extend(refused.actions)
        if not self._writable:
            self._withheld.extend(action for action in step.actions if isinstance(action, WITHHELD))
            step.actions[:] = [action for action in step.actions if not action.needs_journal]
        await self._carry_all(step.actions)

    async def _written(self, writing: Awaitable[None]) -> bool:
        try:
            await writing
        except DiskFailure as error:
            self.journal_errors += 1
            if self._writable:
                log.error("The journal cannot be written; no work is accepted.", extra={"cause": str(error)})
            return False
        return True

    # --- carrying out -------------------------------------------------------------------------------------------------

    async def _carry_all(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, RejoinExecutor):
                self._rejoin.set()
                continue
            if self._doubted and isinstance(action, StartWork):
                continue  # the coming census finds no process and ends them as LOST; what a start does now is unknown
            call = self._call(action)
            if call is None:
                self.send(action)
                continue
            try:
                await within(self._clock, EXECUTOR_SECONDS, call)
            except OSError as error:  # includes TimeoutError and ConnectionError
                log.warning("The executor did not answer.", extra={"cause": str(error)})
                self._doubted = True
                self._wake.set()

    def _call(self, action: Action) -> Awaitable[None] | None:  # noqa: PLR0911 - one return per kind, nothing nested
        """The executor's part of an action; None if it is the session's."""
        executor = self._executor
        match action:
            case StartWork(orders):
                return executor.start([start_request(order, self._cluster) for order in orders])
            case WidenWork(key, slots):
                return executor.widen(outer(key), slots)
            case StopWork(keys, grace):
                return executor.stop([outer(key) for key in keys], grace_seconds=grace)
            case AdoptWork(keys, generation):
                return executor.adopt([outer(key) for key in keys], generation)
            case ForgetWork(keys):
                return executor.forget([outer(key) for key in keys])
            case RenewLease(generation, sent_boot):
                return executor.renew(generation, sent_boot)
            case SetBounds(fence, kill):
                self._kill_seconds = kill
                return executor.configure(fence, kill)
            case KillAll():
                return executor.kill_all()
            case KillIfSilent():
                return executor.kill_if_silent()
        return None

    # --- the executor's side ------------------------------------------------------------------------------------------

    async def _keep_joined(self) -> None:
        """Join the executor, listen until it is gone or doubted, join again (G3)."""
        listening: asyncio.Task[None] | None = None
        try:
            while True:
                await self._rejoin.wait()
                self._rejoin.clear()
                if listening is not None:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)
                try:
                    entries = list(await within(self._clock, JOIN_SECONDS, self._executor.connect()))
                    bounds = (self.machine.state.fence_seconds, self._kill_seconds)
                    if bounds[0] > 0:
                        # An agent that never had a session (or lost its journal) has no say: what a living guard holds
                        # was promised with the F of the session it came by (F5).
                        await within(self._clock, EXECUTOR_SECONDS, self._executor.configure(*bounds))
                except OSError as error:
                    log.warning("The executor cannot be joined.", extra={"cause": str(error)})
                    self._rejoin.set()
                    await self._clock.sleep(REJOIN_PAUSE_SECONDS)
                    continue
                await self._tell([census(entries)])
                self.joined.set()
                listening = asyncio.create_task(self._listen())
        finally:
            if listening is not None:
                listening.cancel()

    async def _listen(self) -> None:
        async for batch in self._executor.events():
            for each in batch:
                attempt_log.tell(each, self._incarnation)
            happened = [event for event in map(work_event, batch) if event is not None]
            if happened:
                await self._tell(happened)
        await self._tell([on.ExecutorLost()])

    def _incarnation(self, key: AttemptKey) -> int:
        """Under which an attempt's shard is known; 0 if it is not."""
        state = self.machine.state
        attempt = state.attempts.get(inner(key))
        epoch = state.epochs.get(attempt.shard) if attempt is not None else None
        return epoch.incarnation if epoch is not None else 0

    async def _tell(self, happened: list[on.Event]) -> None:
        await self._work.put(happened)
        self._wake.set()

    async def _tick(self) -> None:
        while True:
            await self._clock.sleep(TICK_SECONDS)
            if not self._writable or self.machine.due(self._clock.boot()):
                self._wake.set()


def _nobody(_: Action) -> None:
    """There is no session yet."""
