"""Small dealings with the store that several loops share: consistent reads, and transactions that can be asked again.

Theory. A transaction that only reads is one linearizable read of many keys at one revision. A transaction whose
compares cannot hold a second time after it was applied may simply be sent again until there is an answer; the caller
finds out from the answer's reads whether an earlier copy did it (the spirit of PROTOCOL J6).
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.clock import Clock
from control_plane.refusals import Corrupt
from control_plane.store.base import Get, KeyValue, Store, StoreError, Txn, TxnResult, Unavailable

RETRY_PAUSE = 0.1
"""Seconds between two tries: a tenth of an etcd election. Less would hammer a store in trouble; more delays
recovery."""


async def read_keys(store: Store, wanted: Sequence[str], *, timeout: float) -> tuple[Sequence[KeyValue | None], int]:
    """These keys at one revision, in order (None: absent), and the revision; linearizable. Raises Unavailable."""
    try:
        result = await store.txn(Txn((), tuple(Get(key) for key in wanted)), timeout=timeout)
    except StoreError as error:
        raise Unavailable(str(error)) from error
    return result.reads, result.revision


async def settle_txn(store: Store, clock: Clock, txn: Txn, *, timeout: float) -> TxnResult:
    """Send `txn`, byte-identical, until it is answered; only for one that cannot be applied twice. Raises Unavailable
    after `timeout` seconds: it may then be applied, or be applied later."""
    give_up = clock.boot() + timeout
    while True:
        left = give_up - clock.boot()
        if left <= 0:
            raise Unavailable(f"no answer to a transaction in {timeout} s")
        try:
            return await store.txn(txn, timeout=left)
        except StoreError:
            await clock.sleep(min(RETRY_PAUSE, left))


def read_incarnation(kv: KeyValue | None) -> int:
    """The number in the `incarnation` key. Raises Corrupt if it is missing or no number."""
    if kv is None or not kv.value.isdigit():
        raise Corrupt("the store has no incarnation: it was not made by Baton, or somebody deleted keys")
    return int(kv.value)
