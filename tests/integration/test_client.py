"""The client against real gRPC servers that fail on demand: J6 (unclear answers), O5, O8 (request ids), J10 (watches)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton import client_call, client_streams, contexts, errors
from baton.client import AsyncClient, Tls
from baton.time_limits import time_limit
from baton.v1 import graph_pb2, run_pb2
from tests.integration.small_federation import Fault, Replica, State

BARE = grpc.StatusCode.UNAVAILABLE


class World:
    def __init__(self, state: State, replicas: list[Replica]) -> None:
        self.state, self.replicas = state, replicas
        self.addresses = [each.address for each in replicas]

    def calls(self, method: str) -> int:
        return sum(each.calls.count(method) for each in self.replicas)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    state = State()
    replicas = [Replica(state), Replica(state)]
    for each in replicas:
        await each.start()
    yield World(state, replicas)
    for each in replicas:
        await each.stop()


@pytest.fixture
async def client(world: World) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(world.addresses) as made:
        yield made


def graph(count: int = 3, size: int = 0) -> graph_pb2.GraphSpec:
    spec = graph_pb2.GraphSpec()
    for number in range(count):
        task = spec.tasks.add(id=f"t{number}", parents=[f"t{number - 1}"] if number else [])
        task.process.argv.extend(["true", "x" * size])
    return spec


def soon() -> float:
    return time.time() + 60


async def test_a_lost_answer_is_asked_for_again_under_the_same_request_id(world: World, client: AsyncClient) -> None:
    world.replicas[0].faults["CreateRun"] = [Fault(code=BARE, after=True)]
    run = await client.create_run(graph(), deadline=soon(), run_id="once")
    assert run.name == "namespaces/default/runs/once"
    assert len(world.state.records) == 1
    assert [each.calls for each in world.replicas] == [["CreateRun"], ["CreateRun"]]
    assert len({request.request_id for request in world.state.requests}) == 1


async def test_not_applied_is_passed_on_when_every_try_said_so(world: World, client: AsyncClient) -> None:
    world.replicas[0].faults["CreateRun"] = [Fault(error=errors.NotOwned("no owner"))]
    world.replicas[1].faults["CreateRun"] = [Fault(error=errors.WrongState("no"))]
    with pytest.raises(errors.WrongState) as caught:
        await client.create_run(graph(), deadline=soon())
    assert caught.value.applied == errors.NOT_APPLIED
    assert world.state.records == {}


@pytest.mark.parametrize(
    "first",
    [Fault(code=BARE, after=True), Fault(error=errors.StoreUnavailable("?", applied=errors.UNKNOWN), after=True)],
)
async def test_not_applied_is_not_passed_on_after_an_unclear_try(
    world: World, client: AsyncClient, first: Fault
) -> None:
    """PROTOCOL J6, last sentences: the second try's NOT_APPLIED says nothing about the first one, which did apply."""
    world.replicas[0].faults["CreateRun"] = [first]
    world.replicas[1].faults["CreateRun"] = [Fault(error=errors.QuotaExceeded("too many"))]
    with pytest.raises(errors.QuotaExceeded) as caught:
        await client.create_run(graph(), deadline=soon())
    assert caught.value.applied == errors.UNKNOWN
    assert len(world.state.records) == 1


async def test_a_frozen_replica_costs_a_try_and_not_the_call(world: World, client: AsyncClient) -> None:
    world.replicas[0].faults["CreateRun"] = [Fault(silent=True)]
    run = await client.create_run(graph(), deadline=soon())
    assert list(world.state.records) == [run.name]
    assert world.replicas[1].calls == ["CreateRun"]


async def test_definite_failures_are_not_tried_again(world: World, client: AsyncClient) -> None:
    with pytest.raises(errors.NotFound):
        await client.get_run("namespaces/default/runs/none")
    assert world.calls("GetRun") == 1
    with pytest.raises(errors.InvalidField) as caught:
        await client.create_run(graph_pb2.GraphSpec(), deadline=soon())
    assert [each.field for each in caught.value.field_violations] == ["spec.tasks"]
    assert world.calls("CreateRun") == 1


async def test_an_answer_that_no_handler_made_is_not_repeated_and_unknown(world: World, client: AsyncClient) -> None:
    world.replicas[0].faults["CancelRun"] = [Fault(code=grpc.StatusCode.INTERNAL)]
    with pytest.raises(errors.Internal) as caught:
        await client.cancel_run("namespaces/default/runs/x")
    assert caught.value.applied == errors.UNKNOWN
    assert world.calls("CancelRun") == 1


