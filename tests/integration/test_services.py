"""The public services over real replicas: what a caller may rely on, rule by rule, and what a bad caller gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from baton import errors, requestid
from baton.client_call import error_of
from baton.time_limits import time_limit
from baton.v1 import admin_pb2, cluster_pb2, graph_pb2, run_pb2
from control_plane import archiver, store_room
from control_plane.core.commands import Outbox
from control_plane.core.model import shard_of
from control_plane.slots import OwnedShard
from control_plane.store import keys
from tests.integration.replicas import CLOCK, Node, Rig, client, creation, request_id, rig, spec, until

SUCCESS = run_pb2.RUN_STATE_SUCCEEDED


@pytest.fixture
async def federation() -> AsyncIterator[Rig]:
    async with rig("r1") as made:
        yield made


@pytest.fixture
async def pair() -> AsyncIterator[Rig]:
    async with rig("r1", "r2") as made:
        yield made


@pytest.fixture
def node(federation: Rig) -> Node:
    return federation.nodes[0]


async def failure(call: Awaitable[object]) -> errors.BatonError:
    """What a call fails with; the form on the wire is checked on the way."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailers = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == caught.value.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "baton.dev"
    assert info.metadata["applied"] in ("no", "unknown")
    return error_of(caught.value)


def fields_of(error: errors.BatonError) -> list[str]:
    return [violation.field for violation in error.field_violations]


# -- creating -----------------------------------------------------------------------------------------------------------


async def test_a_run_is_created_read_listed_and_cancelled(node: Node) -> None:
    made = (await node.runs.CreateRun(creation("a", "b", run_id="first", priority=3, labels={"team": "x"}))).run
    assert made.name == "namespaces/default/runs/first"
    assert made.task_count == 2
    assert made.state == run_pb2.RUN_STATE_RUNNING
    assert made.shard == shard_of("default", "first")
    read = (await node.runs.GetRun(run_pb2.GetRunRequest(name=made.name))).run
    assert (read.uid, read.priority, dict(read.labels)) == (made.uid, 3, {"team": "x"})
    tasks = (await node.runs.ListTasks(run_pb2.ListTasksRequest(run=made.name))).tasks
    assert [(task.id, list(task.parents)) for task in tasks] == [("a", []), ("b", ["a"])]
    task = (await node.runs.GetTask(run_pb2.GetTaskRequest(name=f"{made.name}/tasks/b"))).task
    assert (task.index, task.state) == (1, run_pb2.TASK_STATE_PENDING)
    cancel = run_pb2.CancelRunRequest(request_id=request_id(), name=made.name, reason="enough")
    cancelled = (await node.runs.CancelRun(cancel)).run
    assert cancelled.state == run_pb2.RUN_STATE_CANCELLED
    again = (await node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name))).run
    assert again.state == run_pb2.RUN_STATE_CANCELLED


async def test_o8_a_retry_gets_the_same_run_and_another_wish_does_not(node: Node) -> None:
    request = creation("a")
    first = (await node.runs.CreateRun(request)).run
    assert (await node.runs.CreateRun(request)).run.uid == first.uid
    request.priority = 7
    refused = await failure(node.runs.CreateRun(request))
    assert isinstance(refused, errors.RequestIdReused)
    assert refused.applied == "no"
    other = creation("a")
    assert (await node.runs.CreateRun(other)).run.uid != first.uid


async def test_o8_request_ids_are_required_well_formed_and_not_ahead(node: Node) -> None:
    request = creation("a")
    request.request_id = ""
    assert fields_of(await failure(node.runs.CreateRun(request))) == ["request_id"]
    request.request_id = "not-a-uuid"
    assert fields_of(await failure(node.runs.CreateRun(request))) == ["request_id"]
    request.request_id = requestid.compose(CLOCK.wall() + 900, "0" * 20)
    ahead = await failure(node.runs.CreateRun(request))
    assert isinstance(ahead, errors.RequestIdAhead)
    assert abs(float(ahead.metadata["server_time"]) - CLOCK.wall()) < 60


async def test_a_live_name_is_taken(node: Node) -> None:
    await node.runs.CreateRun(creation("a", run_id="mine"))
    assert isinstance(await failure(node.runs.CreateRun(creation("a", run_id="mine"))), errors.NameTaken)


