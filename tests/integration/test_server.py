"""A replica as a process on a real etcd, and as a listener under mutual TLS: how it comes up, who may connect, how it leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.client import AsyncClient
from baton.client_call import Tls
from baton.clock import SystemClock, SystemEntropy
from baton.errors import Denied, Draining
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, agent_pb2_grpc, run_pb2
from control_plane import archiver
from control_plane.config import BadConfig, TlsPaths
from control_plane.history import MemoryHistory
from control_plane.server import GrpcServer, Identity, Listener, Parts, Replica
from control_plane.services.identity import Role, identify, parse
from control_plane.store.keeper import TaskLeaseKeeper
from control_plane.store.memory import MemoryEtcd, MemoryStore
from control_plane.tls import Reloader
from lab.etcd_server import EtcdServer
from tests.certificates import Authority
from tests.contract.executor_worlds import end_guards, guards_under
from tests.integration.replicas import CLOCK, rig, spec, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


# -- processes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@dataclass
class Process:
    """One replica."""

    popen: subprocess.Popen[bytes]
    port_file: Path
    log: Path

    def address(self) -> str:
        end = time.monotonic() + 30
        while not self.port_file.exists():
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        return self.port_file.read_text().strip()

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


class Processes:
    """Starts replicas, and ends every one of them by its own handle."""

    def __init__(self, etcd: EtcdServer, directory: Path) -> None:
        self._etcd, self._directory = etcd, directory
        self._all: list[Process] = []

    def start(self, name: str, *flags: str) -> Process:
        port_file, log = self._directory / f"{name}.port", self._directory / f"{name}.log"
        base = ["--replica", name, "--history", str(self._directory / "history.db"), "--port-file", str(port_file)]
        etcd = ["--etcd", self._etcd.endpoint, "--etcd-prefix", f"{self._directory.name}/"]
        with log.open("wb") as out:
            popen = subprocess.Popen([sys.executable, "-m", "control_plane", *base, *etcd, *flags], stderr=out)
        self._all.append(Process(popen, port_file, log))
        return self._all[-1]

    def close(self) -> None:
        for process in self._all:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait()


@pytest.fixture
def processes(etcd: EtcdServer, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(etcd, tmp_path)
    yield made
    made.close()


async def test_two_processes_make_a_federation_and_one_leaves_in_order(processes: Processes) -> None:
    one, two = processes.start("r1"), processes.start("r2")
    addresses = [one.address(), two.address()]
    async with AsyncClient(addresses) as client:
        made = await client.create_run(spec("a", "b"), deadline=CLOCK.wall() + 60)
        async with time_limit(20):
            while len(await client.list_replicas()) < 2:  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.1)
        one.popen.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(one.popen.wait, 20) == 0
        assert not one.port_file.exists()
        assert (await client.get_run(made.name)).uid == made.uid
        await client.cancel_run(made.name)
        assert [replica.id for replica in await client.list_replicas()] == ["r2"]
        backup = b"".join([piece async for piece in client.backup()])
        assert len(backup) > 10_000
    messages = [line["message"] for line in one.lines()]
    assert "leaving" in messages
    assert {line["replica"] for line in one.lines()} == {"r1"}
    assert not [line for line in (*one.lines(), *two.lines()) if line["level"] == "error"]


async def test_what_was_acknowledged_survives_sigkill(processes: Processes) -> None:
    one = processes.start("r1", "--lease-ttl", "2")
    async with AsyncClient([one.address()]) as client:
        made = await client.create_run(spec("a"), deadline=CLOCK.wall() + 60, run_id="kept")
    one.popen.kill()
    one.popen.wait()
    one.port_file.unlink()
    again = processes.start("r1", "--lease-ttl", "2")
    async with AsyncClient([again.address()]) as client:
        assert (await client.get_run("namespaces/default/runs/kept")).uid == made.uid


def test_bad_configuration_ends_with_2_and_one_sentence(processes: Processes, tmp_path: Path) -> None:
    process = processes.start("r1", "--listen", "0.0.0.0:0")
    assert process.popen.wait(20) == 2
    assert process.log.read_text().startswith("control_plane: listen: 0.0.0.0:0 can be reached")
    missing = [f"--tls-{word}={tmp_path / word}" for word in ("cert", "key", "ca")]
    process = processes.start("r2", *missing)
    assert process.popen.wait(20) == 2
    assert "cannot be read" in str(process.lines()[-1]["error"])


def test_a_history_that_cannot_be_used_ends_with_1(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "history.db").write_bytes(b"no database" * 100)
    process = processes.start("r1")
    assert process.popen.wait(20) == 1
    assert "history file" in str(process.lines()[-1]["error"])


def test_a_second_sigterm_ends_it_at_once_even_without_a_store(tmp_path: Path) -> None:
    directory = tmp_path / "none"
    directory.mkdir()
    log = tmp_path / "log"
    flags = ["--replica", "r1", "--history", str(directory / "h"), "--etcd", "127.0.0.1:1"]
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "control_plane", *flags], stderr=out)
    try:
        end = time.monotonic() + 20
        while "waiting for the store" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, 1)
    finally:
        process.kill()
        process.wait()


# -- health -----------------------------------------------------------------------------------------------------------------


async def test_health_says_not_serving_before_the_replica_leaves() -> None:
    async with rig("r1") as federation:
        node = federation.nodes[0]
        health: Any = health_pb2_grpc.HealthStub(node.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        await node.server.drain()
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        async with AsyncClient([node.server.address], timeout=1.0) as client:
            with pytest.raises(Draining):
                await client.get_run("namespaces/default/runs/x")


# -- mutual TLS ---------------------------------------------------------------------------------------------------------------


@dataclass
class Secured:
    """A replica under TLS, and its authority."""

    address: str
    authority: Authority
    files: TlsPaths

    def client(self, paths: TlsPaths) -> AsyncClient:
        tls = Tls(ca=str(paths.ca), certificate=str(paths.cert), key=str(paths.key))
        return AsyncClient([self.address], tls=tls, timeout=3.0)


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Secured]:
    authority = Authority(tmp_path)
    files = authority.issue("server", "localhost", "127.0.0.1", "spiffe://baton/replica/r1")
    etcd = MemoryEtcd(SystemClock())
    store = MemoryStore(etcd)
    server = GrpcServer(Listener("127.0.0.1:0", files))
    parts = Parts(
        store=store,
        make_keeper=lambda: TaskLeaseKeeper(store, CLOCK),
        make_peers=lambda view: server.make_peers("r1", CLOCK, view),
        clock=CLOCK,
        entropy=SystemEntropy(),
        history=MemoryHistory(),
    )
    replica = Replica(Identity("r1", server.address), parts)
    await replica.start()
    await server.start(replica)
    await replica.ready()
    await server.serving()
    await until(lambda: "fleet" in replica.controller.owned())  # ready means: takes part; shards are taken after it
    yield Secured(server.address, authority, files)
    await replica.kill()
    await server.stop(0)
    await etcd.close()


async def test_roles_come_from_the_certificate(secured: Secured) -> None:
    person = secured.authority.issue("ann", "spiffe://baton/user/ann")
    async with secured.client(person) as client:
        made = await client.create_run(spec("a"), deadline=CLOCK.wall() + 60)
        assert (await client.get_run(made.name)).uid == made.uid
    for name in ("spiffe://baton/cluster/eu", "spiffe://baton/replica/r2", "spiffe://other/user/ann", "host.example"):
        async with secured.client(secured.authority.issue("other", name)) as client:
            with pytest.raises(Denied):
                await client.get_run(made.name)


async def test_s1_an_agent_may_speak_for_its_own_cluster_only(secured: Secured) -> None:
    paths = secured.authority.issue("eu", "spiffe://baton/cluster/eu")
    hello = agent_pb2.Hello(cluster="us", instance="i", boot_id="b", journal_uid="j", profile="fast")
    refusal = (await say_hello(secured, paths, hello)).refusal
    assert refusal.reason == "DENIED"
    hello.cluster = "eu"
    assert (await say_hello(secured, paths, hello)).welcome.generation == 1
    person = secured.authority.issue("ann", "spiffe://baton/user/ann")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await say_hello(secured, person, hello)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def say_hello(secured: Secured, paths: TlsPaths, hello: agent_pb2.Hello) -> agent_pb2.SessionResponse:
    """The first answer to a Hello."""
    ca, key, cert = (path.read_bytes() for path in (paths.ca, paths.key, paths.cert))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    async with grpc.aio.secure_channel(secured.address, credentials) as channel:
        stream = agent_pb2_grpc.AgentServiceStub(channel).Session()
        async with time_limit(20):
            await stream.write(agent_pb2.SessionRequest(hello=hello))
            answer = await stream.read()
            if not isinstance(answer, agent_pb2.SessionResponse):
                raise grpc.aio.AioRpcError(await stream.code(), grpc.aio.Metadata(), grpc.aio.Metadata())
            return answer


async def test_17_without_a_certificate_of_ours_nobody_gets_in(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    stranger = Authority(tmp_path / "elsewhere").issue("eve", "spiffe://baton/user/eve")
    trusting = TlsPaths(stranger.cert, stranger.key, secured.files.ca)
    ca, key, cert = (path.read_bytes() for path in (trusting.ca, trusting.key, trusting.cert))
    for credentials in (grpc.ssl_channel_credentials(ca), grpc.ssl_channel_credentials(ca, key, cert)):
        async with grpc.aio.secure_channel(secured.address, credentials) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await get_run(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(secured.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await get_run(channel)


async def get_run(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/baton.v1.RunService/GetRun")
    return await call(b"", timeout=5)


async def answer_of(stream: Any) -> agent_pb2.SessionResponse:
    answer = await stream.read()
    assert isinstance(answer, agent_pb2.SessionResponse)
    return answer


def test_new_certificates_are_taken_up_and_broken_ones_are_not(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server", "localhost")
    reloader = Reloader(files)
    first = reloader.current
    assert reloader.changed() is None
    files.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\nhalf")
    assert reloader.changed() is None
    assert reloader.current is first
    authority.issue("server", "localhost")
    second = reloader.changed()
    assert second is not None
    assert second.cert != first.cert
    files.key.unlink()
    with pytest.raises(BadConfig, match="cannot be read"):
        Reloader(files)


def test_identities_are_uris_of_ours_and_nothing_else() -> None:
    found = parse("spiffe://baton/cluster/eu")
    assert found is not None
    assert (found.role, found.name, found.principal) == (Role.AGENT, "eu", "cluster/eu")
    for uri in (
        "spiffe://baton/cluster/",
        "spiffe://baton/root/x",
        "spiffe://evil/user/x",
        "user/x",
        "spiffe://baton/user/a/b",
    ):
        assert parse(uri) is None
    assert identify({"x509_common_name": [b"spiffe://baton/user/ann"]}, tls=True).role is Role.NOBODY
    assert identify({}, tls=False).may_use_api


async def test_a_half_open_stream_of_an_agent_is_ended_after_garbage() -> None:
    async with rig("r1") as federation:
        call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        call = federation.nodes[0].channel.stream_stream("/baton.v1.AgentService/Session")
        stream = call()
        await stream.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_agent_over_plain_loopback_is_welcomed_and_seen() -> None:
    async with rig("r1") as federation:
        node = federation.nodes[0]
        stream = agent_pb2_grpc.AgentServiceStub(node.channel).Session()
        hello = agent_pb2.Hello(cluster="eu", instance="i", boot_id="b", journal_uid="j", profile="fast")
        async with time_limit(20):
            await stream.write(agent_pb2.SessionRequest(hello=hello))
            welcome = (await answer_of(stream)).welcome
            assert (welcome.generation, welcome.replica) == (1, "r1")
            beat = agent_pb2.Heartbeat(seq=1, generation=1)
            await stream.write(agent_pb2.SessionRequest(heartbeat=beat))
            assert (await answer_of(stream)).heartbeat_ack.seq == 1
        async with AsyncClient([node.server.address]) as client:
            clusters = [cluster async for cluster in client.list_clusters()]
            assert [(cluster.name, cluster.generation) for cluster in clusters] == [("clusters/eu", 1)]
            assert (await client.cordon_cluster("clusters/eu")).admission == 2
            assert (await client.uncordon_cluster("clusters/eu")).admission == 1
        stream.cancel()


async def test_a_run_is_carried_out_by_an_agent_and_its_output_is_read_live_and_archived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "DELAY", 0.5)
    graph = spec("a", "b")
    graph.tasks[1].process.argv[:] = ["sh", "-c", "echo one; sleep 0.3; echo two"]
    async with rig("r1", "r2") as federation:
        flags = ["--cluster", "eu", "--cpus", "2", "--profile", "fast", "--directory", str(tmp_path / "eu")]
        endpoints = [flag for node in federation.nodes for flag in ("--endpoint", node.server.address)]
        with (tmp_path / "agent.log").open("wb") as out:
            command = [sys.executable, "-m", "cluster_agent", *flags, *endpoints, "--drain"]
            agent = subprocess.Popen(command, stderr=out)  # noqa: ASYNC220 - a moment
        try:
            async with AsyncClient([node.server.address for node in federation.nodes]) as client:
                made = await client.create_run(graph, deadline=CLOCK.wall() + 60)
                task = f"{made.name}/tasks/b"
                async with time_limit(40):
                    live = b"".join([piece.data async for piece in client.follow_logs(task, follow=True)])
                    done = await client.wait_run(made.name)
                assert live == b"one\ntwo\n"
                assert (done.state, done.accepted_results) == (run_pb2.RUN_STATE_SUCCEEDED, 2)
                attempts = (await client.get_task(task)).attempts
                assert [(attempt.cluster, attempt.fence, attempt.exit_code) for attempt in attempts] == [
                    ("eu", "1.1", 0)
                ]
                await until(lambda: len(federation.history._kept) == 1)
                await asyncio.sleep(0.5)
                again = b"".join([piece.data async for piece in client.follow_logs(task, follow=True, offset=4)])
                assert again == b"two\n"
        finally:
            agent.terminate()
            try:
                assert await asyncio.to_thread(agent.wait, 30) == 0
            finally:
                await end_guards(guards_under(tmp_path), CLOCK)
