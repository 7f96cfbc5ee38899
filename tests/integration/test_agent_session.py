"""The whole agent with parts in memory: a scripted control plane on the other end of the transport, a fake host below."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.clock import SystemClock, SystemEntropy
from baton.leases import PROFILES, LeaseValues, check, to_millis
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, graph_pb2
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.disk import MemoryDisk
from cluster_agent.executors.base import AttemptKey, StartRequest
from cluster_agent.executors.fake import FakeExecutor, FakeHost
from cluster_agent.transport import Stream, TransportClosed

# The real arithmetic at a fifth of the fast profile's pace: F comes after 1.8 s, which a loaded machine does not lose.
LEASE = LeaseValues("fifth", 0.4, 1.8, 1.0, 3.0, 1.0, pause=0.4, in_flight=0.1, rpc=0.4, election=0.2)
EPOCH = agent_pb2.ShardEpoch(incarnation=1, revision=7)
WAIT = 20.0


class ScriptedStream:
    """One stream, with the control plane's hand on the other end."""

    endpoint = "memory"

    def __init__(self) -> None:
        self.down: asyncio.Queue[agent_pb2.SessionResponse | None] = asyncio.Queue(1000)
        self.heard: list[agent_pb2.SessionRequest] = []
        self.changed = asyncio.Event()
        self.closed = False
        self.answering = True
        self.seconds_each = 0.0

    async def send(self, messages: Sequence[agent_pb2.SessionRequest]) -> None:
        if self.closed:
            raise TransportClosed("closed")
        for message in messages:
            if self.seconds_each:
                await asyncio.sleep(self.seconds_each)
            self.heard.append(message)
            if self.answering and message.HasField("heartbeat"):
                self.say(heartbeat_ack=agent_pb2.HeartbeatAck(seq=message.heartbeat.seq, server_wall_ms=1_000_000))
        self.changed.set()

    async def receive(self) -> Sequence[agent_pb2.SessionResponse]:
        message = None if self.closed else await self.down.get()
        if message is None:
            raise TransportClosed("closed")
        return (message,)

    async def close(self) -> None:
        self.closed = True
        self.down.put_nowait(None)
        self.changed.set()

    def say(self, **message: object) -> None:
        self.down.put_nowait(agent_pb2.SessionResponse(**message))  # type: ignore[arg-type]

    async def hear(self, test: Callable[[agent_pb2.SessionRequest], bool]) -> agent_pb2.SessionRequest:
        """The first message that passes, waiting for it."""
        async with time_limit(WAIT):
            while True:
                for message in self.heard:
                    if test(message):
                        return message
                assert not self.closed, "the stream was closed"
                self.changed.clear()
                await self.changed.wait()

    def welcome(self, generation: int = 1, *, resumed: bool = False) -> None:
        lease = agent_pb2.LeaseValues(**to_millis(LEASE))  # type: ignore[arg-type]
        self.say(
            welcome=agent_pb2.Welcome(
                cluster_uid="cu", generation=generation, resumed=resumed, lease=lease, federation_uid="fu"
            )
        )

    def dispatch(self, task: int, *argv: str, generation: int = 1, number: int = 1, **template: object) -> None:
        shape = agent_pb2.DispatchTemplate(
            process=graph_pb2.ProcessTask(argv=argv),
            resources=graph_pb2.Resources(cpu_millis=1000),
            **template,  # type: ignore[arg-type]
        )
        work = agent_pb2.Dispatch(attempt=ref(task), task_id=f"t{task}", run="namespaces/n/runs/r", fence="1.1")
        self.say(
            dispatches=agent_pb2.Dispatches(
                shard="s0", epoch=EPOCH, generation=generation, dispatch_no=number, templates=[shape], dispatches=[work]
            )
        )