async def test_a_big_graph_comes_in_pieces_and_through_a_thread(node: Node) -> None:
    ids = [f"t{number}" for number in range(5000)]
    head = creation()
    head.spec.ClearField("tasks")
    whole = spec(*ids)

    async def pieces() -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
        yield run_pb2.CreateRunInPiecesRequest(request=head)
        for start in range(0, len(ids), 2000):
            yield run_pb2.CreateRunInPiecesRequest(
                tasks=whole.tasks[start : start + 2000], last=start + 2000 >= len(ids)
            )

    made = (await node.runs.CreateRunInPieces(pieces())).run
    assert made.task_count == 5000
    # Page by page; the last page is short.
    request = run_pb2.ListTasksRequest(run=made.name, page_size=10**9)
    seen: list[str] = []
    while True:
        page = await node.runs.ListTasks(request)
        seen += [task.id for task in page.tasks]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == ids


async def test_pieces_without_a_head_or_an_end_or_with_two_create_nothing(node: Node) -> None:
    async def headless() -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
        yield run_pb2.CreateRunInPiecesRequest(tasks=spec("a").tasks)

    async def doubled() -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
        yield run_pb2.CreateRunInPiecesRequest(request=creation("a"))
        yield run_pb2.CreateRunInPiecesRequest(request=creation("b"))

    async def cut() -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
        """What a server sees of a connection that breaks may be no more than this: an end."""
        yield run_pb2.CreateRunInPiecesRequest(request=creation("a"))
        yield run_pb2.CreateRunInPiecesRequest(tasks=spec("b").tasks)

    async def continued() -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
        yield run_pb2.CreateRunInPiecesRequest(request=creation("a"), last=True)
        yield run_pb2.CreateRunInPiecesRequest(tasks=spec("b").tasks, last=True)

    assert fields_of(await failure(node.runs.CreateRunInPieces(headless()))) == ["request"]
    assert fields_of(await failure(node.runs.CreateRunInPieces(doubled()))) == ["request"]
    assert fields_of(await failure(node.runs.CreateRunInPieces(cut()))) == ["last"]
    assert fields_of(await failure(node.runs.CreateRunInPieces(continued()))) == ["last"]
    assert not (await node.runs.ListRuns(run_pb2.ListRunsRequest())).runs


async def test_a_stored_graph_is_run_and_a_retry_is_the_same_although_a_new_version_came(node: Node) -> None:
    put = graph_pb2.PutGraphRequest(request_id=request_id(), graph_id="etl", spec=spec("a", "b"))
    first = (await node.graphs.PutGraph(put)).graph
    assert (first.version, first.name) == (1, "namespaces/default/graphs/etl")
    assert (await node.graphs.PutGraph(put)).graph.uid == first.uid
    request = creation(graph="namespaces/default/graphs/etl")
    request.ClearField("spec")
    made = (await node.runs.CreateRun(request)).run
    assert (made.graph, made.graph_version, made.task_count) == (first.name, 1, 2)
    newer = graph_pb2.PutGraphRequest(request_id=request_id(), graph_id="etl", spec=spec("a"), etag=first.etag)
    assert (await node.graphs.PutGraph(newer)).graph.version == 2
    assert (await node.runs.CreateRun(request)).run.uid == made.uid
    stale = graph_pb2.PutGraphRequest(request_id=request_id(), graph_id="etl", spec=spec("a"), etag=first.etag)
    assert isinstance(await failure(node.graphs.PutGraph(stale)), errors.EtagMismatch)
    old = (await node.graphs.GetGraph(graph_pb2.GetGraphRequest(name=first.name, version=1))).graph
    assert [task.id for task in old.spec.tasks] == ["a", "b"]
    listed = (await node.graphs.ListGraphs(graph_pb2.ListGraphsRequest())).graphs
    assert [(graph.version, graph.HasField("spec")) for graph in listed] == [(2, False)]
    request.graph, request.request_id = "namespaces/default/graphs/none", request_id()
    assert isinstance(await failure(node.runs.CreateRun(request)), errors.NotFound)


# -- bad inputs (reliability.md 4) ----------------------------------------------------------------------------------------


