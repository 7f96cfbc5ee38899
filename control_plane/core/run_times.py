"""Learned run times of groups (DESIGN 8): how long a slot is busy with one task. Pure; known for now, never journaled.

Theory: the mean decides how fast a queue drains, so the mean is what is learned; and a mistake is dear on one side only: work that
is thought shorter than it is waits in a queue while another cluster is free. So the estimate rises fast and falls slowly.
"""

from __future__ import annotations

MAX_GROUPS = 1024
"""Groups whose times are kept; the one learned first goes. Fewer would forget a group between two of its runs, more only memory."""

RISE, FALL = 1 / 8, 1 / 16
"""Share of the difference that one longer, or one shorter, observation moves the estimate. A faster rise lets one slow start on a busy
host empty a queue of short work, and a task of minutes closes it all the same; a faster fall fills queues between two slow tasks of
a mixed group."""

TICK = 0.0005
"""Seconds taken for a run that agents tell as 0 ms: half of what they can tell. 0 would mean unknown."""


class RunTimes:
    """Seconds by group."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}

    def learn(self, group: str, seconds: float) -> None:
        """A task of the group ran so long. Clocks may step: less than nothing counts as nothing."""
        seconds = max(seconds, TICK)
        known = self._known.get(group)
        if known is None:
            if len(self._known) >= MAX_GROUPS:
                del self._known[next(iter(self._known))]
            self._known[group] = seconds
        elif seconds != known:
            self._known[group] = known + (seconds - known) * (RISE if seconds > known else FALL)

    def of(self, group: str) -> float:
        """The estimate in seconds; 0: not known."""
        return self._known.get(group, 0.0)
