"""Watching clusters live and die, where the fleet shard is owned (PROTOCOL S3, S4, S7, F6).

Theory. A cluster is lost when nobody can have acknowledged a heartbeat of it for L. The only thing that proves this is the
session key itself: a heartbeat is acknowledged only by a put on it (S2). So we poll all beat keys linearizably and note, per
cluster, since when `mod_revision` has stood still *on our own boot clock* (no age is ever inferred from a stored time):

* L starts when the first poll that saw this `mod_revision` was **answered** (the put was before), and is over when a later
  poll that still sees it was **sent** L after that;
* a failed poll, a long gap between polls, or a takeover of fleet starts L anew for everybody: while the store had no quorum,
  no heartbeat could be acknowledged, and while we did not look, our own clock alone spoke for the time. (A short gap is our
  own loop's stall: an equal `mod_revision` at both of its ends proves that no renewal was committed in between.)
* the loss is committed only if `mod_revision` is still the same in that very transaction. An equal mod_revision stays false
  once it is false, so a delayed copy of the transaction is harmless (J5).

SUSPECT is the same observation with a shorter time, and only advice: no new work, nothing killed (S3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError

from baton.clock import Clock
from baton.leases import DEFAULT_PROFILE, PROFILES
from baton.v1 import agent_pb2
from control_plane.bell import Bell
from control_plane.core.commands import LoseCluster, ObserveHealth, Refused
from control_plane.core.fleet import Fleet, LiveSession
from control_plane.core.model import FLEET, Evidence, Health
from control_plane.refusals import ConditionFailed, NotOwned, OutcomeUnknown, StoreDown
from control_plane.store import keys
from control_plane.store.base import Compare, KeyValue, Store, StoreError

if TYPE_CHECKING:
    from control_plane.controller import Controller, OwnedShard
    from control_plane.core.commands import Outbox

log = logging.getLogger(__name__)

POLL_INTERVAL = 0.5
"""Seconds between polls. Larger makes every loss later by as much; smaller costs a read of all session keys each time."""

POLL_TIMEOUT = 0.9
"""Seconds for one poll; less than the gap that starts L anew, so that a slow poll is a failed one."""

MAX_GAP = 2.5
"""Seconds between two answered polls beyond which L starts anew (S4). An equal `mod_revision` at both ends proves that no renewal
was committed in between; the bound only limits how long we rely on our own clock unobserved. Smaller: every stall of a busy
machine's loop delays all losses by L; larger: a suspend that the clock tells wrongly counts as silence of the clusters."""

MISSED_BEATS = 3
"""S3: SUSPECT after so many heartbeats. Fewer: every hiccup stops placement; more: work goes to a cluster that is gone."""

SUBMIT_TIMEOUT = 10.0
"""Seconds for the commit of a loss; after that its outcome is unknown, and the next poll decides anew."""

IDLE = 5.0
"""Seconds between looks at whether fleet is ours; `taken` rings, so this only bounds a missed ring."""


@dataclass(frozen=True, slots=True)
class _Track:
    """Since when (own boot clock) the beat key of a generation stands still. `renewed`: we saw it move. `begun`: the key holds a
    heartbeat of this very generation; since only that generation can put one (S2), False means that it never had any."""

    generation: int
    mod_revision: int
    since: float
    renewed: bool
    guard_silent: bool
    begun: bool