Request = run_pb2.CreateRunRequest
FAULTS: dict[str, Callable[[Request, graph_pb2.Task], object]] = {
    "spec.tasks": lambda request, _: request.spec.ClearField("tasks"),
    "spec.tasks[1].parents[0]": lambda _, task: task.parents.__setitem__(0, "b"),  # a self-edge
    "spec.tasks[1].parents[1]": lambda _, task: task.parents.append("nobody"),
    "spec.tasks[1].id": lambda _, task: task.MergeFrom(graph_pb2.Task(id="b\u202e")),
    "spec.tasks[1].resources.cpu_millis": lambda _, task: setattr(task.resources, "cpu_millis", -1),
    "spec.tasks[1].retry.backoff_multiplier": lambda _, task: setattr(task.retry, "backoff_multiplier", float("nan")),
    "spec.tasks[1].process.argv": lambda _, task: task.process.ClearField("argv"),
    'spec.tasks[1].process.env["BATON_RUN"]': lambda _, task: task.process.env.update({"BATON_RUN": "x"}),
    "deadline_time": lambda request, _: request.deadline_time.FromSeconds(1),
    "priority": lambda request, _: setattr(request, "priority", 5000),
    "run_id": lambda request, _: setattr(request, "run_id", "../x"),
    "namespace": lambda request, _: setattr(request, "namespace", "A"),
    'labels["k"]': lambda request, _: request.labels.update({"k": "a b"}),
    "graph": lambda request, _: setattr(request, "graph", "namespaces/default/graphs/g"),
}


async def test_every_fault_of_a_graph_is_named_by_its_field(node: Node) -> None:
    for field, spoil in FAULTS.items():
        request = creation("a", "b")
        spoil(request, request.spec.tasks[1])
        error = await failure(node.runs.CreateRun(request))
        assert isinstance(error, errors.InvalidField), field
        assert field in fields_of(error)
        assert error.applied == "no"
    for deadline in (None, int(CLOCK.wall()) + 31 * 24 * 3600):
        request = creation("a")
        request.ClearField("deadline_time")
        if deadline is not None:
            request.deadline_time.FromSeconds(deadline)
        assert fields_of(await failure(node.runs.CreateRun(request))) == ["deadline_time"]
    assert not (await node.runs.ListRuns(run_pb2.ListRunsRequest())).runs


async def test_names_and_pages_that_are_none_are_refused_by_field(node: Node) -> None:
    token = (await seeded_page(node)).next_page_token
    cases: list[tuple[Awaitable[object], str]] = [
        (node.runs.GetRun(run_pb2.GetRunRequest(name="runs/x")), "name"),
        (node.runs.GetTask(run_pb2.GetTaskRequest(name="namespaces/a/runs/b")), "name"),
        (node.runs.ListTasks(run_pb2.ListTasksRequest(run="")), "run"),
        (node.runs.ListRuns(run_pb2.ListRunsRequest(page_size=-1)), "page_size"),
        (node.runs.ListRuns(run_pb2.ListRunsRequest(page_token="forged")), "page_token"),
        (node.runs.ListRuns(run_pb2.ListRunsRequest(page_token=token, namespace="other")), "page_token"),
        (node.runs.ListRuns(run_pb2.ListRunsRequest(states=[99])), "states[0]"),  # type: ignore[list-item]
        (node.graphs.GetGraph(graph_pb2.GetGraphRequest(name="x")), "name"),
        (node.clusters.GetCluster(cluster_pb2.GetClusterRequest(name="eu")), "name"),
        (node.admin.PutNamespace(admin_pb2.PutNamespaceRequest(request_id=request_id())), "namespace.name"),
    ]
    for call, field in cases:
        assert fields_of(await failure(call)) == [field]


async def seeded_page(node: Node) -> run_pb2.ListRunsResponse:
    for _ in range(3):
        await node.runs.CreateRun(creation("a"))
    return await node.runs.ListRuns(run_pb2.ListRunsRequest(page_size=1))


async def test_bytes_that_are_no_message_are_the_callers_fault_and_leak_nothing(node: Node) -> None:
    nested = b""
    for _ in range(200):  # a group inside a group: deeper than any decoder follows
        nested = b"\x22" + varint(len(nested)) + nested
    for payload in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"):
        call = raw(node, "GetRun", payload)
        error = await failure(call)
        assert isinstance(error, errors.InvalidField)
        assert "python" not in error.message.lower()
        assert ".py" not in error.message
    deep = raw(node, "CreateRun", nested)
    assert isinstance(await failure(deep), errors.InvalidField)
    unknown_field = b"\xf8\x07\x01" + run_pb2.GetRunRequest(name="namespaces/a/runs/b").SerializeToString()
    missing = await failure(raw(node, "GetRun", unknown_field))
    assert isinstance(missing, errors.NotFound)


