"""What this replica has heard of the federation's small keys: a cache by list and watch, never a proof.

Theory. Routing, dispatching and scheduling want to know who owns what *right now*, thousands of times a second; asking the
store would cost more than the work. So every replica keeps the small keys in memory and follows their watch. A view may be
late, and being wrong costs latency only: whatever must be true is compared in a fenced transaction (PROTOCOL J4, S2, S4).
Fleet's table is read as a level: whichever one is newest is compared in whole, so a missed edge means nothing (S5).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton.clock import Clock
from baton.time_limits import time_limit
from baton.v1 import agent_pb2
from control_plane.core.model import FleetTable
from control_plane.fleet_keys import SessionInfo, decode_session, decode_table
from control_plane.store import keys
from control_plane.store.base import Compacted, EventKind, KeyValue, RangeResult, Store, StoreError

log = logging.getLogger(__name__)

LIST_TIMEOUT = 5.0
"""Seconds for one listing. Too small: a slow store is never listed; too large: a dead connection is noticed late."""

RETRY_PAUSE = 0.2
"""Seconds after a failed listing. The view is stale meanwhile, so short; a down store is asked 5 times a second per prefix."""

REFRESH = 30.0
"""Seconds after which a prefix is listed again though its watch goes on. A restored store (PROTOCOL J12) that has passed the
watch's place has other keys and says nothing of it; this bounds how long they are believed. Costs a read in five seconds."""

LIST_PAGE = 500
"""Keys per page of a listing: a session's beat is about 1 KiB, so a page stays under etcd's default message size."""


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """Value of `members/{replica}`. `start_wall` in seconds since the epoch."""

    replica: str
    address: str
    version: str = ""
    feature_level: int = 0
    start_wall: float = 0.0


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    """Who owns a shard; `revision` is the create_revision of the taking, the epoch that agents compare (PROTOCOL J12)."""

    replica: str
    nonce: str
    revision: int


@dataclass(frozen=True, slots=True)
class Beat:
    """The last committed heartbeat of a cluster; `seen_boot` is this replica's boot clock when it heard of it."""

    heartbeat: agent_pb2.Heartbeat
    mod_revision: int
    seen_boot: float


Subscriber = Callable[[str], None]