class FleetWatch:
    """Polls all sessions and tells fleet. A controller `Listener`; one per replica, awake where fleet is owned."""

    def __init__(self, store: Store, clock: Clock, controller: Controller) -> None:
        self._store = store
        self._clock = clock
        self._controller = controller
        self._bell = Bell(clock)
        self._owned = False
        self._live: tuple[LiveSession, ...] = ()
        self._tracks: dict[str, _Track] = {}
        self._answered: float | None = None
        self._losing: dict[str, asyncio.Task[None]] = {}

    # -- Listener -----------------------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """A takeover of fleet starts L anew (S4)."""
        if shard.id == FLEET:
            self._owned = True
            self._anew()
            self._read(shard)
            self._bell.ring()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:  # noqa: ARG002 - the Listener port's
        """What is committed is what we judge by."""
        if shard.id == FLEET:
            self._read(shard)

    def dropped(self, shard: str) -> None:
        """Somebody else watches now."""
        if shard == FLEET:
            self._owned = False
            self._live = ()
            self._anew()

    def _read(self, shard: OwnedShard) -> None:
        self._live = cast(Fleet, shard.machine).live()

    # -- polling ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Poll while fleet is ours, until cancelled."""
        try:
            while True:
                if not self._owned:
                    await self._bell.wait(IDLE)
                    continue
                started = self._clock.boot()
                await self._poll(started)
                await self._clock.sleep(max(POLL_INTERVAL - (self._clock.boot() - started), 0.0))
        finally:
            for task in self._losing.values():
                task.cancel()

    async def _poll(self, sent: float) -> None:
        """One linearizable read of all beat keys, and what follows from it."""
        try:
            found = await self._store.range(keys.SESSIONS_PREFIX, timeout=POLL_TIMEOUT)
        except StoreError:
            self._anew()
            return
        now = self._clock.boot()
        if self._answered is not None and now - self._answered > MAX_GAP:
            self._anew()
        self._answered = now
        if not self._owned:
            return
        beats = {parsed[0]: kv for kv in found.kvs if (parsed := keys.parse_session(kv.key)) and parsed[1] == "beat"}
        for session in self._live:
            self._judge(session, beats, sent, now)
        living = {session.cluster for session in self._live}
        self._tracks = {uid: track for uid, track in self._tracks.items() if uid in living}

    def _anew(self) -> None:
        """Forget all that was observed: every L starts again with the next poll."""
        self._tracks.clear()
        self._answered = None

    def _judge(self, session: LiveSession, beats: Mapping[str, KeyValue], sent: float, now: float) -> None:
        """Compare one session's key with what it was, and say what that means."""
        kv = beats.get(session.cluster)
        track = self._tracks.get(session.cluster)
        mod_revision = kv.mod_revision if kv else 0
        if track is None or track.generation != session.generation or track.mod_revision != mod_revision:
            track = _follow(session, track, kv, now)
            self._tracks[session.cluster] = track
        still = sent - track.since
        if still >= session.lost_seconds:
            self._lose(session, track)
        elif still >= suspect_seconds(session) and session.health is Health.READY:
            self._controller.post(FLEET, ObserveHealth(session.cluster, session.generation, suspect=True))
        elif track.renewed and still < suspect_seconds(session) and session.health is Health.SUSPECT:
            self._controller.post(FLEET, ObserveHealth(session.cluster, session.generation, suspect=False))

    # -- losing -------------------------------------------------------------------------------------------------------

    def _lose(self, session: LiveSession, track: _Track) -> None:
        """Commit the loss beside the polls: waiting for it here would be a gap for all other clusters."""
        if session.cluster not in self._losing:
            task = asyncio.get_running_loop().create_task(self._submit(session, track))
            self._losing[session.cluster] = task
            task.add_done_callback(lambda _: self._losing.pop(session.cluster, None))

    async def _submit(self, session: LiveSession, track: _Track) -> None:
        evidence = Evidence.NONE if track.guard_silent else Evidence.TIMED
        reason = f"no heartbeat for {session.lost_seconds:.1f} s"
        if not track.begun:
            reason = f"no heartbeat at all in {session.lost_seconds:.1f} s"
        idle = frozenset(uid for uid, seen in self._tracks.items() if not seen.begun)
        command = LoseCluster(session.cluster, session.generation, evidence, reason, begun=track.begun, idle=idle)
        condition = Compare.unchanged(keys.session_beat(session.cluster), track.mod_revision)
        fields = {"cluster": session.name, "generation": session.generation}
        try:
            await self._controller.submit(FLEET, command, timeout=SUBMIT_TIMEOUT, condition=condition)
            log.warning("cluster lost", extra=fields)
        except ConditionFailed:
            log.info("a heartbeat came just before the loss", extra=fields)
        except (Refused, NotOwned, OutcomeUnknown, StoreDown) as error:
            # Ended already, or not ours to say, or unclear: the next poll sees what is true now.
            log.info("cluster loss not committed", extra={**fields, "error": str(error)})


def suspect_seconds(session: LiveSession) -> float:
    """How long a session's key may stand still before the cluster is SUSPECT (S3). Seconds."""
    lease = PROFILES.get(session.profile, PROFILES[DEFAULT_PROFILE])
    return min(MISSED_BEATS * lease.heartbeat, session.lost_seconds / 2)


def _follow(session: LiveSession, before: _Track | None, kv: KeyValue | None, now: float) -> _Track:
    """The key moved, or the generation is new: L starts at `now`. A silent guard is remembered for the generation (G2)."""
    same = before is not None and before.generation == session.generation
    silent = before is not None and same and before.guard_silent
    begun = False
    if kv is not None:
        try:
            beat = agent_pb2.Heartbeat.FromString(kv.value)
            begun = beat.generation == session.generation
            silent = silent or (begun and beat.guard_silent)
        except DecodeError:
            begun = silent = True  # what cannot be read proves nothing
    revision = kv.mod_revision if kv else 0
    return _Track(session.generation, revision, now, renewed=same, guard_silent=silent, begun=begun)
