"""Lanes: the ready tasks of a shard, one lane per group (PROTOCOL C1, C2).

Theory: a lane gives its tasks in order of least slack, then first in first out. Latest starts do not move (see
`core.deadline`), so a heap of (latest start, serial) is that order at any time. Tasks leave a lane in other ways than
through its head (a cancel, a late result), so removal is lazy: a task in a lane holds a *ticket*, the serial of its entry;
an entry whose ticket is gone is stale and falls out when it comes up. Nothing here is journaled: it is derived from state.
"""

from __future__ import annotations

import heapq
from collections import deque

from control_plane.core.model import Group
from control_plane.core.run import Run

STALE_ENTRIES = 1024
"""Stale entries a lane may hold beyond its live ones before it is swept. Smaller: sweeps show up in the cost of a placement;
larger: a lane with one stuck task holds memory of runs long gone."""


class Lane:
    """Ready tasks of one group."""

    __slots__ = ("_fifo", "_heap", "count", "group", "key", "programs", "users")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.key = group.key()
        self.count = 0
        self.users = 0
        """Tasks of live runs that are of this group, ready or not: the lane goes with the last of them."""
        self.programs: dict[tuple[str, ...], int] = {}
        """Ready tasks by what they run."""
        self._heap: list[tuple[float, int, Run, int]] = []
        self._fifo: deque[tuple[int, float, Run, int]] = deque()

    def push(self, serial: int, since: float, run: Run, task: int) -> None:
        """A task joins; it must hold no ticket. `since`: wall time it became ready."""
        run.tickets[task] = serial
        self.count += 1
        program = run.tasks[task].spec.program
        self.programs[program] = self.programs.get(program, 0) + 1
        heapq.heappush(self._heap, (run.latest_start(task), serial, run, task))
        self._fifo.append((serial, since, run, task))

    def leave(self, run: Run, task: int) -> bool:
        """A task leaves, if it is here."""
        if run.tickets.pop(task, None) is None:
            return False
        self.count -= 1
        program = run.tasks[task].spec.program
        self.programs[program] -= 1
        if not self.programs[program]:
            del self.programs[program]
        if not self.count:
            self._heap.clear()
            self._fifo.clear()
        elif len(self._heap) > 2 * self.count + STALE_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[2].tickets.get(entry[3]) == entry[1]]
            heapq.heapify(self._heap)
            self._fifo = deque(entry for entry in self._fifo if entry[2].tickets.get(entry[3]) == entry[0])
        return True

    def head(self) -> tuple[Run, int] | None:
        """The task with the least slack; it stays."""
        heap = self._heap
        while heap:
            _, serial, run, task = heap[0]
            if run.tickets.get(task) == serial:
                return run, task
            heapq.heappop(heap)
        return None

    def pop(self) -> tuple[Run, int] | None:
        """Take the task with the least slack."""
        found = self.head()
        if found is not None:
            heapq.heappop(self._heap)
            self.leave(*found)
        return found

    def since(self) -> float:
        """Wall time since when the oldest task waits; 0 if none does."""
        fifo = self._fifo
        while fifo:
            serial, since, run, task = fifo[0]
            if run.tickets.get(task) == serial:
                return since
            fifo.popleft()
        return 0.0