def raw(node: Node, method: str, payload: bytes) -> Awaitable[bytes]:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = node.channel.unary_unary(f"/baton.v1.RunService/{method}")
    return call(payload)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


async def test_a_fault_inside_is_told_by_reference_only(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    secret = "/very/secret/path"

    def broken_read(*args: object) -> object:
        raise ValueError(secret)

    node.replica.services._runs._desk.controller.read = broken_read  # type: ignore[method-assign, assignment]
    error = await failure(node.runs.GetRun(run_pb2.GetRunRequest(name="namespaces/a/runs/b")))
    assert isinstance(error, errors.Internal)
    assert secret not in str(error)
    assert error.applied == "unknown"
    assert error.metadata["reference"] in [getattr(record, "reference", "") for record in caplog.records]


async def test_a_request_over_the_limit_is_refused(node: Node) -> None:
    request = creation("a", annotations={"k": "x" * (5 << 20)})
    assert (await failure(node.runs.CreateRun(request))).code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


async def test_unknown_methods_are_unimplemented(node: Node) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(node, "Nothing", b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_what_is_not_there_is_not_found(node: Node) -> None:
    made = (await node.runs.CreateRun(creation("a"))).run
    missing: tuple[Awaitable[object], ...] = (
        node.runs.GetRun(run_pb2.GetRunRequest(name="namespaces/default/runs/none")),
        node.runs.ListTasks(run_pb2.ListTasksRequest(run="namespaces/default/runs/none")),
        node.runs.GetTask(run_pb2.GetTaskRequest(name=f"{made.name}/tasks/none")),
        node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name="namespaces/default/runs/none")),
        node.clusters.GetCluster(cluster_pb2.GetClusterRequest(name="clusters/none")),
        node.clusters.CordonCluster(cluster_pb2.CordonClusterRequest(request_id=request_id(), name="clusters/none")),
    )
    for call in missing:
        assert isinstance(await failure(call), errors.NotFound)
    logs = node.runs.FollowLogs(run_pb2.FollowLogsRequest(task=f"{made.name}/tasks/a"))
    assert isinstance(await failure(logs.read()), errors.NotFound)


# -- lists and namespaces ---------------------------------------------------------------------------------------------------


async def test_o7_pages_show_every_run_once_in_order_of_uid(node: Node) -> None:
    made = [(await node.runs.CreateRun(creation("a", labels={"n": str(n % 2)}))).run.uid for n in range(25)]
    seen: list[str] = []
    request = run_pb2.ListRunsRequest(page_size=7)
    while True:
        page = await node.runs.ListRuns(request)
        seen += [run.uid for run in page.runs]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == sorted(made)
    odd = await node.runs.ListRuns(run_pb2.ListRunsRequest(page_size=10**9, labels={"n": "1"}))
    assert {run.uid for run in odd.runs} == set(made[1::2])
    done = await node.runs.ListRuns(run_pb2.ListRunsRequest(states=[SUCCESS]))
    assert not done.runs


async def test_namespaces_are_put_and_listed_over_all_shards(node: Node) -> None:
    for name in ("one", "two", "three"):
        namespace = admin_pb2.Namespace(name=name, weight=2.5, live_task_quota=7, retention=Duration(seconds=60))
        put = admin_pb2.PutNamespaceRequest(request_id=request_id(), namespace=namespace)
        stored = (await node.admin.PutNamespace(put)).namespace
        assert (stored.weight, stored.live_task_quota, stored.retention.seconds) == (2.5, 7, 60)
    listed = (await node.admin.ListNamespaces(admin_pb2.ListNamespacesRequest())).namespaces
    assert [namespace.name for namespace in listed] == ["one", "three", "two"]


