"""One stream of a session, from Hello to its end: four loops in one task group, of which whichever fails ends all.

Rules: S1 (Hello, Welcome), S2 and F5 (heartbeats, counted from before they are sent), G2 (a silent guard is told, and
its heartbeats renew nothing).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from baton.clock import Clock, Entropy
from baton.leases import LeaseValues, UnsafeLease
from baton.v1 import agent_pb2
from cluster_agent import translate
from cluster_agent.core import events as on
from cluster_agent.core.model import AttemptKey
from cluster_agent.executors.base import Executor
from cluster_agent.reconciler import Reconciler
from cluster_agent.translate import BadMessage, HelloFacts
from cluster_agent.transport import Stream, Transport
from cluster_agent.waiting import within
from cluster_agent.workload import outer

log = logging.getLogger("baton.agent")

WELCOME_SECONDS = 10.0
"""From Hello to Welcome, which needs a committed put; an etcd failover fits in."""

OUTBOX = 4096
"""Messages that may wait for a slow stream; beyond that the stream is dropped, and what was not acknowledged goes
again."""

SENT_AT_ONCE = 32
"""Messages that leave together, as one where the replica reads bundles: one for each shard. More would keep a heartbeat behind them
on a slow stream (F5)."""

RECEIPT_SECONDS = 0.1
"""How long a receipt waits for something else to travel with. Smaller: a message of its own for each dispatch; larger comes near
the two seconds after which an owner sends again."""

EARLY_SECONDS = 0.001
"""By how much a timer may be early: clocks round. Smaller, and a reminder of the last femtosecond sets itself again and again."""

GUARD_PATIENCE_SECONDS = 1.0
"""How long a heartbeat waits for a tick of the guard, which ticks several times a second, before it says that it is
silent."""

LOG_CHUNK_BYTES = 64 << 10
LOG_BYTES = 4 << 20
LOG_READERS = 8
"""One chunk, one request, requests at a time: output must not crowd out heartbeats."""

LOG_SECONDS = 10.0


UNSAFE_PAUSE_SECONDS = 5.0
"""After a Welcome whose timing breaks F5: an operator has to act, so hurry would only fill logs."""


REFUSED_SECONDS = 60.0
"""Longest pause that a refusal may ask for: every wait has an end, and a wrong number must not put a cluster out of use.
Smaller, and replicas could not hold off agents while they start."""


class StreamDropped(Exception):
    """We ended the stream; the text says why. `pause`: least seconds before the next one."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Parts:
    """What a session is made of. `lease`: what does not travel in a Welcome, and the timing until there is one."""

    transport: Transport
    reconciler: Reconciler
    executor: Executor
    clock: Clock
    entropy: Entropy
    facts: HelloFacts
    lease: LeaseValues


