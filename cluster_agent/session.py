"""The loop that keeps a session with the control plane (PROTOCOL S1, S2, F5, G2).

For ever: dial the next endpoint; say Hello with the inventory the machine gives; on Welcome send a heartbeat every h; bring
what arrives to the machine and what the machine wants said to the stream; when the stream ends, for whatever reason, wait a
little (jittered, growing while no Welcome comes) and begin again. The queue, the lease and the work are the machine's.

* The send time of a heartbeat is read *before* it is sent; only its acknowledgement renews anything (F5).
* A heartbeat leaves only if the guard has ticked since the last one; else it says `guard_silent`, and its acknowledgement
  renews nothing, so that F comes as if nobody had answered (G2).
* No answer for a while, though F is far: another replica may be better off, so the stream is changed early (S2).
"""

from __future__ import annotations

import asyncio
import logging

from baton.clock import Clock, Entropy
from baton.leases import LeaseValues, UnsafeLease
from baton.v1 import agent_pb2
from cluster_agent import translate
from cluster_agent.core import events as on
from cluster_agent.core.commands import Action, DropStream, SendHello, SendReceipt, SendReports
from cluster_agent.executors.base import AttemptKey, Executor
from cluster_agent.reconciler import Reconciler
from cluster_agent.translate import BadMessage, HelloFacts
from cluster_agent.transport import Stream, Transport, TransportClosed
from cluster_agent.waiting import within

log = logging.getLogger("baton.agent")

CONNECT_SECONDS = 5.0
"""To dial one endpoint; several must be tried within F."""

WELCOME_SECONDS = 10.0
"""From Hello to Welcome, which needs a committed put; an etcd failover fits in."""

BACKOFF_SECONDS = 0.2
BACKOFF_MOST_SECONDS = 5.0
"""First and longest pause between streams, with full jitter. Longer would eat F of the fast profile; shorter would make a
thousand agents a storm on a replica that comes up."""

OUTBOX = 4096
"""Messages that may wait for a slow stream; beyond that the stream is dropped, and what was not acknowledged goes again."""

GUARD_PATIENCE_SECONDS = 1.0
"""How long a heartbeat waits for a tick of the guard, which ticks several times a second, before it says that it is silent."""

LOG_CHUNK_BYTES = 64 << 10
LOG_BYTES = 4 << 20
LOG_READERS = 8
"""One chunk, one request, requests at a time: output must not crowd out heartbeats."""

LOG_SECONDS = 10.0


class StreamDropped(Exception):
    """We ended the stream; the text says why. `pause`: least seconds before the next one."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Session:
    """Keeps one session; `run` is the loop, `send` is where the reconciler's actions come in."""

    def __init__(
        self,
        transport: Transport,
        reconciler: Reconciler,
        executor: Executor,
        clock: Clock,
        entropy: Entropy,
        *,
        facts: HelloFacts,
        lease: LeaseValues,
    ) -> None:
        """`lease`: what does not travel in a Welcome, and the timing until there is one."""
        self._transport = transport
        self._reconciler = reconciler
        self._executor = executor
        self._clock = clock
        self._entropy = entropy
        self._facts = facts
        self._lease = lease
        self._number = 0
        self._conversation: _Conversation | None = None
        self._guard_silent = False
        self.last_tick = float("-inf")

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            pause = 0.0
            welcomed = False
            try:
                stream = await within(self._clock, CONNECT_SECONDS, self._transport.connect())
            except (TransportClosed, TimeoutError) as error:
                log.warning("The control plane cannot be reached.", extra={"cause": str(error)})
            else:
                welcomed, pause = await self._converse(stream)
            failures = 0 if welcomed else failures + 1
            bound = min(BACKOFF_MOST_SECONDS, BACKOFF_SECONDS * 2 ** min(failures, 10))
            await self._clock.sleep(pause + self._entropy.uniform() * bound)

    async def _converse(self, stream: Stream) -> tuple[bool, float]:
        """One stream from Hello to its end: whether there was a Welcome, and the pause that was asked for."""
        self._number += 1
        number = self._number
        talk = self._conversation = _Conversation(self, stream, number)
        pause = 0.0
        try:
            await self._reconciler.post(on.StreamOpened(number))
            await talk.run()
        except* StreamDropped as group:
            pause = max(each.pause for each in group.exceptions if isinstance(each, StreamDropped))
            log.warning("The stream was given up.", extra={"stream": number, "cause": str(group.exceptions[0])})
        except* (TransportClosed, TimeoutError) as lost:
            log.warning("The stream was lost.", extra={"stream": number, "cause": str(lost.exceptions[0])})
        finally:
            self._conversation = None
            await stream.close()
        await self._reconciler.post(on.StreamClosed(number))
        return talk.generation is not None, pause

    def send(self, action: Action) -> None:
        """What the machine wants said. Never waits; what is for a stream that is gone is dropped (it goes again)."""
        talk = self._conversation
        if talk is None or getattr(action, "stream", talk.number) != talk.number:
            return
        match action:
            case SendHello():
                talk.put(translate.hello(action, self._facts, self._reconciler.machine.vitals()))
            case SendReports():
                for message in translate.reports(action):
                    talk.put(message)
            case SendReceipt():
                talk.put(translate.receipt(action))
            case DropStream(_, reason):
                talk.drop(StreamDropped(reason))

    async def goodbye(self, seconds: float) -> bool:
        """Say that all work is dead (S5), and wait until it has left; False if there is no session to say it in."""
        talk = self._conversation
        if talk is None or talk.generation is None:
            return False
        talk.put(translate.goodbye(talk.generation))
        try:
            await within(self._clock, seconds, talk.sent())
        except TimeoutError:
            return False
        return True

    async def guard_ticked(self) -> bool:
        """Whether the guard gave a sign of life since the last heartbeat; waits a moment for it (G2)."""
        until = self._clock.boot() + GUARD_PATIENCE_SECONDS
        while (tick := self._executor.ticked_at()) <= self.last_tick and self._clock.boot() < until:
            await self._clock.sleep(GUARD_PATIENCE_SECONDS / 10)
        ticked = tick > self.last_tick
        self.last_tick = max(tick, self.last_tick)
        if self._guard_silent == ticked:
            self._guard_silent = not ticked
            log.warning("The guard's ticking changed.", extra={"silent": not ticked})
            await self._reconciler.post(on.GuardSilence(silent=not ticked))
        return ticked


