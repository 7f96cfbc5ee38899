"""Which attempts may wait at the executor behind ones that run, so that a worker goes on without asking (PROTOCOL G5, DESIGN 13).

Theory: between the end of a short call and the start of the next one lies a round trip between executor and agent, which costs more
than the call. So a few milliseconds of *learned* work are started ahead: they count as started, but they have no place of their
own. A **lane** is a set of equal calls (environment, demand): its **places** are what the ledger holds for it, and the executor is
told their number, so that it runs no more at once. When a call ends that held a place, the place passes to the next in the lane, as
the executor does by itself; with nobody next it is given back. Room that becomes free elsewhere goes to those first that wait here
longest: they were started before what is still in the queue.

Run times are learned from ends. What counts is the longest seen lately, not the mean: one long call behind which a
hundred wait costs more than a hundred round trips.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from cluster_agent.core.model import AttemptKey, Demand, WorkSpec

AHEAD_SECONDS = 0.01
"""Learned work that may wait behind each place. Smaller: workers run dry during the agent's turn, which takes a few milliseconds on a
busy host; larger: more has to be recalled when a call is longer than the ones before it."""

AHEAD_MOST = 32
"""Calls behind each place, however short: what a turn of the agent starts at once, and what a stop may have to recall."""

SHORTEST_SECONDS = 0.0002
"""A call counts as at least this: what it takes a worker to begin and end it."""

FORGETTING = 0.9
"""What is left of the longest run time with each shorter one: after about thirty calls a hiccup of a second is forgotten."""

KINDS = 512
"""Functions whose run times are remembered; the one unused longest goes first. It only bounds memory."""

Kind = tuple[Hashable, ...]


@dataclass(slots=True)
class Lane:
    """Started calls that are equal to the executor."""

    demand: Demand
    holders: dict[AttemptKey, None] = field(default_factory=dict)
    """Those with a place, in order; the executor may run others of the lane instead, but never more."""
    behind: dict[AttemptKey, float] = field(default_factory=dict)
    """Those without, in order, and how long each will take."""

    @property
    def room(self) -> float:
        """Seconds of work that may still be put behind."""
        if len(self.behind) >= AHEAD_MOST * len(self.holders):
            return 0.0
        return AHEAD_SECONDS * len(self.holders) - sum(self.behind.values())


class Lanes:
    """All lanes of one agent, and what was learned."""

    def __init__(self) -> None:
        self._lanes: dict[Kind, Lane] = {}
        self._of: dict[AttemptKey, tuple[Kind, Kind]] = {}
        """Lane and function of every started call."""
        self._learned: OrderedDict[Kind, float] = OrderedDict()

    def hold(self, key: AttemptKey, spec: WorkSpec) -> int:
        """It starts with a place of its own; how many its lane has now. 0: it is no call, and has no lane."""
        kinds = _kinds(spec)
        if kinds is None:
            return 0
        lane = self._lanes.get(kinds[0])
        if lane is None:
            lane = self._lanes[kinds[0]] = Lane(spec.demand)
        lane.holders[key] = None
        self._of[key] = kinds
        return len(lane.holders)

    def follow(self, key: AttemptKey, spec: WorkSpec) -> int:
        """Start it behind others if that is worth it: the places of its lane; 0 if it has to wait in the queue. What needs files
        first is no few milliseconds of work."""
        kinds = _kinds(spec)
        if kinds is None or spec.carried:
            return 0
        lane, seconds = self._lanes.get(kinds[0]), self._learned.get(kinds[1])
        if lane is None or seconds is None or lane.room < seconds:
            return 0
        lane.behind[key] = seconds
        self._of[key] = kinds
        return len(lane.holders)

    def learn(self, key: AttemptKey, seconds: float) -> None:
        """A call ended by itself and took so long."""
        kinds = self._of.get(key)
        if kinds is None:
            return
        before = self._learned.pop(kinds[1], 0.0)
        self._learned[kinds[1]] = max(seconds, SHORTEST_SECONDS, before * FORGETTING)
        if len(self._learned) > KINDS:
            self._learned.popitem(last=False)

    def leave(self, key: AttemptKey) -> AttemptKey | None:
        """It is over; who has its place now. None: nobody, or it had none."""
        kinds = self._of.pop(key, None)
        if kinds is None:
            return None
        lane = self._lanes[kinds[0]]
        heir = None
        if lane.behind.pop(key, None) is None:
            lane.holders.pop(key)
            heir = next(iter(lane.behind), None)
            if heir is not None:
                del lane.behind[heir]
                lane.holders[heir] = None
        if not lane.holders and not lane.behind:
            del self._lanes[kinds[0]]
        return heir

    def behind(self, key: AttemptKey) -> bool:
        """It was started, and has no place of its own."""
        kinds = self._of.get(key)
        return kinds is not None and key in self._lanes[kinds[0]].behind

    def longest_behind(self) -> Iterator[tuple[AttemptKey, Demand]]:
        """Of each lane the next that has no place, and what it needs."""
        for lane in self._lanes.values():
            heir = next(iter(lane.behind), None)
            if heir is not None:
                yield heir, lane.demand

    def promote(self, key: AttemptKey) -> int:
        """It was behind others and has a place now; how many its lane has."""
        lane = self._lanes[self._of[key][0]]
        del lane.behind[key]
        lane.holders[key] = None
        return len(lane.holders)


def _kinds(spec: WorkSpec) -> tuple[Kind, Kind] | None:
    """What is one environment to the executor, and what takes the same time; None for what is no call of a function."""
    call = spec.python
    if call is None:
        return None
    tenant = spec.run.removeprefix("namespaces/").partition("/")[0]
    lane = (tenant, call.requirements, call.code, spec.demand, spec.processes)
    return lane, (*lane, call.function)
