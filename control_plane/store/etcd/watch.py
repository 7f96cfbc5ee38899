"""One watch over a stream that may break at any time.

Theory: a watch is a position and nothing else: the revision up to which everything was delivered. Whatever happens to
the stream, it is opened again right after that position, so no change is lost or repeated. What makes clients hang for
ever (reliability.md section 6, pitfalls 12 and 19) is met by two rules: every message is asked whether it ends the
watch, the creation reply too; and silence is never trusted: after `STALL` seconds the server is asked for a sign of
life, and after as many more the watch moves to another endpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from baton.clock import Clock
from baton.internal import etcdwire_pb2 as wire
from baton.time_limits import time_limit
from control_plane.store.base import Compacted, WatchBatch, WatchEvent
from control_plane.store.etcd import codec
from control_plane.store.etcd.channel import WATCH, Lane, WireError

STALL = 5.0
"""Seconds of silence before a sign of life is asked for, and again before it is given up. Shorter costs a message per
watch that often; longer delays what caches learn after a member froze."""

FIRST_PAUSE = 0.05
MAX_PAUSE = 2.0
"""Seconds between two openings of a broken stream: doubled each time, from short (a leader change takes 1 s) to a rate
that does not hurt a server which is down."""

_log = logging.getLogger(__name__)


class EtcdWatch:
    """One watch of the keys under `prefix`; `strip` bytes are cut from their names; `stall` as `STALL`. Ends when
    `closed` says so."""

    def __init__(
        self, lane: Lane, clock: Clock, prefix: bytes, *, strip: int, stall: float, closed: Callable[[], bool]
    ) -> None:
        self._lane = lane
        self._clock = clock
        self._prefix = prefix
        self._strip = strip
        self._stall = stall
        self._closed = closed

    async def batches(self, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Batches from that revision on, over as many streams as it takes. Raises Compacted."""
        wanted = from_revision
        pause = FIRST_PAUSE
        while not self._closed():
            generation = self._lane.generation
            try:
                async with aclosing(self._one_stream(wanted)) as stream:
                    async for batch in stream:
                        wanted = batch.revision + 1
                        pause = FIRST_PAUSE
                        yield batch
            except WireError as error:
                if self._closed():
                    return
                self._lane.failed(WireError(error.code, error.detail, generation))
                _log.info("watch stream broke; it is opened again", extra={"cause": str(error), "revision": wanted})
            await self._clock.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    async def _one_stream(self, wanted: int) -> AsyncGenerator[WatchBatch, None]:
        """Batches of one stream. Raises Compacted, and WireError when the stream is over."""
        events: list[WatchEvent] = []
        async with aclosing(self._messages(wanted)) as messages:
            async for message in messages:
                if message.canceled:
                    if message.compact_revision:
                        raise Compacted(message.compact_revision)
                    raise WireError(grpc.StatusCode.UNAVAILABLE, message.cancel_reason or "canceled")
                if message.created:
                    # Its header speaks of the store, not of what was delivered. A store that is not yet where we were
                    # has been restored from a backup (PROTOCOL J12) and would keep us waiting for revisions that are
                    # other changes by then; or it is a member that lags, and listing again does no harm.
                    if message.header.revision < wanted - 1:
                        raise Compacted(message.header.revision)
                    continue
                # An old revision can come again after a reconnect; it was delivered then.
                new = (codec.event(item, self._strip) for item in message.events if item.kv.mod_revision >= wanted)
                events.extend(new)
                if message.fragment:
                    continue
                # With events the header may be ahead of what follows, so the position is the last event's. Without
                # any it is a progress answer: everything up to the header was delivered.
                reached = events[-1].kv.mod_revision if events else message.header.revision
                if reached >= wanted:
                    wanted = reached + 1
                    batch, events = WatchBatch(reached, tuple(events)), []
                    yield batch

    async def _messages(self, wanted: int) -> AsyncGenerator[wire.EtcdWatchResponse, None]:
        """Messages of one stream. Raises WireError on its end, on failure, and on silence."""
        create = wire.EtcdWatchCreateRequest(
            key=self._prefix,
            range_end=codec.prefix_end(self._prefix),
            start_revision=wanted,
            progress_notify=True,
            fragment=True,
        )
        reading: asyncio.Future[Any] | None = None
        call = self._lane.stream(WATCH)
        try:
            await self._write(call, wire.EtcdWatchRequest(create_request=create))
            asked = False
            while True:
                reading = reading or asyncio.ensure_future(call.read())
                done, _ = await asyncio.wait((reading,), timeout=self._stall)
                if not done and asked:
                    raise WireError(grpc.StatusCode.DEADLINE_EXCEEDED, "no sign of life")
                if not done:
                    asked = True
                    progress = wire.EtcdWatchProgressRequest()
                    await self._write(call, wire.EtcdWatchRequest(progress_request=progress))
                    continue
                with self._lane.translated():
                    message = reading.result()
                reading, asked = None, False
                if message is grpc.aio.EOF:
                    raise WireError(grpc.StatusCode.UNAVAILABLE, "the stream ended")
                yield message
        finally:
            call.cancel()
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)

    async def _write(self, call: Any, request: wire.EtcdWatchRequest) -> None:
        with self._lane.translated():
            try:
                async with time_limit(self._stall):
                    await call.write(request)
            except TimeoutError as error:
                late = "the request could not be written in time"
                raise WireError(grpc.StatusCode.DEADLINE_EXCEEDED, late) from error
