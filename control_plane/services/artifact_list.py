"""ListArtifacts: what a run's tasks have published, live or archived (PROTOCOL J8, J10; DESIGN 10).

Theory. The journal, and later history, say what is published; the object store is not asked. A page goes on at a place (index of
the task, artifacts of it that were shown), so it ends anywhere. A live run knows which of its tasks published something; an archived
one is read task by task, a bounded number of them for each page, so a page may be empty and yet go on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from baton import names
from baton.errors import NotFound
from baton.names import InvalidName, RunName
from baton.v1 import agent_pb2, artifact_pb2
from control_plane.agent_codec import artifact_source
from control_plane.core.shard import RunShard
from control_plane.services import pages
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import invalid
from control_plane.services.methods import MAX_PAGE, Asked, page_size

SCAN = 1000
"""Archived tasks read together: five stored pieces, about 5 ms of decompression in the history's thread."""

MAX_SCANNED = 10_000
"""Archived tasks read for one page: a bound of some 100 ms on what one call costs, however few of them have artifacts."""

Source = agent_pb2.ArtifactSource


class ArtifactLists:
    """ArtifactService.ListArtifacts."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list_artifacts(
        self, request: artifact_pb2.ListArtifactsRequest, asked: Asked
    ) -> AsyncIterator[artifact_pb2.ListArtifactsResponse]:
        """At the owner of the run's shard."""
        name = names.parse_run(request.run)
        size = page_size(request.page_size, MAX_PAGE)
        question = _question(request)
        start, skip = _place(pages.read(request.page_token, question))
        found = await self._live(name, request.task, start, skip + size + 1, asked)
        goes_on = -1
        if found is None:
            found, goes_on = await self._archived(name, request.task, start, skip + size + 1)
        token = ""
        if len(found) > skip + size:
            task = found[skip + size].attempt.task
            token = f"{task}.{sum(each.attempt.task == task for each in found[: skip + size])}"
        elif goes_on >= 0:
            token = f"{goes_on}.0"
        yield artifact_pb2.ListArtifactsResponse(
            artifacts=found[skip : skip + size], next_page_token=pages.write(token, question) if token else ""
        )

    async def _live(self, name: RunName, task: str, start: int, limit: int, asked: Asked) -> list[Source] | None:
        """Artifacts from task `start` on; None if the run is not live. Raises NotFound for an unknown task."""

        def question(machine: RunShard) -> list[Source] | None:
            run = machine.run_by_id(name.namespace, name.run)
            if run is None:
                return None
            if not task:
                return [artifact_source(view) for view in machine.artifacts(run.uid, start, limit)]
            one = machine.task(run.uid, task)
            if one is None:
                raise NotFound(f"{name} has no task {task}")
            return [artifact_source(view) for view in one.artifacts]

        return await self._desk.read(shard_of_run(name), question, asked)

    async def _archived(self, name: RunName, task: str, start: int, limit: int) -> tuple[list[Source], int]:
        """The same of a run in history, and the index to go on at if the look was cut short, else -1. Raises NotFound."""
        run = await self._desk.must_be_archived(name)
        history = self._desk.history
        if task:
            one = await from_history(history.task(run.uid, task))
            if one is None:
                raise NotFound(f"{name} has no task {task}")
            return list(one.artifacts), -1
        found: list[Source] = []
        for begin in range(start, min(run.task_count, start + MAX_SCANNED), SCAN):
            tasks = await from_history(history.tasks(run.uid, begin, SCAN, ()))
            found += (source for each in tasks for source in each.artifacts)
            if len(found) >= limit:
                return found, -1
        end = start + MAX_SCANNED
        return found, end if end < run.task_count else -1


def check_list_artifacts(request: artifact_pb2.ListArtifactsRequest, _now: float) -> None:
    """A list of artifacts. Raises InvalidField."""
    try:
        names.parse_run(request.run)
    except InvalidName as error:
        raise invalid("run", str(error)) from None
    if request.task and (problem := names.task_id_problem(request.task)):
        raise invalid("task", problem)
    page_size(request.page_size, MAX_PAGE)
    _place(pages.read(request.page_token, _question(request)))


def _question(request: artifact_pb2.ListArtifactsRequest) -> str:
    return pages.filter_hash("artifacts", request.run, request.task)


def _place(after: str) -> tuple[int, int]:
    """The index of the task a token goes on at, and how many of its artifacts were shown. Raises InvalidField."""
    parts: Sequence[str] = (after or "0.0").split(".")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise invalid("page_token", "is not one that this service gave out")
    return int(parts[0]), int(parts[1])