async def test_operators_see_replicas_and_shards_and_are_told_what_cannot_be_done(node: Node) -> None:
    replicas = (await node.admin.ListReplicas(admin_pb2.ListReplicasRequest())).replicas
    assert [(replica.id, replica.shards) for replica in replicas] == [("r1", 33)]
    shards = await node.admin.ListShards(admin_pb2.ListShardsRequest())
    assert {shard.replica for shard in shards.shards} == {shard.preferred for shard in shards.shards} == {"r1"}
    assert (shards.incarnation, shards.restore_suspected) == (1, False)
    confirm = admin_pb2.ConfirmRestoredRequest(request_id=request_id())
    assert (await node.admin.ConfirmRestored(confirm)).incarnation == 1
    backup = await failure(node.admin.Backup(admin_pb2.BackupRequest()).read())
    assert backup.applied == "no"


async def test_j12_a_restore_is_confirmed_when_no_old_work_can_live_or_at_once_if_told_so() -> None:
    async with rig("r1") as made:
        node = made.nodes[0]
        await node.replica.controller.restore.suspect(1, "the head is too low")
        confirm = admin_pb2.ConfirmRestoredRequest(request_id=request_id())
        early = await failure(node.admin.ConfirmRestored(confirm))
        assert (early.reason, early.code, early.applied) == ("WRONG_STATE", 9, "no")
        assert 30.0 < (early.retry_after or 0.0) <= 42.0, "no cluster is known: the default profile counts"
        assert keys.RESTORED_SUSPECTED in made.etcd.keyspace.live
        confirm.now = True
        assert (await node.admin.ConfirmRestored(confirm)).incarnation == 2
        assert keys.RESTORED_SUSPECTED not in made.etcd.keyspace.live


# -- watching ---------------------------------------------------------------------------------------------------------------


async def test_i16_a_watch_sees_all_events_to_the_end_and_resumes_by_number(node: Node) -> None:
    made = (await node.runs.CreateRun(creation("a", "b"))).run
    watch = aiter(node.runs.WatchRun(run_pb2.WatchRunRequest(name=made.name)))
    first = await anext(watch)
    assert first.run.uid == made.uid
    await node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name))
    messages = [first, *[message async for message in watch]]
    numbers = [event.number for message in messages for event in message.events]
    assert numbers == list(range(1, messages[-1].run.event_number + 1))
    assert messages[-1].run.state == run_pb2.RUN_STATE_CANCELLED
    ids = {change.id for message in messages for event in message.events for change in event.changes}
    assert ids == {"a", "b"}
    rest = [m async for m in node.runs.WatchRun(run_pb2.WatchRunRequest(name=made.name, after_event=1))]
    assert [event.number for message in rest for event in message.events] == numbers[1:]
    ahead = node.runs.WatchRun(run_pb2.WatchRunRequest(name=made.name, after_event=999))
    assert fields_of(await failure(ahead.read())) == ["after_event"]


async def test_a_watch_that_is_given_up_leaves_nothing_behind(node: Node) -> None:
    made = (await node.runs.CreateRun(creation("a"))).run
    watch = node.runs.WatchRun(run_pb2.WatchRunRequest(name=made.name))
    await watch.read()
    bells = node.replica.services.bells
    await until(lambda: bool(bells._waiting))
    watch.cancel()
    await until(lambda: not bells._waiting)


# -- history ------------------------------------------------------------------------------------------------------------------


async def test_j10_an_archived_run_answers_the_same_calls(
    federation: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "DELAY", 0.5)
    request = creation("a", "b", run_id="old")
    made = (await node.runs.CreateRun(request)).run
    await node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name))
    live = await answers(node, made.name)
    shard = node.replica.controller.owned()[made.shard].machine
    await until(lambda: shard.run_by_uid(made.uid) is None)  # type: ignore[attr-defined]
    assert len(federation.history._kept) == 1
    assert await answers(node, made.name) == live
    # Its name stays taken, its own retry meets it, and a cancel of the cancelled is no error.
    assert isinstance(await failure(node.runs.CreateRun(creation("a", run_id="old"))), errors.NameTaken)
    assert (await node.runs.CreateRun(request)).run.uid == made.uid
    cancel = run_pb2.CancelRunRequest(request_id=request_id(), name=made.name)
    assert (await node.runs.CancelRun(cancel)).run.uid == made.uid