class View:
    """The small keys, as last heard. Dicts are live: read them, never keep or change them."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.members: dict[str, MemberInfo] = {}
        self.owners: dict[str, OwnerInfo] = {}
        self.sessions: dict[str, SessionInfo] = {}
        self.beats: dict[str, Beat] = {}
        self.table = FleetTable()
        self.incarnation = 0
        self.restore_suspected = ""
        self._subscribers: list[Subscriber] = []
        prefixes = (
            keys.MEMBERS_PREFIX,
            keys.OWNERS_PREFIX,
            keys.SESSIONS_PREFIX,
            keys.FLEET_TABLE,
            keys.INCARNATION,
            keys.RESTORED_SUSPECTED,
        )
        self._feeds = [_Feed(prefix) for prefix in prefixes]

    def subscribe(self, callback: Subscriber) -> None:
        """`callback(topic)` after each change heard; topic is members, owners, sessions, beats, table or restore. It runs on the
        loop, must be quick and must not raise."""
        self._subscribers.append(callback)

    async def ready(self) -> None:
        """Wait until everything has been listed once. Waits as long as the store is down: bound it by the caller's deadline."""
        for feed in self._feeds:
            await feed.listed.wait()

    async def run(self) -> None:
        """Follow the store until cancelled."""
        async with asyncio.TaskGroup() as group:
            for feed in self._feeds:
                group.create_task(self._follow(feed))

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self, feed: _Feed) -> None:
        """List, watch from there; list again when the watch cannot go on."""
        while True:
            try:
                await self._list(feed)
                async with time_limit(REFRESH):
                    await self._watch(feed)
            except TimeoutError:
                continue
            except Compacted as error:
                log.info("the view lists again", extra={"prefix": feed.prefix, "cause": str(error)})
            except StoreError as error:
                log.debug("the view cannot be refreshed", extra={"prefix": feed.prefix, "error": str(error)})
            # A watch that ended without a word (store closed) is as bad as a failed listing.
            await self._clock.sleep(RETRY_PAUSE)

    async def _list(self, feed: _Feed) -> None:
        page: RangeResult = await self._store.range(feed.prefix, timeout=LIST_TIMEOUT, limit=LIST_PAGE)
        revision, kvs = page.revision, list(page.kvs)
        while page.more:
            start = kvs[-1].key + "\x00"
            page = await self._store.range(
                feed.prefix, timeout=LIST_TIMEOUT, start=start, limit=LIST_PAGE, revision=revision
            )
            kvs += page.kvs
        present = {kv.key for kv in kvs}
        topics = {self._remove(key) for key in feed.known - present} | {self._put(kv) for kv in kvs}
        feed.known = present
        feed.revision = revision
        feed.listed.set()
        self._tell(topics)

    async def _watch(self, feed: _Feed) -> None:
        watch = self._store.watch(feed.prefix, from_revision=feed.revision + 1)
        try:
            async for batch in watch:
                if batch.revision <= feed.revision:
                    continue  # told twice
                topics: set[str] = set()
                for event in batch.events:
                    if event.kind is EventKind.PUT:
                        feed.known.add(event.kv.key)
                        topics.add(self._put(event.kv))
                    else:
                        feed.known.discard(event.kv.key)
                        topics.add(self._remove(event.kv.key))
                feed.revision = batch.revision
                self._tell(topics)
        finally:
            close = getattr(watch, "aclose", None)
            if close is not None:
                await close()

    def _tell(self, topics: set[str]) -> None:
        for topic in sorted(topics - {""}):
            for subscriber in self._subscribers:
                subscriber(topic)

    # -- one key ------------------------------------------------------------------------------------------------------

    def _put(self, kv: KeyValue) -> str:
        """Take a key's value; its topic. What cannot be read is logged, and the last readable value stays."""
        try:
            return self._decode(kv)
        except (ValueError, TypeError, KeyError, DecodeError) as error:
            log.error("a stored value cannot be read", extra={"key": kv.key, "error": str(error)})
            return ""

    def _decode(self, kv: KeyValue) -> str:
        if kv.key == keys.FLEET_TABLE:
            self.table = decode_table(kv.value)
            return "table"
        if kv.key == keys.INCARNATION:
            self.incarnation = int(kv.value)
            return "restore"
        if kv.key == keys.RESTORED_SUSPECTED:
            self.restore_suspected = kv.value.decode()
            return "restore"
        if session := keys.parse_session(kv.key):
            uid, leaf = session
            if leaf == "owner":
                self.sessions[uid] = decode_session(kv.value)
                return "sessions"
            beat = agent_pb2.Heartbeat.FromString(kv.value)
            self.beats[uid] = Beat(beat, kv.mod_revision, self._clock.boot())
            return "beats"
        if replica := keys.parse_member(kv.key):
            self.members[replica] = _member(replica, json.loads(kv.value))
            return "members"
        if shard := keys.parse_owner(kv.key):
            fields = json.loads(kv.value)
            self.owners[shard] = OwnerInfo(str(fields["replica"]), str(fields["nonce"]), kv.create_revision)
            return "owners"
        return ""

    def _remove(self, key: str) -> str:
        """Forget a key; its topic."""
        if key == keys.RESTORED_SUSPECTED:
            self.restore_suspected = ""
            return "restore"
        if session := keys.parse_session(key):
            uid, leaf = session
            if leaf == "owner":
                self.sessions.pop(uid, None)
                return "sessions"
            self.beats.pop(uid, None)
            return "beats"
        if replica := keys.parse_member(key):
            self.members.pop(replica, None)
            return "members"
        if shard := keys.parse_owner(key):
            self.owners.pop(shard, None)
            return "owners"
        return ""  # the table and the incarnation never go


class _Feed:
    """One followed prefix: the keys seen there, up to which revision."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.known: set[str] = set()
        self.revision = 0
        self.listed = asyncio.Event()


def _member(replica: str, fields: dict[str, object]) -> MemberInfo:
    return MemberInfo(
        replica=replica,
        address=str(fields["address"]),
        version=str(fields.get("version", "")),
        feature_level=int(str(fields.get("feature_level", 0))),
        start_wall=float(str(fields.get("start_wall", 0.0))),
    )
