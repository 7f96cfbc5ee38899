"""The shards this replica owns: taking and releasing them, and what may be asked of them (PROTOCOL J2, J8, O3, O4).

Theory. Everything is one loop turn or one transaction. `submit`, `post` and `read` only put something into a shard's
inbox (a read of an open shard is answered at once); the cycle (`control_plane.cycle`) is the one task that decides
and commits. A shard exists here from the moment its taking begins, so that calls which arrive early are parked, not
failed (O4).

The lease is judged by whoever renews it (`attach`); while it is not good nothing is decided and nothing is read (O3),
and what was decided is still carried to its end, since the fence does not need the lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from baton.clock import Clock, Entropy
from baton.time_limits import time_limit
from control_plane.claims import claim, give_back
from control_plane.core.commands import Command, Outbox, Refused
from control_plane.core.events import Event
from control_plane.core.machine import Machine
from control_plane.cycle import Cycle, OnCommit
from control_plane.deciding import CycleConfig
from control_plane.journal import Verdict, owner_value
from control_plane.manifest import NONCE_BYTES
from control_plane.recovery import Recovered, recover
from control_plane.refusals import Corrupt, NotOwned, OutcomeUnknown, StoreDown, TooNew
from control_plane.restore import Mark, RestoreDetector
from control_plane.slots import Item, Listener, OwnedShard, Phase, Read, SidePuts, Slot
from control_plane.store.base import Compare, Put, Store, StoreError, Unavailable

__all__ = ["Controller", "CycleConfig", "Listener", "OwnedShard", "SidePuts"]

log = logging.getLogger(__name__)

T = TypeVar("T")

CLAIM_TIMEOUT = 5.0
"""Seconds for taking or giving back an owner key: several etcd elections."""

FLUSH_TIMEOUT = 10.0
"""Seconds for a decision in flight when a shard is released; then its callers are told UNKNOWN. Too small: a
hand-over in a slow moment costs certainty; too large: a replica cannot leave while the store is down."""


def no_side_puts(shard: OwnedShard, events: Sequence[Event]) -> Sequence[Put]:
    """For shards whose batches carry nothing else."""
    del shard, events
    return ()


class Controller:
    """See the module. `make_machine(shard)` makes an empty machine; `side_puts` adds puts to a batch's transaction."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        entropy: Entropy,
        replica: str,
        config: CycleConfig | None = None,
        make_machine: Callable[[str], Machine],
        side_puts: SidePuts = no_side_puts,
    ) -> None:
        self._store, self._clock, self._entropy, self._replica = store, clock, entropy, replica
        self._config = config or CycleConfig()
        self._make_machine = make_machine
        self.restore = RestoreDetector(store, clock, replica)
        """Marks of this replica, and the check of others' (PROTOCOL J12)."""
        self.stopped: dict[str, str] = {}
        """Shards that this program cannot serve, and why (PROTOCOL J11). They are not taken again."""
        self.dropped = 0
        """Posted commands that found their shard's inbox full."""
        self._cycle = Cycle(
            store=store,
            clock=clock,
            entropy=entropy,
            config=self._config,
            side_puts=side_puts,
            restore=self.restore,
            rebuild=self._rebuild,
        )
        self._slots = self._cycle.slots
        self._lease = 0

    def listen(self, listener: Listener) -> None:
        """From now on `listener` hears of owned shards. Call it before the first taking."""
        self._cycle.listeners.append(listener)

    def measure(self, on_commit: OnCommit) -> None:
        """`on_commit` is told of every transaction that is through. It must be quick and must not raise."""
        self._cycle.on_commit = on_commit

    def attach(self, lease: int, lease_good: Callable[[], bool]) -> None:
        """Owner keys are put under `lease`; nothing is decided or read while `lease_good()` is false (O2, O3)."""
        self._lease = lease
        self._cycle.lease_good = lease_good
        self._cycle.wake()

    @property
    def feature_level(self) -> int:
        """The federation's feature level, as last read (J11)."""
        return self._cycle.decider.level

    def set_feature_level(self, level: int) -> None:
        """The federation's feature level, as last read (J11)."""
        self._cycle.decider.level = level

    def wake(self) -> None:
        """The lease is good again: go on."""
        self._cycle.wake()

    @property
    def acting(self) -> bool:
        """The lease is good. A lapsed replica decides, reads and sends nothing (O3)."""
        return self._cycle.lease_good()

    def owned(self) -> Mapping[str, OwnedShard]:
        """Shards that are taken and recovered, by id."""
        return MappingProxyType(self._cycle.handles)

    def holds(self, shard: str, value: bytes) -> bool:
        """Whether an owner key with `value` is known here: of a shard that is owned, or just being taken."""
        slot = self._slots.get(shard)
        return slot is not None and (slot.handle is None or slot.handle.owner_value == value)

    async def run(self) -> None:
        """The cycle. Runs until it is cancelled; then everybody who waits is told."""
        await self._cycle.run()

    # -- asking --------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        shard: str,
        command: Command,
        *,
        actor: str = "",
        timeout: float,
        condition: Compare | None = None,
    ) -> Any:
        """Decide `command`, wait until it is durable, return `handle`'s reply. With a `condition` it is a batch and a
        transaction of its own (J5).

        Raises Refused (decided: no), ConditionFailed, NotOwned and StoreDown (NOT applied), OutcomeUnknown.
        """
        slot = self._slots.get(shard)
        if slot is None or slot.releasing:
            raise NotOwned(shard)
        if len(slot.inbox) >= self._config.inbox:
            raise Refused("LIMIT_EXCEEDED", f"{self._config.inbox} commands wait for shard {shard}; try again later")
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        item = Item(command, actor, reply, condition)
        slot.inbox.append(item)
        self._cycle.wake()
        try:
            async with time_limit(timeout):
                return await reply
        except TimeoutError:
            # The await cancelled `reply`: an undecided item is now abandoned, and never will be decided.
            if item.decided:
                raise OutcomeUnknown(f"no clear answer from the store in {timeout} s") from None
            raise StoreDown(f"shard {shard} did not get to it in {timeout} s") from None

    def post(self, shard: str, command: Command) -> None:
        """Like `submit` for nobody who waits. Dropped silently if the shard is not here or too much waits: whoever
        cares sends it again (J7)."""
        slot = self._slots.get(shard)
        if slot is None or slot.releasing:
            return
        if len(slot.inbox) >= self._config.inbox:
            self.dropped += 1
            return
        slot.inbox.append(Item(command, "", None))
        self._cycle.wake()

    async def read(self, shard: str, question: Callable[[Any], T], *, timeout: float) -> T:
        """`question` of the machine's committed state (J8). It must not keep or change what it is shown. Raises
        NotOwned, StoreDown if the shard does not open in time, and what `question` raises."""
        slot = self._slots.get(shard)
        if slot is None or slot.releasing:
            raise NotOwned(shard)
        if slot.phase is Phase.OPEN and self._cycle.lease_good():
            answer = question(slot.owned.machine)
            if self._cycle.lease_good():
                return answer
        if len(slot.reads) >= self._config.reads:
            raise Refused("LIMIT_EXCEEDED", f"{self._config.reads} reads wait for shard {shard}; try again later")
        waiting: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        slot.reads.append(Read(question, waiting))
        self._cycle.wake()
        try:
            async with time_limit(timeout):
                return await waiting
        except TimeoutError:
            raise StoreDown(f"shard {shard} did not open in {timeout} s") from None

    # -- taking and releasing ------------------------------------------------------------------------------------------

    async def take(self, shard: str) -> bool:
        """Become the owner of `shard` (O1) and recover it. False if somebody else owns it, the store does not answer,
        or it cannot be served (then `stopped` says why)."""
        if shard in self._slots or shard in self.stopped:
            return False
        slot = self._slots[shard] = Slot(shard)
        taken = False
        try:
            taken = await self._take(slot)
        except StoreError as error:
            log.warning("could not take a shard", extra={"shard": shard, "error": str(error)})
        finally:
            # It may have been dropped meanwhile, because the lease was lost.
            taken = taken and self._slots.get(shard) is slot
            if not taken:
                self._cycle.forget(slot, None)
        if taken:
            slot.owned.taken_boot = self._clock.boot()
            self._cycle.opened(slot)
        return taken

    async def _take(self, slot: Slot) -> bool:
        """Claim and recover. Raises Unavailable."""
        shard, value = slot.shard, owner_value(self._replica, self._entropy.token(NONCE_BYTES))
        epoch = await claim(self._store, self._clock, shard, value, self._lease, timeout=CLAIM_TIMEOUT)
        if epoch is None:
            return False
        slot.handle = OwnedShard(shard, self._make_machine(shard), epoch, 0, 0, "", owner_value=value)
        return await self._fill(slot)

    async def release(self, shard: str) -> None:
        """Flush and give back one shard (O4). Commands not yet decided get NotOwned."""
        slot = self._slots.get(shard)
        if slot is None or slot.handle is None:
            return
        value = slot.handle.owner_value
        await self._flush(slot)
        try:
            await give_back(self._store, self._clock, shard, value, timeout=CLAIM_TIMEOUT)
        except Unavailable as error:
            log.warning("could not give a shard back yet", extra={"shard": shard, "error": str(error)})

    async def flush_all(self) -> None:
        """Stop serving every shard as soon as what was decided is committed; owner keys stay (a lease's end takes
        them)."""
        await asyncio.gather(*(self._flush(slot) for slot in list(self._slots.values()) if slot.handle is not None))

    def drop(self, shard: str) -> None:
        """The shard is known to be lost. A decision in flight is left to the journal, which will find out (J6)."""
        slot = self._slots.get(shard)
        if slot is not None and slot.decision is None and slot.handle is not None:
            self._cycle.forget(slot, Verdict.LOST)

    async def _flush(self, slot: Slot) -> None:
        slot.releasing = True
        try:
            async with time_limit(FLUSH_TIMEOUT):
                await slot.idle.wait()
        except TimeoutError:
            log.warning("a shard is let go with a decision in flight", extra={"shard": slot.shard})
        self._cycle.forget(slot, Verdict.LOST)

    async def _fill(self, slot: Slot) -> bool:
        """Recover the state of a slot and check it against our own memory (J12). False if the shard must stop or is
        lost. Raises Unavailable."""
        owned = slot.owned
        try:
            found = await recover(
                self._store, self._clock, slot.shard, self._make_machine, timeout=self._config.recovery_seconds
            )
        except (TooNew, Corrupt) as error:
            log.exception("a shard stops", extra={"shard": slot.shard})
            self.stopped[slot.shard] = str(error)
            await give_back(self._store, self._clock, slot.shard, owned.owner_value, timeout=CLAIM_TIMEOUT)
            return False
        if found.owner != owned.owner_value:
            return False
        _fit(owned, found)
        await self.restore.check_own([slot.shard])
        if found.head.seq:
            self.restore.marks.observe(Mark(slot.shard, found.incarnation, found.head.seq, found.head.nonce))
        return True

    async def _rebuild(self, slot: Slot) -> bool:
        """The machine's state is not the log's any more: read it anew. False if the shard is to be dropped."""
        try:
            return await self._fill(slot)
        except StoreError:
            return False


def _fit(owned: OwnedShard, found: Recovered) -> None:
    """Make the handle show what was recovered. Loops keep the handle, not the machine."""
    owned.machine = found.machine
    owned.machine.outbox = Outbox()  # after a takeover effects come from state (J7)
    owned.seq, owned.nonce = found.head.seq, found.head.nonce
    owned.incarnation = found.incarnation
    owned.log_bytes = max(owned.log_bytes, found.log_bytes)  # a rebuild finds what was counted already