async def answers(node: Node, name: str) -> list[object]:
    run = (await node.runs.GetRun(run_pb2.GetRunRequest(name=name))).run
    tasks = await node.runs.ListTasks(run_pb2.ListTasksRequest(run=name))
    second = (await node.runs.GetTask(run_pb2.GetTaskRequest(name=f"{name}/tasks/b"))).task
    listed = await node.runs.ListRuns(run_pb2.ListRunsRequest())
    events = [e for m in [m async for m in node.runs.WatchRun(run_pb2.WatchRunRequest(name=name))] for e in m.events]
    return [run, tasks, second, listed, events]


async def test_history_that_is_down_keeps_runs_live(
    federation: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "DELAY", 0.1)
    federation.history.down = True
    made = (await node.runs.CreateRun(creation("a"))).run
    await node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name))
    asked = run_pb2.GetRunRequest(name=made.name)
    async with time_limit(30):
        while (await node.runs.GetRun(asked)).run.state != run_pb2.RUN_STATE_CANCELLED:  # noqa: ASYNC110 - it must be asked
            await asyncio.sleep(0.02)
    await asyncio.sleep(1.0)  # ten times the archiver's delay, in vain
    assert (await node.runs.GetRun(asked)).run.state == run_pb2.RUN_STATE_CANCELLED
    gone = await failure(node.runs.GetRun(run_pb2.GetRunRequest(name="namespaces/default/runs/none")))
    assert isinstance(gone, errors.StoreUnavailable)


# -- two replicas ---------------------------------------------------------------------------------------------------------------


async def test_o5_any_replica_serves_any_call(pair: Rig) -> None:
    one, two = pair.nodes
    made = [(await one.runs.CreateRun(creation("a"))).run for _ in range(12)]
    assert {run.shard for run in made} & two.owned
    assert {run.shard for run in made} & one.owned
    for run in made:
        assert (await two.runs.GetRun(run_pb2.GetRunRequest(name=run.name))).run.uid == run.uid
    for node in (one, two):
        listed = (await node.runs.ListRuns(run_pb2.ListRunsRequest())).runs
        assert {run.uid for run in listed} == {run.uid for run in made}
        missing = node.runs.GetRun(run_pb2.GetRunRequest(name="namespaces/default/runs/none"))
        assert isinstance(await failure(missing), errors.NotFound)
    remote = next(run for run in made if run.shard in two.owned)
    refused = creation("a", run_id=remote.name.rpartition("/")[2])
    assert isinstance(await failure(one.runs.CreateRun(refused)), errors.NameTaken)


async def test_o4_calls_are_parked_and_watches_go_on_while_shards_move(pair: Rig) -> None:
    one, two = pair.nodes
    made = next(
        run for run in [(await one.runs.CreateRun(creation("a", "b"))).run for _ in range(16)] if run.shard in two.owned
    )
    watch = aiter(one.runs.WatchRun(run_pb2.WatchRunRequest(name=made.name)))
    first = await anext(watch)
    await two.server.drain()
    leaving = asyncio.create_task(two.replica.stop())
    created = asyncio.ensure_future(one.runs.CreateRun(creation("a"), timeout=20))
    results = await asyncio.gather(
        *(one.runs.GetRun(run_pb2.GetRunRequest(name=made.name), timeout=20) for _ in range(5))
    )
    assert (await created).run.uid
    await leaving
    assert {result.run.uid for result in results} == {made.uid}
    await until(lambda: len(one.owned) == 33)
    await one.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name), timeout=20)
    messages = [first, *[message async for message in watch]]
    numbers = [event.number for message in messages for event in message.events]
    assert numbers == list(range(1, messages[-1].run.event_number + 1))


async def test_the_client_library_goes_from_a_leaving_replica_to_another(pair: Rig) -> None:
    one, two = pair.nodes
    async with client(one, two) as sdk:
        made = await sdk.create_run(spec("a"), deadline=CLOCK.wall() + 60)
        await one.server.drain()
        assert (await sdk.get_run(made.name)).uid == made.uid
        await sdk.cancel_run(made.name)
        assert (await sdk.wait_run(made.name)).state == run_pb2.RUN_STATE_CANCELLED


async def test_74_a_store_that_is_down_is_said_with_what_was_applied(federation: Rig, node: Node) -> None:
    federation.etcd.lose_quorum()
    error = await failure(node.runs.CreateRun(creation("a"), timeout=2))
    assert error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert error.applied == "unknown"  # it was decided, and may land when the store is back (J6)
    federation.etcd.regain_quorum()


