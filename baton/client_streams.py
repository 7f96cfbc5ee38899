"""Streams that outlive the replica that serves them: a run's events and an attempt's output.

Theory (PROTOCOL J10): a watch resumes by the run's own event number and a log by its byte offset; both are the
receiver's knowledge, so any replica can go on where another died. What arrives twice is dropped by number, what is
missing is asked for again; the user of these iterators sees each event once, in order, without gaps. A stream that is
silent for too long is taken for a frozen replica: a plain read through another replica tells whether there was nothing
to say.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar, cast

import grpc

from baton.client_call import Caller, Endpoint, Refusals, error_of, may_retry
from baton.errors import BatonError, Internal
from baton.time_limits import time_limit
from baton.v1 import admin_pb2, run_pb2

Message = TypeVar("Message")

STREAM_SECONDS = 600.0
"""Deadline of one stream; then it is opened again. Without one, a half-open connection would live for ever."""

SILENCE_SECONDS = 15.0
"""Silence after which a stream is opened elsewhere. Shorter: needless streams for quiet runs; longer: that much of a
frozen replica's silence is shown to the user as calm."""

MAX_GAPS = 3
"""Streams in a row that may skip an event before that is called a fault of the server."""

FINAL_STATES = frozenset(
    {
        run_pb2.RUN_STATE_SUCCEEDED,
        run_pb2.RUN_STATE_FAILED,
        run_pb2.RUN_STATE_CANCELLED,
        run_pb2.RUN_STATE_DEADLINE_EXCEEDED,
    }
)
"""States that a run never leaves."""


class _Gap(Exception):
    """A stream skipped an event."""


class Patience:
    """How long a stream may fail to be had before its user is told; any sign of life starts it anew."""

    def __init__(self, caller: Caller, seconds: float) -> None:
        self._caller = caller
        self._seconds = seconds
        self._failures = 0
        self.refusals = Refusals(caller)
        self.renew()

    def renew(self) -> None:
        """Something was heard."""
        self._end = self._caller.clock.boot() + self._seconds
        self._failures = 0

    async def fail(self, endpoint: Endpoint, error: BatonError) -> None:
        """Turns to the next replica after a pause; raises `error` when patience is at its end."""
        self._failures += 1
        if self._caller.clock.boot() >= self._end or self.refusals.hopeless:
            raise error
        self._caller.next_endpoint(endpoint)
        await self._caller.clock.sleep(self._caller.backoff(self._failures, error.retry_after))


async def watch_run(
    caller: Caller, name: str, *, after_event: int, patience: float
) -> AsyncIterator[run_pb2.WatchRunResponse]:
    """The run's events after a number, each once, in order, until the run is final. Raises BatonError."""
    last = after_event
    gaps = 0
    waiting = Patience(caller, patience)
    while True:
        endpoint = caller.endpoint
        request = run_pb2.WatchRunRequest(name=name, after_event=last)
        stream = endpoint.runs.WatchRun(request, timeout=STREAM_SECONDS)
        try:
            async for message in _fresh(stream, last):
                waiting.renew()
                caller.answered = True
                if message.events:
                    last, gaps = message.events[-1].number, 0
                if message.events or message.HasField("run"):
                    yield message
                if message.HasField("run") and message.run.state in FINAL_STATES and message.run.event_number <= last:
                    return
            error: BatonError = Internal(f"the watch of {name} ended although the run is not final")
        except _Gap:
            gaps += 1
            error = Internal(f"the events of {name} after {last} are skipped by every replica asked")
            if gaps >= MAX_GAPS:
                raise error from None
        except TimeoutError:
            run = await _read_run(caller, endpoint, name, patience)
            waiting.renew()
            if run.state in FINAL_STATES and run.event_number <= last:
                yield run_pb2.WatchRunResponse(run=run)
                return
            continue
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
            waiting.refusals.see(endpoint, failure)
            if not may_retry(failure):
                raise error from None
        finally:
            stream.cancel()
        await waiting.fail(endpoint, error)


