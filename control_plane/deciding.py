"""Turning what arrived at one open shard into one decision (PROTOCOL J1, J2, J5, J11). Synchronous: nothing can come
between.

Theory. Commands are handled one after the other on the live machine, each emitting events that are applied at once,
and serialized as they come, so that a batch ends before it is too large or takes too long. The rest of the inbox
waits for the next one. Answers are kept until the batch is committed, refusals too: one may rest on what an earlier
command of the batch did. A machine that raises anything else has a bug and an unknown state: it is thrown away and
rebuilt from the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from baton.clock import Clock, Entropy
from control_plane.batches import BatchWriter
from control_plane.core.commands import Command, FleetTick, Refused, Request, Tick
from control_plane.core.machine import Batch
from control_plane.core.model import FLEET, Stamp
from control_plane.manifest import NONCE_BYTES
from control_plane.slots import Answer, Decision, Item, SidePuts, Slot
from control_plane.store.base import Compare

TICK_PAUSE = 0.05
"""Seconds before a timer that is due and brought nothing is asked again. Without it a machine whose timer stays due
would spin the cycle; much larger would delay timers."""


@dataclass(frozen=True, slots=True)
class CycleConfig:
    """Bounds of the cycle (PROTOCOL J2). Defaults are the protocol's."""

    slice_seconds: float = 0.005
    """Work on one batch. More delays the other shards' commits; less makes batches small and transactions many."""
    batch_bytes: int = 256 * 1024
    """Of one shard in one transaction: four full shards, or all with a little each."""
    txn_bytes: int = 1 << 20
    """Of one transaction, under etcd's 1.5 MiB."""
    batch_commands: int = 1000
    """Commands of one batch, for clocks that stand still (simulation)."""
    batch_side_puts: int = 40
    """Extra keys of one batch: with 2 puts for each of 33 shards this stays under etcd's 128."""
    inbox: int = 10_000
    """Commands that may wait for one shard. Posted ones beyond it are dropped (J7 sends them again), others refused."""
    reads: int = 10_000
    """Reads that may wait for one shard to open."""
    recovery_seconds: float = 60.0
    """For reading a shard's state; then it is tried anew. Too small: a big shard is never taken."""


class Broken(Exception):
    """A machine raised something it must not. `item` is the command it was handling; None: a timer or `settle`."""

    def __init__(self, item: Item | None, taken: list[Item]) -> None:
        super().__init__("a machine failed")
        self.item = item
        self.taken = taken
        """Everything that was taken from the inbox, in order; none of it has happened."""


class Decider:
    """Makes decisions. `level` is the federation's feature level (PROTOCOL J11)."""

    def __init__(self, clock: Clock, entropy: Entropy, config: CycleConfig, side_puts: SidePuts) -> None:
        self._clock, self._entropy, self._config, self._side_puts = clock, entropy, config, side_puts
        self.level = 1

    def due_at(self, slot: Slot) -> float:
        """Wall time of the shard's next timer; infinity if it has none."""
        machine = slot.owned.machine
        if slot.due_of is not machine:
            due = machine.due()
            slot.due, slot.due_of = (math.inf if due is None else max(slot.quiet_until, due)), machine
        return slot.due

    def decide(self, slot: Slot) -> tuple[list[Answer], Decision | None]:
        """Handle what arrived. Either a decision to commit (its answers in it), or no events and answers to give now.
        Raises Broken."""
        owned = slot.owned
        nonce = self._entropy.token(NONCE_BYTES)
        stamp = Stamp(self._clock.wall(), nonce, owned.seq + 1, owned.incarnation)
        work = _Work(
            slot, Batch(stamp, owned.machine.apply, self.level), BatchWriter(stamp, self.level), self._side_puts
        )
        ticked = self._tick(slot, work)
        slot.due_of = None
        self._commands(slot, work)
        work.run(None, lambda: owned.machine.settle(work.batch))
        if not work.batch.events:
            due, now = owned.machine.due(), stamp.wall
            if ticked and due is not None and due <= now:
                slot.quiet_until = now + TICK_PAUSE
            return work.answers, None
        decision = Decision(
            stamp=stamp,
            values=work.writer.values(self._config.batch_bytes),
            side_puts=tuple(self._side_puts(owned, work.batch.events)),
            answers=work.answers,
            condition=work.condition,
        )
        return [], decision

    def _tick(self, slot: Slot, work: _Work) -> bool:
        """Tell the machine that its timer is due; whether it was."""
        if self.due_at(slot) > self._clock.wall() or (slot.inbox and slot.inbox[0].condition is not None):
            return False
        machine = slot.owned.machine
        tick: Command = FleetTick() if slot.shard == FLEET else Tick()
        work.run(None, lambda: machine.handle(tick, work.batch))
        return True

    def _commands(self, slot: Slot, work: _Work) -> None:
        until = self._clock.boot() + self._config.slice_seconds
        while slot.inbox and work.condition is None:
            item = slot.inbox[0]
            if item.condition is not None and (work.taken or work.batch.events):
                return  # a transaction of its own (J5)
            slot.inbox.popleft()
            if item.abandoned:
                continue
            work.handle(item)
            if (
                self._clock.boot() >= until
                or len(work.taken) >= self._config.batch_commands
                or work.writer.size >= self._config.batch_bytes
                or work.side_puts >= self._config.batch_side_puts
            ):
                return


class _Work:
    """A batch in the making."""

    def __init__(self, slot: Slot, batch: Batch, writer: BatchWriter, side_puts: SidePuts) -> None:
        self._slot, self.batch, self.writer, self._side_puts_of = slot, batch, writer, side_puts
        self._plain = batch.stamp
        self.taken: list[Item] = []
        self.answers: list[Answer] = []
        self.side_puts = 0

    @property
    def condition(self) -> Compare | None:
        """The condition of its only command (J5)."""
        return self.taken[0].condition if self.taken else None

    def handle(self, item: Item) -> None:
        """One command; its answer is kept."""
        self.taken.append(item)
        item.decided = True
        machine = self._slot.owned.machine
        request = getattr(item.command, "request", None)
        self.batch.stamp = replace(self._plain, actor=item.actor) if item.actor else self._plain
        reply = self.run(
            item,
            lambda: machine.handle(item.command, self.batch),
            request.id if isinstance(request, Request) else "",
        )
        self.batch.stamp = self._plain
        self.answers.append((item, reply))

    def run(self, item: Item | None, work: Callable[[], object], request_id: str = "") -> object:
        """`work`'s reply or refusal; what it emitted is serialized. Raises Broken for anything else."""
        before = len(self.batch.events)
        try:
            reply = work()
            emitted = self.batch.events[before:]
            if emitted:
                self.writer.add(emitted, item.actor if item else "", request_id)
                self.side_puts += len(self._side_puts_of(self._slot.owned, emitted))
        except Refused as refused:
            return refused
        except Exception as error:
            raise Broken(item, self.taken) from error
        return reply
