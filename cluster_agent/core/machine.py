"""The agent's decisions: events in, records and actions out. Everything an agent may or must do about work is here.

The rules, each with its place below:

* **F3 start**: only what came on the current stream of the current session, for that session's generation, without a
  lapse since, at or above the shard's epoch on disk, with no tombstone (`_on_dispatched`, `_admit`, `step`). Refusals
  for epoch, stream or generation are silent; a rejection for capacity is tombstoned before it is reported.
* **F4**: at most one spawn: `Starting` is recorded first, and what has the record but no process ends as LOST, after
  the executor has tombstoned it (`holdings`).
* **F5**: the lease counts from the send time of acknowledged heartbeats of this session's generation. At F: nothing
  starts, the queue is void, a new stream is opened (`_check_lapse`). Running work is stopped by the executor's own
  clock.
* **F8**: a stop is a durable tombstone at once, and is reported when the executor has confirmed it, whether or not the
  attempt was known (`holdings`).
* **S6**: a new stream voids the queue and lists it; another boot id means that all is dead (`restore`).
* **J7, J12**: reports repeat until acknowledged and only then is anything forgotten; every owner message raises the
  shard's epoch and mark before it is acted upon (`_admit`).
* **G2**: at F the guard must live, stream or no stream; one that gives no sign of life is killed with its work
  (`_see_to_the_fence`). A new guard is told of the lease first (`_on_census`).
* **C3**: this agent has the last word on what fits, and sends back what waits too long. **D1**: deadlines are mapped
  by the last answered heartbeat.

One step handles a batch and is atomic: its actions leave only after its records are written (see `commands.Step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster_agent.core import events as on
from cluster_agent.core.capacity import QUEUE_FLOOR, NodeSpec
from cluster_agent.core.commands import (
    DropStream,
    InventoryEntry,
    KillAll,
    KillIfSilent,
    RejoinExecutor,
    RenewLease,
    SendHello,
    SendReceipt,
    SetBounds,
    Step,
    Vitals,
)
from cluster_agent.core.holdings import Holdings
from cluster_agent.core.link import Link
from cluster_agent.core.model import AgentState, AttemptKey
from cluster_agent.core.records import Booted, EpochRaised, MarkRaised, SessionOpened

GATHER_SECONDS = 0.01
"""How long a report may wait for others while more work waits here. Smaller: a message, a commit and a dispatch for every few short
tasks; larger: children of what is finished become ready later, and the queue must be deeper to hide it."""

DEEP_QUEUE, DEEP_GATHER_SECONDS = 64, 0.03
"""With so much waiting reports may gather longer: it is a multiple of what ends meanwhile, and its shards share commits."""

AWAY_SECONDS = 1.0
"""Between two steps while something waits: there is a tick every quarter of a second, so the process stood still meanwhile. Smaller:
a busy host counts as an absence, and what waits is never handed back; larger: a pause of that length sends short work away."""

GATHER_REPORTS = 256
"""Reports that leave without waiting for more: a full message is as cheap a task as any larger one."""


class AgentMachine:
    """See the module's rules. Not thread-safe; owns `state`."""

    def __init__(self, state: AgentState, nodes: Sequence[NodeSpec], *, fence_seconds: float) -> None:
        """`fence_seconds`: F until the first Welcome says otherwise."""
        self.state = state
        self.link = Link(fence_seconds=state.fence_seconds or fence_seconds)
        self._held = Holdings(state, nodes)
        self._joined = False
        self._guard_silent = False
        self._fenced = False
        """F passed and no heartbeat was answered since: what ran then must be dead (F5)."""
        self._writable = True
        self._draining = False
        self._now = 0.0
        self._told = float("-inf")
        """When reports last left, boot clock."""
        held = self._held
        self._handlers: dict[type, Callable[[Any], None]] = {
            on.StreamOpened: self._on_stream_opened,
            on.StreamClosed: self._on_stream_closed,
            on.Welcomed: self._on_welcomed,
            on.HeartbeatAcked: self._on_heartbeat_acked,
            on.Dispatched: self._on_dispatched,
            on.StopOrdered: self._on_stop_ordered,
            on.Adopted: self._on_adopted,
            on.ReportsSettled: self._on_reports_settled,
            on.WorkStarted: lambda event: held.started(event.key, event.wall_ms),
            on.WorkRefused: lambda event: held.refused(event.key, event.reason),
            on.WorkEnded: lambda event: held.ended(event.key, event.ended, event.seconds),
            on.WorkSaved: lambda event: held.saved(event.key, event.checkpoint),
            on.WorkStopped: lambda event: held.stopped(event.key),
            on.Census: self._on_census,
            on.ExecutorLost: self._on_executor_lost,
            on.GuardSilence: self._on_guard_silence,
            on.DiskState: self._on_disk_state,
            on.DrainOrdered: self._on_drain_ordered,
        }

    # --- the step -----------------------------------------------------------------------------------------------------

    def restore(self, boot_id: str) -> Step:
        """First step after the journal was read. The census that follows tells what is dead (F4, S6)."""
        self._held.step = Step()
        self._held.restore()
        if self.state.boot_id != boot_id:
            self._held.put(Booted(boot_id))
        return self._held.step

    def step(self, happened: Sequence[on.Event], now: float) -> Step:
        """Take what happened, decide. `now`: boot clock, seconds. An empty batch is a tick."""
        held, link = self._held, self.link
        if now - self._now > AWAY_SECONDS:
            held.wait_anew(now)
        self._now = now
        held.step = Step()
        self._check_lapse()
        for event in happened:
            self._handlers[type(event)](event)
        held.flush_stops()
        if link.leased and self._writable and self._joined and not self._guard_silent:
            held.start_what_fits(link, now)
        if link.ready and self._writable:
            held.hand_back(now)
        if link.ready and self.gathering(now) == 0.0:
            reports = held.outbox.due(self.state.attempts, stream=link.stream, generation=link.generation, now=now)
            if reports:
                self._told = now
            held.step.actions.extend(reports)
        return held.step

    def gathering(self, now: float) -> float:
        """Seconds for which reports still wait for company; 0 if none do. While the queue holds work no slot waits for an answer,
        so many reports may share one message, one commit and one dispatch; when it is empty a report leaves at once."""
        held = self._held
        if not held.waiting() or not held.outbox.fresh or held.outbox.fresh >= GATHER_REPORTS:
            return 0.0
        patience = DEEP_GATHER_SECONDS if held.waiting() >= DEEP_QUEUE else GATHER_SECONDS
        return max(0.0, min(patience, self._told + patience - now))

    def due(self, now: float) -> bool:
        """Whether time alone has given a step something to do: F may be over, a report be silent, waiting work too late."""
        held = self._held
        return held.waiting() > 0 or not held.outbox.idle or (not self.link.lapsed and self.link.passed(now))

    def vitals(self) -> Vitals:
        """What the next heartbeat says (S2, C4). While no work is taken, no room is offered."""
        included = tuple((shard, epoch, number) for shard, (epoch, number) in self.link.received.items())
        closed = self._draining or not self._writable or self._guard_silent or not self._joined
        attempts = self._held.alive() + self._held.waiting()
        limit = 0 if self._held.stuck else QUEUE_FLOOR
        return Vitals(self.link.generation, self._held.shapes(closed=closed), included, attempts, limit)

    @property
    def handed_back(self) -> int:
        """Attempts that waited here too long and went back, since this process began."""
        return self._held.handed_back

    def find(self, run_uid: str, task: int, n: int) -> AttemptKey | None:
        """The key of an attempt whose nonce the asker does not know, if it is held here."""
        same = (run_uid, task, n)
        return next((key for key in self.state.attempts if (key.run_uid, key.task, key.n) == same), None)

    @property
    def all_dead(self) -> bool:
        """No process exists and none is about to (S5)."""
        return self._joined and not self._held.alive()

    @property
    def all_settled(self) -> bool:
        """Every report is acknowledged."""
        return not len(self._held.outbox)

    # --- streams, sessions, leases (F3, F5, S1, S2) -------------------------------------------------------------------

    def _on_stream_opened(self, event: on.StreamOpened) -> None:
        self._held.void()
        self._held.outbox.rewind()
        self.link.open(event.stream, self._now)
        inventory = tuple(
            InventoryEntry(attempt.key, attempt.shard, attempt.generation, attempt.phase)
            for attempt in self.state.attempts.values()
        )
        marks = tuple(self.state.marks.items())
        self._held.do(SendHello(event.stream, inventory, marks, self.state.generation, self.state.federation_uid))

    def _on_stream_closed(self, event: on.StreamClosed) -> None:
        if event.stream == self.link.stream:
            self.link.close()

    def _on_welcomed(self, event: on.Welcomed) -> None:
        if event.stream != self.link.stream or not self.link.is_open:
            return
        known = self.state.federation_uid
        if known and known != event.federation_uid:
            self._held.do(DropStream(event.stream, f"federation {event.federation_uid} is not ours ({known})"))
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
            self._held.put(opened)
        self._held.do(SetBounds(event.fence_seconds, event.kill_seconds))

    def _on_heartbeat_acked(self, event: on.HeartbeatAcked) -> None:
        if not self.link.renew(event.stream, event.generation, event.sent_boot, event.server_wall_ms):
            return
        self._fenced = False
        self._held.do(RenewLease(event.generation, event.sent_boot))
        self._held.move_adopted(self.link)

    def _check_lapse(self) -> None:
        """F5: at F the queue is void and, as trust in this stream is gone, another one is opened (F3)."""
        if self.link.lapsed or not self.link.passed(self._now):
            return
        self._held.void()
        if self.link.is_open:
            self._held.do(DropStream(self.link.stream, "lease lapsed"))
        self.link.lapse()
        self._fenced = True
        self._see_to_the_fence()

    def _see_to_the_fence(self) -> None:
        """G2: the guard stops what F ends; if it does not live, nobody else will."""
        if self._held.must_die_at_fence():
            self._held.do(KillIfSilent())

    # --- what owners say (F3, F8, S6, J12) ----------------------------------------------------------------------------

    def _admit(self, event: on.OwnerMessage) -> bool:
        """Whether an owner's message counts, and if so raise epoch and mark. Refusals are silent: owners repeat
        (J7)."""
        if event.stream != self.link.stream or not self.link.ready:
            return False
        held = self.state.epochs.get(event.shard)
        if held is not None and event.epoch < held:
            return False
        before = max((epoch.incarnation for epoch in self.state.epochs.values()), default=event.epoch.incarnation)
        if held is None or event.epoch > held:
            self._held.put(EpochRaised(event.shard, event.epoch))
        if event.epoch.incarnation > before:
            # The store was restored (J12). What this stream's inventory said was said to the store that is gone: owners
            # know neither what was placed since nor what they have forgotten, and must hear of it before we act.
            self._held.do(DropStream(event.stream, "the store was restored: the inventory must be told again"))
            self.link.close()
            return False
        mark = event.mark
        if mark is not None:
            known = self.state.marks.get(event.shard)
            if known is None or (mark.incarnation, mark.seq) > (known.incarnation, known.seq):
                self._held.put(MarkRaised(event.shard, mark))
        return True

    def _on_dispatched(self, event: on.Dispatched) -> None:
        if event.generation != self.link.generation or not self._writable or not self._admit(event):
            return
        if self.link.expects(event.shard, event.epoch, event.dispatch_no):
            for assignment in event.assignments:
                self._held.take(event.shard, assignment, self.link, self._now, draining=self._draining)
        number = self.link.count(event.shard, event.epoch, event.dispatch_no)
        self._held.do(SendReceipt(event.stream, event.shard, event.epoch, number))

    def _on_adopted(self, event: on.Adopted) -> None:
        if event.generation == self.link.generation and self._admit(event):
            for key in event.keys:
                self._held.adopt(key, self.link)

    def _on_stop_ordered(self, event: on.StopOrdered) -> None:
        if self._admit(event):
            for key in event.keys:
                self._held.stop(key, event.shard, self.link.generation)

    def _on_reports_settled(self, event: on.ReportsSettled) -> None:
        if self._admit(event):
            for key, name in event.checkpoints:
                self._held.outbox.settle_saved(key, name)
            self._held.settle(event.keys)

    # --- circumstances ------------------------------------------------------------------------------------------------

    def _on_census(self, event: on.Census) -> None:
        self._joined = True
        self._held.census(event.running, event.ended)
        if self.link.leased and self.link.renewed_at is not None:
            # A guard that is new knows of no lease, and would refuse for ever what starts before the next heartbeat.
            self._held.do(RenewLease(self.link.generation, self.link.renewed_at))
        self._held.move_adopted(self.link)
        if self._draining:
            self._held.do(KillAll())  # an earlier one may not have been heard

    def _on_executor_lost(self, _: on.ExecutorLost) -> None:
        if self._joined:  # else it is being joined already
            self._joined = False
            self._held.do(RejoinExecutor())

    def _on_guard_silence(self, event: on.GuardSilence) -> None:
        if event.silent and not self._guard_silent and self._fenced:
            self._see_to_the_fence()
        self._guard_silent = event.silent

    def _on_disk_state(self, event: on.DiskState) -> None:
        self._writable = event.writable

    def _on_drain_ordered(self, _: on.DrainOrdered) -> None:
        self._draining = True
        self._held.drain()
