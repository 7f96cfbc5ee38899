"""The leader's side of placement, awake where fleet is owned (PROTOCOL C1-C4).

Theory. The leader is an optimiser without a memory that matters: everything it knows comes again within half a second. It
collects what shards want, for some milliseconds, looks at the last capacity reports, and asks `core.scheduler.place`. Its term
is fleet's epoch. A new leader grants nothing for one maximum time to live, so permissions of two leaders never add up (C3).

Quotas and weights of namespaces come with the demands of the shards that keep them (O6). A quota counts live tasks over all
shards (O7), so what a shard held when it was last heard counts until it speaks again, however long that takes; and a namespace
with a quota gets nothing while a shard has not spoken to this leader at all. Likewise a namespace whose keeper has not spoken,
but for a bounded time: most have no quota.

What a permission may still use is subtracted until the shard speaks again or the permission expires; what is in use but not in
a capacity report comes with the shards' demands.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.clock import Clock
from baton.internal import peer_pb2 as pb
from control_plane.bell import Bell
from control_plane.core.model import FLEET, RUN_SHARDS, Group, Resources, shard_of
from control_plane.core.offers import Granted, Holding, Offer, Plan, Snapshot, Want
from control_plane.core.scheduler import place
from control_plane.demand_wire import Answer, decode_group, encode_grants, shapes_of
from control_plane.view import View

if TYPE_CHECKING:
    from control_plane.controller import OwnedShard
    from control_plane.core.commands import Outbox
    from control_plane.placement_owner import Send

log = logging.getLogger(__name__)

GATHER = 0.002
"""Seconds in which demands are gathered for one plan. Larger: a slower hop; smaller: a plan per shard instead of per moment."""

SHARE, MOST_GATHER = 10, 0.05
"""After a plan demands are gathered for so many times its own length, at most so many seconds: a federation that is busy on many
shards is planned for as a whole, and planning leaves the loop to others. Larger: slower growth; smaller: plans fill the loop."""

GRANT_TTL = 2.0
"""Seconds a permission lives, and a new leader's silence. Too small: slow commits lose their permissions; too large: a killed
leader costs a longer pause, and unused room idles longer."""

DEMAND_TTL = 3.0
"""Seconds after which a silent shard's demand is forgotten: six of its repetitions, so only a lost owner falls silent so long."""

REPLAN = 0.5
"""Seconds until the next plan while somebody waits and nothing new was heard: expired permissions give room back."""

IDLE = 10.0
"""Seconds between looks while nobody waits or somebody else leads; whatever changes that rings, so this only bounds a missed ring."""

HEARING = 10.0
"""Seconds from its opening in which a leader holds back a namespace of which it does not know whether it has a quota. Longer than
the takeover of a shard, so only a shard that cannot be taken at all is not waited for; larger: its namespaces stand longer."""

MAX_GROUPS = 10_000
"""Decoded groups kept. More groups than this in use at once are only decoded again."""


@dataclass(slots=True)
class _Asked:
    """A shard's last Demand. Times on the own boot clock."""

    seq: int
    heard: float
    wants: tuple[Want, ...]
    uses: tuple[tuple[Holding, int], ...]
    """What it holds, and the change of that since the cluster's report."""
    told: Answer | None = None
    runs: Mapping[str, float] = field(default_factory=dict)
    """Learned run times of what it holds, by key of group, seconds."""
    grants: tuple[Granted, ...] = ()
    expires: float = 0.0
    """When the permissions given for this Demand expire; 0: none were given, and only then may some still be."""


@dataclass(frozen=True, slots=True)
class _Word:
    """What a shard last said that outlives its demand: what it holds (O7), and the terms of the namespaces it keeps."""

    epoch: int
    seq: int
    heard: float
    holdings: tuple[Holding, ...]
    terms: tuple[tuple[str, float, int], ...]
    """(namespace, weight, quota or 0)"""


