"""FollowLogs: captured output of one attempt, fetched from its cluster piece by piece (J10 does not hold it: clusters do).

Theory. Output stays where it was written. The replica that is asked finds out from the run's owner which cluster holds the
attempt, and asks its agent through whichever replica serves it; the agent's answer names the asking replica in its request id.
A request is idempotent: it says from which byte, so a lost chunk or a moved session is answered by asking again. An empty
answer is the end of what there is; with `follow` we go on until the attempt itself has ended.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from baton import names
from baton.errors import BatonError, NotFound
from baton.telemetry.logs import about
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, run_pb2
from control_plane.core.model import AttemptState, TaskState
from control_plane.core.shard import RunShard
from control_plane.core.views import TaskView
from control_plane.peers import CallContext, Calls
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import invalid
from control_plane.services.methods import Asked, decode

log = logging.getLogger(__name__)

FIND = "/baton.internal/FindAttempt"

PIECE_BYTES = 256 * 1024
"""Bytes asked for at one time: bounds what waits here for a slow reader."""

CHUNKS = 64
"""Chunks of one answer that wait for their reader; agents send far fewer for PIECE_BYTES."""

ANSWER_SECONDS = 5.0
"""Silence after which an agent is asked again: its stream may have moved."""

TRIES = 3
"""Silent answers in a row before the cluster counts as not to be reached."""

FOLLOW_PAUSE = 0.5
"""Seconds between looks at output that has not grown. Smaller costs a message to the agent each; larger is seen as lag."""

_ENDED = frozenset(AttemptState) - {AttemptState.PLACED, AttemptState.RUNNING}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attempt's output is. `ended`: no more will come. `n` 0: there is no attempt yet."""

    run_uid: str
    task: int
    n: int
    nonce: str
    cluster: str
    ended: bool


