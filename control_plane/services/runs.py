"""Runs and their tasks: reading, listing, cancelling (PROTOCOL J8, J10, O7, O8).

A run is asked for at its shard's owner; if it is not live there it is in history, and answers the same calls from it. Lists are
merged over all shards and history in order of uid: what a page shows was true when it was asked, shard by shard; no snapshot
over shards is promised.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

from baton import names
from baton.errors import NotFound, WrongState
from baton.names import InvalidName
from baton.v1 import run_pb2
from control_plane.core import commands
from control_plane.core.commands import Refused
from control_plane.core.model import RUN_SHARDS, TaskState
from control_plane.core.shard import RunShard
from control_plane.core.views import RunView, TaskView
from control_plane.history import Wanted
from control_plane.peers import CallContext, Calls
from control_plane.services import pages, translate
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import committed, invalid
from control_plane.services.methods import (
    DEFAULT_TASK_PAGE,
    PAGE_BYTES,
    Asked,
    check_request_id,
    page_size,
)

LIST = "/baton.internal/ListRuns"

MAX_REASON = 1000
"""Characters of a cancel's reason: it rides in the journal."""

_RUN_STATES = frozenset(run_pb2.RunState.values()) - {run_pb2.RUN_STATE_UNSPECIFIED}
_TASK_STATES = frozenset(run_pb2.TaskState.values()) - {run_pb2.TASK_STATE_UNSPECIFIED}


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, in order of uid. `more`: the source goes on after the last of `runs`."""

    runs: Sequence[run_pb2.Run]
    more: bool


class Runs:
    """RunService, but for creating, watching and logs."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(LIST, self._list_shard)

    # -- one run -----------------------------------------------------------------------------------------------------------

    async def get_run(self, request: run_pb2.GetRunRequest, asked: Asked) -> AsyncIterator[run_pb2.GetRunResponse]:
        """RunService.GetRun."""
        name = names.parse_run(request.name)
        yield run_pb2.GetRunResponse(run=await self.find(name, asked))

    async def find(self, name: names.RunName, asked: Asked) -> run_pb2.Run:
        """A run, live or archived. Raises NotFound."""
        shard = shard_of_run(name)
        view = await self._desk.read(shard, lambda machine: machine.run_by_id(name.namespace, name.run), asked)
        return translate.run(view, shard) if view is not None else await self._desk.must_be_archived(name)

    async def cancel_run(
        self, request: run_pb2.CancelRunRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.CancelRunResponse]:
        """RunService.CancelRun."""
        name = names.parse_run(request.name)
        shard = shard_of_run(name)
        digest = hashlib.blake2b(f"cancel\n{name}\n{request.reason}".encode(), digest_size=16).hexdigest()
        ask = commands.Request(request.request_id, digest)
        try:
            await self._desk.submit(shard, commands.CancelRun(ask, name.namespace, name.run, request.reason), asked)
        except Refused as refused:
            if refused.reason != "NOT_FOUND":
                raise
            run = await self._desk.must_be_archived(name)
            if run.state != run_pb2.RUN_STATE_CANCELLED:
                word = run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_")
                raise WrongState(f"{name} is {word}: a finished run stays as it is") from None
            yield run_pb2.CancelRunResponse(run=run)
            return
        with committed():
            found = await self.find(name, asked)
        yield run_pb2.CancelRunResponse(run=found)

    # -- tasks -------------------------------------------------------------------------------------------------------------

    async def get_task(self, request: run_pb2.GetTaskRequest, asked: Asked) -> AsyncIterator[run_pb2.GetTaskResponse]:
        """RunService.GetTask."""
        name = names.parse_task(request.name)
        shard = shard_of_run(name.parent)

        def question(machine: RunShard) -> tuple[bool, TaskView | None]:
            run = machine.run_by_id(name.namespace, name.run)
            return run is not None, machine.task(run.uid, name.task) if run is not None else None

        live, view = await self._desk.read(shard, question, asked)
        if view is not None:
            yield run_pb2.GetTaskResponse(task=translate.task(view, self._desk.cluster_name))
            return
        if not live:
            run = await self._desk.must_be_archived(name.parent)
            task = await from_history(self._desk.history.task(run.uid, name.task))
            if task is not None:
                yield run_pb2.GetTaskResponse(task=task)
                return
        raise NotFound(f"{name.parent} has no task {name.task}")

    async def list_tasks(
        self, request: run_pb2.ListTasksRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.ListTasksResponse]:
        """RunService.ListTasks."""
        name = names.parse_run(request.run)
        shard = shard_of_run(name)
        size = page_size(request.page_size, DEFAULT_TASK_PAGE)
        states = frozenset(TaskState(state) for state in request.states)
        question = pages.filter_hash("tasks", request.run, sorted(states))
        start = _index(pages.read(request.page_token, question))

        def read(machine: RunShard) -> list[TaskView] | None:
            run = machine.run_by_id(name.namespace, name.run)
            return machine.tasks(run.uid, start, size + 1, states) if run is not None else None

        views = await self._desk.read(shard, read, asked)
        if views is not None:
            tasks: Iterable[run_pb2.TaskStatus] = (translate.task(view, self._desk.cluster_name) for view in views)
        else:
            run = await self._desk.must_be_archived(name)
            tasks = await from_history(self._desk.history.tasks(run.uid, start, size + 1, states))
        yield _task_page(tasks, size, question)

    # -- lists -------------------------------------------------------------------------------------------------------------

    async def list_runs(
        self, request: run_pb2.ListRunsRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.ListRunsResponse]:
        """RunService.ListRuns, at the replica that was asked: all shards, then history, so that a run which is archived
        meanwhile is seen in one of them."""
        namespace = request.namespace or names.DEFAULT_NAMESPACE
        size = page_size(request.page_size)
        states, labels = sorted(request.states), translate.pairs(request.labels)
        question = pages.filter_hash("runs", namespace, states, labels)
        after = pages.read(request.page_token, question)
        ask = {"namespace": namespace, "after": after, "limit": size, "states": states, "labels": labels}
        payloads = [json.dumps({**ask, "shard": shard}).encode() for shard in RUN_SHARDS]
        answers = await asyncio.gather(
            *(
                self._desk.forwarder.one(shard, LIST, payload, asked)
                for shard, payload in zip(RUN_SHARDS, payloads, strict=True)
            )
        )
        found = [run_pb2.ListRunsResponse.FromString(answer) for answer in answers]
        wanted = Wanted(namespace, frozenset(states), labels)
        past = await from_history(self._desk.history.runs(wanted, after, size))
        sources = [Page(each.runs, bool(each.next_page_token)) for each in found]
        page = merge([*sources, Page(past, len(past) == size)], size)
        token = pages.write(page.runs[-1].uid, question) if page.more else ""
        yield run_pb2.ListRunsResponse(runs=page.runs, next_page_token=token)

    async def _list_shard(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """One shard's part, at its owner: `next_page_token` is set if it goes on."""
        ask = json.loads(payload)
        shard, limit = str(ask["shard"]), int(ask["limit"])
        states, labels = frozenset(ask["states"]), tuple((key, value) for key, value in ask["labels"])

        def question(machine: RunShard) -> list[RunView]:
            of = (
                run
                for run in machine.runs(ask["namespace"])
                if run.uid > ask["after"]
                and (not states or run.state in states)
                and translate.matching(dict(run.labels), labels)
            )
            return list(itertools.islice(of, limit + 1))

        views = await self._desk.controller.read(shard, question, timeout=context.timeout)
        page = cut([translate.run(view, shard) for view in views], limit)
        yield run_pb2.ListRunsResponse(runs=page.runs, next_page_token="more" if page.more else "").SerializeToString()


def cut(runs: Sequence[run_pb2.Run], limit: int) -> Page:
    """The first runs, at most `limit` of them and PAGE_BYTES together, but at least one."""
    size = 0
    for place, run in enumerate(runs):
        size += run.ByteSize()
        if place >= limit or (place and size > PAGE_BYTES):
            return Page(runs[:place], more=True)
    return Page(runs, more=False)


def merge(sources: Sequence[Page], limit: int) -> Page:
    """Sources in order of uid as one. What lies beyond the end of an unfinished source may have gaps, so it waits for the next
    page. Of two with one uid the earlier source's stays."""
    ends = [page.runs[-1].uid for page in sources if page.more and page.runs]
    bound = min(ends, default="")
    runs: dict[str, run_pb2.Run] = {}
    left_out = False
    for page in sources:
        for run in page.runs:
            if bound and run.uid > bound:
                left_out = True
            else:
                runs.setdefault(run.uid, run)
    page = cut([runs[uid] for uid in sorted(runs)], limit)
    return Page(page.runs, more=page.more or left_out or bool(ends))


def check_name(request: run_pb2.GetRunRequest | run_pb2.WatchRunRequest, _now: float) -> None:
    """The name of a run. Raises InvalidField."""
    _check(request.name, "name", names.parse_run)


def check_task(request: run_pb2.GetTaskRequest, _now: float) -> None:
    """The name of a task. Raises InvalidField."""
    _check(request.name, "name", names.parse_task)


def check_cancel(request: run_pb2.CancelRunRequest, now: float) -> None:
    """A cancel. Raises InvalidField, RequestIdAhead."""
    check_request_id(request.request_id, now)
    _check(request.name, "name", names.parse_run)
    if len(request.reason) > MAX_REASON:
        raise invalid("reason", f"has {len(request.reason)} characters: use at most {MAX_REASON}")


def check_list_tasks(request: run_pb2.ListTasksRequest, _now: float) -> None:
    """A list of tasks; its token too, so that a bad one is refused before anybody is asked. Raises InvalidField."""
    _check(request.run, "run", names.parse_run)
    page_size(request.page_size, DEFAULT_TASK_PAGE)
    _check_states(request.states, _TASK_STATES)
    question = pages.filter_hash("tasks", request.run, sorted(TaskState(state) for state in set(request.states)))
    _index(pages.read(request.page_token, question))


def check_list_runs(request: run_pb2.ListRunsRequest, _now: float) -> None:
    """A list of runs. Raises InvalidField."""
    if request.namespace and (problem := names.id_problem(request.namespace)):
        raise invalid("namespace", problem)
    page_size(request.page_size)
    _check_states(request.states, _RUN_STATES)
    if found := names.labels_problem(dict(request.labels)):
        raise invalid(f'labels["{found[0]}"]' if found[0] else "labels", found[1])


def _check(text: str, field: str, parse: Callable[[str], object]) -> None:
    try:
        parse(text)
    except InvalidName as error:
        raise invalid(field, str(error)) from None


def _check_states(states: Iterable[int], known: frozenset[int]) -> None:
    for place, state in enumerate(states):
        if state not in known:
            raise invalid(f"states[{place}]", f"{state} is no state that this version knows")


def _index(after: str) -> int:
    """The index a token of a task list goes on at."""
    if not after:
        return 0
    if not after.isascii() or not after.isdigit() or len(after) > 9:
        raise invalid("page_token", "is not one that this service gave out")
    return int(after)


def _task_page(tasks: Iterable[run_pb2.TaskStatus], size: int, question: str) -> run_pb2.ListTasksResponse:
    """At most `size` tasks and PAGE_BYTES; `tasks` holds one more if there are more."""
    response = run_pb2.ListTasksResponse()
    used = 0
    for place, task in enumerate(tasks):
        used += task.ByteSize()
        if place >= size or (place and used > PAGE_BYTES):
            response.next_page_token = pages.write(str(task.index), question)
            break
        response.tasks.append(task)
    return response
