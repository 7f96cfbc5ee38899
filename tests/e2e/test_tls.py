"""Who may listen, and who may speak for whom (DESIGN 11, PROTOCOL S1), with real processes and certificates.

The replica of these tests listens on all addresses of this machine, which it may do under mutual TLS only. Certificates carry role and
cluster as a URI; an agent is what its certificate says, whatever its messages say.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from baton.client import AsyncClient, Tls
from baton.clock import SystemClock
from baton.errors import Unreachable
from baton.time_limits import time_limit
from baton.v1 import agent_pb2 as pb
from baton.v1 import agent_pb2_grpc, cluster_pb2, graph_pb2, run_pb2
from control_plane.config import TlsPaths
from lab import processes
from lab.etcd_server import EtcdServer
from tests.certificates import Authority

SOON = 60.0
"""Bound of waits, seconds; everything here takes a second on an idle machine."""

CLOCK = SystemClock()


class Children:
    """Processes of one test, each ended by its own handle."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, module: str, *flags: str) -> subprocess.Popen[bytes]:
        """A process of ours; what it says is in its log."""
        return self._start(name, processes.python(module, *flags))

    def start_machine(self, name: str, *flags: str) -> None:
        """An agent in a machine of its own (lab/machine.py): its guard, which would outlive it (G1), ends with the machine."""
        self._start(name, processes.bare_python("lab.machine", *processes.python("cluster_agent", *flags)))

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("wb") as log:
            env = processes.environment()
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=env)
        self._all.append(child)
        return child

    def log(self, name: str) -> Path:
        """What a process said."""
        return self._directory / f"{name}.log"

    def end(self) -> None:
        """All of them; machines with all that is in them."""
        for child in self._all:
            child.terminate()
        for child in self._all:
            try:
                child.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    made = Children(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as server:
        print(f"etcd {server.binary.version} ({server.binary.support.value})")
        yield server


# -- plain text only on loopback -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7400", "replica.example:7400"])
def test_a_listener_beyond_loopback_without_mutual_tls_is_refused(
    children: Children, etcd: EtcdServer, tmp_path: Path, address: str
) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server", "localhost", "spiffe://baton/replica/r1")
    port_file = tmp_path / "port"
    common = ["--listen", address, "--replica", "r1", "--history", str(tmp_path / "h"), "--port-file", str(port_file)]
    common += ["--etcd", etcd.endpoint]
    one_sided = [
        "--tls-cert",
        str(files.cert),
        "--tls-key",
        str(files.key),
    ]  # a server's certificate, nobody asked for his
    for name, flags in (("plain", []), ("one-sided", one_sided)):
        process = children.start(name, "control_plane", *common, *flags)
        assert process.wait(SOON) == 2
        said = children.log(name).read_text()
        assert ("plain text" if name == "plain" else "tls") in said
        assert not port_file.exists()


def test_agents_and_the_command_line_send_no_plain_text_beyond_loopback(children: Children, tmp_path: Path) -> None:
    flags = ["--cluster", "eu", "--endpoint", "192.0.2.1:7400", "--directory", str(tmp_path / "eu"), "--cpus", "1"]
    assert children.start("agent", "cluster_agent", *flags).wait(SOON) == 2
    assert "not a loopback address" in children.log("agent").read_text()
    baton = children.start("baton", "baton.cli", "--endpoint", "192.0.2.1:7400", "get", "runs")
    assert baton.wait(SOON) != 0
    assert "mutual TLS" in children.log("baton").read_text()


# -- under mutual TLS ------------------------------------------------------------------------------------------------------------


@dataclass
class Secured:
    """A replica on all addresses, and the authority whose certificates it takes."""

    port: int
    authority: Authority
    children: Children
    directory: Path

    def client(self, paths: TlsPaths, *, timeout: float = 20.0) -> AsyncClient:
        tls = Tls(ca=str(paths.ca), certificate=str(paths.cert), key=str(paths.key))
        return AsyncClient([f"127.0.0.1:{self.port}"], tls=tls, timeout=timeout)

    def person(self) -> AsyncClient:
        return self.client(self.authority.issue("ann", "spiffe://baton/user/ann"))

    def agent(self, cluster: str, certificate: TlsPaths) -> None:
        """A real agent that calls itself `cluster`, with somebody's certificate."""
        self.children.start_machine(
            cluster,
            *("--cluster", cluster, "--endpoint", f"127.0.0.1:{self.port}", "--fixed-endpoints", "--profile", "fast"),
            *("--directory", str(self.directory / cluster), "--cpus", "2"),
            *("--tls-ca", str(certificate.ca), "--tls-certificate", str(certificate.cert)),
            *("--tls-key", str(certificate.key)),
        )

    def certificate(self, cluster: str) -> TlsPaths:
        return self.authority.issue(f"agent-{cluster}", f"spiffe://baton/cluster/{cluster}")


@pytest.fixture
async def secured(children: Children, etcd: EtcdServer, tmp_path: Path) -> Secured:
    authority = Authority(tmp_path)
    files = authority.issue("server", "localhost", "127.0.0.1", "spiffe://baton/replica/r1")
    port_file = tmp_path / "port"
    port = free_port()  # it has to be known before: who listens everywhere must say where he is found
    process = children.start(
        "r1",
        "control_plane",
        *("--listen", f"0.0.0.0:{port}", "--advertise", f"localhost:{port}"),
        *("--replica", "r1", "--history", str(tmp_path / "history"), "--artifacts", f"dir:{tmp_path / 'artifacts'}"),
        *("--etcd", etcd.endpoint, "--etcd-prefix", f"{tmp_path.name}/", "--port-file", str(port_file)),
        *("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca), "--allow-unsafe-etcd"),
    )
    await until(lambda: port_file.exists() or process.poll() is not None, "the replica to listen")
    assert process.poll() is None, children.log("r1").read_text()
    found = Secured(port, authority, children, tmp_path)
    async with time_limit(SOON), found.person() as client:
        while not all(shard.replica for shard in (await client.list_shards()).shards):  # noqa: ASYNC110 - others decide
            await asyncio.sleep(0.05)
    return found


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(see: Callable[[], bool], what: str) -> None:
    """Wait for other processes."""
    deadline = CLOCK.boot() + SOON
    while not see():
        assert CLOCK.boot() < deadline, f"waited {SOON:g} s for {what}"
        await asyncio.sleep(0.05)


async def test_s1_a_real_agent_serves_its_own_cluster_and_no_other(secured: Secured) -> None:
    secured.agent("eu", secured.certificate("eu"))
    secured.agent("us", secured.certificate("eu"))
    async with secured.person() as client:
        await until(lambda: "session stands" in secured.children.log("eu").read_text(), "eu to be served")
        await until(lambda: "DENIED" in secured.children.log("us").read_text(), "us to be refused")
        spec = graph_pb2.GraphSpec()
        spec.tasks.add(id="a").process.argv.extend(["sh", "-c", 'printf done > "$BATON_ARTIFACTS_DIR/f"'])
        spec.tasks.add(id="b", parents=["a"]).process.argv.extend(["sh", "-c", 'grep -q done "$BATON_INPUT_DIR/a/f"'])
        run = await client.wait_run((await client.create_run(spec, deadline=CLOCK.wall() + 300)).name)
        assert run.state == run_pb2.RUN_STATE_SUCCEEDED
        assert (await client.get_task(f"{run.name}/tasks/a")).attempts[0].cluster == "eu"
        assert [each.name async for each in client.list_clusters()] == ["clusters/eu"]
    log = [json.loads(line) for line in secured.children.log("us").read_text().splitlines()]
    assert not [line for line in log if line["message"] == "The session stands."]


async def test_17_strangers_and_plain_text_do_not_get_in(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    eve = Authority(tmp_path / "elsewhere").issue("eve", "spiffe://baton/user/eve")
    ours = secured.certificate("eu")
    async with secured.client(TlsPaths(eve.cert, eve.key, ours.ca), timeout=3.0) as client:
        with pytest.raises(Unreachable):
            await client.list_replicas()
    async with AsyncClient([f"127.0.0.1:{secured.port}"], timeout=3.0) as client:
        with pytest.raises(Unreachable):
            await client.list_replicas()
    async with secured.person() as client:
        assert [each.id for each in await client.list_replicas()] == ["r1"]


class RawAgent:
    """A stream that says what a test wants, under one cluster's certificate."""

    def __init__(self, cluster: str, stream: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]) -> None:
        self.cluster, self._stream = cluster, stream
        self.generation = 0

    async def say(self, **words: object) -> None:
        await self._stream.write(pb.SessionRequest(**words))  # type: ignore[arg-type]

    async def hear(self, kind: str) -> pb.SessionResponse:
        """The next message of that kind; others are passed over."""
        async with time_limit(SOON):
            while True:
                answer = await self._stream.read()
                assert isinstance(answer, pb.SessionResponse), f"{self.cluster}: the stream ended before {kind}"
                assert kind == "refusal" or not answer.HasField("refusal"), answer
                if answer.WhichOneof("message") == kind:
                    return answer

    async def join(self) -> None:
        hello = pb.Hello(cluster=self.cluster, instance="i", boot_id="b", journal_uid=self.cluster, profile="fast")
        await self.say(hello=hello)
        self.generation = (await self.hear("welcome")).welcome.generation
        shape = cluster_pb2.NodeShape(count=1, cpu_millis=4000, memory_bytes=1 << 32)
        await self.say(heartbeat=pb.Heartbeat(seq=1, generation=self.generation, shapes=[shape]))
        await self.hear("heartbeat_ack")

    async def report(self, shard: str, attempt: pb.AttemptRef, result: bytes) -> None:
        """Say that an attempt has succeeded, and hear that this is settled."""
        finished = pb.FinishedReport(attempt=attempt, outcome=pb.OUTCOME_SUCCEEDED, exit_code=0, result=result)
        await self.say(reports=pb.Reports(shard=shard, generation=self.generation, finished=[finished]))
        settled = (await self.hear("report_acks")).report_acks
        assert list(settled.attempts) == [attempt]


@asynccontextmanager
async def raw_agent(secured: Secured, cluster: str) -> AsyncIterator[RawAgent]:
    paths = secured.certificate(cluster)
    credentials = grpc.ssl_channel_credentials(*(path.read_bytes() for path in (paths.ca, paths.key, paths.cert)))
    async with grpc.aio.secure_channel(f"127.0.0.1:{secured.port}", credentials) as channel:
        stream = agent_pb2_grpc.AgentServiceStub(channel).Session()
        agent = RawAgent(cluster, stream)
        await agent.join()
        yield agent
        stream.cancel()


async def test_f2_an_agents_word_about_another_clusters_attempt_is_not_taken(secured: Secured) -> None:
    async with secured.person() as client, raw_agent(secured, "eu") as eu, raw_agent(secured, "us") as us:
        spec = graph_pb2.GraphSpec()
        spec.tasks.add(id="a", clusters=["eu"]).process.argv.append("true")
        run = (await client.create_run(spec, deadline=CLOCK.wall() + 300)).name
        work = (await eu.hear("dispatches")).dispatches
        attempt = work.dispatches[0].attempt

        await us.report(work.shard, attempt, b"forged")
        task = await client.get_task(f"{run}/tasks/a")
        assert (task.accepted_results, task.result) == (0, b"")
        assert task.attempts[0].state == run_pb2.ATTEMPT_STATE_PLACED

        await eu.report(work.shard, attempt, b"honest")
        task = await client.get_task(f"{run}/tasks/a")
        assert (task.accepted_results, task.result) == (1, b"honest")
        assert (await client.get_run(run)).state == run_pb2.RUN_STATE_SUCCEEDED
