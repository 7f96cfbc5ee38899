"""Which shards this replica owns, and for how long (PROTOCOL O1-O4).

Theory. The owner key decides who owns a shard; everything here is about latency. A replica lives under one lease: its
registration and all its owner keys vanish with it. When something changed, and now and then anyway, it reads members
and owner keys at one revision and moves one step towards what the ring says: gives one shard back that should be
elsewhere, takes those that should be here and are free. That something changed it is told (`nudge`) by whoever watches
these keys; a nudge that never comes costs a POLL.

The lease is good from the *send* time of the last acknowledged keepalive, less an election time-out and the clocks'
rate error (O2). Once it was not good, even if nobody looked meanwhile, the replica has *lapsed*: it stops deciding
and reading but keeps its state, until a keepalive with a TTL and a linearizable read of its owner keys and heads say
that nothing happened (O3).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.clock import Clock, Entropy
from control_plane.bell import Bell
from control_plane.claims import give_back
from control_plane.controller import CLAIM_TIMEOUT, Controller
from control_plane.core.model import ALL_SHARDS
from control_plane.core.ring import owners
from control_plane.journal import Head
from control_plane.registration import feature_level, join_federation, register, withdraw
from control_plane.store import keys
from control_plane.store.base import KeyValue, Lease, Store, StoreError
from control_plane.store.keeper import LeaseKeeper
from control_plane.store_reads import RETRY_PAUSE, read_incarnation, read_keys
from control_plane.view import MemberInfo, OwnerInfo

log = logging.getLogger(__name__)

ELECTION = 1.0
"""etcd's election time-out, seconds: for so long may a leader that lost its quorum still answer keepalives (measured
1.4 s at most, 1.0 s of it after a renewal it could not have replicated). Too small: reads under a lease that is gone
(J8)."""

CLOCK_RATE = 0.083
"""Largest rate error of a clock: chrony's default slew of 83,333 ppm. Too small: the same as above."""

READ_TIMEOUT = 2.0
"""Seconds for one survey of the store."""


SURVEYED = (keys.INCARNATION, keys.FEATURE_LEVEL, *map(keys.owner, ALL_SHARDS))
"""Keys that a survey reads at one revision, beside the heads of the shards that are held."""


@dataclass(frozen=True, slots=True)
class OwnershipConfig:
    """Times in seconds."""

    lease_ttl: float = 5.0
    """A dead replica's shards are free after this. Less makes short stalls fatal; more makes takeovers slow."""
    tick: float = 0.25
    """Between two signs of life to the lease keeper, and two looks at the lease."""
    poll: float = 0.5
    """Between two surveys that nobody nudged. A survey costs one transaction and one range."""
    eager_poll: float = 0.1
    """The same while a shard is on its way: without nudges it bounds how long a handed-over shard has no owner (O4)."""
    gap: float = 0.1
    """Between two surveys, however often it is nudged, and while the lease is not good or the store does not answer. Less
    reads the store once for each of 33 takings; more delays each step of a hand-over."""
    minimum_hold: float = 2.0
    """A shard is not handed over sooner after its taking (O4). Less lets a flapping member drag shards to and fro, each
    move costing a recovery; more delays the balance after a start."""
    register_timeout: float = 30.0
    """How long an earlier process of our name may stay registered: a few lease times."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The store at one moment: live members, owner keys, heads of the shards that were held here when it was asked."""

    members: tuple[str, ...]
    owners: dict[str, KeyValue | None]
    heads: dict[str, Head]
    incarnation: int
    level: int
    registration: KeyValue | None
    """Our own; None if it is not there."""
    shared: bool
    """An earlier registration is under the same lease: after a restore its id came again, and it is that replica's (J12)."""


@dataclass(slots=True)
class Tenure:
    """One lease, and how long it was surely good."""

    lease: Lease
    keeper: LeaseKeeper
    since: float
    """The send time that everything is judged from."""
    lapsed: bool = field(default=False)
    gone: bool = field(default=False)
    """The store does not hold our registration under it, whatever keepalives say: after a restore its id may be another's."""

    def good(self, now: float) -> bool:
        """Good now, and was never not good since the last resume. Judged at each look from what the keeper knows
        (O2)."""
        span = self.lease.ttl * (1 - CLOCK_RATE) - ELECTION
        acked = self.keeper.last_ack_sent
        if acked > self.since:
            # A renewal that was sent when the one before it had run out proves nothing about the time between.
            self.lapsed |= acked >= self.since + span
            self.since = acked
        self.lapsed |= self.keeper.lost or now >= self.since + span
        return not self.lapsed

    def fresh(self, now: float) -> bool:
        """A keepalive was answered lately, so resuming may be tried (O3)."""
        span = self.lease.ttl * (1 - CLOCK_RATE) - ELECTION
        return not self.keeper.lost and now < max(self.since, self.keeper.last_ack_sent) + span


