"""The agent as a process: real gRPC on loopback, a real guard, real workloads."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.clock import SystemClock
from baton.leases import PROFILES, to_millis
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, agent_pb2_grpc, graph_pb2
from cluster_agent.transport import TransportClosed
from cluster_agent.transport_grpc import GrpcTransport
from tests.contract.executor_worlds import end_guards, guards_under

ROOT = Path(__file__).resolve().parents[2]
EPOCH = agent_pb2.ShardEpoch(incarnation=1, revision=1)
REF = agent_pb2.AttemptRef(run_uid="run", task=0, n=1, nonce="nonce")
WAIT = 40.0


class Server(agent_pb2_grpc.AgentServiceServicer):
    """Welcomes every agent, answers every heartbeat, and keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[agent_pb2.SessionRequest] = []
        self.changed = asyncio.Condition()
        self.down: asyncio.Queue[agent_pb2.SessionResponse] = asyncio.Queue(100)
        self.sessions = 0

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[agent_pb2.SessionResponse]:  # noqa: N802
        self.sessions += 1
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                yield await self.down.get()
        finally:
            reader.cancel()

    async def _read(self, requests: Any) -> None:
        async for message in requests:
            if message.HasField("hello"):
                lease = agent_pb2.LeaseValues(**to_millis(PROFILES["fast"]))  # type: ignore[arg-type]
                welcome = agent_pb2.Welcome(cluster_uid="cu", generation=1, lease=lease, federation_uid="fu")
                self.down.put_nowait(agent_pb2.SessionResponse(welcome=welcome))
            if message.HasField("heartbeat"):
                ack = agent_pb2.HeartbeatAck(seq=message.heartbeat.seq, server_wall_ms=1_000_000)
                self.down.put_nowait(agent_pb2.SessionResponse(heartbeat_ack=ack))
            async with self.changed:
                self.heard.append(message)
                self.changed.notify_all()

    async def hear(self, test: Callable[[agent_pb2.SessionRequest], bool]) -> agent_pb2.SessionRequest:
        async with time_limit(WAIT), self.changed:
            await self.changed.wait_for(lambda: any(test(message) for message in self.heard))
        return next(message for message in self.heard if test(message))

    def dispatch(self, *argv: str) -> None:
        shape = agent_pb2.DispatchTemplate(
            process=graph_pb2.ProcessTask(argv=argv, env={"GREETING": "hello"}),
            resources=graph_pb2.Resources(cpu_millis=1000),
        )
        work = agent_pb2.Dispatch(
            attempt=REF,
            task_id="build",
            run="namespaces/n/runs/r",
            fence="1.1",
            deadline_wall_ms=1_000_000 + 60_000,
            traceparent="00-trace-span-01",
        )
        self.down.put_nowait(
            agent_pb2.SessionResponse(
                dispatches=agent_pb2.Dispatches(
                    shard="s0", epoch=EPOCH, generation=1, dispatch_no=1, templates=[shape], dispatches=[work]
                )
            )
        )


@pytest.fixture
async def served() -> AsyncIterator[tuple[Server, str]]:
    service, server = Server(), grpc.aio.server()
    agent_pb2_grpc.add_AgentServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def agent(served: tuple[Server, str], tmp_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    flags = ["--cluster", "eu", "--endpoint", served[1], "--directory", str(tmp_path), "--cpus", "2", "--drain"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster_agent", *flags, "--profile", "fast", cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    yield process
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    await process.wait()
    await end_guards(guards_under(tmp_path), SystemClock())


async def test_a_real_task_through_a_real_agent(served: tuple[Server, str], agent: asyncio.subprocess.Process) -> None:
    service, _ = served
    await service.hear(lambda message: message.HasField("heartbeat"))
    names = ["RUN", "TASK", "ATTEMPT", "FENCE", "CLUSTER", "DEADLINE"]
    program = (
        "import json, os\n"
        f"names = {['BATON_' + name for name in names] + ['TRACEPARENT', 'GREETING']}\n"
        "open(os.environ['BATON_RESULT'], 'w').write(json.dumps([os.environ[name] for name in names]))\n"
        "print('some output')\n"
    )
    service.dispatch(sys.executable, "-c", program)
    report = (await service.hear(lambda message: bool(message.reports.finished))).reports.finished[0]
    assert report.outcome == agent_pb2.OUTCOME_SUCCEEDED, report.message
    run, task, attempt, fence, cluster, deadline, trace, greeting = json.loads(report.result)
    assert (run, task, attempt, fence) == ("namespaces/n/runs/r", "build", "1", "1.1")
    assert (cluster, deadline, trace, greeting) == ("eu", "1060.000", "00-trace-span-01", "hello")
    request = agent_pb2.LogRequest(request="q", attempt=REF)
    service.down.put_nowait(agent_pb2.SessionResponse(log_request=request))
    assert (await service.hear(lambda message: message.log.request == "q")).log.data == b"some output\n"
    acks = agent_pb2.ReportAcks(shard="s0", epoch=EPOCH, attempts=[REF])
    service.down.put_nowait(agent_pb2.SessionResponse(report_acks=acks))
    agent.send_signal(signal.SIGTERM)
    await service.hear(lambda message: message.HasField("goodbye"))
    async with time_limit(WAIT):
        _, errors = await agent.communicate()
    assert agent.returncode == 0, errors.decode()
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert all({"time", "level", "message", "cluster"} <= line.keys() for line in lines)
    assert "The session stands." in {line["message"] for line in lines}


async def test_bad_configuration_is_exit_code_2() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster_agent", "--cluster", "eu", cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"endpoints is missing" in errors


async def test_a_dead_endpoint_is_followed_by_the_next(served: tuple[Server, str], unused_tcp_port: int) -> None:
    transport = GrpcTransport([f"127.0.0.1:{unused_tcp_port}", served[1]])
    with pytest.raises(TransportClosed):
        await transport.connect()
    stream = await transport.connect()
    await stream.send([agent_pb2.SessionRequest(hello=agent_pb2.Hello(cluster="eu"))])
    assert (await stream.receive())[0].welcome.generation == 1
    await stream.close()
    with pytest.raises(TransportClosed):
        await stream.send([agent_pb2.SessionRequest()])