class Logs:
    """RunService.FollowLogs."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._open: dict[str, asyncio.Queue[agent_pb2.LogChunk]] = {}

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(FIND, self._find)

    def receive(self, chunk: agent_pb2.LogChunk) -> None:
        """A chunk for a reader of this replica. What nobody waits for is dropped, and asked for again."""
        waiting = self._open.get(chunk.request.partition(":")[2])
        if waiting is not None and not waiting.full():
            waiting.put_nowait(chunk)

    async def follow_logs(
        self, request: run_pb2.FollowLogsRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.FollowLogsResponse]:
        """At the replica that was asked."""
        offset, request_n = request.offset, request.attempt
        while True:
            place = await self._place(request, request_n, asked)
            if place.n:
                # The newest attempt is chosen once; a later one is another output.
                request_n = place.n
                grew = False
                async with aclosing(self._piece(place, offset, asked)) as chunks:
                    async for chunk in chunks:
                        grew = True
                        yield run_pb2.FollowLogsResponse(offset=offset, data=chunk, attempt=place.n)
                        offset += len(chunk)
                if grew:
                    continue
                if place.ended or not request.follow:
                    return
            elif place.ended or not request.follow:
                raise NotFound(f"{request.task} has no such attempt")
            if asked.over:
                raise TimeoutError
            await self._desk.clock.sleep(FOLLOW_PAUSE)

    async def _place(self, request: run_pb2.FollowLogsRequest, n: int, asked: Asked) -> Place:
        """Raises NotFound."""
        payload = run_pb2.FollowLogsRequest(task=request.task, attempt=n).SerializeToString()
        shard = shard_of_run(names.parse_task(request.task).parent)
        fields: dict[str, Any] = json.loads(await self._desk.forwarder.one(shard, FIND, payload, asked))
        return Place(**fields)

    async def _piece(self, place: Place, offset: int, asked: Asked) -> AsyncGenerator[bytes, None]:
        """What there is from `offset`, at most PIECE_BYTES; nothing if it has not grown. Raises NotFound, BatonError."""
        tries = 0
        while True:
            session = self._desk.view.sessions.get(place.cluster)
            if session is not None and not session.ended:
                end = offset + PIECE_BYTES
                async with aclosing(self._ask(place, session.replica, offset, end - offset)) as chunks:
                    async for chunk in chunks:
                        if chunk.error:
                            fields = about(place.run_uid, task=place.task, attempt=place.n, detail=chunk.error)
                            log.info("an agent has no output", extra=fields)
                            if place.ended:
                                raise NotFound(f"its cluster keeps no output of attempt {place.n} any more")
                            return
                        if chunk.offset == offset and chunk.data:
                            offset += len(chunk.data)
                            yield chunk.data
                        if chunk.end:
                            return
            tries += 1
            if tries >= TRIES or asked.over:
                name = self._desk.cluster_name(place.cluster)
                raise BatonError(
                    "NOT_OWNED",
                    f"cluster {name}, which has the output, cannot be reached; its output can be read when it is back",
                )
            await self._desk.clock.sleep(FOLLOW_PAUSE)

    async def _ask(
        self, place: Place, replica: str, offset: int, limit: int
    ) -> AsyncGenerator[agent_pb2.LogChunk, None]:
        """Chunks of one request, until one says `end`, or silence."""
        token = self._desk.entropy.token(8)
        chunks = self._open[token] = asyncio.Queue(CHUNKS)
        attempt = agent_pb2.AttemptRef(run_uid=place.run_uid, task=place.task, n=place.n, nonce=place.nonce)
        ask = agent_pb2.LogRequest(
            request=f"{self._desk.router.replica}:{token}", attempt=attempt, offset=offset, limit=limit
        )
        self._desk.router.to_cluster(replica, place.cluster, "", agent_pb2.SessionResponse(log_request=ask))
        try:
            while True:
                async with time_limit(ANSWER_SECONDS):
                    chunk = await chunks.get()
                yield chunk
                if chunk.end:
                    return
        except TimeoutError:
            return
        finally:
            del self._open[token]

    async def _find(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """At the owner of the run's shard: where the attempt is."""
        desk = self._desk
        request: run_pb2.FollowLogsRequest = decode(run_pb2.FollowLogsRequest, payload)
        name = names.parse_task(request.task)
        shard = shard_of_run(name.parent)
        asked = Asked(FIND, context.principal, desk.clock.boot() + context.timeout, desk.clock, shard)

        def question(machine: RunShard) -> tuple[str, TaskView | None]:
            run = machine.run_by_id(name.namespace, name.run)
            return (run.uid, machine.task(run.uid, name.task)) if run is not None else ("", None)

        uid, task = await desk.read(shard, question, asked)
        if task is not None:
            place = _live(uid, task, request.attempt)
        elif uid:
            raise NotFound(f"{name.parent} has no task {name.task}")
        else:
            place = await self._archived(name, request.attempt)
        fields = {each: getattr(place, each) for each in Place.__slots__}
        yield json.dumps(fields).encode()

    async def _archived(self, name: names.TaskName, n: int) -> Place:
        """Of a run in history."""
        run = await self._desk.must_be_archived(name.parent)
        task = await from_history(self._desk.history.task(run.uid, name.task))
        if task is None:
            raise NotFound(f"{name.parent} has no task {name.task}")
        attempt = next((each for each in reversed(task.attempts) if n in (0, each.n)), None)
        if attempt is None:
            return Place(run.uid, task.index, 0, "", "", ended=True)
        cluster = self._desk.cluster_uid(attempt.cluster) or attempt.cluster
        nonce = await from_history(self._desk.history.nonce(run.uid, task.index, attempt.n))
        return Place(run.uid, task.index, attempt.n, nonce, cluster, ended=True)


def _live(uid: str, task: TaskView, n: int) -> Place:
    attempt = next((each for each in reversed(task.attempts) if n in (0, each.id.n)), None)
    if attempt is None:
        # A number that was never given out will be, only if the task goes on and the next one is meant.
        over = task.state >= TaskState.SUCCEEDED or n != 0
        return Place(uid, task.index, 0, "", "", ended=over)
    ended = attempt.state in _ENDED and not attempt.stopping
    return Place(uid, task.index, attempt.id.n, attempt.id.nonce, attempt.cluster, ended=ended)


def check_logs(request: run_pb2.FollowLogsRequest, _now: float) -> None:
    """A request for output. Raises InvalidField."""
    try:
        names.parse_task(request.task)
    except names.InvalidName as error:
        raise invalid("task", str(error)) from None
    if request.attempt < 0:
        raise invalid("attempt", f"is {request.attempt}: use 0 for the newest")
    if request.offset < 0:
        raise invalid("offset", f"is {request.offset}: use 0 for the beginning")
