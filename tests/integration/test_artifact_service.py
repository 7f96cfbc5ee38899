"""ArtifactService over real gRPC: who may read and write what, downloads that survive, code that is stored (PROTOCOL F1, F2)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from baton import contexts
from baton.artifact_wire import Incoming, put_chunk, put_end, put_header
from baton.artifacts import CHUNK_BYTES, Chunk, read_chunks
from baton.client_call import error_of
from baton.client_sync import Client
from baton.errors import BatonError, Denied, Internal, InvalidField, LimitExceeded, NotFound, NotOwned, WrongState
from baton.sdk_run import AsyncStartedRun
from baton.v1 import agent_pb2, artifact_pb2, artifact_pb2_grpc, graph_pb2, run_pb2
from control_plane.artifacts.directory import DirectoryStore
from control_plane.core.model import Admission, ClusterFacts, FleetTable, Health
from control_plane.history import Archive, Piece
from control_plane.services.identity import Identity, Role
from tests.integration.replicas import CLOCK, ENTROPY, Node, Rig, client, rig, spec, until

RUN = "namespaces/default/runs/nightly"
ATTEMPT = agent_pb2.AttemptRef(run_uid="ab12cd", task=0, n=1, nonce="00ff")
CLUSTER = "c0ffee"


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@asynccontextmanager
async def federation(tmp_path: Path, *names: str) -> AsyncIterator[Rig]:
    objects = DirectoryStore(tmp_path / "objects", CLOCK, ENTROPY)
    async with rig(*(names or ("r1",)), objects=objects) as made:
        yield made
    await objects.close()


def stub(node: Node) -> artifact_pb2_grpc.ArtifactServiceStub:
    return artifact_pb2_grpc.ArtifactServiceStub(node.channel)


def header(name: str, *, cluster: str = CLUSTER, namespace: str = "default") -> artifact_pb2.PutArtifactHeader:
    return artifact_pb2.PutArtifactHeader(namespace=namespace, attempt=ATTEMPT, name=name, cluster_uid=cluster)


async def put(
    node: Node, of: artifact_pb2.PutArtifactHeader, data: bytes | Iterable[Chunk], *, cut: bool = False
) -> agent_pb2.ArtifactSource:
    """As an agent does. Raises BatonError."""
    chunks = read_chunks(io.BytesIO(data)) if isinstance(data, bytes) else data

    async def messages() -> AsyncIterator[artifact_pb2.PutArtifactRequest]:
        yield put_header(of)
        sent = 0
        for chunk in chunks:
            yield put_chunk(chunk)
            sent += 1
        if not cut:
            yield put_end(sent)

    try:
        answer = await stub(node).PutArtifact(messages(), timeout=60)
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from None
    return agent_pb2.ArtifactSource(
        namespace=of.namespace,
        attempt=of.attempt,
        cluster_uid=of.cluster_uid,
        artifact=answer.artifact,
        task_id="train",
    )


async def get(node: Node, request: artifact_pb2.GetArtifactRequest, incoming: Incoming) -> bytes:
    """As an agent does. Raises BatonError."""
    try:
        return b"".join([incoming.take(message) async for message in stub(node).GetArtifact(request, timeout=60)])
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from None


async def publish(made: Rig, *sources: agent_pb2.ArtifactSource) -> None:
    """A finished run whose one task published these."""
    run = run_pb2.Run(name=RUN, uid=ATTEMPT.run_uid, state=run_pb2.RUN_STATE_SUCCEEDED, task_count=1)
    task = run_pb2.TaskStatus(id="train", state=run_pb2.TASK_STATE_SUCCEEDED, artifacts=sources, accepted_results=1)
    piece = Piece(0, run_pb2.ListTasksResponse(tasks=[task]))
    await made.history.insert([Archive(1, run, (piece,), ())])


async def test_f2_users_read_what_was_published_and_nothing_else(tmp_path: Path) -> None:
    data = content(3 * CHUNK_BYTES + 5)
    async with federation(tmp_path, "r1", "r2") as made, client(*made.nodes) as user:
        model = await put(made.nodes[0], header("model.bin"), data)
        await put(made.nodes[0], header("secret"), b"of an attempt that was not accepted")
        with pytest.raises(NotFound, match="there is no run"):
            await user.artifacts.read(RUN, "train", "model.bin")
        await publish(made, model)

        assert [each async for each in user.artifacts.list(RUN)] == [model]
        assert [each async for each in user.artifacts.list(RUN, "train")] == [model]
        with pytest.raises(NotFound, match="no task other"):
            [each async for each in user.artifacts.list(RUN, "other")]
        assert await user.artifacts.read(RUN, "train", "model.bin") == data
        ref = await user.artifacts.save(RUN, "train", "model.bin", tmp_path / "model")
        assert (tmp_path / "model").read_bytes() == data
        assert ref.digest == model.artifact.digest
        with pytest.raises(NotFound, match=r"published no artifact secret \(published: model\.bin\)"):
            await user.artifacts.read(RUN, "train", "secret")
        with pytest.raises(LimitExceeded, match="download it to a file"):
            await user.artifacts.read(RUN, "train", "model.bin", limit=CHUNK_BYTES)
        with pytest.raises(NotFound):
            await user.artifacts.save(RUN, "train", "nothing", tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["model", "objects"], "no half download stays"


class Interrupting(io.BytesIO):
    """A file that does something at its second chunk."""

    def __init__(self, act: object) -> None:
        super().__init__()
        self._act = act
        self.writes = 0

    def write(self, data: object) -> int:
        self.writes += 1
        if self.writes == 2:
            self._act()  # type: ignore[operator]
        return super().write(data)  # type: ignore[arg-type]


async def test_an_upload_without_its_end_is_not_stored(tmp_path: Path) -> None:
    """A connection that breaks can look like the end of a stream: then the first half of a file would be taken for the file."""
    data = content(5 * CHUNK_BYTES)
    half = list(read_chunks(io.BytesIO(data)))[:2]
    async with federation(tmp_path) as made:
        (node,) = made.nodes
        with pytest.raises(InvalidField, match="cut") as refused:
            await put(node, header("model"), half, cut=True)
        assert [each.field for each in refused.value.field_violations] == ["end"]
        assert not any((tmp_path / "objects").rglob("manifest"))
        source = await put(node, header("model"), data)
        ask = artifact_pb2.GetArtifactRequest(source=source)
        assert await get(node, ask, Incoming(source.artifact.digest)) == data


async def test_a_download_goes_on_at_another_replica_where_it_was(tmp_path: Path) -> None:
    data = content(20 * CHUNK_BYTES)
    async with federation(tmp_path, "r1", "r2") as made, client(*made.nodes) as user:
        await publish(made, await put(made.nodes[1], header("model"), data))
        first, loop = made.nodes[0].server, asyncio.get_running_loop()

        def die() -> None:
            loop.call_soon_threadsafe(lambda: loop.create_task(first._server.stop(0)))

        into = Interrupting(die)
        await user.artifacts.download(RUN, "train", "model", into)
        assert into.getvalue() == data
        assert into.writes == 20, "nothing was fetched twice"


async def test_an_upload_that_is_killed_is_never_seen_and_leaves_its_place(tmp_path: Path) -> None:
    data = content(5 * CHUNK_BYTES)
    async with federation(tmp_path) as made:
        (node,) = made.nodes
        sent = asyncio.Event()

        async def stuck() -> AsyncIterator[artifact_pb2.PutArtifactRequest]:
            yield put_header(header("model"))
            for chunk in list(read_chunks(io.BytesIO(data)))[:4]:
                yield put_chunk(chunk)
            sent.set()
            await asyncio.Event().wait()

        gateway = node.replica.services.artifacts._gateway
        assert gateway is not None
        free = gateway._transfers._value
        calls = [stub(node).PutArtifact(stuck(), timeout=60) for _ in range(3)]
        await sent.wait()
        await until(lambda: gateway._transfers._value == free - 3)
        for call in calls:
            call.cancel()
        await until(lambda: gateway._transfers._value == free)
        await until(lambda: any((tmp_path / "objects").rglob("000000-*")))
        assert not any((tmp_path / "objects").rglob("manifest"))
        source = await put(node, header("model"), data)
        ask = artifact_pb2.GetArtifactRequest(source=source)
        assert await get(node, ask, Incoming(source.artifact.digest)) == data


async def test_a_damaged_store_is_told_as_the_stores_fault(tmp_path: Path) -> None:
    data = content(2 * CHUNK_BYTES)
    async with federation(tmp_path) as made, client(*made.nodes) as user:
        await publish(made, await put(made.nodes[0], header("model"), data))
        (chunk,) = (tmp_path / "objects").rglob("000001-*")
        good = chunk.read_bytes()
        chunk.write_bytes(b"\x00" + content(CHUNK_BYTES - 1) + b"!")
        into = io.BytesIO()
        with pytest.raises(Internal, match="chunk 1 does not match its hash, 3 times: what the artifact store holds"):
            await user.artifacts.download(RUN, "train", "model", into)
        assert into.getvalue() == data[:CHUNK_BYTES], "nothing unproved was written"

        chunk.write_bytes(good)
        assert await user.artifacts.read(RUN, "train", "model") == data


async def test_f1_an_agent_writes_for_its_own_cluster_and_namespaces_only(tmp_path: Path) -> None:
    def facts(uid: str, name: str, *namespaces: str) -> ClusterFacts:
        return ClusterFacts(uid, name, Health.READY, Admission.OPEN, (), namespaces=namespaces)

    async with federation(tmp_path) as made:
        (node,) = made.nodes
        node.replica.view.table = FleetTable(
            clusters={CLUSTER: facts(CLUSTER, "eu", "default"), "beef": facts("beef", "us")}
        )

        def become(identity: Identity) -> None:
            assert node.server._edge is not None
            node.server._edge._identify = lambda context: identity

        become(Identity(Role.AGENT, "eu"))
        mine = await put(node, header("model"), b"mine")
        with pytest.raises(Denied, match=r"cluster/eu may not write artifacts of cluster beef"):
            await put(node, header("model", cluster="beef"), b"not mine")
        with pytest.raises(Denied, match="serves no work of namespace finance"):
            await put(node, header("model", namespace="finance"), b"not mine")
        ask = artifact_pb2.GetArtifactRequest(source=mine)
        assert await get(node, ask, Incoming(mine.artifact.digest)) == b"mine"
        finance = agent_pb2.ArtifactSource()
        finance.CopyFrom(mine)
        finance.namespace = "finance"
        with pytest.raises(Denied, match="finance"):
            await get(node, artifact_pb2.GetArtifactRequest(source=finance), Incoming())
        published = artifact_pb2.PublishedArtifact(run=RUN, task="train", name="model")
        with pytest.raises(Denied, match="by the source"):
            await get(node, artifact_pb2.GetArtifactRequest(published=published), Incoming())
        with pytest.raises(grpc.aio.AioRpcError, match="may not use"):
            await node.runs.GetRun(run_pb2.GetRunRequest(name=RUN), timeout=10)

        with pytest.raises(Denied, match="may not store code"):
            await put(node, artifact_pb2.PutArtifactHeader(namespace="default", code_sha256="0" * 64), b"code")

        become(Identity(Role.AGENT, "newcomer"))
        with pytest.raises(NotOwned, match="newcomer is not known here yet") as late:
            await put(node, header("model"), b"early")
        assert late.value.retry_after == 0.5

        become(Identity(Role.USER, "ada"))
        with pytest.raises(Denied, match="it is not its agent"):
            await put(node, header("model"), b"forged")
        with pytest.raises(Denied, match="serves no work"):
            await get(node, ask, Incoming())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../escape"}, "header.name"),
        ({"name": ""}, "header.name"),
        ({"namespace": "a/b"}, "header.namespace"),
        ({"cluster_uid": "../.."}, "header.cluster_uid"),
        ({"attempt": agent_pb2.AttemptRef(run_uid="..", n=1, nonce="a")}, "header.attempt.run_uid"),
        ({"attempt": agent_pb2.AttemptRef(run_uid="a", n=0, nonce="a")}, "attempts from 1"),
        ({"code_sha256": "ABC"}, "header.code_sha256"),
    ],
)
async def test_paths_are_made_of_checked_parts(tmp_path: Path, change: dict[str, object], words: str) -> None:
    wrong = header("model")
    wrong.MergeFrom(artifact_pb2.PutArtifactHeader(**change))  # type: ignore[arg-type]
    for field in ("name", "namespace", "cluster_uid"):
        if field in change:
            setattr(wrong, field, change[field])
    if "attempt" in change:
        wrong.attempt.CopyFrom(change["attempt"])  # type: ignore[arg-type]
    async with federation(tmp_path) as made:
        with pytest.raises(InvalidField, match=words):
            await put(made.nodes[0], wrong, b"x")
        assert not [path for path in (tmp_path / "objects").rglob("*") if path.name != ".drafts"]


async def test_large_code_is_stored_once_and_a_run_needs_it_to_be_there(tmp_path: Path) -> None:
    archive = content(300_000)
    sha256 = hashlib.sha256(archive).hexdigest()
    graph = spec("a")
    graph.tasks[0].ClearField("process")
    graph.tasks[0].python.CopyFrom(graph_pb2.PythonTask(function="m:f", args_json="[]", code=sha256))
    graph.codes.add(sha256=sha256, stored=True)
    async with federation(tmp_path, "r1", "r2") as made, client(*made.nodes) as user:
        with pytest.raises(InvalidField, match="is not stored in namespace default"):
            await user.create_run(graph, deadline=CLOCK.wall() + 600)
        graph.codes[0].CopyFrom(graph_pb2.Code(sha256=sha256, zip=archive))
        run = await user.create_run(graph, deadline=CLOCK.wall() + 600)
        assert run.state != run_pb2.RUN_STATE_FAILED
        assert graph.codes[0].zip, "the caller's graph stays as it was"
        stored = list((tmp_path / "objects" / "default" / "code").iterdir())
        assert [path.name for path in stored] == [sha256]
        await user.create_run(graph, deadline=CLOCK.wall() + 600)
        ask = artifact_pb2.GetArtifactRequest(code=artifact_pb2.CodeSource(namespace="default", sha256=sha256))
        assert await get(made.nodes[0], ask, Incoming(code_sha256=sha256)) == archive
        with pytest.raises(LimitExceeded, match="10485760"):
            await user.artifacts.put_code("default", bytes(10 * CHUNK_BYTES + 1))


async def test_a_federation_without_a_store_says_so(tmp_path: Path) -> None:
    async with rig("r1") as made, client(*made.nodes) as user:
        with pytest.raises(
            WrongState, match="no artifact store: its operator has to start the replicas with --artifacts"
        ):
            await user.artifacts.put_code("default", b"x")
        await publish(made)
        with pytest.raises(WrongState, match="--artifacts"):
            await user.artifacts.read(RUN, "train", "model")
        assert [each async for each in user.artifacts.list(RUN)] == []


async def test_the_sweeper_is_told_of_live_and_of_finished_runs(tmp_path: Path) -> None:
    async with federation(tmp_path, "r1", "r2") as made, client(*made.nodes) as user:
        live = await user.create_run(spec("a"), deadline=CLOCK.wall() + 600)
        await publish(made)
        for node in made.nodes:
            known = await node.replica.services.artifacts.known([live.uid, ATTEMPT.run_uid, "fade"], 20.0)
            assert known == {live.uid, ATTEMPT.run_uid}
        made.history.down = True
        with pytest.raises(BatonError, match="history"):
            await made.nodes[0].replica.services.artifacts.known(["fade"], 20.0)


async def command(node: Node, folder: Path, *argv: str) -> tuple[int, bytes, str]:
    """`baton`, as a user types it: exit code, standard output, standard error."""
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "baton.cli", "--endpoint", node.server.address, *argv),
        env=env,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out, err.decode()


async def test_the_command_line_lists_and_fetches(tmp_path: Path) -> None:
    data, large = content(2 * CHUNK_BYTES + 9), json.dumps(["x" * 20_000]).encode()
    async with federation(tmp_path / "f") as made:
        (node,) = made.nodes
        sources = [await put(node, header("model.bin"), data), await put(node, header("result"), large)]
        await publish(made, *sources)

        code, out, _ = await command(node, tmp_path, "artifacts", "nightly")
        assert code == 0
        assert [line.split()[:3] for line in out.decode().splitlines()[1:]] == [
            ["train", "model.bin", "2.0Mi"],
            ["train", "result", "19.5Ki"],
        ]
        code, out, _ = await command(node, tmp_path, "artifacts", "nightly", "train", "-o", "json")
        assert [each["artifact"]["name"] for each in json.loads(out)["artifacts"]] == ["model.bin", "result"]
        for same in ("nightly/train", "namespaces/default/runs/nightly/tasks/train"):
            assert (await command(node, tmp_path, "artifacts", same, "--json"))[:2] == (0, out)
        assert (await command(node, tmp_path, "artifacts", "get", "nightly", "train", "model.bin"))[0] == 0
        code, out, _ = await command(node, tmp_path, "artifacts", "get", "nightly", "train", "model.bin", "-o", "-")
        assert (code, out) == (0, data)
        assert (await command(node, tmp_path, "result", "nightly/train"))[1] == large

        code, out, err = await command(node, tmp_path, "artifacts", "get", "nightly", "train", "absent")
        assert (code, out) == (5, b"")
        assert "published no artifact absent (published: model.bin, result)" in err
        code, _, err = await command(node, tmp_path, "artifacts", "get", "nightly", "train", "result", "-o", "no/such")
        assert (code, err) == (1, "error: no/such cannot be written: No such file or directory\n")
    assert (tmp_path / "model.bin").read_bytes() == data


async def test_the_sdk_fetches_a_large_result_when_it_is_looked_at(tmp_path: Path) -> None:
    value = {"rows": list(range(10_000))}
    async with federation(tmp_path) as made:
        (node,) = made.nodes
        await publish(made, await put(node, header("result"), json.dumps(value).encode()))
        to = contexts.Context(endpoints=(node.server.address,), namespace="default")
        run = run_pb2.Run(name=RUN, state=run_pb2.RUN_STATE_SUCCEEDED)
        results = await AsyncStartedRun(run, to).results()
        assert list(results) == ["train"]
        assert await asyncio.to_thread(results.__getitem__, "train") == value

        def plainly() -> list[str]:
            with Client(node.server.address) as plain:
                plain.artifacts.save(RUN, "train", "result", tmp_path / "saved")
                return [source.artifact.name for source in plain.artifacts.list(RUN)]

        assert await asyncio.to_thread(plainly) == ["result"]
        await made.nodes[0].server.stop(0)
        assert results["train"] == await results.fetch("train") == value, "it is kept"
    assert json.loads((tmp_path / "saved").read_bytes()) == value
