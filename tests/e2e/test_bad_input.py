"""Bad input, from a person's file and on the wire: refused as the caller's fault, with the field named, and nothing changed.

"Changed nothing" is asked of etcd itself: no shard of runs has committed a batch, so no head was written (PROTOCOL J4). The
federation is idle otherwise; heartbeats and verdicts on clusters are not in these keys.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from baton import requestid
from baton.client_call import error_of
from baton.clock import SystemEntropy
from baton.errors import BatonError
from baton.time_limits import time_limit
from baton.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    graph_pb2,
    graph_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
)
from control_plane.core.model import FLEET
from control_plane.store.etcd import EtcdStore
from control_plane.store.keys import SHARDS_PREFIX
from tests.e2e.federation import CLOCK, Fed, federation

pytestmark = pytest.mark.asyncio(loop_scope="module")

HUGE = "n" * (1 << 20)

MAX_SAID = 8 * 1024
"""Characters of an answer to a huge input: an error must not carry the megabyte back."""

SECONDS = 20.0
"""For one call; a refusal takes milliseconds."""

HEAD = """\
apiVersion: baton/v1
kind: Graph
spec:
  deadline: 5m
  tasks:
"""
"""Five lines: the first task stands on line 6."""

GOOD = "    - {id: a, argv: [echo]}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fed]:
    async with federation(tmp_path_factory.mktemp("bad"), clusters=("eu",)) as found:
        yield found
        # Whatever was thrown at it, it serves as before, and nothing inside broke.
        await found.accepted_once((await found.run("after", [found.quick("works")])).name)
        for name in ("replica-1", "replica-2", "eu"):
            assert "Traceback" not in found.log_of(name)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def unchanged(fed: Fed) -> AsyncIterator[None]:
    """Nothing that a test did was committed to any run's shard, and there is no run."""
    assert fed.lab.links.store is not None
    store = EtcdStore(["{}:{}".format(*fed.lab.links.store)], clock=CLOCK)
    try:
        before = await heads(store)
        yield
        assert await heads(store) == before
        assert [run async for run in fed.client.list_runs()] == []
    finally:
        await store.close()


async def heads(store: EtcdStore) -> dict[str, int]:
    """Revision of the newest commit of each shard of runs."""
    found = await store.range(SHARDS_PREFIX, timeout=SECONDS)
    wanted = [
        each for each in found.kvs if each.key.endswith("/head") and not each.key.startswith(SHARDS_PREFIX + FLEET)
    ]
    return {each.key: each.mod_revision for each in wanted}