async def _fresh(
    stream: grpc.aio.UnaryStreamCall[run_pb2.WatchRunRequest, run_pb2.WatchRunResponse], last: int
) -> AsyncIterator[run_pb2.WatchRunResponse]:
    """A stream's messages without events up to `last`. Raises _Gap, TimeoutError after silence, AioRpcError."""
    while (message := await next_message(stream)) is not None:
        fresh = [event for event in message.events if event.number > last]
        for event in fresh:
            if event.number != last + 1:
                raise _Gap
            last = event.number
        if len(fresh) == len(message.events):
            yield message
        else:
            yield run_pb2.WatchRunResponse(events=fresh, run=message.run if message.HasField("run") else None)


async def next_message(stream: grpc.aio.UnaryStreamCall[Any, Message]) -> Message | None:
    """The next message, None at the end. Raises TimeoutError after too long a silence, AioRpcError."""
    async with time_limit(SILENCE_SECONDS):
        message = await stream.read()
    return None if message is grpc.aio.EOF else cast("Message", message)


async def _read_run(caller: Caller, silent: Endpoint, name: str, patience: float) -> run_pb2.Run:
    """The run, read through another replica than the silent one, if there is one. Raises BatonError."""
    caller.next_endpoint(silent)

    async def send(endpoint: Endpoint, seconds: float) -> run_pb2.GetRunResponse:
        return await endpoint.runs.GetRun(run_pb2.GetRunRequest(name=name), timeout=seconds)

    return (await caller.call(send, timeout=patience)).run


async def follow_logs(
    caller: Caller, task: str, *, attempt: int, offset: int, follow: bool, patience: float
) -> AsyncIterator[run_pb2.FollowLogsResponse]:
    """An attempt's output from an offset, each byte once, in order. Raises BatonError.

    With `attempt` 0 the newest attempt is chosen once, by the server, and kept over reconnects.
    """
    waiting = Patience(caller, patience)
    while True:
        endpoint = caller.endpoint
        request = run_pb2.FollowLogsRequest(task=task, attempt=attempt, offset=offset, follow=follow)
        stream = endpoint.runs.FollowLogs(request, timeout=STREAM_SECONDS)
        try:
            while (piece := await next_message(stream)) is not None:
                attempt = attempt or piece.attempt
                caller.answered = True
                seen = offset - piece.offset
                if seen > 0:
                    piece = run_pb2.FollowLogsResponse(offset=offset, data=piece.data[seen:], attempt=piece.attempt)
                if piece.data:
                    waiting.renew()
                    offset = piece.offset + len(piece.data)
                    yield piece
            return
        except TimeoutError:
            await _read_task(caller, endpoint, task, patience)
            waiting.renew()
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
            waiting.refusals.see(endpoint, failure)
            if not may_retry(failure):
                raise error from None
            await waiting.fail(endpoint, error)
        finally:
            stream.cancel()


async def _read_task(caller: Caller, silent: Endpoint, name: str, patience: float) -> run_pb2.TaskStatus:
    """The task, read through another replica than the silent one, if there is one. Raises BatonError."""
    caller.next_endpoint(silent)

    async def send(endpoint: Endpoint, seconds: float) -> run_pb2.GetTaskResponse:
        return await endpoint.runs.GetTask(run_pb2.GetTaskRequest(name=name), timeout=seconds)

    return (await caller.call(send, timeout=patience)).task


async def backup(caller: Caller) -> AsyncIterator[bytes]:
    """A backup of the store, in order, from one replica; it cannot be resumed. Raises BatonError."""
    stream = caller.endpoint.admin.Backup(admin_pb2.BackupRequest(), timeout=STREAM_SECONDS)
    try:
        async for piece in stream:
            yield piece.data
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from None
    finally:
        stream.cancel()
