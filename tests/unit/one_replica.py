"""A controller without a journal, for tests of loops that only submit, post and listen: one batch per command, durable at once.

It keeps the documented promises that those loops rely on: commands are handled in order and never inside the caller's call,
`committed` follows every batch with events, a condition is compared in the store at the moment of the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from baton.clock import Clock
from control_plane.core.commands import Command, Outbox, Refused
from control_plane.core.machine import Batch, Machine
from control_plane.core.model import Stamp
from control_plane.refusals import ConditionFailed, NotOwned
from control_plane.slots import Listener, OwnedShard
from control_plane.store.base import Compare
from control_plane.store.memory import MemoryStore


class OneReplica:
    """Implements the parts of `controller.Controller` that fleet_watch, guard_wait and placement use."""

    def __init__(self, clock: Clock, store: MemoryStore) -> None:
        self._clock = clock
        self._store = store
        self._owned: dict[str, OwnedShard] = {}
        self._listeners: list[Listener] = []
        self._posting: set[asyncio.Task[Any]] = set()
        self.said: list[tuple[str, Command]] = []
        self.epoch = 0

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def owned(self) -> Mapping[str, OwnedShard]:
        return self._owned

    def take(self, shard: str, machine: Machine) -> None:
        self.epoch += 1
        owned = self._owned[shard] = OwnedShard(shard, machine, self.epoch, 1, 0, "")
        for listener in self._listeners:
            listener.taken(owned)

    def drop(self, shard: str) -> None:
        self._owned.pop(shard).lost = True
        for listener in self._listeners:
            listener.dropped(shard)

    async def submit(
        self, shard: str, command: Command, *, actor: str = "", timeout: float, condition: Compare | None = None
    ) -> Any:
        await asyncio.sleep(0.001)
        if condition is not None:
            found, _ = await self._store.get(condition.key, timeout=timeout)
            if (found.mod_revision if found else 0) != condition.revision:
                raise ConditionFailed(condition.key)
        owned = self._owned.get(shard)
        if owned is None:
            raise NotOwned(shard)
        self.said.append((shard, command))
        owned.seq += 1
        owned.nonce = f"{shard}.{owned.seq}"
        batch = Batch(Stamp(self._clock.wall(), owned.nonce, owned.seq, 1), owned.machine.apply)
        reply = owned.machine.handle(command, batch)
        owned.machine.settle(batch)
        if batch.events:
            outbox, owned.machine.outbox = owned.machine.outbox, Outbox()
            for listener in self._listeners:
                listener.committed(owned, outbox)
        return reply

    def post(self, shard: str, command: Command) -> None:
        task = asyncio.get_running_loop().create_task(self._posted(shard, command))
        self._posting.add(task)
        task.add_done_callback(self._posting.discard)

    async def _posted(self, shard: str, command: Command) -> None:
        try:
            await self.submit(shard, command, timeout=1.0)
        except (NotOwned, Refused):
            pass
