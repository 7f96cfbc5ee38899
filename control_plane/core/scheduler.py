"""One pure function: what the federation wants and has -> who may use what, and why the rest waits (PROTOCOL C1-C4).

Theory. The leader never sees tasks, only counts of equal ones (groups), and never places, only permits. So a plan costs
O(groups x clusters) however many tasks there are, and a wrong plan costs a rejection, never correctness (C3).

Order: priority class first. In a class, namespaces by weighted dominant-resource fairness: whoever has the least share of
its scarcest resource, divided by its weight, goes next, by small steps. In a namespace, the group with the least slack
first, then the one that waits longest. What a namespace holds already counts, so a late-comer catches up: while a higher
class or an owed share waits, others give their slots back as these become free (`Plan.returning`), and nobody is stopped.

A namespace's quota (O7) bounds what it holds over all shards and clusters: nothing is permitted beyond it, and slots that its
own tasks free may serve its next ones (C2), for that raises no count. Only while it holds too much do they come back.

Choice: a cluster must be READY and OPEN, bear the names, labels, isolation and namespaces, and no taint that is not
tolerated (`core.reasons`); then tasks are spread in proportion to how many more of them each cluster can hold, so that no
cluster fills up while another idles, and one loss hurts least.

Beyond free room only work that is known to be short is permitted, and only where nobody else waits for a slot (`core.queues`): it
would spend most of its time on the way otherwise. Long work is never queued: behind a long task it would miss the slot that
another cluster frees first. Owners tell at once which slots became free (`Offer.changes`), and a finished task's place serves
the next of its group without a visit here (C2), in the queue as in a slot.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from control_plane.core.capacity import Need, need_of, size_of
from control_plane.core.model import ClusterFacts, Resources
from control_plane.core.offers import Granted, Holding, Plan, Snapshot, Want
from control_plane.core.queues import Queues, room_of
from control_plane.core.reasons import candidates, reason_for, slots
from control_plane.core.run_times import short

__all__ = ["HEADROOM", "MAX_GRANT", "SHARE_STEP", "URGENT_SLACK", "place"]

URGENT_SLACK = 60.0
"""Seconds of slack below which work is urgent. Too small: it is urgent when it is too late; too large: everything is."""

HEADROOM = 0.05
"""Share of the room for a group that only urgent work may use, rounded down to whole tasks: under 20 slots there is none.
More would idle capacity that is paid for; less leaves urgent work to wait for an end."""

SHARE_STEP = 0.01
"""How far one namespace may run ahead of the next in one step, as a share of the federation. Smaller: more steps per plan;
larger: a visible unfairness when room is scarce."""

MAX_GRANT = 2048
"""Tasks permitted to one group of one shard in a plan: about what an owner binds in one batch (J2). The rest follows with the
next plan, some milliseconds later."""

SPREAD = 8
"""Clusters over which one step is spread, if they have room for it. More would cut a step into single tasks and make a plan over
a hundred clusters slow; fewer would put more work into one cluster's loss."""


def place(snapshot: Snapshot, now: float) -> Plan:
    """Permit what fits, in order (see the module). Deterministic: equal snapshots give equal plans. `now` is wall seconds."""
    board = _Board(snapshot)
    tickets = [_Ticket(want, want.start_by - now < URGENT_SLACK) for want in snapshot.wants if want.count > 0]
    classes = sorted({ticket.want.group.priority for ticket in tickets}, reverse=True)
    for priority in classes:
        board.serve([ticket for ticket in tickets if ticket.want.group.priority == priority], board.slots_for)
    for priority in classes:
        board.queue([ticket for ticket in tickets if ticket.want.group.priority == priority])
    returning = board.returning(tickets, snapshot.holdings) | board.quotas.over(snapshot.holdings)
    return Plan(tuple(_grants(tickets)), _reasons(tickets, board), returning)


_Order = tuple[float, float, str, str]
_RoomFor = Callable[["_Ticket", list[int]], tuple[list[int], int]]
"""(ticket, its candidates) -> how many tasks each can take, and how many of these may be taken together."""


