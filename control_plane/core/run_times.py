"""Learned run times of programs (DESIGN 8): how long a slot is busy with one task. Pure; known for now, never journaled.

Theory: the mean decides how fast a queue drains, so the mean is what is learned, of each program of a group by itself: a function
with its code, or a whole command line. A mistake is dear on one side only: work that is thought shorter than it is waits in a
queue while another cluster is free. So the estimate rises faster than it falls; an agent hands back what waits too long, and then
the program counts as slow at once; what never ran is unknown; and a group whose ready
tasks run several programs is as slow as the slowest of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

HORIZON = 0.25
"""Seconds within which a cluster must get through all that it holds, if some of it only waits (`core.queues`). Smaller: slots idle
while a hop takes longer than the queue lasts; larger: urgent work waits longer, and another cluster that falls idle finds nothing
left to take."""

MAX_PROGRAMS = 4096
"""Programs whose times are kept; the one unused longest goes. Fewer would forget a program between two of its runs."""

MAX_MIXED = 32
"""Different programs among a group's ready tasks up to which their times are looked up. A group with more counts as unknown."""

RISE, FALL = 1 / 8, 1 / 16
"""Share of the difference that one longer, or one shorter, observation moves the estimate. A faster rise lets one slow start on a busy
host empty a queue of short work, and a task of minutes closes it all the same; a faster fall fills queues between two slow tasks of
a mixed program."""

SLOW = 2 * HORIZON
"""Seconds that a program takes at least if one of its tasks came back from a cluster unstarted. Too little: a few short ends fill the
same queue again; more: a cluster that stood still for a moment costs many hops. From here it takes a dozen short ends."""

TICK = 0.0005
"""Seconds taken for a run that agents tell as 0 ms: half of what they can tell. 0 would mean unknown."""

Program = tuple[str, ...]


class RunTimes:
    """Seconds by group and program, and by group."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Program], float] = {}
        self._groups: dict[str, float] = {}

    def learn(self, group: str, program: Program, seconds: float) -> None:
        """A task ran so long. Clocks may step: less than nothing counts as nothing."""
        seconds = max(seconds, TICK)
        key = (group, program)
        self._known[key] = _moved(self._known.pop(key, None), seconds)
        self._groups[group] = _moved(self._groups.pop(group, None), seconds)
        if len(self._known) > MAX_PROGRAMS:
            del self._known[next(iter(self._known))]
        if len(self._groups) > MAX_PROGRAMS:
            del self._groups[next(iter(self._groups))]

    def running(self, group: str, program: Program, seconds: float) -> None:
        """A task has run so long and goes on: that only raises what is known. Of a program without an end nothing is known yet."""
        if seconds > self._known.get((group, program), math.inf):
            self.learn(group, program, seconds)

    def slow(self, group: str, program: Program) -> None:
        """A task waited in a cluster's queue far longer than the horizon and was not started: the program is not short any more."""
        key = (group, program)
        self._known[key] = max(self._known.pop(key, SLOW), SLOW)
        self._groups[group] = max(self._groups.pop(group, SLOW), SLOW)

    def of(self, group: str, programs: Iterable[Program]) -> float:
        """The slowest of these programs, in seconds; 0 if one is not known, or there are too many."""
        slowest = 0.0
        for place, program in enumerate(programs):
            known = self._known.get((group, program))
            if known is None or place >= MAX_MIXED:
                return 0.0
            slowest = max(slowest, known)
        return slowest

    def mean(self, group: str) -> float:
        """Of whatever the group ran lately, in seconds; 0: not known."""
        return self._groups.get(group, 0.0)


def short(seconds: float) -> bool:
    """Whether work of that learned run time may be queued at all."""
    return 0.0 < seconds <= HORIZON


def _moved(known: float | None, seconds: float) -> float:
    """An estimate after one more observation."""
    if known is None:
        return seconds
    return known + (seconds - known) * (RISE if seconds > known else FALL)