class Ownership:
    """See the module. `make_keeper()` makes a keeper for one lease; `member` is what others shall know of this
    replica."""

    def __init__(
        self,
        *,
        store: Store,
        make_keeper: Callable[[], LeaseKeeper],
        clock: Clock,
        entropy: Entropy,
        controller: Controller,
        member: MemberInfo,
        config: OwnershipConfig | None = None,
    ) -> None:
        self._store, self._make_keeper, self._clock, self._entropy = store, make_keeper, clock, entropy
        self._controller, self._member, self._config = controller, member, config or OwnershipConfig()
        self._tenure: Tenure | None = None
        self._bell = Bell(clock)
        self._wanted: tuple[tuple[str, ...], dict[str, str]] = ((), {})
        """What the ring last said, and of which members."""
        self._leaving = False
        self.federation_uid = ""
        """Known once `joined` is set."""
        self.joined = asyncio.Event()
        """The federation is known and this replica is registered for the first time."""

    def lease_good(self) -> bool:
        """O2. False before the first registration."""
        return self._tenure is not None and self._tenure.good(self._clock.boot())

    def lease_margin(self) -> float:
        """Seconds for which the lease is still surely good if no keepalive is answered any more (O2); 0 without one."""
        tenure, now = self._tenure, self._clock.boot()
        if tenure is None or not tenure.good(now):
            return 0.0
        return tenure.since + tenure.lease.ttl * (1 - CLOCK_RATE) - ELECTION - now

    def nudge(self) -> None:
        """Something has changed, as far as somebody has heard: look soon."""
        self._bell.ring()

    def heard(self, owners: Mapping[str, OwnerInfo]) -> None:
        """Owner keys have changed, and this is all of them: look soon if one that should be ours is free, or one that we hold is
        not ours any more. (The first may still be on its way to us, the second on its way to whoever tells us.)"""
        me, held, wanted = self._member.replica, self._controller.owned(), self._wanted[1]
        lost = any((owner := owners.get(shard)) is None or owner.replica != me for shard in held)
        if lost or (
            len(owners) < len(ALL_SHARDS) and any(wanted[shard] == me for shard in wanted.keys() - owners.keys())
        ):
            self.nudge()

    async def run(self) -> None:
        """Join, register, and hold what the ring says, until cancelled. Raises IncompatibleFederation, Corrupt."""
        while not self._leaving:
            try:
                federation = await join_federation(self._store, self._clock, self._entropy)
                self.federation_uid = self._controller.restore.federation_uid = federation.uid
                await self._serve_one_lease()
            except StoreError as error:
                log.warning("the store does not answer", extra={"error": str(error)})
                await self._clock.sleep(RETRY_PAUSE)

    async def leave(self) -> None:
        """Graceful end: flush all shards, then let go of everything at once by ending the lease (O4)."""
        self._leaving = True
        await self._controller.flush_all()
        tenure, self._tenure = self._tenure, None
        for shard in list(self._controller.owned()):
            self._controller.drop(shard)
        if tenure is None:
            return
        await tenure.keeper.stop()
        try:
            await self._store.lease_revoke(tenure.lease.id, timeout=CLAIM_TIMEOUT)
        except StoreError as error:
            log.warning("the lease is left to expire", extra={"error": str(error)})

    # -- one lease -----------------------------------------------------------------------------------------------------

    async def _serve_one_lease(self) -> None:
        """From a new lease to its loss."""
        sent = self._clock.boot()
        lease = await self._store.lease_grant(self._config.lease_ttl, timeout=READ_TIMEOUT)
        tenure = Tenure(lease, self._make_keeper(), sent)
        tenure.keeper.start(lease)
        ticking = asyncio.get_running_loop().create_task(self._tick(tenure))
        try:
            level = await register(self._store, self._clock, self._member, lease, timeout=self._config.register_timeout)
            if level is None:
                log.error("another process is registered under this name", extra={"replica": self._member.replica})
                return
            self._controller.set_feature_level(level)
            self._tenure = tenure
            self._controller.attach(lease.id, self.lease_good)
            self.joined.set()
            while not (tenure.keeper.lost or tenure.gone or self._leaving):
                await self._rest(await self._step(tenure))
        finally:
            ticking.cancel()
            if not self._leaving:
                self._tenure = None
                for shard in list(self._controller.owned()):
                    self._controller.drop(shard)
                await tenure.keeper.stop()

    async def _rest(self, seconds: float) -> None:
        """Until the next survey: at most `seconds`, less if nudged."""
        await self._clock.sleep(min(seconds, self._config.gap))
        await self._bell.wait(seconds - self._config.gap)

    async def _tick(self, tenure: Tenure) -> None:
        """The main loop works (O2). A lease that is not good is not left until the next poll (O3)."""
        while True:
            tenure.keeper.tick()
            if not tenure.good(self._clock.boot()):
                self.nudge()
            await self._clock.sleep(self._config.tick)

    async def _step(self, tenure: Tenure) -> float:
        """One survey and what follows from it. Seconds until the next."""
        try:
            survey = await self._survey()
            if survey.registration is None or survey.registration.lease != tenure.lease.id or survey.shared:
                log.warning(
                    "the registration is gone, or its lease is another's: registering anew",
                    extra={"replica": self._member.replica},
                )
                if survey.registration is not None and survey.shared:
                    await withdraw(self._store, self._clock, survey.registration)  # the other one keeps it alive
                tenure.gone = True
                return self._config.gap
            if not tenure.good(self._clock.boot()):
                return await self._resume(tenure, survey)
            return await self._balance(tenure, survey)
        except StoreError as error:
            log.warning("could not survey the store", extra={"error": str(error)})
            return self._config.gap

    async def _survey(self) -> Survey:
        """Members, then owners and heads. Raises Unavailable, Corrupt."""
        members = await self._store.range(keys.MEMBERS_PREFIX, timeout=READ_TIMEOUT)
        held = tuple(self._controller.owned())
        found, _ = await read_keys(self._store, (*SURVEYED, *map(keys.head, held)), timeout=READ_TIMEOUT)
        owner_kvs, head_kvs = found[2 : len(SURVEYED)], found[len(SURVEYED) :]
        registered = {name: kv for kv in members.kvs if (name := keys.parse_member(kv.key)) is not None}
        ours = registered.get(self._member.replica)
        return Survey(
            members=tuple(registered),
            owners=dict(zip(ALL_SHARDS, owner_kvs, strict=True)),
            heads={shard: Head.parse(kv) for shard, kv in zip(held, head_kvs, strict=True)},
            incarnation=read_incarnation(found[0]),
            level=feature_level(found[1]),
            registration=ours,
            shared=ours is not None
            and any(kv.lease == ours.lease and kv.mod_revision < ours.mod_revision for kv in registered.values()),
        )

    async def _resume(self, tenure: Tenure, survey: Survey) -> float:
        """O3: `survey` was read after the lapse. Shards that are still ours go on from the very state they had. Raises
        Unavailable."""
        await self._controller.restore.check_own(self._controller.owned())
        if not tenure.fresh(self._clock.boot()):
            return self._config.gap
        self._drop_lost(survey)
        tenure.since, tenure.lapsed = tenure.keeper.last_ack_sent, False
        self._controller.wake()
        return self._config.gap

    def _drop_lost(self, survey: Survey) -> None:
        """Let go of shards whose owner key, head or incarnation is not what we left. (One with a decision in flight
        is left to the journal, which sees the same: J6.)"""
        for shard, owned in list(self._controller.owned().items()):
            kv = survey.owners[shard]
            ours = kv is not None and kv.value == owned.owner_value and survey.incarnation == owned.incarnation
            # Our own commits may have come after the survey, so only a head above ours, or another at it, speaks; and none at
            # all of a shard that was not held when it was asked.
            head = survey.heads.get(shard, Head())
            if not ours or (head.seq > owned.seq) or (head.seq == owned.seq and head.nonce != owned.nonce):
                self._controller.drop(shard)

    # -- balance -------------------------------------------------------------------------------------------------------

    async def _balance(self, tenure: Tenure, survey: Survey) -> float:
        """One step towards what the ring says. Raises Unavailable."""
        self._controller.set_feature_level(survey.level)
        self._drop_lost(survey)
        await self._give_back_orphans(tenure, survey)
        wanted = self._ring(survey.members)
        mine = [shard for shard, owner in wanted.items() if owner == self._member.replica]
        rest = await self._hand_over_one(wanted)
        for shard in mine:
            if survey.owners[shard] is None and tenure.good(self._clock.boot()) and not self._leaving:
                await self._controller.take(shard)
        settled = all(shard in self._controller.owned() or shard in self._controller.stopped for shard in mine)
        return min(rest, self._config.poll if settled else self._config.eager_poll)

    def _ring(self, members: tuple[str, ...]) -> dict[str, str]:
        """Who should own what; reckoned once for the same members."""
        if members != self._wanted[0]:
            self._wanted = (members, owners(ALL_SHARDS, dict.fromkeys(members, 1.0)))
        return self._wanted[1]

    async def _hand_over_one(self, wanted: dict[str, str]) -> float:
        """O4: flush and release, one at a time, after a minimum hold; the one we had longest first. Seconds until the next
        one may go; infinity if none has to."""
        leaving = [
            owned
            for shard, owned in self._controller.owned().items()
            if wanted.get(shard, self._member.replica) != self._member.replica
        ]
        if not leaving:
            return math.inf
        first = min(leaving, key=lambda owned: owned.taken_boot)
        wait = first.taken_boot + self._config.minimum_hold - self._clock.boot()
        if wait > 0:
            return wait
        await self._controller.release(first.id)
        return self._config.gap

    async def _give_back_orphans(self, tenure: Tenure, survey: Survey) -> None:
        """Owner keys under our own lease that we know nothing of: takings or releases whose answer never came. One
        under another lease is an earlier process's, or not ours at all: it is left to expire (its nonce is not
        ours)."""
        for shard, kv in survey.owners.items():
            if kv is not None and kv.lease == tenure.lease.id and not self._controller.holds(shard, kv.value):
                log.warning("giving back an owner key nobody uses", extra={"shard": shard})
                await give_back(self._store, self._clock, shard, kv.value, timeout=CLAIM_TIMEOUT)
