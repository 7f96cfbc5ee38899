"""The attempts this agent holds and what becomes of them: queue, start, end, stop, report, forget.

`machine` decides whether a message counts; this decides what it then means for an attempt. Rules: F4 (a `Starting`
record before the spawn, and never a second one), F8 (stops are tombstones at once, confirmed by the executor), C3
(what does not fit, or waited too long for a place, is tombstoned and rejected), S6 (adoption), J7 (reports until acknowledged).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster_agent.core.capacity import PATIENCE_SECONDS, FreeShape, Ledger, LocalQueue, NodeSpec
from cluster_agent.core.commands import (
    Action,
    AdoptWork,
    ForgetWork,
    KillAll,
    StartOrder,
    StartWork,
    Step,
    StopWork,
    WidenWork,
)
from cluster_agent.core.events import Assignment, WorkEnded
from cluster_agent.core.lanes import Lanes
from cluster_agent.core.link import Link
from cluster_agent.core.model import AgentState, ArtifactRef, Attempt, AttemptKey, Demand, Ended, Outcome, Phase
from cluster_agent.core.outbox import Outbox
from cluster_agent.core.records import Finished, Forgotten, Moved, Record, Starting, StopConfirmed, Tombstoned, apply

ALIVE = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
"""Phases in which a process may exist."""

SETTLED = (Phase.FINISHED, Phase.TOMBSTONED)
"""Phases that only wait for the acknowledgement of their report."""

DRAINING = "the cluster is draining"

WAITED = f"it waited here for {PATIENCE_SECONDS:g} s and no place came free"


class Holdings:
    """Owns the state, the capacity ledger, the queue and the outbox. Writes into `step` what must be recorded and
    done."""

    def __init__(self, state: AgentState, nodes: Sequence[NodeSpec]) -> None:
        self.state = state
        self.outbox = Outbox()
        self.step = Step()
        self._ledger = Ledger(nodes)
        self._queue = LocalQueue(*self._ledger.totals())
        self._lanes = Lanes()
        self._strangers: set[AttemptKey] = set()
        """What an earlier agent started: it may stand in a lane of the executor that is not known here."""
        self.stuck = False
        """What waited went back, and no place came free since: nothing more should be sent to wait here."""
        self.handed_back = 0
        """Attempts that went back since this process began."""
        self._unadopted: set[AttemptKey] = set()
        self._stopping: dict[float, list[AttemptKey]] = {}

    def put(self, record: Record) -> None:
        """Make a fact: fold it into the state and have it written."""
        apply(self.state, record)
        self.step.records.append(record)

    def do(self, action: Action) -> None:
        """Have it done once the step's records are written."""
        self.step.actions.append(action)

    def restore(self) -> None:
        """After the journal was read: reports go out again, and queues did not survive (S6)."""
        for attempt in list(self.state.attempts.values()):
            if attempt.phase in SETTLED:
                self.outbox.add(attempt.key)
            elif attempt.phase in (Phase.QUEUED, Phase.VOID):
                del self.state.attempts[attempt.key]
            else:
                self._strangers.add(attempt.key)

    def alive(self) -> int:
        """Attempts that may have a process."""
        return sum(1 for attempt in self.state.attempts.values() if attempt.phase in ALIVE)

    def must_die_at_fence(self) -> bool:
        """Whether something may run that F ends (F7: kept work goes on, unless it was told to stop)."""
        held = self.state.attempts.values()
        return any(a.phase in ALIVE and (not a.keep_at_fence or a.phase is Phase.STOPPING) for a in held)

    def waiting(self) -> int:
        """Attempts in the queue."""
        return len(self._queue)

    def shapes(self, *, closed: bool) -> tuple[FreeShape, ...]:
        """Free room; nothing free if `closed`."""
        return self._ledger.shapes(self._queue.demands(), closed=closed)

    # --- what owners want ---------------------------------------------------------------------------------------------

    def take(self, shard: str, assignment: Assignment, link: Link, now: float, *, draining: bool) -> None:
        """A dispatch that counts: queue it, reject it, or take it as a confirmation (F3, C3, S6)."""
        key, spec = assignment.key, assignment.spec
        attempt = self.state.attempts.get(key)
        if attempt is None or attempt.phase is Phase.VOID:
            refusal = DRAINING if draining else self._refusal(key, spec.demand, now)
            if refusal:
                self.put(Tombstoned(key, shard, link.generation, refusal))
                self.outbox.add(key)
            else:
                queued = Attempt(key, shard, link.generation, Phase.QUEUED, spec.demand, spec.grace_seconds, spec)
                self.state.attempts[key] = queued
        elif attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self.adopt(key, link)
        elif attempt.phase in SETTLED:
            self.outbox.add(key)  # the owner does not know yet

    def _refusal(self, key: AttemptKey, demand: Demand, now: float) -> str:
        """Why it cannot be taken into the queue; nothing if it was taken."""
        misfit = self._ledger.never_fits(demand)
        if misfit:
            return f"no node is large enough: {misfit}"
        return "" if self._queue.offer(key, demand, now) else "the local queue is full"

    def adopt(self, key: AttemptKey, link: Link) -> None:
        """It lives in the session's generation now (S6); it moves to that lease once the lease exists (F5)."""
        attempt = self.state.attempts.get(key)
        if attempt is None or attempt.generation == link.generation:
            return
        if attempt.phase is Phase.VOID:
            attempt.generation = link.generation
        elif attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self.put(Moved(key, link.generation))
            self._unadopted.add(key)
            self.move_adopted(link)

    def move_adopted(self, link: Link) -> None:
        """Tell the executor of adoptions that were confirmed before their generation had a lease."""
        if not self._unadopted or not link.leased:
            return
        held = [self.state.attempts.get(key) for key in sorted(self._unadopted)]
        keys = tuple(attempt.key for attempt in held if attempt is not None and attempt.generation == link.generation)
        self._unadopted.clear()
        if keys:
            self.do(AdoptWork(keys, link.generation))

    def stop(self, key: AttemptKey, shard: str, generation: int) -> None:
        """Tombstone now, kill, and report when the executor has confirmed it; unknown ones too (F8)."""
        attempt = self.state.attempts.get(key)
        if attempt is not None and attempt.phase is Phase.TOMBSTONED:
            self.outbox.add(key)
            return
        if attempt is not None and attempt.phase is Phase.STOPPING and not attempt.orphaned:
            return
        self._queue.remove(key)
        self.outbox.settle(key)
        if attempt is not None:
            shard, generation = attempt.shard, attempt.generation
        self.put(Tombstoned(key, shard, generation))
        self._kill(self.state.attempts[key])

    def _kill(self, attempt: Attempt) -> None:
        self._stopping.setdefault(attempt.grace_seconds, []).append(attempt.key)

    def flush_stops(self) -> None:
        """One action for all stops of a step with the same grace."""
        for grace, keys in self._stopping.items():
            self.do(StopWork(tuple(keys), grace))
        self._stopping.clear()

    def settle(self, keys: Iterable[AttemptKey]) -> None:
        """Reports that are committed: forget what they were about (F3), unless it has changed since it was told."""
        gone: list[AttemptKey] = []
        for key in keys:
            attempt = self.state.attempts.get(key)
            if attempt is not None and attempt.phase in SETTLED and self.outbox.told(key):
                self.outbox.settle(key)
                self.put(Forgotten(key))
                gone.append(key)
        if gone:
            self.do(ForgetWork(tuple(gone)))

    def void(self) -> None:
        """The stream that brought the queue is not trusted any more (F3)."""
        for key in self._queue.clear():
            attempt = self.state.attempts[key]
            attempt.phase, attempt.spec = Phase.VOID, None

    def drain(self) -> None:
        """Reject what waits and kill what runs (S5)."""
        for key in self._queue.clear():
            attempt = self.state.attempts[key]
            self.put(Tombstoned(key, attempt.shard, attempt.generation, DRAINING))
            self.outbox.add(key)
        self.do(KillAll())

    def hand_back(self, now: float) -> None:
        """Reject what has waited too long: run times grew, and another cluster may be free (C3). What was started is not in the
        queue, even if it still waits for files or an environment."""
        for key in self._queue.stale(now):
            attempt = self.state.attempts[key]
            self._queue.remove(key)
            self.put(Tombstoned(key, attempt.shard, attempt.generation, WAITED))
            self.outbox.add(key)
            self.stuck = True
            self.handed_back += 1

    def wait_anew(self, now: float) -> None:
        """Nobody looked after the queue until now: what waits could not have started."""
        self._queue.wait_anew(now)

    # --- starting -----------------------------------------------------------------------------------------------------

    def start_what_fits(self, link: Link, now: float) -> None:
        """Start from the head of the queue while there is room, and short calls behind their like without room (G5). F4: recorded
        first; D1: not after the deadline."""
        for key, demand in list(self._lanes.longest_behind()):
            if self._ledger.place(key, demand):
                self.do(WidenWork(key, self._lanes.promote(key)))
        orders: list[StartOrder] = []
        while (first := self._queue.first()) is not None:
            key, demand = first
            attempt = self.state.attempts[key]
            spec = attempt.spec
            assert spec is not None, f"{key} is queued without a specification"  # noqa: S101 - a broken invariant
            stop_boot = link.boot_of(spec.deadline_wall_ms)
            if stop_boot is not None and stop_boot <= now:
                self._queue.remove(key)
                self._finish(attempt, Ended(Outcome.DEADLINE, message="the deadline passed before it could start"))
                continue
            if self._ledger.place(key, demand):
                slots = self._lanes.hold(key, spec)
                if spec.carried or self._strangers:
                    slots = 0  # a number would be wrong when its files are here, or leaves out the strangers
            elif self._strangers or not (slots := self._lanes.follow(key, spec)):
                break
            self._queue.remove(key)
            keep = spec.keep_at_fence
            self.put(Starting(key, attempt.shard, link.generation, demand, spec.grace_seconds, keep))
            orders.append(StartOrder(key, link.generation, spec, stop_boot, slots))
        if orders:
            self.do(StartWork(tuple(orders)))

    # --- what the executor says ---------------------------------------------------------------------------------------

    def started(self, key: AttemptKey, wall_ms: int) -> None:
        """A workload runs."""
        attempt = self.state.attempts.get(key)
        if attempt is not None and attempt.phase is Phase.STARTING:
            attempt.phase = Phase.RUNNING
            self.outbox.started(key, wall_ms)

    def saved(self, key: AttemptKey, checkpoint: ArtifactRef) -> None:
        """A workload's newer checkpoint is stored; told at once, for it is what the next attempt starts from."""
        attempt = self.state.attempts.get(key)
        if attempt is not None and attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self.outbox.saved(key, checkpoint)

    def refused(self, key: AttemptKey, reason: str) -> None:
        """The executor has tombstoned it and never will start it: a rejection, at no cost to the task (C3)."""
        attempt = self.state.attempts.get(key)
        if attempt is not None and attempt.phase is Phase.STARTING:
            self._vacate(key)
            self.put(Tombstoned(key, attempt.shard, attempt.generation, reason or "refused by the executor"))
            self.outbox.add(key)

    def _vacate(self, key: AttemptKey) -> None:
        """It holds nothing any more; its place goes to who waits behind it, as it does at the executor (G5)."""
        self._strangers.discard(key)
        self.stuck = False
        heir = self._lanes.leave(key)
        if heir is None:
            self._ledger.release(key)
        else:
            self._ledger.pass_on(key, heir)

    def ended(self, key: AttemptKey, ended: Ended, seconds: float = 0.0) -> None:
        """All its processes are gone. `seconds`: its run time."""
        attempt = self.state.attempts.get(key)
        if ended.outcome in (Outcome.SUCCEEDED, Outcome.FAILED):
            self._lanes.learn(key, seconds)
        self._vacate(key)
        if attempt is None:
            self.do(ForgetWork((key,)))  # settled before; only the executor still keeps it
        elif attempt.phase in (Phase.STARTING, Phase.RUNNING):
            self._finish(attempt, ended)
        elif attempt.ended is None and not attempt.rejected:
            attempt.ended = ended
            if attempt.phase is Phase.TOMBSTONED:
                self.outbox.add(key)

    def _finish(self, attempt: Attempt, ended: Ended) -> None:
        self.put(Finished(attempt.key, attempt.shard, attempt.generation, ended))
        self.outbox.add(attempt.key)

    def stopped(self, key: AttemptKey) -> None:
        """A stop is confirmed (F8), or the fence of an orphan is (F4)."""
        attempt = self.state.attempts.get(key)
        if attempt is None or attempt.phase is not Phase.STOPPING:
            return
        self._vacate(key)
        if attempt.orphaned:
            message = "it was started and has no process: the guard or the host went down"
            self._finish(attempt, attempt.ended or Ended(Outcome.LOST, message=message))
            return
        self.put(StopConfirmed(key))
        self.outbox.add(key)

    def census(self, running: Mapping[AttemptKey, int], ended: Iterable[WorkEnded]) -> None:
        """F4: what was started but neither runs nor has ended is dead; its key is tombstoned before that is said."""
        for exit_ in ended:
            self.ended(exit_.key, exit_.ended, exit_.seconds)
        for attempt in self.state.attempts.values():
            if attempt.phase not in ALIVE:
                continue
            if not self._lanes.behind(attempt.key):
                self._ledger.claim(attempt.key, attempt.demand)
            if attempt.phase is Phase.STOPPING:
                self._kill(attempt)
            elif attempt.key not in running:
                attempt.phase, attempt.orphaned = Phase.STOPPING, True
                self._kill(attempt)
            else:
                attempt.phase = Phase.RUNNING
                if running[attempt.key] != attempt.generation:
                    self._unadopted.add(attempt.key)  # adopted on disk, but the executor was not told any more
