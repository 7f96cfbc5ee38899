"""How much short work may wait on a cluster beyond its free room (PROTOCOL C2, C3; DESIGN 8). Pure.

Theory. A slot that serves one task at a time idles for a whole hop (report, commit, dispatch) between two tasks. For a task of a
minute that is nothing; a task of a millisecond would spend most of its life on the way. So a cluster is given a *queue* of tasks
whose run time is learned, just long enough that a hop hides behind it: everything the cluster holds must be done within HORIZON
when all its slots work. The agent starts the next one without asking; a finished one's place in the queue serves the next ready
task of its group in the finish's own transaction (C2), so a full queue stays full, in batches, without a visit to the leader.

Why urgent work does not wait for it: whoever comes first in the order (class, owed share, slack) makes the others give back what
becomes free, and what they hold drains within the horizon. That is the longest that queued work can stand in anybody's way, and
less than the end of one ordinary task. Work of unknown or longer run time is never queued; a slot that it holds is not counted
among those that drain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from control_plane.core.capacity import Need, Room, Shape, need_of, size_of
from control_plane.core.offers import Holding, Offer
from control_plane.core.reasons import slots
from control_plane.core.run_times import HORIZON, short

__all__ = ["HORIZON", "SHORTEST", "Queues", "room_of"]

SHORTEST = 0.001
"""Seconds that a task takes at least, whatever was measured: agents tell whole milliseconds, and a task that does nothing still
costs the machine some. Smaller: a queue of no-ops deeper than any hop needs; larger: fast slots run dry."""


def room_of(offer: Offer, held: Mapping[str, int]) -> Room:
    """Free room of a cluster now (C4): what it reported, less what was placed since, and with what ended since as far as nothing
    that waited there has taken it. `held`: what owners hold of it now, by resource."""
    shapes = offer.shapes or ()
    room, left = Room(shapes), _totals(shapes)
    for resources, count in offer.changes:
        if count > 0:
            room.take(need_of(resources), count)  # what finds no node is an over-estimate: the agent knows (C3)
    for name in left:
        left[name] -= held.get(name, 0) + sum(count * amounts[name] for count, amounts in room.classes())
    for resources, count in offer.changes:
        need = need_of(resources)
        came = min([-count, *(left[name] // amount for name, amount in need if name in left)])
        if came > 0:
            room.give(need, came)
            for name, amount in need:
                if name in left:
                    left[name] -= came * amount
    return room


def _totals(shapes: Sequence[Shape]) -> dict[str, int]:
    """What the whole cluster has of the resources of which its agent tells that; of others only what is free is known."""
    totals = {"cpu": [s.total_cpu_millis for s in shapes], "memory": [s.total_memory_bytes for s in shapes]}
    size = size_of(shapes)
    return {name: size[name] for name, sizes in totals.items() if sizes and all(sizes)}


class Queues:
    """What may still be queued on each cluster, while a plan is made. Clusters go by their index in the offers."""

    def __init__(
        self,
        offers: Sequence[Offer],
        sizes: Sequence[Mapping[str, int]],
        holdings: Iterable[Holding],
        runs: Mapping[str, float],
    ) -> None:
        """`runs`: learned run times of what is held, seconds by key of group."""
        self._sizes = sizes
        self._index = {offer.facts.uid: i for i, offer in enumerate(offers)}
        self._filled = [0.0] * len(offers)
        """Share of the cluster's slots that is taken; above 1 something waits."""
        self._drain = [0.0] * len(offers)
        """Seconds of all slots' work, of groups that are known to be short."""
        self._long = [0.0] * len(offers)
        """Share of the slots held by work that is not known to be short."""
        self._seconds = [0.0] * len(offers)
        """As `_drain`, but of all groups that are known."""
        self._left = [offer.queue_limit for offer in offers]
        for holding in holdings:
            i = self._index.get(holding.cluster)
            if i is not None:
                self.hold(i, need_of(holding.group.resources), holding.count, runs.get(holding.key, 0.0))

    def hold(self, i: int, need: Need, count: int, run: float) -> None:
        """So many tasks that take `run` seconds (0: not known) are held, or were just permitted."""
        fits = slots(self._sizes[i], need)
        self._left[i] -= count
        if fits <= 0:
            return
        share = count / fits
        self._filled[i] += share
        self._seconds[i] += share * run
        if short(run):
            self._drain[i] += share * max(run, SHORTEST)
        else:
            self._long[i] += share

    def fit(self, i: int, need: Need, run: float) -> int:
        """How many tasks that take `run` seconds may still be queued on a cluster."""
        fits = slots(self._sizes[i], need)
        seconds = HORIZON * (1.0 - self._long[i]) - self._drain[i]
        if not short(run) or fits <= 0 or seconds <= 0.0:
            return 0
        whole = int(seconds * fits / max(run, SHORTEST) + 1e-6)  # sums of fractions fall short of whole tasks
        return max(0, min(whole, self._left[i]))

    def waits(self, cluster: str) -> bool:
        """Whether a cluster holds more than it can run at once."""
        i = self._index.get(cluster)
        return i is not None and self._filled[i] > 1.0

    def overdue(self, cluster: str) -> bool:
        """Whether a cluster's queue turned out to be twice as long as it may be: run times have grown."""
        return self.waits(cluster) and self._seconds[self._index[cluster]] > 2 * HORIZON
