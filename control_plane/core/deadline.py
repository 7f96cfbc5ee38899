"""Time as a plan: critical paths, slack, feasibility, backoff (PROTOCOL D1, C2).

Theory: a run has one absolute deadline. The *tail* of a task is the sum of expected run times along the longest path from
it (itself included) to a leaf; so deadline - tail is the latest moment at which it may start, and that moment less now is
its slack. Latest starts do not move with the clock, so ready tasks can be kept in a heap by them. Tasks without a declared
time count as zero: slack is then the time to the deadline, and nothing is refused on a guess.

Backoffs have full jitter, but no chance: the draw is a hash of (run uid, task, n), so a decision made again gives the
same answer, on any replica.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from control_plane.core.model import GraphTask, RetryPolicy

INFRASTRUCTURE_BACKOFF = 0.1
"""Bound, seconds, of the first wait after an infrastructure loss. The loss is not the task's fault, so it is short; zero would
let an agent that cannot spawn burn a task's whole loss budget within one second."""

INFRASTRUCTURE_BACKOFF_CAP = 10.0
"""Most seconds between infrastructure retries. Larger: the 20 losses of the default budget would take minutes even when
the fault was healed long ago; smaller: a cluster in a crash loop drains the budget before health verdicts can steer work away."""

REJECTION_PAUSE = 0.1
"""Bound, seconds, of the wait after an agent had no room (C3). A few round trips: a corrected capacity report reaches the
scheduler meanwhile. Zero spins commit - dispatch - reject; a second would leave freed room empty."""


class CyclicGraph(ValueError):
    """The parents of some tasks lead back to themselves, or point outside the graph."""


def tails(tasks: Sequence[GraphTask]) -> list[float]:
    """Seconds from the start of each task to the end of the last leaf after it, by expected run times.

    Raises `CyclicGraph`. O(tasks + edges), no recursion."""
    pending = [0] * len(tasks)
    for task in tasks:
        for parent in task.parents:
            if not 0 <= parent < len(tasks):
                raise CyclicGraph(f"a parent of {task.id} is not in the graph")
            pending[parent] += 1
    below = [0.0] * len(tasks)
    stack = [index for index, count in enumerate(pending) if count == 0]
    done = 0
    while stack:
        index = stack.pop()
        done += 1
        task = tasks[index]
        below[index] = tail = below[index] + task.spec.expected
        for parent in task.parents:
            below[parent] = max(below[parent], tail)
            pending[parent] -= 1
            if not pending[parent]:
                stack.append(parent)
    if done != len(tasks):
        culprit = next(task.id for task, count in zip(tasks, pending, strict=True) if count)
        raise CyclicGraph(f"the parents of {culprit} form a cycle")
    return below


def critical_path(tasks: Sequence[GraphTask]) -> float:
    """Least seconds in which the graph can finish with unlimited room. Raises `CyclicGraph`."""
    return max(tails(tasks), default=0.0)


def jitter(run: str, task: int, n: int) -> float:
    """A draw from [0, 1), always the same for the same attempt."""
    digest = hashlib.blake2b(f"{run}/{task}/{n}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / (1 << 56)


def application_backoff(policy: RetryPolicy, failures: int, draw: float) -> float:
    """Seconds to wait after the `failures`-th application failure (from 1): full jitter under an exponential bound."""
    bound = min(policy.max_backoff, policy.initial_backoff * policy.multiplier ** (failures - 1))
    return bound * draw


def infrastructure_backoff(losses: int, draw: float) -> float:
    """Seconds to wait after the `losses`-th infrastructure loss (from 1)."""
    # The exponent is bounded so that the power stays a float; the cap is reached long before.
    return min(INFRASTRUCTURE_BACKOFF_CAP, INFRASTRUCTURE_BACKOFF * 2.0 ** min(losses - 1, 30)) * draw


def rejection_pause(draw: float) -> float:
    """Seconds to wait after a rejection: between half of the bound and the bound, never zero."""
    return REJECTION_PAUSE * (0.5 + draw / 2)