async def test_nobody_there(world: World) -> None:
    for each in world.replicas:
        await each.stop()
    async with AsyncClient(world.addresses, timeout=0.5) as client:
        with pytest.raises(errors.Unreachable, match="--endpoint") as caught:
            await client.cancel_run("namespaces/default/runs/x")
    assert caught.value.applied == errors.UNKNOWN


async def test_where_all_refuse_and_none_ever_answered_a_call_ends_long_before_its_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_call, "REFUSED_SECONDS", 0.0)
    for each in world.replicas:
        await each.stop()
    async with AsyncClient(world.addresses, timeout=3600) as client, time_limit(60):
        with pytest.raises(errors.Unreachable, match="nobody listens at") as caught:
            await client.cancel_run("namespaces/default/runs/x")
        assert caught.value.applied == errors.NOT_APPLIED
        with pytest.raises(errors.Unreachable):
            async for _ in client.follow_logs("namespaces/default/runs/x/tasks/t", patience=3600):
                pass


async def test_replicas_that_have_answered_are_waited_for_while_they_refuse(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_call, "REFUSED_SECONDS", 0.0)
    async with AsyncClient(world.addresses, timeout=30) as client:
        with pytest.raises(errors.NotFound):  # an error of a handler is an answer
            await client.get_run("namespaces/default/runs/x")
        ports = [int(address.rpartition(":")[2]) for address in world.addresses]
        for each in world.replicas:
            await each.stop()
        asking = asyncio.create_task(client.list_replicas())
        await asyncio.wait([asking], timeout=0.5)
        assert not asking.done()
        await world.replicas[0].start(ports[0])
        assert [replica.id for replica in await asking] == ["r1"]


async def test_a_dead_replica_is_left_and_not_asked_again(world: World, client: AsyncClient) -> None:
    await client.create_run(graph(), deadline=soon(), run_id="r")
    await world.replicas[0].stop()
    for _ in range(5):
        await client.get_run("namespaces/default/runs/r")
    assert world.replicas[1].calls == ["GetRun"] * 5


async def test_large_graphs_go_in_pieces(world: World, client: AsyncClient) -> None:
    spec = graph(10_000, size=600)
    assert spec.ByteSize() > 4 * 1024 * 1024
    world.replicas[0].faults["CreateRunInPieces"] = [Fault(code=BARE, after=True)]
    run = await client.create_run(spec, deadline=soon(), run_id="big", labels={"outcome": "HANG"})
    assert run.task_count == 10_000
    assert world.calls("CreateRun") == 0
    assert world.calls("CreateRunInPieces") == 2
    assert world.state.requests[0] == world.state.requests[1]
    assert [task.id for task in world.state.requests[0].spec.tasks] == [task.id for task in spec.tasks]
    assert [task.index async for task in client.list_tasks(run.name)] == list(range(10_000))


async def test_lists_follow_pages(world: World, client: AsyncClient) -> None:
    for number in range(5):
        await client.create_run(graph(), deadline=soon(), run_id=f"r{number}")
    assert [run.name[-2:] async for run in client.list_runs()] == ["r0", "r1", "r2", "r3", "r4"]
    assert [cluster.name async for cluster in client.list_clusters()] == ["clusters/eu", "clusters/us"]


async def collect(client: AsyncClient, name: str, after: int = 0) -> tuple[list[int], run_pb2.Run]:
    numbers: list[int] = []
    last = run_pb2.Run()
    async for message in client.watch_run(name, after_event=after):
        numbers += [event.number for event in message.events]
        if message.HasField("run"):
            last = message.run
    return numbers, last


async def test_a_watch_has_no_gap_and_no_double_over_cut_streams(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(5), deadline=soon())
    for each in world.replicas:
        each.cut_watch_after = 3
    numbers, last = await collect(client, run.name)
    assert numbers == list(range(1, 13))
    assert last.state == run_pb2.RUN_STATE_SUCCEEDED
    assert world.calls("WatchRun") > 3
    assert (await collect(client, run.name, after=7))[0] == list(range(8, 13))