# -- files ---------------------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[bytes, str]] = {
    # what is wrong: (the file, what the first line of the answer says after the file's name)
    "cycle": (
        f"{HEAD}    - {{id: a, argv: [x], after: [c]}}\n    - {{id: b, argv: [x], after: [a]}}\n"
        "    - {id: c, argv: [x], after: [b]}\n".encode(),
        ":6: spec.tasks[0].after[0]: closes a cycle: a -> b -> c -> a;",
    ),
    "itself": (f"{HEAD}    - {{id: a, argv: [x], after: [a]}}\n".encode(), ":6: spec.tasks[0].after[0]: "),
    "unknown parent": (
        f"{HEAD}{GOOD}    - {{id: b, argv: [x], after: [z]}}\n".encode(),
        ":7: spec.tasks[1].after[0]: 'z'",
    ),
    "duplicate id": (f"{HEAD}{GOOD}{GOOD}".encode(), ":7: spec.tasks[1].id: "),
    "zero tasks": (b"apiVersion: baton/v1\nkind: Graph\nspec:\n  deadline: 5m\n  tasks: []\n", ":5: spec.tasks: "),
    "no tasks": (b"apiVersion: baton/v1\nkind: Graph\nspec:\n  deadline: 5m\n", ":3: spec: "),
    "deadline in the past": (
        f"{HEAD}{GOOD}".replace("5m", "2020-01-01T00:00:00Z").encode(),
        ":4: spec.deadline: ",
    ),
    "negative cpu": (
        f"{HEAD}    - {{id: a, argv: [x], resources: {{cpu: -1}}}}\n".encode(),
        ":6: spec.tasks[0].resources.cpu: ",
    ),
    "nan cpu": (
        f"{HEAD}    - {{id: a, argv: [x], resources: {{cpu: .nan}}}}\n".encode(),
        ":6: spec.tasks[0].resources.cpu: ",
    ),
    "infinite cpu": (
        f"{HEAD}    - {{id: a, argv: [x], resources: {{cpu: .inf}}}}\n".encode(),
        ":6: spec.tasks[0].resources.cpu: ",
    ),
    "negative memory": (
        f"{HEAD}    - id: a\n      argv: [x]\n      resources:\n        memory: -1Gi\n".encode(),
        ":9: spec.tasks[0].resources.memory: ",
    ),
    "negative extra": (
        f"{HEAD}    - {{id: a, argv: [x], resources: {{extended: {{gpus: -1}}}}}}\n".encode(),
        ':6: spec.tasks[0].resources.extended["gpus"]: ',
    ),
    "nan multiplier": (
        f"{HEAD}    - {{id: a, argv: [x], retry: {{attempts: 2, multiplier: .nan}}}}\n".encode(),
        ":6: spec.tasks[0].retry.multiplier: ",
    ),
    "1 MB id": (f"{HEAD}    - {{id: {HUGE}, argv: [x]}}\n".encode(), ":6: spec.tasks[0].id: "),
    "1 MB name": (f"metadata: {{name: {HUGE}}}\n{HEAD}{GOOD}".encode(), ":1: metadata.name: "),
    "1 MB key": (f"{HEAD}    - {{id: a, argv: [x], ? {HUGE} : 1}}\n".encode(), ":6: spec.tasks[0].nnn"),
    "NUL in argv": (f'{HEAD}    - {{id: a, argv: [echo, "a\\0b"]}}\n'.encode(), ":6: spec.tasks[0].argv[1]: "),
    "NUL in the file": (f"{HEAD}    - {{id: a, argv: [echo, a\0b]}}\n".encode(), ":6: "),
    "tab": (f"{HEAD}\t- {{id: a, argv: [x]}}\n".encode(), ":6: "),
    "unknown field at the top": (f"{HEAD}{GOOD}retries: 3\n".encode(), ":7: retries: "),
    "unknown field of a task": (
        f"{HEAD}    - id: a\n      argv: [x]\n      comand: y\n".encode(),
        ":8: spec.tasks[0].comand: ",
    ),
    "argv is text": (f"{HEAD}    - {{id: a, argv: echo hi}}\n".encode(), ":6: spec.tasks[0].argv: "),
    "tasks is a map": (
        b"apiVersion: baton/v1\nkind: Graph\nspec:\n  deadline: 5m\n  tasks: {a: [x]}\n",
        ":5: spec.tasks: ",
    ),
    "id is a list": (f"{HEAD}    - {{id: [a], argv: [x]}}\n".encode(), ":6: spec.tasks[0].id: "),
    "attempts is text": (
        f"{HEAD}    - {{id: a, argv: [x], retry: {{attempts: many}}}}\n".encode(),
        ":6: spec.tasks[0].retry.attempts: ",
    ),
    "not UTF-8": (HEAD.encode() + b"    - {id: a, argv: [\xff\xfe]}\n", ":"),
    "garbage": (b"\x80\x00\xff" * 999, ":1: "),
    "empty": (b"", ":1: "),
    "another kind": (f"{HEAD}{GOOD}".replace("Graph", "Pod").encode(), ":2: kind: "),
}