class _Conversation:
    """One stream. Four loops in one task group: whichever fails ends all."""

    def __init__(self, session: Session, stream: Stream, number: int) -> None:
        self.number = number
        self.generation: int | None = None
        self._s = session
        self._stream = stream
        self._out: asyncio.Queue[agent_pb2.SessionRequest] = asyncio.Queue(OUTBOX)
        self._dropped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._welcome = asyncio.Event()
        self._values = session._lease
        self._beats: dict[int, float] = {}
        self._seq = 0
        self._answered_at = session._clock.boot()
        self._log_room = asyncio.Semaphore(LOG_READERS)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write())
            tasks.create_task(self._read(tasks))
            tasks.create_task(self._beat())
            tasks.create_task(self._watch())

    def put(self, message: agent_pb2.SessionRequest) -> None:
        try:
            self._out.put_nowait(message)
        except asyncio.QueueFull:
            self.drop(StreamDropped("the stream is too slow for what has to be said"))

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
            batch = [await self._out.get()]
            while not self._out.empty():
                batch.append(self._out.get_nowait())
            await self._stream.send(batch)
            for _ in batch:
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
                raise StreamDropped(f"{refusal.reason}: {refusal.message}", max(0, refusal.retry_after_ms) / 1000)
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
                    await self._s._reconciler.post(event)

    async def _welcomed(self, welcome: agent_pb2.Welcome) -> None:
        try:
            self._values = translate.lease_values(welcome, self._s._lease)
        except UnsafeLease as error:
            raise StreamDropped(str(error), BACKOFF_MOST_SECONDS) from error
        self.generation = welcome.generation
        extra = {"generation": welcome.generation, "resumed": welcome.resumed, "replica": welcome.replica}
        log.info("The session stands.", extra={**extra, "endpoint": self._stream.endpoint})
        self._s._transport.learn(list(welcome.replicas))
        await self._s._reconciler.post(translate.welcomed(self.number, welcome, self._values))
        self._answered_at = self._s._clock.boot()
        self._welcome.set()

    # --- heartbeats (S2, F5, G2) --------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        clock = self._s._clock
        await within(clock, WELCOME_SECONDS, self._welcome.wait())
        while True:
            ticked = await self._s.guard_ticked()
            stall = 2 * self._values.heartbeat + self._values.rpc
            if clock.boot() - self._answered_at > stall:
                raise StreamDropped(f"no answer for {stall:.1f} s; another replica may give one")
            self._seq += 1
            vitals = self._s._reconciler.machine.vitals()
            now = clock.boot()  # before it is sent: whatever delays it only makes the lease shorter
            if ticked:
                self._beats[self._seq] = now
            message = translate.heartbeat(
                vitals, seq=self._seq, generation=self.generation or 0, guard_silent=not ticked
            )
            self.put(message)
            await clock.sleep(self._values.heartbeat)

    async def _acknowledged(self, ack: agent_pb2.HeartbeatAck) -> None:
        self._answered_at = self._s._clock.boot()
        sent = self._beats.get(ack.seq)
        if sent is None or self.generation is None:
            return  # a silent guard's, or one we never sent
        self._beats = {seq: at for seq, at in self._beats.items() if seq > ack.seq}
        event = on.HeartbeatAcked(self.number, self.generation, sent, ack.server_wall_ms)
        await self._s._reconciler.post(event)

    # --- output -------------------------------------------------------------------------------------------------------

    async def _answer_log(self, request: agent_pb2.LogRequest) -> None:
        """Send what was asked for, at most LOG_BYTES; the last chunk has `end`. The asker goes on from where it ended."""
        async with self._log_room:
            offset = max(0, request.offset)
            left = min(request.limit, LOG_BYTES) if request.limit > 0 else LOG_BYTES
            try:
                key = self._key(request.attempt)
                while True:
                    reading = self._s._executor.read_log(key, offset, min(left, LOG_CHUNK_BYTES))
                    data, _ = await within(self._s._clock, LOG_SECONDS, reading)
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
        key = self._s._reconciler.machine.find(ref.run_uid, ref.task, ref.n)
        if key is None:
            raise BadMessage("this attempt is not held any more; its nonce is needed to find its output")
        return key
