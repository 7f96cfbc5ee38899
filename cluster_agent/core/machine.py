"""The agent's decisions: events in, records and actions out. Everything an agent may or must do about work is here.

The rules, each with its place below:

* **F3 start**: only what came on the current stream of the current session, for that session's generation, without a lapse
  since, at or above the shard's epoch on disk, with no tombstone (`_on_dispatched`, `_void`, `_start_what_fits`). Refusals
  for epoch, stream or generation are silent; a rejection for capacity is tombstoned before it is reported.
* **F4**: at most one spawn: `Starting` is recorded first, and what has the record but no process ends as LOST, after the
  executor has tombstoned it (`_on_census`).
* **F5**: the lease counts from the send time of acknowledged heartbeats of this session's generation. At F: nothing starts,
  the queue is void, a new stream is opened (`_check_lapse`). Running work is stopped by the executor's own clock.
* **F8**: a stop is a durable tombstone at once, and is reported when the executor has confirmed it, whether or not the
  attempt was known (`_on_stop_ordered`, `_on_work_stopped`).
* **S6**: a new stream voids the queue and lists it; another boot id means that all is dead (`restore`).
* **J7, J12**: reports repeat until acknowledged and only then is anything forgotten; every owner message raises the shard's
  epoch and mark before it is acted upon (`_admit`).
* **C3**: this agent has the last word on what fits. **D1**: deadlines are mapped by the last answered heartbeat.

One step handles a batch and is atomic: its actions leave only after its records are written (see `commands.Step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster_agent.core import events as on
from cluster_agent.core.capacity import Ledger, LocalQueue, NodeSpec
from cluster_agent.core.commands import (
    Action,
    AdoptWork,
    DropStream,
    ForgetWork,
    InventoryEntry,
    KillAll,
    RejoinExecutor,
    RenewLease,
    SendHello,
    SendReceipt,
    SetBounds,
    StartOrder,
    StartWork,
    Step,
    StopWork,
    Vitals,
)
from cluster_agent.core.link import Link
from cluster_agent.core.model import AgentState, Attempt, AttemptKey, Ended, Epoch, Outcome, Phase
from cluster_agent.core.outbox import Outbox
from cluster_agent.core.records import (
    Booted,
    EpochRaised,
    Finished,
    Forgotten,
    MarkRaised,
    Moved,
    Record,
    SessionOpened,
    Starting,
    StopConfirmed,
    Tombstoned,
    apply,
)

ALIVE = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
"""Phases in which a process may exist."""


class AgentMachine:
    """See the module's rules. Not thread-safe; owns `state`."""

    def __init__(self, state: AgentState, nodes: Sequence[NodeSpec], *, fence_seconds: float) -> None:
        """`fence_seconds`: F until the first Welcome says otherwise."""
        self.state = state
        self.link = Link(fence_seconds=state.fence_seconds or fence_seconds)
        self._ledger = Ledger(nodes)
        self._queue = LocalQueue(*self._ledger.totals())
        self._outbox = Outbox()
        self._joined = False
        self._guard_silent = False
        self._writable = True
        self._draining = False
        self._early_adoptions: list[AttemptKey] = []
        self._stopping: dict[float, list[AttemptKey]] = {}
        self._now = 0.0
        self._step = Step()
        self._handlers: dict[type, Callable[[Any], None]] = {
            on.StreamOpened: self._on_stream_opened,
            on.StreamClosed: self._on_stream_closed,
            on.Welcomed: self._on_welcomed,
            on.HeartbeatAcked: self._on_heartbeat_acked,
            on.Dispatched: self._on_dispatched,
            on.StopOrdered: self._on_stop_ordered,
            on.Adopted: self._on_adopted,
            on.ReportsSettled: self._on_reports_settled,
            on.WorkStarted: self._on_work_started,
            on.WorkRefused: self._on_work_refused,
            on.WorkEnded: self._on_work_ended,
            on.WorkStopped: self._on_work_stopped,
            on.Census: self._on_census,
            on.ExecutorLost: self._on_executor_lost,
            on.GuardSilence: self._on_guard_silence,
            on.DiskState: self._on_disk_state,
            on.DrainOrdered: self._on_drain_ordered,
        }

    # --- the step -----------------------------------------------------------------------------------------------------

    def restore(self, boot_id: str) -> Step:
        """First step after the journal was read: what the past left behind (S6). Queues did not survive."""
        self._step = Step()
        rebooted = self.state.boot_id != boot_id
        for attempt in list(self.state.attempts.values()):
            if attempt.phase in (Phase.FINISHED, Phase.TOMBSTONED):
                self._outbox.add(attempt.key)
            elif attempt.phase in (Phase.QUEUED, Phase.VOID):
                del self.state.attempts[attempt.key]
        if rebooted:
            self._put(Booted(boot_id))
        return self._step

    def step(self, happened: Sequence[on.Event], now: float) -> Step:
        """Take what happened, decide. `now`: boot clock, seconds. An empty batch is a tick."""
        self._now = now
        self._step = Step()
        self._check_lapse()
        for event in happened:
            self._handlers[type(event)](event)
        self._flush_stops()
        self._start_what_fits()
        if self.link.ready:
            self._step.actions.extend(
                self._outbox.due(
                    self.state.attempts, stream=self.link.stream, generation=self.link.generation, now=now
                )
            )
        return self._step

    def vitals(self) -> Vitals:
        """What the next heartbeat says (S2, C4). While no work is taken, no room is offered."""
        alive = sum(1 for attempt in self.state.attempts.values() if attempt.phase in ALIVE)
        included = tuple((shard, epoch, number) for shard, (epoch, number) in self.link.received.items())
        closed = self._draining or not self._writable or self._guard_silent or not self._joined
        shapes = self._ledger.shapes(self._queue.demands(), closed=closed)
        return Vitals(self.link.generation, shapes, included, alive + len(self._queue))

    def find(self, run_uid: str, task: int, n: int) -> AttemptKey | None:
        """The key of an attempt whose nonce the asker does not know, if it is held here."""
        same = (run_uid, task, n)
        return next((key for key in self.state.attempts if (key.run_uid, key.task, key.n) == same), None)

    @property
    def all_dead(self) -> bool:
        """No process exists and none is about to (S5)."""
        return self._joined and not any(attempt.phase in ALIVE for attempt in self.state.attempts.values())

    @property
    def all_settled(self) -> bool:
        """Every report is acknowledged."""
        return not len(self._outbox)

    def _put(self, record: Record) -> None:
        apply(self.state, record)
        self._step.records.append(record)

    def _do(self, action: Action) -> None:
        self._step.actions.append(action)

    # --- streams, sessions, leases (F3, F5, S1, S2) -------------------------------------------------------------------

    def _on_stream_opened(self, event: on.StreamOpened) -> None:
        self._void()
        self._outbox.rewind()
        self._early_adoptions.clear()
        self.link.open(event.stream, self._now)
        inventory = tuple(
            InventoryEntry(attempt.key, attempt.shard, attempt.generation, attempt.phase)
            for attempt in self.state.attempts.values()
        )
        marks = tuple(self.state.marks.items())
        self._do(SendHello(event.stream, inventory, marks, self.state.generation, self.state.federation_uid))

    def _on_stream_closed(self, event: on.StreamClosed) -> None:
        if event.stream == self.link.stream:
            self.link.close()

    def _on_welcomed(self, event: on.Welcomed) -> None:
        if event.stream != self.link.stream or not self.link.is_open:
            return
        known = self.state.federation_uid
        if known and known != event.federation_uid:
            self._do(DropStream(event.stream, f"federation {event.federation_uid} is not ours ({known})"))
            return
        self.link.welcome(event.generation, event.fence_seconds)
        opened = SessionOpened(
            event.generation, event.cluster_uid, event.federation_uid, event.fence_seconds, event.kill_seconds
        )
        state = self.state
        held = SessionOpened(
            state.generation, state.cluster_uid, state.federation_uid, state.fence_seconds, state.kill_seconds
        )
        if opened != held:
            self._put(opened)
        self._do(SetBounds(event.fence_seconds, event.kill_seconds))

    def _on_heartbeat_acked(self, event: on.HeartbeatAcked) -> None:
        if not self.link.renew(event.stream, event.generation, event.sent_boot, event.server_wall_ms):
            return
        self._do(RenewLease(event.generation, event.sent_boot))
        if self._early_adoptions:
            self._do(AdoptWork(tuple(self._early_adoptions), event.generation))
            self._early_adoptions.clear()

    def _check_lapse(self) -> None:
        """F5: at F the queue is void and, as trust in this stream is gone, another one is opened (F3)."""
        if self.link.lapsed or not self.link.passed(self._now):
            return
        self._void()
        if self.link.is_open:
            self._do(DropStream(self.link.stream, "lease lapsed"))
        self.link.lapse()
        if self._guard_silent:
            self._do(KillAll())  # G2: nobody else will

    def _void(self) -> None:
        for key in self._queue.clear():
            attempt = self.state.attempts[key]
            attempt.phase, attempt.spec = Phase.VOID, None

    # --- what owners say (F3, F8, S6, J12) ----------------------------------------------------------------------------

    def _admit(self, event: on.OwnerMessage) -> bool:
        """Whether an owner's message counts, and if so raise epoch and mark. Refusals are silent: owners repeat (J7)."""
        if event.stream != self.link.stream or not self.link.ready:
            return False
        held = self.state.epochs.get(event.shard)
        if held is not None and event.epoch < held:
            return False
        if held is None or event.epoch > held:
            self._put(EpochRaised(event.shard, event.epoch))
        mark = event.mark
        if mark is not None:
            known = self.state.marks.get(event.shard)
            if known is None or (mark.incarnation, mark.seq) > (known.incarnation, known.seq):
                self._put(MarkRaised(event.shard, mark))
        return True

    def _on_dispatched(self, event: on.Dispatched) -> None:
        if event.generation != self.link.generation or not self._writable or not self._admit(event):
            return
        for assignment in event.assignments:
            self._take(event, assignment)
        number = self.link.count(event.shard, event.epoch, event.dispatch_no)
        self._do(SendReceipt(event.stream, event.shard, event.epoch, number))

    def _take(self, event: on.Dispatched, assignment: on.Assignment) -> None:
        key, spec = assignment.key, assignment.spec
        attempt = self.state.attempts.get(key)
        if attempt is None or attempt.phase is Phase.VOID:
            refusal = self._refusal(key, spec.demand)
            if refusal:
                self._put(Tombstoned(key, event.shard, event.generation, refusal))
                self._outbox.add(key)
            else:
                self.state.attempts[key] = Attempt(
                    key, event.shard, event.generation, Phase.QUEUED, spec.demand, spec.grace_seconds, spec
                )
        elif attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self._adopt(attempt, event.generation)
        elif attempt.phase in (Phase.FINISHED, Phase.TOMBSTONED):
            self._outbox.add(key)  # the owner does not know yet

    def _refusal(self, key: AttemptKey, demand: object) -> str:
        """Why it is not taken into the queue; nothing if it was."""
        if self._draining:
            return "the cluster is draining"
        misfit = self._ledger.never_fits(demand)  # type: ignore[arg-type]
        if misfit:
            return f"no node is large enough: {misfit}"
        return "" if self._queue.offer(key, demand) else "the local queue is full"  # type: ignore[arg-type]

    def _on_adopted(self, event: on.Adopted) -> None:
        if event.generation != self.link.generation or not self._admit(event):
            return
        for key in event.keys:
            attempt = self.state.attempts.get(key)
            if attempt is not None and attempt.phase in (Phase.STARTING, Phase.RUNNING):
                self._adopt(attempt, event.generation)
            elif attempt is not None and attempt.phase is Phase.VOID:
                attempt.generation = event.generation

    def _adopt(self, attempt: Attempt, generation: int) -> None:
        """F5: an adopted attempt moves to the lease of the new generation, once that lease exists."""
        if attempt.generation == generation:
            return
        self._put(Moved(attempt.key, generation))
        if self.link.leased:
            self._do(AdoptWork((attempt.key,), generation))
        else:
            self._early_adoptions.append(attempt.key)

    def _on_stop_ordered(self, event: on.StopOrdered) -> None:
        if not self._admit(event):
            return
        for key in event.keys:
            attempt = self.state.attempts.get(key)
            if attempt is None:
                self._put(Tombstoned(key, event.shard, self.link.generation))
            elif attempt.phase is Phase.TOMBSTONED:
                self._outbox.add(key)
                continue
            elif attempt.phase is Phase.STOPPING and not attempt.orphaned:
                continue
            else:
                self._queue.remove(key)
                self._outbox.settle(key)
                self._put(Tombstoned(key, attempt.shard, attempt.generation))
            self._stop(self.state.attempts[key])

    def _stop(self, attempt: Attempt) -> None:
        self._stopping.setdefault(attempt.grace_seconds, []).append(attempt.key)

    def _flush_stops(self) -> None:
        for grace, keys in self._stopping.items():
            self._do(StopWork(tuple(keys), grace))
        self._stopping.clear()

    def _on_reports_settled(self, event: on.ReportsSettled) -> None:
        if not self._admit(event):
            return
        gone: list[AttemptKey] = []
        for key in event.keys:
            attempt = self.state.attempts.get(key)
            if attempt is not None and attempt.phase in (Phase.FINISHED, Phase.TOMBSTONED) and self._outbox.told(key):
                self._outbox.settle(key)
                self._put(Forgotten(key))
                gone.append(key)
        if gone:
            self._do(ForgetWork(tuple(gone)))

    # --- starting (F3, F4, C3, D1) ------------------------------------------------------------------------------------

    def _start_what_fits(self) -> None:
        may_start = self.link.leased and not self.link.lapsed and self._writable and self._joined
        if not may_start or self._guard_silent:
            return
        orders: list[StartOrder] = []
        while (first := self._queue.first()) is not None:
            key, demand = first
            attempt = self.state.attempts[key]
            spec = attempt.spec
            stop_boot = self.link.boot_of(spec.deadline_wall_ms) if spec is not None else None
            if spec is not None and stop_boot is not None and stop_boot <= self._now:
                self._queue.remove(key)
                self._finish(attempt, Ended(Outcome.DEADLINE, message="the deadline passed before it could start"))
                continue
            if spec is None or not self._ledger.place(key, demand):
                break
            self._queue.remove(key)
            self._put(Starting(key, attempt.shard, self.link.generation, demand, spec.grace_seconds))
            orders.append(StartOrder(key, self.link.generation, spec, stop_boot))
        if orders:
            self._do(StartWork(tuple(orders)))

    # --- what the executor says (F4, F8) ------------------------------------------------------------------------------

    def _on_work_started(self, event: on.WorkStarted) -> None:
        attempt = self.state.attempts.get(event.key)
        if attempt is not None and attempt.phase is Phase.STARTING:
            attempt.phase = Phase.RUNNING
            self._outbox.started(event.key, event.wall_ms)

    def _on_work_refused(self, event: on.WorkRefused) -> None:
        attempt = self.state.attempts.get(event.key)
        if attempt is not None and attempt.phase is Phase.STARTING:
            self._ledger.release(event.key)
            self._put(Tombstoned(event.key, attempt.shard, attempt.generation, event.reason or "refused by the executor"))
            self._outbox.add(event.key)

    def _on_work_ended(self, event: on.WorkEnded) -> None:
        attempt = self.state.attempts.get(event.key)
        self._ledger.release(event.key)
        if attempt is None:
            self._do(ForgetWork((event.key,)))  # settled before; only the executor still keeps it
        elif attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self._finish(attempt, event.ended)
        elif attempt.ended is None:
            attempt.ended = event.ended
            if attempt.phase is Phase.TOMBSTONED:
                self._outbox.add(event.key)

    def _finish(self, attempt: Attempt, ended: Ended) -> None:
        self._put(Finished(attempt.key, attempt.shard, attempt.generation, ended))
        self._outbox.add(attempt.key)

    def _on_work_stopped(self, event: on.WorkStopped) -> None:
        attempt = self.state.attempts.get(event.key)
        if attempt is None or attempt.phase is not Phase.STOPPING:
            return
        self._ledger.release(event.key)
        if attempt.orphaned:
            message = "it was started and has no process: the guard or the host went down"
            self._finish(attempt, attempt.ended or Ended(Outcome.LOST, message=message))
            return
        self._put(StopConfirmed(event.key))
        self._outbox.add(event.key)

    def _on_census(self, event: on.Census) -> None:
        """F4: what was started but is neither running nor ended is dead; its key is tombstoned before that is said."""
        self._joined = True
        for ended in event.ended:
            self._on_work_ended(ended)
        for attempt in self.state.attempts.values():
            if attempt.phase not in ALIVE:
                continue
            self._ledger.claim(attempt.key, attempt.demand)
            if attempt.phase is Phase.STOPPING:
                self._stop(attempt)
            elif attempt.key in event.running:
                attempt.phase = Phase.RUNNING
            else:
                attempt.phase, attempt.orphaned = Phase.STOPPING, True
                self._stop(attempt)

    def _on_executor_lost(self, _: on.ExecutorLost) -> None:
        self._joined = False
        self._do(RejoinExecutor())

    def _on_guard_silence(self, event: on.GuardSilence) -> None:
        if event.silent and not self._guard_silent and self.link.lapsed:
            self._do(KillAll())
        self._guard_silent = event.silent

    # --- circumstances ------------------------------------------------------------------------------------------------

    def _on_disk_state(self, event: on.DiskState) -> None:
        self._writable = event.writable

    def _on_drain_ordered(self, _: on.DrainOrdered) -> None:
        """S5: reject what waits, kill what runs; the goodbye comes when all is dead."""
        self._draining = True
        for key in self._queue.clear():
            attempt = self.state.attempts[key]
            self._put(Tombstoned(key, attempt.shard, attempt.generation, "the cluster is draining"))
            self._outbox.add(key)
        self._do(KillAll())


def newest(epochs: dict[str, Epoch]) -> Epoch | None:
    """The highest epoch held, for people."""
    return max(epochs.values(), default=None)
