"""WatchRun: a run's events in order, without gaps, until it is final (PROTOCOL J10, J8).

Theory. A watch is a reader that comes again: it reads committed events above the last number it has, and sleeps until a commit
touches its run. Commits do not know watches; they ring a bell per run, and a watch that missed a ring looks again by itself.
So a slow watcher costs nothing but its own stream, and nothing is kept for it. When the shard goes elsewhere the read fails with
NotOwned, and the replica that was asked goes on at the new owner, after the last number it has passed on (`resume`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from baton import names
from baton.errors import WatchCompacted
from baton.time_limits import time_limit
from baton.v1 import run_pb2
from control_plane.controller import OwnedShard
from control_plane.core.commands import Outbox
from control_plane.core.shard import RunShard
from control_plane.core.views import RunEventView, RunView
from control_plane.services import translate
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import invalid
from control_plane.services.methods import Asked
from control_plane.services.runs import check_name

LOOK_AGAIN = 5.0
"""Seconds after which a watch looks without having been rung. It finds out so that its shard is gone, or that nobody listens."""

MESSAGE_CHANGES = 5000
"""Task changes in one message: about 500 KB. More would near the 4 MiB that clients receive, fewer cost messages."""

MESSAGE_EVENTS = 500
"""Events in one message, for those with few changes."""

MAX_CHANGES = 25_000
"""Changes shown of a single event: at 150 bytes each they stay under a message. An event with more (the cancel of a huge run)
is cut; ListTasks tells the rest."""


class Bells:
    """Who waits for which run. A `controller.Listener`."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], dict[asyncio.Event, None]] = {}
        """In the order of their coming: a set would wake them in the order of their addresses, another one in each process."""

    def taken(self, shard: OwnedShard) -> None:
        """Nobody watches a shard that was not here."""

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """Runs of this shard have new events."""
        if self._waiting:
            for uid in outbox.runs:
                for event in self._waiting.get((shard.id, uid), ()):
                    event.set()

    def dropped(self, shard: str) -> None:
        """Let everybody find out."""
        for (of, _), events in self._waiting.items():
            if of == shard:
                for event in events:
                    event.set()

    @contextmanager
    def waiting(self, shard: str, uid: str) -> Iterator[asyncio.Event]:
        """An event that is set when the run may have changed."""
        event = asyncio.Event()
        self._waiting.setdefault((shard, uid), {})[event] = None
        try:
            yield event
        finally:
            others = self._waiting[shard, uid]
            del others[event]
            if not others:
                del self._waiting[shard, uid]


class Watches:
    """RunService.WatchRun."""

    def __init__(self, desk: Desk, bells: Bells) -> None:
        self._desk, self._bells = desk, bells

    async def watch_run(
        self, request: run_pb2.WatchRunRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        """At the owner of the run's shard."""
        name = names.parse_run(request.name)
        shard = shard_of_run(name)
        view = await self._desk.read(shard, lambda machine: machine.run_by_id(name.namespace, name.run), asked)
        if view is None:
            async for response in self._archived(name, request.after_event):
                yield response
            return
        with self._bells.waiting(shard, view.uid) as rung:
            async for response in self._live(name, view.uid, request.after_event, rung, asked):
                yield response

    async def _live(
        self, name: names.RunName, uid: str, after: int, rung: asyncio.Event, asked: Asked
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        shard, first = shard_of_run(name), True
        while True:
            rung.clear()
            view, events, ids = await self._desk.read(shard, partial(_news, uid=uid, after=after), asked)
            if view is None:
                async for response in self._archived(name, after):
                    yield response
                return
            _check_number(after, view.event_number)
            if events is None:
                raise WatchCompacted(f"event {after + 1} of {name} is no longer kept: read the run and its tasks anew")
            messages = [
                translate.run_event(_bounded(event), ids.__getitem__, self._desk.cluster_name) for event in events
            ]
            run = translate.run(view, shard)
            if first and not messages:
                yield run_pb2.WatchRunResponse(run=run)
            for part in in_messages(messages):
                after = part[-1].number
                last = after == view.event_number and view.state.final
                yield run_pb2.WatchRunResponse(events=part, run=run if first or last else None)
                first = False
            first = False
            if view.state.final and after == view.event_number:
                return
            if not messages:
                await _wait(rung, LOOK_AGAIN)
            if asked.over:
                raise TimeoutError

    async def _archived(self, name: names.RunName, after: int) -> AsyncIterator[run_pb2.WatchRunResponse]:
        """A run in history: what is kept, and the end."""
        run = await self._desk.must_be_archived(name)
        _check_number(after, run.event_number)
        events = await from_history(self._desk.history.events(run.uid))
        kept = [event for event in events if event.number > after]
        if after < run.event_number and (not kept or kept[0].number != after + 1):
            raise WatchCompacted(f"event {after + 1} of {name} is no longer kept: read the run and its tasks anew")
        parts = list(in_messages(kept))
        for place, part in enumerate(parts):
            shown = run if place in (0, len(parts) - 1) else None
            yield run_pb2.WatchRunResponse(events=part, run=shown)
        if not parts:
            yield run_pb2.WatchRunResponse(run=run)


def check_watch(request: run_pb2.WatchRunRequest, now: float) -> None:
    """A watch. Raises InvalidField."""
    check_name(request, now)
    if request.after_event < 0:
        raise invalid("after_event", f"is {request.after_event}: use 0 for all events")


def go_on(request: run_pb2.WatchRunRequest, response: run_pb2.WatchRunResponse) -> None:
    """Change a watch so that it goes on after what was passed on."""
    if response.events:
        request.after_event = response.events[-1].number


def in_messages(events: Sequence[run_pb2.RunEvent]) -> Iterator[Sequence[run_pb2.RunEvent]]:
    """Events in parts that fit into messages."""
    start = changes = 0
    for place, event in enumerate(events):
        changes += len(event.changes)
        if place > start and (changes > MESSAGE_CHANGES or place - start >= MESSAGE_EVENTS):
            yield events[start:place]
            start, changes = place, len(event.changes)
    if events:
        yield events[start:]


def _news(machine: RunShard, uid: str, after: int) -> tuple[RunView | None, list[RunEventView] | None, dict[int, str]]:
    """The run, a bounded part of its events above `after`, and the ids of the tasks they speak of."""
    view = machine.run_by_uid(uid)
    if view is None:
        return None, None, {}
    events = machine.run_events(uid, after)
    if events is None:
        return view, None, {}
    part: list[RunEventView] = []
    changes = 0
    for event in events:
        changes += len(event.tasks)
        if part and (changes > MESSAGE_CHANGES or len(part) >= MESSAGE_EVENTS):
            break
        part.append(event)
    indices = {index for event in part for index in event.tasks[:MAX_CHANGES]}
    return view, part, machine.task_ids(uid, indices)


def _bounded(event: RunEventView) -> RunEventView:
    if len(event.tasks) <= MAX_CHANGES:
        return event
    return replace(
        event,
        tasks=event.tasks[:MAX_CHANGES],
        states=event.states[:MAX_CHANGES],
        ns=event.ns[:MAX_CHANGES],
        clusters=event.clusters[:MAX_CHANGES],
        reasons=event.reasons[:MAX_CHANGES],
    )


def _check_number(after: int, newest: int) -> None:
    if after > newest:
        raise invalid("after_event", f"is {after}, but the run's last event is {newest}")


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until `event`, at most `seconds`."""
    try:
        async with time_limit(seconds):
            await event.wait()
    except TimeoutError:
        pass
