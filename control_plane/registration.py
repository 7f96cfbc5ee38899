"""Joining a federation: its first start, a replica's registration, and the feature level (PROTOCOL O1, J11).

Theory. What a federation is, is written once, by whoever comes first, in one transaction: `federation` (uid, shard
count), `incarnation` 1, `feature_level`. A replica registers only if the level is at most its own, and its
registration writes the level's key again, so that raising the level, which compares that key's mod_revision after
reading the members, cannot miss a replica that registers meanwhile. Raising is one way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from baton.clock import Clock, Entropy
from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import RUN_SHARDS
from control_plane.refusals import Corrupt, IncompatibleFederation
from control_plane.store import keys
from control_plane.store.base import Compare, Delete, Get, KeyValue, Lease, Put, Store, Txn
from control_plane.store_reads import RETRY_PAUSE, read_keys, settle_txn
from control_plane.view import MemberInfo

TIMEOUT = 5.0
"""Seconds for one transaction: several etcd elections."""


@dataclass(frozen=True, slots=True)
class Federation:
    """What was fixed at its creation."""

    uid: str
    shards: int


async def join_federation(store: Store, clock: Clock, entropy: Entropy) -> Federation:
    """The federation in the store, made now if there is none. Raises IncompatibleFederation, Corrupt, Unavailable."""
    mine = Federation(entropy.token(16), len(RUN_SHARDS))
    create = Txn(
        (Compare.absent(keys.FEDERATION), Compare.absent(keys.INCARNATION), Compare.absent(keys.FEATURE_LEVEL)),
        (
            Put(keys.FEDERATION, json.dumps(asdict(mine)).encode()),
            Put(keys.INCARNATION, b"1"),
            Put(keys.FEATURE_LEVEL, str(FEATURE_LEVEL).encode()),
        ),
        (Get(keys.FEDERATION),),
    )
    result = await settle_txn(store, clock, create, timeout=TIMEOUT)
    federation = mine if result.succeeded else _parse(result.reads[0])
    if federation.shards != len(RUN_SHARDS):
        raise IncompatibleFederation(
            f"the store holds a federation of {federation.shards} shards; this program serves {len(RUN_SHARDS)}. "
            "The number is fixed at creation: use the program that made it, or an empty key prefix"
        )
    return federation


async def register(store: Store, clock: Clock, member: MemberInfo, lease: Lease, *, timeout: float) -> int | None:
    """Put `member` under `lease` (O1). The federation's feature level; None if another process of that name is
    registered for longer than `timeout` seconds. Raises IncompatibleFederation, Unavailable."""
    give_up = clock.boot() + timeout
    key = keys.member(member.replica)
    value = json.dumps(asdict(member), separators=(",", ":")).encode()
    while True:
        (level_kv, known), _ = await read_keys(store, [keys.FEATURE_LEVEL, key], timeout=TIMEOUT)
        level = feature_level(level_kv)
        if level > member.feature_level:
            raise IncompatibleFederation(
                f"the federation is at feature level {level}, this program reads up to {member.feature_level}: "
                "run a version at least as new as the others"
            )
        if known is not None and known.lease == lease.id:
            return level
        if known is None and level_kv is not None:
            enter = Txn(
                (Compare.absent(key), Compare.unchanged(keys.FEATURE_LEVEL, level_kv.mod_revision)),
                (Put(key, value, lease.id), Put(keys.FEATURE_LEVEL, level_kv.value)),
            )
            if (await settle_txn(store, clock, enter, timeout=TIMEOUT)).succeeded:
                return level
        if clock.boot() >= give_up:
            return None
        await clock.sleep(RETRY_PAUSE)


async def withdraw(store: Store, clock: Clock, registration: KeyValue) -> None:
    """Delete a registration if it is still as it was read. Raises Unavailable."""
    undo = Txn((Compare.unchanged(registration.key, registration.mod_revision),), (Delete(registration.key),))
    await settle_txn(store, clock, undo, timeout=TIMEOUT)


async def raise_feature_level(store: Store, clock: Clock, level: int) -> int:
    """Let replicas write events of `level` from now on (J11); the level then in force. Never lowers it. Raises
    IncompatibleFederation naming a member that is too old, Unavailable."""
    while True:
        (level_kv,), _ = await read_keys(store, [keys.FEATURE_LEVEL], timeout=TIMEOUT)
        now = feature_level(level_kv)
        if level_kv is None or now >= level:
            return now
        for kv in (await store.range(keys.MEMBERS_PREFIX, timeout=TIMEOUT)).kvs:
            member = json.loads(kv.value)
            if int(member["feature_level"]) < level:
                raise IncompatibleFederation(f"replica {member['replica']} reads only up to {member['feature_level']}")
        put = Txn(
            (Compare.unchanged(keys.FEATURE_LEVEL, level_kv.mod_revision),),
            (Put(keys.FEATURE_LEVEL, str(level).encode()),),
        )
        await settle_txn(store, clock, put, timeout=TIMEOUT)


def feature_level(kv: KeyValue | None) -> int:
    """The number in the `feature_level` key. Raises Corrupt."""
    if kv is None or not kv.value.isdigit():
        raise Corrupt("the store has no feature level: it was not made by Baton, or somebody deleted keys")
    return int(kv.value)


def _parse(kv: KeyValue | None) -> Federation:
    if kv is None:
        raise Corrupt("the store has an incarnation or a feature level, but no federation: somebody deleted keys")
    try:
        value = json.loads(kv.value)
        return Federation(str(value["uid"]), int(value["shards"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{kv.key} does not parse: {error}") from error
