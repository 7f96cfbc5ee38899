"""The cycle: take what arrived, decide it as one batch a shard, commit all in one transaction, publish (PROTOCOL J2).

Theory. One task, one transaction at a time. Under load everything that arrives during a commit becomes the next
batch, so throughput grows with load and no queue needs tuning; an idle shard's command waits for nothing. What cannot
go into this transaction (a full one, a batch with a condition, the later parts of a big one) goes into the next,
shard after shard in turn. A busy replica takes a short breath between two, so that what its answers set off comes
together. Publishing is synchronous: answers, waiting reads and listeners see the same committed state, before
anything else is decided.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from baton.clock import Clock, Entropy
from control_plane.core.commands import Outbox
from control_plane.deciding import Broken, CycleConfig, Decider
from control_plane.journal import Entry, Journal, Verdict
from control_plane.refusals import ConditionFailed, NotOwned
from control_plane.restore import Mark, RestoreDetector
from control_plane.slots import Answer, Item, Listener, OwnedShard, Phase, Read, SidePuts, Slot
from control_plane.store.base import MAX_TXN_OPS, Store

log = logging.getLogger(__name__)

LAPSED_POLL = 0.1
"""Seconds between looks at a lease that is not good; `wake` is quicker. Only a net under it."""

CROWD, GATHER_SECONDS = 6, 0.003
"""After a transaction that answered so many commands the next is not begun for so long (seconds): their senders are about to send
the next ones, and a transaction costs the same for one of them as for all. A lone chain never waits. Smaller numbers: more
transactions under load; larger: calls of a busy replica answer later."""

OnCommit = Callable[[int, int, float], None]
"""(shards, bytes, seconds) of a transaction that is through."""


_NOTHING = Outbox()
"""To compare with: nothing for anybody."""


def _no_lease() -> bool:
    return False


def _not_measured(shards: int, size: int, seconds: float) -> None:
    """Nobody wants to know."""


class Cycle:
    """See the module. `rebuild(slot)` reads a slot's state anew; False means: drop it."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        entropy: Entropy,
        config: CycleConfig,
        side_puts: SidePuts,
        restore: RestoreDetector,
        rebuild: Callable[[Slot], Awaitable[bool]],
    ) -> None:
        self._clock, self._config, self._restore, self._rebuild = clock, config, restore, rebuild
        self._journal = Journal(store, clock, restore.suspect)
        self.decider = Decider(clock, entropy, config, side_puts)
        self.slots: dict[str, Slot] = {}
        self.handles: dict[str, OwnedShard] = {}
        self.listeners: list[Listener] = []
        self.lease_good: Callable[[], bool] = _no_lease
        self.on_commit: OnCommit = _not_measured
        self._wake = asyncio.Event()
        self._turn = 0
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0.0
        self._rebuilding: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Something arrived."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Then decisions in flight are UNKNOWN, the rest NOT applied."""
        try:
            while True:
                self._wake.clear()
                good = self.lease_good()
                busy, due = await self._decide_all() if good else (False, math.inf)
                group = self._next_group()
                if group:
                    crowd = sum(len(slot.decision.answers) for slot in group if slot.decision is not None)
                    await self._commit(group)
                    if crowd >= CROWD:
                        await self._clock.sleep(GATHER_SECONDS)
                elif busy:
                    await self._clock.sleep(0)
                else:
                    self._set_alarm(max(0.0, due - self._clock.wall()) if good else LAPSED_POLL)
                    await self._wake.wait()
        finally:
            for task in (self._alarm, *self._rebuilding):
                if task is not None:
                    task.cancel()
            for slot in list(self.slots.values()):
                self.forget(slot, Verdict.LOST)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def opened(self, slot: Slot) -> None:
        """A slot was taken and recovered: show it."""
        slot.phase = Phase.OPEN
        self.handles[slot.shard] = slot.owned
        for listener in self.listeners:
            listener.taken(slot.owned)
        self._answer_reads(slot)
        self.wake()

    def forget(self, slot: Slot, verdict: Verdict | None) -> None:
        """A slot is gone; everybody who waits is told (J6)."""
        if self.slots.get(slot.shard) is slot:
            del self.slots[slot.shard]
        shown = self.handles.get(slot.shard)
        if shown is not None and shown is slot.handle:
            del self.handles[slot.shard]
            shown.lost = True
            for listener in self.listeners:
                listener.dropped(slot.shard)
        slot.phase = Phase.CLOSED
        slot.fail_all(verdict)

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def _decide_all(self) -> tuple[bool, float]:
        """Decide for every open shard that has work. Whether anything was done, and if not, the wall time of the next timer.
        Yields every slice (J2)."""
        busy, since, now, due_at = False, self._clock.boot(), self._clock.wall(), self.decider.due_at
        earliest = math.inf
        for slot in list(self.slots.values()):
            if slot.phase is not Phase.OPEN or slot.releasing:
                continue
            if not slot.inbox:
                handle = slot.handle
                known = handle is not None and slot.due_of is handle.machine
                if (due := slot.due if known else due_at(slot)) > now:
                    earliest = due if due < earliest else earliest  # noqa: FURB136 - a call for each shard that rests
                    continue
            busy = True
            self._decide(slot)
            if self._clock.boot() - since >= self._config.slice_seconds:
                await self._clock.sleep(0)
                since = self._clock.boot()
        for slot in self.slots.values():
            if slot.reads:
                self._answer_reads(slot)
        return busy, earliest

    def _decide(self, slot: Slot) -> None:
        try:
            answers, decision = self.decider.decide(slot)
        except Broken as broken:
            self._broke(slot, broken)
            return
        if decision is not None:
            slot.decision, slot.phase = decision, Phase.CLOSED
            slot.idle.clear()
            return
        if not self.lease_good():
            # An answer without a commit is a read (J8): it must not leave. Nothing was decided.
            answers = [(item, NotOwned(slot.shard)) for item, _ in answers]
        _tell(answers)
        self._publish_outbox(slot)

    def _broke(self, slot: Slot, broken: Broken) -> None:
        """A bug: the machine is rebuilt, the culprit is told, the others are decided anew."""
        log.error("a machine failed, its shard is rebuilt", extra={"shard": slot.shard}, exc_info=broken.__cause__)
        cause = broken.__cause__ if isinstance(broken.__cause__, Exception) else broken
        for item in reversed(broken.taken):
            # Without a culprit (a timer, `settle`) nobody is safe to try again.
            if item is broken.item or broken.item is None:
                item.fail(cause)
            else:
                item.decided = False
                slot.inbox.appendleft(item)
        self._start_rebuild(slot)

    # -- committing ----------------------------------------------------------------------------------------------------

    def _next_group(self) -> list[Slot]:
        """Closed shards whose next parts go into one transaction, in turn; a condition goes alone (J2, J5)."""
        waiting = [slot for slot in self.slots.values() if slot.phase is Phase.CLOSED and slot.decision is not None]
        if not waiting:
            return []
        self._turn += 1
        start = self._turn % len(waiting)
        group: list[Slot] = []
        size, puts = 0, 0
        for slot in (*waiting[start:], *waiting[:start]):
            entry = slot.entry()
            size, puts = size + entry.size, puts + entry.puts
            if group and (size > self._config.txn_bytes or puts > MAX_TXN_OPS):
                break
            if slot.decision is not None and slot.decision.condition is not None:
                if not group:
                    return [slot]
                size, puts = size - entry.size, puts - entry.puts
                continue
            if slot.owned.incarnation != (group[0].owned.incarnation if group else slot.owned.incarnation):
                continue
            group.append(slot)
        return group

    async def _commit(self, group: list[Slot]) -> None:
        by_shard = {slot.shard: slot for slot in group}
        decision = group[0].decision
        condition = decision.condition if decision is not None and len(group) == 1 else None

        def resolved(entry: Entry, verdict: Verdict) -> None:
            self._resolved(by_shard[entry.shard], entry, verdict)

        entries, sent = [slot.entry() for slot in group], self._clock.boot()
        await self._journal.commit(entries, condition, resolved)
        self.on_commit(len(entries), sum(len(entry.value) for entry in entries), self._clock.boot() - sent)

    def _resolved(self, slot: Slot, entry: Entry, verdict: Verdict) -> None:
        """The journal knows what became of one part of one shard's batch."""
        decision, owned = slot.decision, slot.owned
        if decision is None:
            return
        if verdict is Verdict.CONDITION_FAILED:
            slot.decision = None
            for item, _ in decision.answers:
                item.fail(ConditionFailed(f"shard {slot.shard}: the condition does not hold any more"))
            self._start_rebuild(slot)
            return
        if verdict not in (Verdict.COMMITTED, Verdict.COMMITTED_THEN_LOST):
            self.forget(slot, verdict)
            return
        owned.seq, owned.nonce = entry.after.seq, entry.after.nonce
        owned.log_bytes += len(entry.value)
        self._restore.marks.observe(Mark(slot.shard, entry.incarnation, owned.seq, owned.nonce))
        decision.written += 1
        whole = decision.written == len(decision.values)
        if whole:
            slot.decision = None
            _tell(decision.answers)
        if verdict is Verdict.COMMITTED_THEN_LOST:
            self.forget(slot, Verdict.NOT_APPLIED)
        elif whole:
            slot.phase = Phase.OPEN
            self._publish_outbox(slot)
            self._answer_reads(slot)
            slot.idle.set()

    # -- publishing ----------------------------------------------------------------------------------------------------

    def _publish_outbox(self, slot: Slot) -> None:
        machine = slot.owned.machine
        outbox = machine.outbox
        if outbox != _NOTHING:
            machine.outbox = Outbox()
            for listener in self.listeners:
                listener.committed(slot.owned, outbox)

    def _answer_reads(self, slot: Slot) -> None:
        while slot.reads and slot.phase is Phase.OPEN:
            if not _answer(slot.reads[0], slot.owned.machine, self.lease_good):
                return
            slot.reads.popleft()

    # -- rebuilding and timers -----------------------------------------------------------------------------------------

    def _start_rebuild(self, slot: Slot) -> None:
        slot.phase = Phase.REBUILDING
        slot.idle.set()
        task = asyncio.get_running_loop().create_task(self._finish_rebuild(slot))
        self._rebuilding.add(task)
        task.add_done_callback(self._rebuilding.discard)

    async def _finish_rebuild(self, slot: Slot) -> None:
        rebuilt = await self._rebuild(slot)
        if self.slots.get(slot.shard) is not slot:
            return
        if not rebuilt:
            self.forget(slot, Verdict.LOST)
            return
        # Committed state is what it was, so listeners need not hear of it.
        slot.phase = Phase.OPEN
        self.wake()

    def _set_alarm(self, wait: float) -> None:
        """Wake the cycle in `wait` seconds, never if that is infinity. An alarm that is due no later is left alone, so most calls
        cost nothing."""
        if wait == math.inf:
            return
        at = self._clock.boot() + wait
        if self._alarm is not None and not self._alarm.done():
            if self._alarm_at <= at:
                return
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = asyncio.get_running_loop().create_task(self._ring(wait))

    async def _ring(self, wait: float) -> None:
        await self._clock.sleep(wait)
        self.wake()


def _tell(answers: list[Answer]) -> None:
    for item, reply in answers:
        _settle(item, reply)


def _settle(item: Item, reply: object) -> None:
    if isinstance(reply, Exception):
        item.fail(reply)
    else:
        item.succeed(reply)


def _answer(read: Read, machine: Any, lease_good: Callable[[], bool]) -> bool:
    """Answer a waiting read. False if it must wait on: the lease was not good after the answer was made (J8)."""
    if read.answer.done():
        return True
    try:
        answer = read.question(machine)
    except Exception as error:  # noqa: BLE001 - the asker's own error, whatever it is, goes back to the asker
        read.answer.set_exception(error)
        return True
    if not lease_good():
        return False
    read.answer.set_result(answer)
    return True