async def test_a_watch_outlives_replicas_that_die_and_come_back(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(4), deadline=soon(), labels={"outcome": "HANG"})
    watching = asyncio.create_task(collect(client, run.name))
    for turn in range(4):
        await world.state.emit(run.name, "started")
        victim = world.replicas[turn % 2]
        port = int(victim.address.rpartition(":")[2])
        await victim.stop()
        await world.state.emit(run.name, "finished")
        await victim.start(port)
    await world.state.play(run.name, "FAILED")
    numbers, last = await asyncio.wait_for(watching, 60)
    assert numbers == list(range(1, len(world.state.records[run.name].events) + 1))
    assert last.state == run_pb2.RUN_STATE_FAILED


async def test_a_watch_leaves_a_silent_replica(
    world: World, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_streams, "SILENCE_SECONDS", 0.3)
    run = await client.create_run(graph(2), deadline=soon())
    world.replicas[0].mute_watch = True
    numbers, last = await asyncio.wait_for(collect(client, run.name), 30)
    assert numbers == list(range(1, run.event_number + 1))
    assert last.state == run_pb2.RUN_STATE_SUCCEEDED
    assert world.replicas[1].calls.count("GetRun") >= 1


async def test_a_quiet_run_is_watched_on(world: World, client: AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_streams, "SILENCE_SECONDS", 0.1)
    run = await client.create_run(graph(2), deadline=soon(), labels={"outcome": "HANG"})
    watching = asyncio.create_task(collect(client, run.name))
    async with time_limit(30):
        await asyncio.gather(*(each.called("WatchRun", 2) for each in world.replicas))
    await world.state.play(run.name, "SUCCEEDED")
    assert (await asyncio.wait_for(watching, 30))[0] == list(range(1, 7))


async def test_a_server_that_skips_events_is_found_out(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(3), deadline=soon())
    del world.state.records[run.name].events[2]
    with pytest.raises(errors.Internal, match="after 2"):
        await collect(client, run.name)


async def test_a_watch_tells_what_the_server_refuses(world: World, client: AsyncClient) -> None:
    with pytest.raises(errors.NotFound):
        await collect(client, "namespaces/default/runs/none")
    run = await client.create_run(graph(), deadline=soon())
    world.replicas[0].faults["WatchRun"] = [Fault(error=errors.WatchCompacted("gone"))]
    with pytest.raises(errors.WatchCompacted):
        await collect(client, run.name)


async def test_a_watch_gives_up_when_its_patience_ends(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(), deadline=soon(), labels={"outcome": "HANG"})
    for each in world.replicas:
        await each.stop()
    with pytest.raises(errors.Unreachable):
        async for _ in client.watch_run(run.name, patience=0.3):
            pass


async def test_waiting_for_a_run(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(), deadline=soon(), labels={"outcome": "DEADLINE_EXCEEDED"})
    assert (await client.wait_run(run.name)).state == run_pb2.RUN_STATE_DEADLINE_EXCEEDED


async def test_logs_resume_by_offset(world: World, client: AsyncClient) -> None:
    run = await client.create_run(graph(), deadline=soon())
    world.state.records[run.name].log = bytes(range(200))
    for each in world.replicas:
        each.cut_watch_after = 1
    pieces = [piece async for piece in client.follow_logs(f"{run.name}/tasks/t0")]
    assert b"".join(piece.data for piece in pieces) == bytes(range(200))
    assert {piece.attempt for piece in pieces} == {2}
    assert world.calls("FollowLogs") > 10


async def test_operators_calls(world: World, client: AsyncClient) -> None:
    assert (await client.cordon_cluster("clusters/eu")).admission == 2
    assert (await client.drain_cluster("clusters/eu")).admission == 3
    assert (await client.uncordon_cluster("clusters/eu")).admission == 1
    assert (await client.confirm_restored(), await client.confirm_restored(now=True)) == (2, 3)
    assert [replica.id for replica in await client.list_replicas()] == ["r1"]
    assert b"".join([piece async for piece in client.backup()]) == world.replicas[0].state.backup


async def test_short_names_are_those_of_the_clients_namespace(world: World) -> None:
    async with AsyncClient(world.addresses, namespace="team") as client:
        created = await client.create_run(graph(1), deadline=soon(), run_id="short")
        assert created.name == "namespaces/team/runs/short"
        assert (await client.get_run("short")).name == (await client.get_run(created.name)).name == created.name
        assert (await client.wait_run("short")).state == run_pb2.RUN_STATE_SUCCEEDED
        assert [task.id async for task in client.list_tasks("short")] == ["t0"]
        assert [task.id async for task in client.as_completed("short")] == ["t0"]
        assert (await client.get_task("short/t0")).result == b"result of t0"
        assert b"".join([piece.data async for piece in client.follow_logs("short/t0", follow=False)])
        assert [message.run.name async for message in client.watch_run("short") if message.HasField("run")]
        assert [run.name async for run in client.list_runs()] == [created.name]
        assert (await client.get_cluster("eu")).name == "clusters/eu"
        assert (await client.cordon_cluster("eu")).admission == 2
        with pytest.raises(errors.NotFound):
            await client.get_run("namespaces/default/runs/short")