class GrantSide:
    """Plans for the whole federation while this replica owns fleet. A controller `Listener`."""

    def __init__(self, clock: Clock, view: View, send: Send) -> None:
        self._clock = clock
        self._view = view
        self._send = send
        self._bell = Bell(clock)
        self._term = 0
        self._opens = 0.0
        self._asked: dict[str, _Asked] = {}
        self._words: dict[str, _Word] = {}
        self._groups: dict[str, Group] = {}
        view.subscribe(self._heard)

    # -- Listener -----------------------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """A new leader knows nothing, and keeps silent for one maximum ttl (C3)."""
        if shard.id == FLEET:
            self._term = shard.epoch_revision
            self._opens = self._clock.boot() + GRANT_TTL
            self._asked.clear()
            self._words.clear()
            self._bell.ring()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """Changes of the table come by the view, as to everybody."""

    def dropped(self, shard: str) -> None:
        """Somebody else leads."""
        if shard == FLEET:
            self._term = 0
            self._asked.clear()
            self._words.clear()

    def _heard(self, topic: str) -> None:
        if topic in ("beats", "table") and self._waits():
            self._bell.ring()

    def _waits(self) -> bool:
        return any(asked.wants and not asked.expires for asked in self._asked.values())

    # -- demand -------------------------------------------------------------------------------------------------------

    def on_demand(self, message: pb.Demand) -> None:
        """A shard says what it wants and holds; what it was permitted before is spent or void."""
        if not self._term:
            return
        known, now = self._words.get(message.shard), self._clock.boot()
        fresh = known is not None and now - known.heard <= DEMAND_TTL
        if known is not None and fresh and (message.epoch, message.seq) <= (known.epoch, known.seq):
            return
        wall = self._clock.wall()
        try:
            wants = tuple(
                Want(
                    shard=message.shard,
                    key=line.key,
                    group=self._group(line.group),
                    count=line.count,
                    start_by=wall + line.slack_ms / 1000,
                    since=line.since_ms / 1000,
                    run_seconds=line.run_seconds,
                )
                for line in message.groups
            )
            uses = tuple(
                (Holding(message.shard, use.key, self._group(use.group), use.cluster_uid, use.held), use.count)
                for use in message.pending
            )
        except ValueError as error:
            log.error("a demand cannot be read", extra={"shard": message.shard, "error": str(error)})
            return
        terms = tuple((each.name, each.weight, each.live_task_quota) for each in message.namespaces)
        held = tuple(holding for holding, _ in uses)
        self._words[message.shard] = _Word(message.epoch, message.seq, now, held, terms)
        if wants or uses:
            runs = {use.key: use.run_seconds for use in message.pending}
            self._asked[message.shard] = _Asked(message.seq, now, wants, uses, runs=runs)
        else:
            self._asked.pop(message.shard, None)
        if self._waits():
            self._bell.ring()

    def _group(self, text: str) -> Group:
        """Equal text is one object; parsing is dear and groups are few."""
        group = self._groups.get(text)
        if group is None:
            if len(self._groups) >= MAX_GROUPS:
                self._groups.clear()
            group = self._groups[text] = decode_group(text)
        return group

    # -- planning -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Plan while fleet is ours, until cancelled."""
        gather = GATHER
        while True:
            await self._bell.wait(REPLAN if self._term and self._waits() else IDLE)
            if not self._term or not self._waits():
                continue
            await self._clock.sleep(max(gather, self._opens - self._clock.boot()))
            if self._term and self._clock.boot() >= self._opens:
                began = self._clock.boot()
                self._plan(began)
                gather = min(max(GATHER, SHARE * (self._clock.boot() - began)), MOST_GATHER)

    def _plan(self, now: float) -> None:
        """One plan, and an answer to every shard to which it says something new."""
        self._asked = {shard: asked for shard, asked in self._asked.items() if now - asked.heard <= DEMAND_TTL}
        for asked in self._asked.values():
            if asked.expires <= now:
                asked.grants = ()
        waiting = {shard: asked for shard, asked in self._asked.items() if not asked.expires}
        plan = place(self._snapshot(waiting, now), self._clock.wall())
        for shard, answer in _answers(plan, waiting).items():
            asked = waiting[shard]
            if answer == asked.told:
                continue
            asked.told = answer
            if answer.grants:
                asked.grants, asked.expires = answer.grants, now + GRANT_TTL
            self._send(shard, encode_grants(shard, self._term, asked.seq, GRANT_TTL, answer))

    def _snapshot(self, waiting: Mapping[str, _Asked], now: float) -> Snapshot:
        changes: dict[str, dict[Resources, int]] = defaultdict(lambda: defaultdict(int))
        runs: dict[str, list[float]] = defaultdict(list)
        silent = (word for shard, word in self._words.items() if shard not in self._asked)
        holdings: list[Holding] = [holding for word in silent for holding in word.holdings]
        for shard, asked in self._asked.items():
            for key, seconds in asked.runs.items():
                if seconds > 0.0:
                    runs[key].append(seconds)
            for holding, change in asked.uses:
                changes[holding.cluster][holding.group.resources] += change
                holdings.append(holding)
            groups = {want.key: want.group for want in asked.wants}
            for grant in asked.grants:
                group = groups[grant.key]
                changes[grant.cluster][group.resources] += grant.count
                holdings.append(Holding(shard, grant.key, group, grant.cluster, grant.count))
        offers = []
        for uid, facts in self._view.table.clusters.items():
            beat = self._view.beats.get(uid)
            fresh = beat is not None and beat.heartbeat.generation == facts.generation
            shapes = shapes_of(beat.heartbeat) if beat is not None and fresh else None
            limit = beat.heartbeat.queue_limit if beat is not None and fresh else 0
            session = self._view.sessions.get(uid)
            level = session.level if session is not None and session.generation == facts.generation else 0
            offers.append(Offer(facts, shapes, tuple((need, n) for need, n in changes[uid].items() if n), limit, level))
        wants = tuple(want for asked in waiting.values() for want in asked.wants)
        terms = [each for word in self._words.values() for each in word.terms]
        quotas = {name: quota for name, _, quota in terms if quota > 0}
        return Snapshot(
            offers=tuple(offers),
            wants=wants,
            holdings=tuple(holdings),
            weights={name: weight for name, weight, _ in terms},
            quotas=quotas,
            closed=self._closed({want.group.namespace for want in wants}, quotas, now),
            runs={key: sum(known) / len(known) for key, known in runs.items()},
        )

    def _closed(self, namespaces: Iterable[str], quotas: Mapping[str, int], now: float) -> dict[str, str]:
        """Namespaces that get nothing until more shards have spoken (O7), and why."""
        unheard = sum(shard not in self._words for shard in RUN_SHARDS)
        if not unheard:
            return {}
        closed = dict.fromkeys(quotas, f"waits until {unheard} more shards have said what they hold of its quota")
        if now < self._opens + HEARING:
            unknown = (ns for ns in namespaces if shard_of(ns, "") not in self._words)
            closed |= {ns: f"waits until the quota of namespace {ns} is known" for ns in unknown}
        return closed


def _answers(plan: Plan, shards: Iterable[str]) -> dict[str, Answer]:
    """A plan, by shard."""
    grants: dict[str, list[Granted]] = defaultdict(list)
    reasons: dict[str, list[tuple[str, str]]] = defaultdict(list)
    returning: dict[str, set[str]] = defaultdict(set)
    for grant in plan.grants:
        grants[grant.shard].append(grant)
    for (shard, key), reason in plan.reasons.items():
        reasons[shard].append((key, reason))
    for shard, key in plan.returning:
        returning[shard].add(key)
    return {s: Answer(tuple(grants[s]), tuple(reasons[s]), frozenset(returning[s])) for s in shards}