class ScriptedTransport:
    """Hands out streams in the order in which the agent dials."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[ScriptedStream] = asyncio.Queue(100)
        self.reachable = True
        self.learned: list[str] = []

    async def connect(self) -> Stream:
        if not self.reachable:
            raise TransportClosed("unreachable")
        stream = ScriptedStream()
        self.streams.put_nowait(stream)
        return stream

    def learn(self, endpoints: Sequence[str]) -> None:
        self.learned.extend(endpoints)

    async def close(self) -> None:
        pass

    async def accept(self, generation: int = 1, *, resumed: bool = False) -> ScriptedStream:
        """The next stream, welcomed."""
        async with time_limit(WAIT):
            stream = await self.streams.get()
        await stream.hear(lambda message: message.HasField("hello"))
        stream.welcome(generation, resumed=resumed)
        return stream


class Site:
    """What outlives an agent: host, disk, the way out."""

    def __init__(self) -> None:
        check(LEASE)
        self.clock = SystemClock()
        self.host = FakeHost(self.clock)
        self.disk = MemoryDisk()
        self.transport = ScriptedTransport()
        self.boot_id = "boot-1"
        self.executor: Callable[[FakeHost], FakeExecutor] = FakeExecutor

    @asynccontextmanager
    async def agent(self, lease: LeaseValues = LEASE, *, drain_seconds: float = 5) -> AsyncIterator[Agent]:
        config = AgentConfig(
            "eu", ("memory",), Path("unused"), (NodeSpec(2000),), lease=lease, drain_seconds=drain_seconds
        )
        agent = Agent(
            config,
            self.clock,
            SystemEntropy(),
            self.transport,
            self.executor(self.host),
            self.disk,
            boot_id=self.boot_id,
        )
        running = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            async with time_limit(WAIT):
                await running


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    await made.host.close()


def ref(task: int) -> agent_pb2.AttemptRef:
    return agent_pb2.AttemptRef(run_uid="run", task=task, n=1, nonce="nonce")


def finished(message: agent_pb2.SessionRequest) -> bool:
    return bool(message.reports.finished)


def stopped(message: agent_pb2.SessionRequest) -> bool:
    return bool(message.reports.stopped)


def acks(*tasks: int) -> agent_pb2.ReportAcks:
    return agent_pb2.ReportAcks(shard="s0", epoch=EPOCH, attempts=[ref(task) for task in tasks])


async def eventually(test: Callable[[], bool]) -> None:
    async with time_limit(WAIT):
        while not test():  # noqa: ASYNC110 - what is looked at has no event of its own
            await asyncio.sleep(0.01)


async def test_a_task_from_dispatch_to_acknowledged_report(site: Site) -> None:
    async with site.agent() as agent:
        stream = await site.transport.accept()
        hello = stream.heard[0].hello
        assert (hello.cluster, hello.boot_id, hello.last_generation) == ("eu", "boot-1", 0)
        assert hello.shapes[0].total_cpu_millis == 2000
        stream.dispatch(0, "fake", "--seconds", "0.01", "--result", "42")
        report = (await stream.hear(finished)).reports.finished[0]
        assert report.attempt == ref(0)
        assert report.outcome == agent_pb2.OUTCOME_SUCCEEDED
        assert report.result == b"42"
        assert (await stream.hear(lambda message: message.HasField("receipt"))).receipt.dispatch_no == 1
        stream.say(report_acks=acks(0))
        machine = agent.reconciler.machine if agent.reconciler else None
        assert machine is not None
        await eventually(lambda: machine.all_settled)


async def test_f3_nothing_starts_without_an_acknowledged_heartbeat(site: Site) -> None:
    async with site.agent():
        async with time_limit(WAIT):
            stream = await site.transport.streams.get()
        stream.answering = False
        stream.welcome()
        stream.dispatch(0, "fake", "--seconds", "30")
        beat = await stream.hear(lambda message: message.HasField("heartbeat"))
        await stream.hear(lambda message: message.HasField("receipt"))
        assert site.host.living() == []
        stream.say(heartbeat_ack=agent_pb2.HeartbeatAck(seq=beat.heartbeat.seq, server_wall_ms=1))
        await eventually(lambda: len(site.host.living()) == 1)


async def test_f5_unanswered_work_is_fenced_reported_and_the_queue_is_void(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        for task in range(3):
            stream.dispatch(task, "fake", "--seconds", "30", number=task + 1)
        await eventually(lambda: len(site.host.living()) == 2)
        site.transport.reachable = False
        stream.answering = False
        await stream.close()
        await eventually(lambda: site.host.living() == [])
        assert len(site.host.intervals) == 2
        site.transport.reachable = True
        again = await site.transport.accept(resumed=True)
        listed = again.heard[0].hello.inventory[0]
        assert dict(zip(listed.task, listed.phase, strict=True))[2] == agent_pb2.ATTEMPT_PHASE_VOID
        report = (await again.hear(finished)).reports.finished[0]
        assert report.outcome == agent_pb2.OUTCOME_FENCED
        assert len(site.host.intervals) == 2
        again.dispatch(2, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)


async def test_s2_silence_changes_the_stream_before_f_and_disturbs_nothing(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        stream.answering = False
        again = await site.transport.accept(resumed=True)
        assert again.heard[0].hello.last_generation == 1
        await again.hear(lambda message: message.HasField("heartbeat"))
        await asyncio.sleep(LEASE.fence)  # what the old stream's answers bought is over; the new one's count
        assert len(site.host.living()) == 1


async def test_f8_a_stop_is_reported_once_nothing_is_left(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30", grace_ms=100)
        await eventually(lambda: len(site.host.living()) == 1)
        stream.say(stops=agent_pb2.Stops(shard="s0", epoch=EPOCH, attempts=[ref(0), ref(5)]))
        await stream.hear(lambda message: ref(0) in message.reports.stopped)
        assert site.host.living() == []
        await stream.hear(lambda message: ref(5) in message.reports.stopped)
        stream.dispatch(5, "fake", "--seconds", "30", number=2)
        await stream.hear(lambda message: message.receipt.dispatch_no == 2)
        assert site.host.living() == []


async def test_g1_an_agent_that_restarts_adopts_what_runs_and_starts_nothing_twice(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "0.3", "--result", "once")
        stream.dispatch(1, "fake", "--seconds", "30", number=2)
        await eventually(lambda: len(site.host.living()) == 2)
        uid = stream.heard[0].hello.journal_uid
    async with site.agent():
        again = await site.transport.accept(resumed=True)
        hello = again.heard[0].hello
        assert (hello.journal_uid, hello.last_generation, hello.federation_uid) == (uid, 1, "fu")
        again.dispatch(0, "fake", "--seconds", "30", number=1)
        again.dispatch(1, "fake", "--seconds", "30", number=2)
        assert (await again.hear(finished)).reports.finished[0].result == b"once"
        assert len(site.host.intervals) == 2


async def test_f4_a_dead_guard_means_lost_and_never_a_second_start(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        site.host.kill_guard()
        report = (await stream.hear(finished)).reports.finished[0]
        assert report.outcome == agent_pb2.OUTCOME_LOST
        stream.dispatch(0, "fake", "--seconds", "30", number=2)
        await stream.hear(lambda message: message.receipt.dispatch_no == 2)
        assert site.host.living() == []
        assert len(site.host.intervals) == 1


async def test_s6_after_a_power_cut_another_boot_id_and_losses_are_reported(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
    site.host.reboot()
    site.boot_id = "boot-2"
    async with site.agent():
        again = await site.transport.accept(generation=2)
        assert again.heard[0].hello.boot_id == "boot-2"
        assert (await again.hear(finished)).reports.finished[0].outcome == agent_pb2.OUTCOME_LOST


async def test_g2_a_guard_that_does_not_tick_is_said_and_renews_nothing(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        await stream.hear(lambda message: message.HasField("heartbeat"))
        site.host.freeze_guard()
        silent = await stream.hear(lambda message: message.heartbeat.guard_silent)
        assert all(shape.cpu_millis == 0 for shape in silent.heartbeat.shapes) or silent.heartbeat.seq > 0
        again = await site.transport.accept(resumed=True)  # F came, though every heartbeat was answered
        site.host.thaw_guard()
        await again.hear(lambda message: message.HasField("heartbeat") and not message.heartbeat.guard_silent)


async def test_s5_a_drain_kills_reports_and_says_goodbye(site: Site) -> None:
    async with site.agent() as agent:
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        agent.stop(drain=True)
        report = (await stream.hear(finished)).reports.finished[0]
        assert report.outcome == agent_pb2.OUTCOME_STOPPED
        assert not any(message.HasField("goodbye") for message in stream.heard)
        stream.say(report_acks=acks(0))
        await eventually(lambda: any(message.HasField("goodbye") for message in stream.heard))
        assert site.host.living() == []


async def test_a_full_disk_stops_new_work_but_not_reports(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "0.3")
        await eventually(lambda: len(site.host.living()) == 1)
        site.disk.capacity = 0
        assert (await stream.hear(finished)).reports.finished[0].outcome == agent_pb2.OUTCOME_SUCCEEDED
        stream.dispatch(1, "fake", "--seconds", "30", number=2)
        await asyncio.sleep(0.3)
        assert site.host.living() == []
        site.disk.capacity = None
        async with time_limit(WAIT):
            while not site.host.living():  # J7: the owner sends again until it is receipted
                stream.dispatch(1, "fake", "--seconds", "30", number=2)
                await asyncio.sleep(0.2)
        assert len(site.host.intervals) == 2


async def test_output_is_sent_in_chunks_and_misses_are_said(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30", "--output", "x" * 100_000)
        await eventually(lambda: len(site.host.living()) == 1)
        stream.say(log_request=agent_pb2.LogRequest(request="a", attempt=ref(0), offset=10, limit=0))
        await stream.hear(lambda message: message.log.request == "a" and message.log.end)
        chunks = [message.log for message in stream.heard if message.log.request == "a"]
        assert len(chunks) == 2
        assert sum(len(chunk.data) for chunk in chunks) == 99_990
        assert chunks[1].offset == 10 + len(chunks[0].data)
        nameless = agent_pb2.AttemptRef(run_uid="run", task=9, n=1)
        stream.say(log_request=agent_pb2.LogRequest(request="b", attempt=nameless))
        assert "nonce" in (await stream.hear(lambda message: message.log.request == "b")).log.error


@pytest.mark.parametrize("reason", ["GENERATION_ENDED", "SECOND_INSTANCE"])
async def test_a_refusal_ends_the_stream_and_the_agent_comes_back(site: Site, reason: str) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.say(refusal=agent_pb2.Refusal(reason=reason, message="no", retry_after_ms=10))
        again = await site.transport.accept(generation=2)
        beat = await again.hear(lambda message: message.HasField("heartbeat"))
        assert beat.heartbeat.generation == 2


async def test_f5_unsafe_timing_is_not_accepted(site: Site) -> None:
    async with site.agent():
        async with time_limit(WAIT):
            stream = await site.transport.streams.get()
        await stream.hear(lambda message: message.HasField("hello"))
        unsafe = agent_pb2.LeaseValues(**to_millis(replace(LEASE, lost=0.1)))  # type: ignore[arg-type]
        stream.say(welcome=agent_pb2.Welcome(generation=1, lease=unsafe, federation_uid="fu"))
        await eventually(lambda: stream.closed)
        assert not any(message.HasField("heartbeat") for message in stream.heard)


async def test_f5_a_second_welcome_ends_the_stream_and_answers_of_one_generation_never_serve_another(
    site: Site,
) -> None:
    async with site.agent():
        stream = await site.transport.accept(generation=1)
        stream.answering = False
        beat = await stream.hear(lambda message: message.HasField("heartbeat"))
        stream.welcome(generation=2)
        stream.say(heartbeat_ack=agent_pb2.HeartbeatAck(seq=beat.heartbeat.seq, server_wall_ms=1))
        stream.dispatch(0, "fake", "--seconds", "30", generation=2)
        await eventually(lambda: stream.closed)
        assert site.host.living() == []


async def test_g2_a_guard_that_is_frozen_at_f_is_killed_with_its_work_though_no_stream_is_left(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        site.transport.reachable = False
        await stream.close()
        site.host.freeze_guard()
        await eventually(lambda: site.host.living() == [])
        site.transport.reachable = True
        again = await site.transport.accept(resumed=True)
        assert (await again.hear(finished)).reports.finished[0].outcome == agent_pb2.OUTCOME_LOST


async def test_g2_what_waits_for_a_dead_guards_work_starts_at_the_next_guard(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        for task in range(3):
            stream.dispatch(task, "fake", "--seconds", "30", number=task + 1)
        await eventually(lambda: len(site.host.living()) == 2)
        await stream.hear(lambda message: message.receipt.dispatch_no == 3)
        site.host.kill_guard()
        await eventually(lambda: len(site.host.living()) == 1)
        assert len(site.host.intervals) == 3
        assert not any(message.reports.rejected for message in stream.heard)


async def test_s5_no_goodbye_is_said_while_work_may_live(site: Site) -> None:
    async with site.agent(drain_seconds=0.3) as agent:
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        site.host.freeze_guard()
        agent.stop(drain=True)
        await eventually(lambda: stream.closed)
    assert len(site.host.living()) == 1
    assert not any(message.HasField("goodbye") for message in stream.heard)


async def test_s5_after_a_goodbye_no_session_is_opened_again(site: Site) -> None:
    async with site.agent() as agent:
        stream = await site.transport.accept()
        await stream.hear(lambda message: message.HasField("heartbeat"))
        agent.stop(drain=True)
        await stream.hear(lambda message: message.HasField("goodbye"))
        await asyncio.sleep(0.2)
        assert not stream.closed  # our end could overtake the goodbye
        stream.say(refusal=agent_pb2.Refusal(reason="GENERATION_ENDED", message="goodbye"))
        await eventually(lambda: stream.closed)
    assert site.transport.streams.empty()


async def test_f5_an_agent_without_its_journal_cannot_stretch_the_lease_of_what_runs(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(site.host.living()) == 1)
        site.transport.reachable = False
    site.disk = MemoryDisk()
    async with site.agent(PROFILES["patient"]):
        await asyncio.sleep(LEASE.fence + LEASE.kill)
        assert site.host.living() == []


class JournalReader(FakeExecutor):
    """What stood in the journal, and what of it would survive a power cut, when the executor was called."""

    def __init__(self, host: FakeHost, disk: MemoryDisk) -> None:
        super().__init__(host)
        self._journal = disk
        self.at_start: list[bytes] = []
        self.at_stop: list[bytes] = []

    async def start(self, requests: Sequence[StartRequest]) -> None:
        self.at_start.append(self._journal.read("journal") or b"")
        await super().start(requests)

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:
        self._journal.crash()
        self.at_stop.append(self._journal.read("journal") or b"")
        await super().stop(keys, grace_seconds=grace_seconds)


async def test_f4_a_start_is_in_the_journal_before_the_executor_hears_of_it_and_a_stop_is_even_synced(
    site: Site,
) -> None:
    reader = JournalReader(site.host, site.disk)
    site.executor = lambda _host: reader
    async with site.agent():
        stream = await site.transport.accept()
        stream.dispatch(0, "fake", "--seconds", "30")
        await eventually(lambda: len(reader.at_start) == 1)
        assert b'"t":"starting","key":"run.0.1.nonce"' in reader.at_start[0]
        stream.say(stops=agent_pb2.Stops(shard="s0", epoch=EPOCH, attempts=[ref(0)]))
        await eventually(lambda: len(reader.at_stop) == 1)
        assert b'"t":"epoch","shard":"s0"' in reader.at_stop[0]
        assert b'"t":"tombstoned","key":"run.0.1.nonce"' in reader.at_stop[0]


async def test_f4_a_start_that_the_journal_did_not_take_waits_for_it_and_then_happens_once(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        await stream.hear(lambda message: message.HasField("heartbeat"))
        await asyncio.sleep(0.1)
        site.disk.capacity = 0
        stream.dispatch(0, "fake", "--seconds", "30")
        await asyncio.sleep(0.4)
        assert site.host.living() == []
        assert not any(message.HasField("receipt") for message in stream.heard)
        site.disk.capacity = None
        await eventually(lambda: len(site.host.living()) == 1)
        assert b'"t":"starting"' in (site.disk.read("journal") or b"")
        assert len(site.host.intervals) == 1


async def test_f5_heartbeats_overtake_what_waits_for_a_slow_stream(site: Site) -> None:
    async with site.agent():
        stream = await site.transport.accept()
        await stream.hear(lambda message: message.HasField("heartbeat"))
        stream.seconds_each = 0.01
        for number in range(1, 301):  # each is answered with a receipt: three seconds of them, more than F
            stream.say(dispatches=agent_pb2.Dispatches(shard="s0", epoch=EPOCH, generation=1, dispatch_no=number))
        await stream.hear(lambda message: message.receipt.dispatch_no == 300)
        assert not stream.closed
        assert site.transport.streams.empty()


class Impatient(SystemClock):
    """Does not wait out what is longer than 30 s, but takes note."""

    def __init__(self) -> None:
        self.long: list[float] = []

    async def sleep(self, seconds: float) -> None:
        if seconds > 30:
            self.long.append(seconds)
        await super().sleep(0.01 if seconds > 30 else seconds)


async def test_a_refusal_cannot_send_an_agent_away_for_good(site: Site) -> None:
    clock = site.clock = Impatient()
    async with site.agent():
        stream = await site.transport.accept()
        stream.say(refusal=agent_pb2.Refusal(reason="DRAINING", message="no", retry_after_ms=10**12))
        await site.transport.accept(resumed=True)
    assert max(clock.long) < 62