async def test_what_is_no_name_is_refused_before_it_is_sent(world: World, client: AsyncClient) -> None:
    for asked, forms in (
        (client.get_run("A b"), "RUN or namespaces/NAMESPACE/runs/RUN"),
        (client.cancel_run(""), "RUN or namespaces/NAMESPACE/runs/RUN"),
        (client.get_task("nightly"), "RUN/TASK or namespaces/NAMESPACE/runs/RUN/tasks/TASK"),
        (client.get_graph("a/b"), "GRAPH or namespaces/NAMESPACE/graphs/GRAPH"),
        (client.drain_cluster("eu/1"), "CLUSTER or clusters/CLUSTER"),
        (client.get_trace("A"), "RUN or namespaces/NAMESPACE/runs/RUN"),
        (client.artifacts.read("A", "t", "x"), "RUN or namespaces/NAMESPACE/runs/RUN"),
    ):
        with pytest.raises(errors.InvalidField) as caught:
            await asked
        assert forms in str(caught.value)
        assert caught.value.applied == errors.NOT_APPLIED
        assert len(caught.value.field_violations) == 1
    assert [replica.calls for replica in world.replicas] == [[], []]


async def test_without_an_endpoint_it_is_the_current_context(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"BATON_CONFIG": str(tmp_path / "contexts.toml")}
    monkeypatch.setenv("BATON_CONFIG", file["BATON_CONFIG"])
    for name in ("BATON_ENDPOINT", "BATON_CONTEXT", "BATON_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.InvalidField, match="no federation is named"):
        AsyncClient()
    contexts.write_context("other", ["127.0.0.1:1"], env=file)
    contexts.write_context("here", world.addresses, namespace="team", env=file)
    async with AsyncClient() as client:
        assert client.namespace == "team"
        assert [each.id for each in await client.list_replicas()] == ["r1"]
    assert AsyncClient(context="other", namespace="mine").namespace == "mine"
    with pytest.raises(errors.InvalidField, match="known: here, other"):
        AsyncClient(context="none")
    contexts.remove_context("here", env=file)
    with pytest.raises(errors.InvalidField, match=r"known: other\): choose one with --context NAME or BATON_CONTEXT"):
        AsyncClient()
    (tmp_path / "contexts.toml").write_text("current = ")
    with pytest.raises(errors.InvalidField, match=r"contexts\.toml: is not TOML"):
        AsyncClient()
    assert AsyncClient("127.0.0.1:1").namespace == "default"  # what is given needs no file


async def test_arguments_that_cannot_be_meant_are_named(world: World, client: AsyncClient) -> None:
    with pytest.raises(errors.InvalidField, match="deadline: '5m' is no moment: give seconds since the epoch"):
        await client.create_run(graph(), deadline="5m")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidField, match="timeout is -1"):
        AsyncClient(world.addresses, timeout=-1)
    with pytest.raises(errors.InvalidField, match="namespace 'A'"):
        AsyncClient(world.addresses, namespace="A")


@pytest.mark.parametrize("address", ["10.0.0.1:80", "example.com:80", "0.0.0.0:80", "[2001:db8::1]:80"])
def test_plain_text_only_on_loopback(address: str) -> None:
    with pytest.raises(errors.Denied, match="mutual TLS"):
        AsyncClient([address])
    AsyncClient([address], tls=Tls("ca", "certificate", "key"))


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:x", "host:0", "host:65536"])
def test_bad_endpoints(address: str) -> None:
    with pytest.raises(errors.InvalidField, match="host:port"):
        AsyncClient([address])
    with pytest.raises(errors.InvalidField):
        AsyncClient([])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_loopback_endpoints(address: str) -> None:
    AsyncClient([address])


async def test_unreadable_certificates_are_named() -> None:
    async with AsyncClient(["example.com:1"], tls=Tls("/none/ca.pem", "c", "k")) as client:
        with pytest.raises(errors.InvalidField, match=r"/none/ca\.pem"):
            await client.list_replicas()