class _Ticket:
    """A want while it is served."""

    __slots__ = ("granted", "left", "need", "room_left", "urgent", "want")

    def __init__(self, want: Want, urgent: bool) -> None:
        self.want = want
        self.urgent = urgent
        self.need: Need = need_of(want.group.resources)
        self.left = want.count
        self.room_left = min(want.count, MAX_GRANT)
        self.granted: dict[str, tuple[ClusterFacts, int]] = {}

    def order(self) -> _Order:
        """Least slack, then first in first out."""
        return (self.want.start_by, self.want.since, self.want.key, self.want.shard)

    def got(self, facts: ClusterFacts, count: int) -> None:
        """Room for `count` tasks was taken on a cluster."""
        before = self.granted.get(facts.uid)
        self.granted[facts.uid] = (facts, count + (before[1] if before else 0))
        self.left -= count
        self.room_left -= count


class _Quotas:
    """How many live tasks each namespace may still get (O7)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._closed = snapshot.closed
        self._limits = {ns: quota for ns, quota in snapshot.quotas.items() if quota > 0}
        self._left = dict(self._limits)
        for holding in snapshot.holdings:
            if (ns := holding.group.namespace) in self._left:
                self._left[ns] -= holding.count

    def bound(self, namespace: str, wanted: int) -> int:
        """At most this many of `wanted`."""
        if namespace in self._closed:
            return 0
        return min(wanted, max(self._left.get(namespace, wanted), 0))

    def take(self, namespace: str, count: int) -> None:
        """So many were permitted."""
        if namespace in self._left:
            self._left[namespace] -= count

    def reason(self, namespace: str) -> str:
        """Why the namespace gets nothing more; empty if it may."""
        if namespace in self._closed:
            return self._closed[namespace]
        if self._left.get(namespace, 1) > 0:
            return ""
        return f"namespace {namespace} is at its quota of {self._limits[namespace]} live tasks"

    def over(self, holdings: Iterable[Holding]) -> frozenset[tuple[str, str]]:
        """(shard, group key) of namespaces that hold more than they may: their quota was lowered."""
        return frozenset((h.shard, h.key) for h in holdings if h.count > 0 and self._left.get(h.group.namespace, 0) < 0)


class _Board:
    """Rooms and shares while a plan is made."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.offers = snapshot.offers
        self._weights = snapshot.weights
        self._sizes = [size_of(offer.shapes or ()) for offer in self.offers]
        self._candidates: dict[str, list[int]] = {}
        self._total: dict[str, int] = defaultdict(int)
        self._kept: dict[str, int] = {}
        for size in self._sizes:
            for name, amount in size.items():
                self._total[name] += amount
        held: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for holding in snapshot.holdings:
            for name, amount in need_of(holding.group.resources):
                held[holding.cluster][name] += amount * holding.count
        self.rooms = [room_of(offer, held[offer.facts.uid]) for offer in self.offers]
        self._shares = self._held(snapshot.holdings, snapshot.weights)
        self._queues = Queues(self.offers, self._sizes, snapshot.holdings, snapshot.runs)
        self._shut: set[int] = set()
        """Clusters where a higher class waits for a slot and may not be queued: nobody else may be, then."""
        self._first: dict[int, dict[str, _Order]] = defaultdict(dict)
        """Cluster -> namespace -> the first of this class that waits there so."""
        self.quotas = _Quotas(snapshot)

    def _held(self, holdings: Iterable[Holding], weights: Mapping[str, float]) -> dict[str, float]:
        """Weighted dominant share of each namespace before this plan."""
        counts: dict[tuple[str, Resources], int] = defaultdict(int)
        for holding in holdings:
            counts[holding.group.namespace, holding.group.resources] += holding.count
        used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for (namespace, resources), count in counts.items():
            for name, amount in need_of(resources):
                used[namespace][name] += amount * count
        return defaultdict(float, {ns: self._dominant(used[ns].items()) / _weight(weights, ns) for ns in used})

    def _dominant(self, amounts: Iterable[tuple[str, int]]) -> float:
        """The largest share of any resource of the federation."""
        return max((amount / self._total[name] for name, amount in amounts if self._total.get(name)), default=0.0)

    def serve(self, tickets: list[_Ticket], room_for: _RoomFor) -> None:
        """One priority class: the poorest namespace takes a step, until nobody can."""
        queues: dict[str, list[_Ticket]] = defaultdict(list)
        for ticket in sorted(tickets, key=_Ticket.order, reverse=True):
            queues[ticket.want.group.namespace].append(ticket)
        heap = [(self._shares[ns], queue[-1].order(), ns) for ns, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            share, _, ns = heapq.heappop(heap)
            queue = queues[ns]
            ticket = queue[-1]
            unit = self._dominant(ticket.need) / _weight(self._weights, ns)
            step = ticket.room_left
            if heap and unit > 0:
                step = min(step, max(1, int((heap[0][0] - share + SHARE_STEP) / unit)))
            step = self.quotas.bound(ns, step)
            taken = self._take(ticket, step, room_for)
            self.quotas.take(ns, taken)
            self._shares[ns] = share + taken * unit
            if self.quotas.reason(ns):
                continue
            if taken < step or ticket.room_left == 0:
                queue.pop()
            if queue:
                heapq.heappush(heap, (self._shares[ns], queue[-1].order(), ns))

    def _take(self, ticket: _Ticket, wanted: int, room_for: _RoomFor) -> int:
        """Spread up to `wanted` tasks over the candidates in proportion to how many each can hold; how many found room."""
        chosen = self.candidates(ticket)
        fits, most = room_for(ticket, chosen)
        wanted = min(wanted, max(most, 0))
        if wanted == 0:
            return 0
        for position, count in _spread(wanted, fits):
            i = chosen[position]
            if count:
                self.rooms[i].take(ticket.need, count)
                self._queues.hold(i, ticket.need, count, ticket.want.run_seconds)
                ticket.got(self.offers[i].facts, count)
        return wanted

    def slots_for(self, ticket: _Ticket, chosen: list[int]) -> tuple[list[int], int]:
        """Free slots by candidate, and how many of them the ticket may use."""
        fits = [self.rooms[i].fit(ticket.need) for i in chosen]
        return fits, sum(fits) - self.kept(ticket)

    def queues_for(self, ticket: _Ticket, chosen: list[int]) -> tuple[list[int], int]:
        """Places in queues by candidate."""
        run = ticket.want.run_seconds
        fits = [0 if self._kept_out(ticket, i) else self._queues.fit(i, ticket.need, run) for i in chosen]
        return fits, sum(fits)

    def _kept_out(self, ticket: _Ticket, i: int) -> bool:
        """Whether somebody waits for a slot there who may not be queued, and would come before the ticket: a higher class, another
        namespace, or who is first in its own."""
        waiting = self._first.get(i, {})
        own = waiting.get(ticket.want.group.namespace)
        return i in self._shut or len(waiting) > (own is not None) or (own is not None and own < ticket.order())

    def queue(self, tickets: list[_Ticket]) -> None:
        """One priority class: what is short takes places in queues. Who must wait for a slot keeps those that come after it out of
        the queues where it waits."""
        waiting = [t for t in tickets if t.left and not self.quotas.reason(t.want.group.namespace)]
        self._first.clear()
        for ticket in waiting:
            if not short(ticket.want.run_seconds):
                for i in self.candidates(ticket):
                    there, namespace = self._first[i], ticket.want.group.namespace
                    there[namespace] = min(there.get(namespace, ticket.order()), ticket.order())
        self.serve([t for t in waiting if t.room_left and short(t.want.run_seconds)], self.queues_for)
        self._shut.update(self._first)

    def candidates(self, ticket: _Ticket) -> list[int]:
        """Indices of the clusters that may run the ticket's group, in order of name, whatever room they have."""
        found = self._candidates.get(ticket.want.key)
        if found is None:
            found = sorted(candidates(ticket.want.group, self.offers), key=lambda i: self.offers[i].facts.name)
            self._candidates[ticket.want.key] = found
        return found

    def kept(self, ticket: _Ticket) -> int:
        """Slots of this size that only urgent work may use."""
        if ticket.urgent:
            return 0
        known = self._kept.get(ticket.want.key)
        if known is None:
            known = int(HEADROOM * sum(slots(self._sizes[i], ticket.need) for i in self.candidates(ticket)))
            self._kept[ticket.want.key] = known
        return known

    def returning(self, tickets: Iterable[_Ticket], holdings: Iterable[Holding]) -> frozenset[tuple[str, str]]:
        """Who must give slots back as they become free (C2): a lower class than one that waits for room on that cluster, or,
        in the same class, a namespace that would still have the larger share after giving a slot to one that waits. From a
        cluster where work is queued also who comes later in the order than one of its namespace that got nothing there, and
        everybody if the queue has become too long."""
        poorest: dict[str, dict[int, float]] = defaultdict(dict)
        """Cluster -> class -> the least share that a namespace which waits there would have with one task more."""
        first: dict[tuple[str, int, str], _Order] = {}
        """(cluster, class, namespace) -> the first in the order that waits there and got nothing."""
        for ticket in tickets:
            group = ticket.want.group
            if ticket.left == 0 or ticket.room_left == 0 or self.quotas.reason(group.namespace):
                continue
            after = self._shares[group.namespace] + self._dominant(ticket.need) / _weight(
                self._weights, group.namespace
            )
            for i in self.candidates(ticket):
                uid = self.offers[i].facts.uid
                there = poorest[uid]
                there[group.priority] = min(there.get(group.priority, after), after)
                if not ticket.granted:
                    where = (uid, group.priority, group.namespace)
                    first[where] = min(first.get(where, ticket.order()), ticket.order())
        orders = {(ticket.want.shard, ticket.want.key): ticket.order() for ticket in tickets}
        found: set[tuple[str, str]] = set()
        for holding in holdings:
            group, there = holding.group, poorest.get(holding.cluster, {})
            owed = self._shares[group.namespace] > there.get(group.priority, float("inf"))
            behind = False
            if self._queues.waits(holding.cluster):
                before = first.get((holding.cluster, group.priority, group.namespace))
                own = orders.get((holding.shard, holding.key))
                behind = before is not None and own is not None and before < own
                behind |= self._queues.overdue(holding.cluster)
            if holding.count > 0 and (owed or behind or any(priority > group.priority for priority in there)):
                found.add((holding.shard, holding.key))
        return frozenset(found)


def _spread(wanted: int, fits: list[int]) -> list[tuple[int, int]]:
    """(position, tasks): `wanted` <= sum(fits) split in proportion to the largest fits, in whole tasks: largest remainder
    first, then largest fit."""
    order = sorted((i for i, fit in enumerate(fits) if fit), key=lambda i: (-fits[i], i))
    chosen, room = order[:SPREAD], sum(fits[i] for i in order[:SPREAD])
    while room < wanted:
        room += fits[order[len(chosen)]]
        chosen.append(order[len(chosen)])
    parts = {i: wanted * fits[i] // room for i in chosen}
    for i in sorted(chosen, key=lambda i: (-(wanted * fits[i] % room), -fits[i], i))[: wanted - sum(parts.values())]:
        parts[i] += 1
    return list(parts.items())


def _weight(weights: Mapping[str, float], namespace: str) -> float:
    """A weight of nothing would be an infinite share."""
    return max(weights.get(namespace, 1.0), 0.001)


def _grants(tickets: Iterable[_Ticket]) -> Iterable[Granted]:
    for ticket in tickets:
        for facts, count in ticket.granted.values():
            yield Granted(ticket.want.shard, ticket.want.key, facts.uid, facts.generation, count)


def _reasons(tickets: Iterable[_Ticket], board: _Board) -> dict[tuple[str, str], str]:
    """One sentence for each ticket that is not served in full; equal groups share the search for it."""
    known: dict[tuple[str, bool], str] = {}
    reasons: dict[tuple[str, str], str] = {}
    for ticket in tickets:
        if ticket.left == 0:
            continue
        barred = board.quotas.reason(ticket.want.group.namespace)
        if barred:
            reasons[ticket.want.shard, ticket.want.key] = barred
            continue
        kind = (ticket.want.key, ticket.urgent)
        if kind not in known:
            kept = board.kept(ticket) > 0
            known[kind] = reason_for(ticket.want.group, board.offers, board.rooms, kept=kept)
        reasons[ticket.want.shard, ticket.want.key] = known[kind]
    return reasons
