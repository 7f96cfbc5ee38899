"""Taking and giving back the owner key of a shard (PROTOCOL O1, J4, J6).

Theory. A taking succeeds only while the key is absent, and puts a nonce that was never used before; so it can be sent
again until it is answered, and an owner key that holds our value is ours whichever copy put it. If no answer comes in
time the key may still appear later: `Ownership` finds it under its lease, unknown to the controller, and gives it
back.
"""

from __future__ import annotations

from baton.clock import Clock
from control_plane.store import keys
from control_plane.store.base import Compare, Delete, Get, Put, Store, Txn
from control_plane.store_reads import settle_txn


async def claim(store: Store, clock: Clock, shard: str, value: bytes, lease: int, *, timeout: float) -> int | None:
    """Put `value` as the owner of `shard` under `lease`. The epoch's revision; None if somebody else owns it. Raises
    Unavailable if there was no answer."""
    key = keys.owner(shard)
    take = Txn((Compare.absent(key),), (Put(key, value, lease),), (Get(key),))
    result = await settle_txn(store, clock, take, timeout=timeout)
    if result.succeeded:
        return result.revision
    found = result.reads[0]
    return found.create_revision if found is not None and found.value == value else None


async def give_back(store: Store, clock: Clock, shard: str, value: bytes, *, timeout: float) -> None:
    """Delete the owner key if it still holds `value`. Raises Unavailable if there was no answer."""
    key = keys.owner(shard)
    release = Txn((Compare.equals(key, value),), (Delete(key),))
    await settle_txn(store, clock, release, timeout=timeout)