class LosesWhatItCommits:
    """A listener: the store goes down and the shard is lost between its commit and the answer."""

    def __init__(self, rig: Rig, node: Node, shard: str) -> None:
        self._rig, self._node, self._shard = rig, node, shard

    def taken(self, shard: OwnedShard) -> None:
        pass

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        if shard.id == self._shard:
            self._rig.etcd.lose_quorum()
            self._node.replica.controller.drop(shard.id)

    def dropped(self, shard: str) -> None:
        pass


async def test_j6_what_is_committed_is_never_said_to_be_not_applied(federation: Rig, node: Node) -> None:
    made = (await node.runs.CreateRun(creation("a"), timeout=20)).run
    shard = shard_of("default", made.name.rpartition("/")[2])
    node.replica.controller.listen(LosesWhatItCommits(federation, node, shard))
    cancel = run_pb2.CancelRunRequest(request_id=request_id(), name=made.name)
    error = await failure(node.runs.CancelRun(cancel, timeout=2))
    federation.etcd.regain_quorum()
    assert error.applied == "unknown"


# -- a store that fills up -----------------------------------------------------------------------------------------------


async def test_j9_a_store_that_fills_up_takes_no_new_work_but_lets_old_work_end(
    pair: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_room, "POLL_INTERVAL", 0.05)
    node, other = pair.nodes
    made = (await node.runs.CreateRun(creation("a", run_id="before"))).run
    rooms = [each.replica._room for each in pair.nodes]
    quota, pair.etcd._quota_bytes = pair.etcd._quota_bytes, int(pair.etcd.keyspace.size() / 0.75)
    await until(lambda: all(room.refusal for room in rooms))
    put_graph = graph_pb2.PutGraphRequest(request_id=request_id(), graph_id="g", spec=spec("a"))
    namespace = admin_pb2.PutNamespaceRequest(request_id=request_id(), namespace=admin_pb2.Namespace(name="n"))
    for call in (
        other.runs.CreateRun(creation("a")),
        node.graphs.PutGraph(put_graph),
        node.admin.PutNamespace(namespace),
    ):
        refused = await failure(call)
        assert isinstance(refused, errors.LimitExceeded)
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert "70% of its quota" in refused.message
        assert refused.applied == "no"
    cancel = run_pb2.CancelRunRequest(request_id=request_id(), name=made.name)
    assert (await other.runs.CancelRun(cancel)).run.state == run_pb2.RUN_STATE_CANCELLED
    pair.etcd._quota_bytes = quota
    await until(lambda: not any(room.refusal for room in rooms))
    await other.runs.CreateRun(creation("a"))


# -- a restored store ----------------------------------------------------------------------------------------------------


async def test_j12_a_run_that_finished_before_the_restore_is_answered_by_history(
    federation: Rig, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "DELAY", 0.1)
    made = (await node.runs.CreateRun(creation("a", run_id="old"))).run
    backup = federation.etcd.snapshot()
    await node.runs.CancelRun(run_pb2.CancelRunRequest(request_id=request_id(), name=made.name, reason="enough"))
    shard = shard_of("default", "old")
    machine = node.replica.controller.owned()[shard].machine
    await until(lambda: machine.run_by_uid(made.uid) is None)  # type: ignore[attr-defined]
    federation.etcd.restore(backup)
    assert await node.replica.controller.restore.check_own([shard])
    confirm = admin_pb2.ConfirmRestoredRequest(request_id=request_id(), now=True)
    assert (await node.admin.ConfirmRestored(confirm)).incarnation == 2
    owned = node.replica.controller.owned
    await until(lambda: shard in owned() and owned()[shard].incarnation == 2)
    await until(lambda: not owned()[shard].machine.event_numbers())  # type: ignore[attr-defined]
    read = (await node.runs.GetRun(run_pb2.GetRunRequest(name=made.name))).run
    assert (read.uid, read.state) == (made.uid, run_pb2.RUN_STATE_CANCELLED)
    tasks = (await node.runs.ListTasks(run_pb2.ListTasksRequest(run=made.name))).tasks
    assert [task.state for task in tasks] == [run_pb2.TASK_STATE_CANCELLED]
