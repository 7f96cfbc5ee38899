"""Results as they come: each task of a run once, as soon as it is final.

Theory: a watch says *that* a task is final, a read says *what* came of it. Few of them are read one by one, many by a page, so
that neither the first result of a small run nor the last of a large one waits for the others. What is read twice (a listing meets
the watch) is told once; the run's own end is the end, and whatever no event told is read then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from baton import names
from baton.v1 import run_pb2

FINAL_TASKS = frozenset(
    {
        run_pb2.TASK_STATE_SUCCEEDED,
        run_pb2.TASK_STATE_FAILED,
        run_pb2.TASK_STATE_SKIPPED,
        run_pb2.TASK_STATE_CANCELLED,
        run_pb2.TASK_STATE_DEADLINE_EXCEEDED,
    }
)
"""States that a task never leaves."""

FEW = 64
"""Tasks that are read one by one in any run. Fewer: a small run is listed for each; more: a burst of calls for what a page holds."""

PART = 16
"""A listing pays when at least this part of the run is new: at most so many listings, however the events come."""

AT_ONCE = 16
"""Reads under way at once: bounds what one user asks of a replica."""


async def as_completed(
    run: run_pb2.Run,
    read: Callable[[str], Awaitable[run_pb2.TaskStatus]],
    listed: Callable[[], AsyncIterator[run_pb2.TaskStatus]],
    watched: AsyncIterator[run_pb2.WatchRunResponse],
) -> AsyncIterator[run_pb2.TaskStatus]:
    """Final tasks of a run. `read`: by full name; `listed`: all of them; `watched`: the events after `run`'s. Raises BatonError."""
    seen: set[int] = set()

    async def by_page() -> AsyncIterator[run_pb2.TaskStatus]:
        async for task in listed():
            if task.state in FINAL_TASKS and task.index not in seen:
                seen.add(task.index)
                yield task

    async for task in by_page():
        yield task
    due: dict[int, str] = {}
    async for message in watched:
        for event in message.events:
            due.update((each.index, each.id) for each in event.changes if each.state in FINAL_TASKS)
        due = {index: task_id for index, task_id in due.items() if index not in seen}
        if len(due) > max(FEW, run.task_count // PART):
            async for task in by_page():
                yield task
        else:
            async for task in _one_by_one(run, due, read):
                seen.add(task.index)
                yield task
    async for task in by_page():
        yield task


async def _one_by_one(
    run: run_pb2.Run, due: dict[int, str], read: Callable[[str], Awaitable[run_pb2.TaskStatus]]
) -> AsyncIterator[run_pb2.TaskStatus]:
    parent = names.parse_run(run.name)
    full = [str(names.TaskName(parent.namespace, parent.run, task_id)) for task_id in due.values()]
    for first in range(0, len(full), AT_ONCE):
        for task in await asyncio.gather(*(read(each) for each in full[first : first + AT_ONCE])):
            yield task