class GuardWatch:
    """Whether the guard still ticks (G2). Outlives streams."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last_tick = float("-inf")
        self._silent = False

    async def ticked(self) -> bool:
        """Whether the guard gave a sign of life since the last heartbeat; waits a moment for it (G2)."""
        patience = min(GUARD_PATIENCE_SECONDS, self._parts.reconciler.machine.link.fence_seconds / 3)
        until = self._parts.clock.boot() + patience
        while (tick := self._parts.executor.ticked_at()) <= self._last_tick and self._parts.clock.boot() < until:
            await self._parts.clock.sleep(patience / 10)
        ticked = tick > self._last_tick
        self._last_tick = max(tick, self._last_tick)
        if self._silent == ticked:
            self._silent = not ticked
            log.warning("The guard's ticking changed.", extra={"silent": not ticked})
            await self._parts.reconciler.post(on.GuardSilence(silent=not ticked))
        return ticked


class Conversation:
    """One stream. Four loops in one task group: whichever fails ends all."""

    def __init__(self, parts: Parts, guard: GuardWatch, stream: Stream, number: int) -> None:
        self.number = number
        self.generation: int | None = None
        self.answered = False
        self._parts = parts
        self._guard = guard
        self._stream = stream
        self._out: asyncio.Queue[agent_pb2.SessionRequest | None] = asyncio.Queue(OUTBOX)
        """None: there is nothing here but a heartbeat to send."""
        self._pulse: agent_pb2.SessionRequest | None = None
        """The heartbeat to be sent next; it overtakes what waits, or a backlog of reports would end the lease (F5)."""
        self._receipts: dict[str, agent_pb2.SessionRequest] = {}
        """The newest of each shard, which says all that the earlier ones said."""
        self._receipts_since = 0.0
        self._reminded = False
        self._dropped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._welcome = asyncio.Event()
        self.ended = asyncio.Event()
        self._values = parts.lease
        self._beats: dict[int, float] = {}
        self._seq = 0
        self._answered_at = parts.clock.boot()
        self._log_room = asyncio.Semaphore(LOG_READERS)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write())
                tasks.create_task(self._read(tasks))
                tasks.create_task(self._beat())
                tasks.create_task(self._watch())
        finally:
            self.ended.set()

    def put(self, message: agent_pb2.SessionRequest | None) -> None:
        try:
            self._out.put_nowait(message)
        except asyncio.QueueFull:
            self.drop(StreamDropped("the stream is too slow for what has to be said"))

    def put_receipt(self, shard: str, message: agent_pb2.SessionRequest) -> None:
        """It goes with what is said next, or by itself after a moment."""
        if not self._receipts:
            self._receipts_since = self._parts.clock.boot()
        self._receipts[shard] = message
        if not self._reminded:
            self._remind(RECEIPT_SECONDS)

    def _remind(self, seconds: float) -> None:
        self._reminded = True
        self._parts.clock.later(seconds, self._send_receipts)

    def _send_receipts(self) -> None:
        """Those that waited long enough, if nothing took them along. One reminder is under way, however often that happens."""
        self._reminded = False
        if self._receipts and not self.ended.is_set():
            left = self._receipts_since + RECEIPT_SECONDS - self._parts.clock.boot()
            if left > EARLY_SECONDS:
                self._remind(left)
            else:
                self.put(None)

    def drop(self, why: StreamDropped) -> None:
        if not self._dropped.done():
            self._dropped.set_exception(why)

    async def sent(self) -> None:
        """Everything put so far has left."""
        await self._out.join()

    async def _watch(self) -> None:
        try:
            await self._dropped
        finally:
            self._dropped.cancel()

    async def _write(self) -> None:
        while True:
            message = await self._out.get()
            pulse, self._pulse = self._pulse, None
            taken = [message]
            while not self._out.empty() and len(taken) < SENT_AT_ONCE:
                taken.append(self._out.get_nowait())
            receipts, self._receipts = self._receipts, {}
            batch = [each for each in (pulse, *receipts.values(), *taken) if each is not None]
            if batch:
                await self._stream.send(batch)
            for _ in taken:
                self._out.task_done()

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            for message in await self._stream.receive():
                await self._take(message, tasks)

    async def _take(self, message: agent_pb2.SessionResponse, tasks: asyncio.TaskGroup) -> None:
        match message.WhichOneof("message"):
            case "heartbeat_ack":
                await self._acknowledged(message.heartbeat_ack)
            case "welcome":
                await self._welcomed(message.welcome)
            case "refusal":
                refusal = message.refusal
                pause = min(max(0, refusal.retry_after_ms) / 1000, REFUSED_SECONDS)
                raise StreamDropped(f"{refusal.reason}: {refusal.message}", pause)
            case "log_request":
                if self._log_room.locked():
                    self.put(translate.log_chunk(message.log_request.request, 0, end=True, error="too many readers"))
                else:
                    tasks.create_task(self._answer_log(message.log_request))
            case _:
                try:
                    event = translate.owner_event(self.number, message)
                except BadMessage as error:
                    raise StreamDropped(f"bad message: {error}") from error
                if event is not None:
                    await self._parts.reconciler.post(event)

    async def _welcomed(self, welcome: agent_pb2.Welcome) -> None:
        if self.generation is not None:  # answers to heartbeats on their way would count for another generation (F5)
            raise StreamDropped("a second Welcome on one stream")
        try:
            self._values = translate.lease_values(welcome, self._parts.lease)
        except UnsafeLease as error:
            raise StreamDropped(str(error), UNSAFE_PAUSE_SECONDS) from error
        self.generation = welcome.generation
        extra = {"generation": welcome.generation, "resumed": welcome.resumed, "replica": welcome.replica}
        log.info("The session stands.", extra={**extra, "endpoint": self._stream.endpoint})
        self._parts.transport.learn(list(welcome.replicas))
        await self._parts.reconciler.post(translate.welcomed(self.number, welcome, self._values))
        self._answered_at = self._parts.clock.boot()
        self._welcome.set()

    # --- heartbeats (S2, F5, G2) --------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        clock = self._parts.clock
        await within(clock, WELCOME_SECONDS, self._welcome.wait())
        while True:
            ticked = await self._guard.ticked()
            stall = 2 * self._values.heartbeat + self._values.rpc
            if clock.boot() - self._answered_at > stall:
                raise StreamDropped(f"no answer for {stall:.1f} s; another replica may give one")
            self._seq += 1
            vitals = self._parts.reconciler.machine.vitals()
            now = clock.boot()  # before it is sent: whatever delays it only makes the lease shorter
            if ticked:
                self._beats[self._seq] = now
            self._pulse = translate.heartbeat(
                vitals, seq=self._seq, generation=self.generation or 0, guard_silent=not ticked
            )
            self.put(None)
            await clock.sleep(self._values.heartbeat)

    async def _acknowledged(self, ack: agent_pb2.HeartbeatAck) -> None:
        self._answered_at = self._parts.clock.boot()
        sent = self._beats.get(ack.seq)
        if sent is None or self.generation is None:
            return  # a silent guard's, or one we never sent
        self.answered = True
        self._parts.reconciler.heartbeat_seconds = self._answered_at - sent
        self._beats = {seq: at for seq, at in self._beats.items() if seq > ack.seq}
        event = on.HeartbeatAcked(self.number, self.generation, sent, ack.server_wall_ms)
        await self._parts.reconciler.post(event)

    # --- output -------------------------------------------------------------------------------------------------------

    async def _answer_log(self, request: agent_pb2.LogRequest) -> None:
        """Send what was asked for, at most LOG_BYTES; the last chunk has `end`. The asker goes on from where it
        ended."""
        async with self._log_room:
            offset = max(0, request.offset)
            left = min(request.limit, LOG_BYTES) if request.limit > 0 else LOG_BYTES
            try:
                key = self._key(request.attempt)
                while True:
                    reading = self._parts.executor.read_log(outer(key), offset, min(left, LOG_CHUNK_BYTES))
                    data, _ = await within(self._parts.clock, LOG_SECONDS, reading)
                    left -= len(data)
                    end = left <= 0 or len(data) < min(left + len(data), LOG_CHUNK_BYTES)
                    self.put(translate.log_chunk(request.request, offset, data, end=end))
                    if end:
                        return
                    offset += len(data)
                    await self.sent()
            except (OSError, LookupError, BadMessage) as error:
                self.put(translate.log_chunk(request.request, offset, end=True, error=str(error) or "no such output"))

    def _key(self, ref: agent_pb2.AttemptRef) -> AttemptKey:
        if ref.nonce:
            return translate.read_key(ref)
        key = self._parts.reconciler.machine.find(ref.run_uid, ref.task, ref.n)
        if key is None:
            raise BadMessage("this attempt is not held any more; its nonce is needed to find its output")
        return key