@pytest.mark.parametrize("fault", FILES)
async def test_a_bad_file_ends_with_2_and_says_file_line_and_field(fed: Fed, tmp_path: Path, fault: str) -> None:
    content, said = FILES[fault]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    done = await fed.cli("run", str(path), "--wait")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[:MAX_SAID]
    assert done.stderr.startswith(f"{path}{said}"), done.stderr[:MAX_SAID]
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < MAX_SAID


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--deadline", "-5m"), "--deadline"),
        (("--deadline", "2020-01-01T00:00:00Z"), "past"),
        (("--deadline", "nan"), "--deadline"),
        (("--name", "N" * 100_000), "--name"),
        (("--priority", "1e9"), "--priority"),
        (("-n", "no/such"), "namespace"),
        (("--frobnicate",), "--frobnicate"),
    ],
)
async def test_bad_flags_end_with_2_and_name_the_flag(
    fed: Fed, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(HEAD + GOOD)
    done = await fed.cli("run", str(path), *flags)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[:MAX_SAID]
    assert said in done.stderr
    assert len(done.stderr) < MAX_SAID


# -- messages ------------------------------------------------------------------------------------------------------------------


def creation() -> run_pb2.CreateRunRequest:
    """A good request: a, then b."""
    request = run_pb2.CreateRunRequest(request_id=requestid.new(CLOCK, SystemEntropy()))
    request.deadline_time.FromSeconds(int(CLOCK.wall()) + 600)
    for name, parents in (("a", []), ("b", ["a"])):
        request.spec.tasks.add(id=name, parents=parents, process=graph_pb2.ProcessTask(argv=["true"]))
    return request


Request = run_pb2.CreateRunRequest
Task = graph_pb2.Task

MESSAGES: dict[str, tuple[str, Callable[[Request, Task], object]]] = {
    # what is wrong: (field, how to spoil the request and its second task)
    "cycle": ("spec.tasks[0].parents[0]", lambda r, _: r.spec.tasks[0].parents.append("b")),
    "unknown parent": ("spec.tasks[1].parents[1]", lambda _, t: t.parents.append("z")),
    "duplicate id": ("spec.tasks[1].id", lambda _, t: t.MergeFrom(Task(id="a"))),
    "zero tasks": ("spec.tasks", lambda r, _: r.spec.ClearField("tasks")),
    "no graph": ("spec.tasks", lambda r, _: r.ClearField("spec")),
    "deadline in the past": ("deadline_time", lambda r, _: r.deadline_time.FromSeconds(1)),
    "no deadline": ("deadline_time", lambda r, _: r.ClearField("deadline_time")),
    "deadline that is no time": ("deadline_time", lambda r, _: setattr(r.deadline_time, "nanos", -5)),
    "negative cpu": ("spec.tasks[1].resources.cpu_millis", lambda _, t: setattr(t.resources, "cpu_millis", -1)),
    "negative memory": ("spec.tasks[1].resources.memory_bytes", lambda _, t: setattr(t.resources, "memory_bytes", -1)),
    "negative extra": (
        'spec.tasks[1].resources.extended["gpus"]',
        lambda _, t: t.resources.extended.update({"gpus": -1}),
    ),
    "NaN": ("spec.tasks[1].retry.backoff_multiplier", lambda _, t: setattr(t.retry, "backoff_multiplier", math.nan)),
    "infinity": (
        "spec.tasks[1].retry.backoff_multiplier",
        lambda _, t: setattr(t.retry, "backoff_multiplier", math.inf),
    ),
    "1 MB run id": ("run_id", lambda r, _: setattr(r, "run_id", HUGE)),
    "1 MB namespace": ("namespace", lambda r, _: setattr(r, "namespace", HUGE)),
    "1 MB task id": ("spec.tasks[1].id", lambda _, t: setattr(t, "id", HUGE)),
    "1 MB parent": ("spec.tasks[1].parents[0]", lambda _, t: t.parents.__setitem__(0, HUGE)),
    "1 MB cluster": ("spec.tasks[1].clusters[0]", lambda _, t: t.clusters.append(HUGE)),
    "1 MB request id": ("request_id", lambda r, _: setattr(r, "request_id", HUGE)),
    "NUL in argv": ("spec.tasks[1].process.argv[1]", lambda _, t: t.process.argv.append("a\0b")),
    "NUL in env": ('spec.tasks[1].process.env["E"]', lambda _, t: t.process.env.update({"E": "a\0b"})),
    "empty argv": ("spec.tasks[1].process.argv", lambda _, t: t.process.ClearField("argv")),
    "no kind": ("spec.tasks[1].process", lambda _, t: t.ClearField("process")),
    "unknown word": ("spec.tasks[1].trigger_rule", lambda _, t: setattr(t, "trigger_rule", 99)),
    "no request id": ("request_id", lambda r, _: r.ClearField("request_id")),
}


@pytest.mark.parametrize("fault", MESSAGES)
async def test_a_bad_message_is_an_invalid_argument_that_names_the_field(fed: Fed, fault: str) -> None:
    field, spoil = MESSAGES[fault]
    request = creation()
    spoil(request, request.spec.tasks[1])
    async with grpc.aio.insecure_channel(fed.lab.endpoints[0]) as channel:
        error = await failure(run_pb2_grpc.RunServiceStub(channel).CreateRun(request, timeout=SECONDS))
    assert field in [each.field for each in error.field_violations], error.field_violations
    assert error.applied == "no"
    assert len(str(error)) + sum(len(each.field + each.message) for each in error.field_violations) < MAX_SAID
    if fault == "cycle":
        assert "a -> b -> a" in error.field_violations[0].message


async def failure(call: Awaitable[object]) -> BatonError:
    """What the call fails with: always INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    return error_of(caught.value)


async def test_other_calls_name_their_bad_fields_too(fed: Fed) -> None:
    cyclic = creation().spec
    cyclic.tasks[0].parents.append("b")
    ask = requestid.new(CLOCK, SystemEntropy())
    async with grpc.aio.insecure_channel(fed.lab.endpoints[1]) as channel:
        runs, graphs = run_pb2_grpc.RunServiceStub(channel), graph_pb2_grpc.GraphServiceStub(channel)
        clusters, admin = cluster_pb2_grpc.ClusterServiceStub(channel), admin_pb2_grpc.AdminServiceStub(channel)
        cases: list[tuple[str, Awaitable[object]]] = [
            (
                "spec.tasks[0].parents[0]",
                graphs.PutGraph(graph_pb2.PutGraphRequest(request_id=ask, graph_id="g", spec=cyclic)),
            ),
            (
                "graph_id",
                graphs.PutGraph(graph_pb2.PutGraphRequest(request_id=ask, graph_id=HUGE, spec=creation().spec)),
            ),
            ("name", runs.GetRun(run_pb2.GetRunRequest(name=HUGE))),
            ("name", runs.CancelRun(run_pb2.CancelRunRequest(request_id=ask, name="runs/../x"))),
            ("page_size", runs.ListRuns(run_pb2.ListRunsRequest(page_size=-1))),
            ("page_token", runs.ListRuns(run_pb2.ListRunsRequest(page_token="e30="))),
            ("name", clusters.DrainCluster(cluster_pb2.DrainClusterRequest(request_id=ask, name="eu"))),
            ("request_id", clusters.CordonCluster(cluster_pb2.CordonClusterRequest(name="clusters/eu"))),
            ("namespace.name", admin.PutNamespace(admin_pb2.PutNamespaceRequest(request_id=ask))),
        ]
        for field, call in cases:
            error = await failure(call)
            assert [each.field for each in error.field_violations] == [field]
            assert len(str(error)) < MAX_SAID


METHODS = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in (run_pb2, graph_pb2, cluster_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


GARBAGE = {
    "noise": b"\xff" * 40,
    "cut off": b"\x0a\x7f",
    "no such wire type": b"\x07",
    "not UTF-8": b"\x0a\x02\xff\xfe",
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_on_the_wire_is_an_invalid_argument_of_every_method(fed: Fed, kind: str) -> None:
    assert len(METHODS) > 20
    garbage = GARBAGE[kind]
    async with grpc.aio.insecure_channel(fed.lab.endpoints[0]) as channel:
        for method, request in METHODS.items():
            first = request.fields_by_number.get(1)
            if kind == "not UTF-8" and (first is None or first.type != first.TYPE_STRING):
                continue  # field 1 holds no text there: a message of a newer version, which is to be understood
            if method.endswith(("WatchRun", "FollowLogs", "Backup")):
                out: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
                call: Awaitable[object] = out(garbage, timeout=SECONDS).read()
            elif method.endswith("InPieces"):
                pieces: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(method)
                call = pieces(iter([garbage]), timeout=SECONDS)
            else:
                unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
                call = unary(garbage, timeout=SECONDS)
            error = await failure(call)
            assert error.applied == "no", method
            assert [each.field for each in error.field_violations] == ["request"], method
            assert ".py" not in error.message
        session: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/baton.v1.AgentService/Session"
        )
        agent = session(iter([garbage]), timeout=SECONDS)
        await failure(agent.read())


async def test_bytes_that_are_not_even_http_end_a_connection_and_nothing_else(fed: Fed) -> None:
    for garbage in (
        b"\0" * 4096,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
    ):
        host, port = fed.lab.endpoints[0].rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        async with time_limit(SECONDS):
            while await reader.read(65_536):
                pass
        writer.close()
    assert len(await fed.client.list_replicas()) == 2
