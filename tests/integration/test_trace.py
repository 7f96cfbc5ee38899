"""One trace of a run with a failover and a takeover: from the service, the command line, the web port and an OTLP receiver."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from baton import errors, names, traces
from baton.client import AsyncClient
from baton.time_limits import time_limit
from baton.v1 import graph_pb2, run_pb2, trace_pb2, trace_pb2_grpc
from baton.webport import WebPort
from control_plane import archiver
from control_plane.core.span_model import trace_id_of
from control_plane.meter import Meter
from control_plane.metrics import ReplicaMetrics
from control_plane.observing import Exporting
from control_plane.services.desk import shard_of_run
from control_plane.web import Web
from tests.integration.fake_clusters import CLOCK, FakeCluster, fake_cluster
from tests.integration.replicas import Node, rig, until

KIND = trace_pb2.SpanKind
ROOT = Path(__file__).parents[2]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector as far as traces go."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.address = ""

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    made, server = Receiver(), grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    made.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)


def graph(*ids: str) -> graph_pb2.GraphSpec:
    """A chain of fake work."""
    made = graph_pb2.GraphSpec()
    for before, id_ in itertools.pairwise(("", *ids)):
        made.tasks.add(id=id_, process=graph_pb2.ProcessTask(argv=["work"]), parents=[before] if before else [])
    return made


async def attempts(client: AsyncClient, task: str) -> list[run_pb2.Attempt]:
    return list((await client.get_task(task)).attempts)


async def running_on(client: AsyncClient, task: str, cluster: str) -> None:
    async with time_limit(60):
        while True:
            found = await attempts(client, task)
            if found and found[-1].cluster == cluster and found[-1].state == run_pb2.ATTEMPT_STATE_RUNNING:
                return
            await asyncio.sleep(0.1)


async def baton(node: Node, *argv: str) -> str:
    command = [sys.executable, "-m", "baton.cli", "--endpoint", node.server.address, *argv]
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def get(port: WebPort, path: str) -> tuple[int, bytes]:
    host, _, number = port.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(number))
    writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body


@asynccontextmanager
async def web(node: Node) -> AsyncIterator[WebPort]:
    meter = Meter(CLOCK)
    port = WebPort(Web(node.replica, ReplicaMetrics(node.replica, meter)).route)
    await port.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await port.close()


@asynccontextmanager
async def exporting(address: str) -> AsyncIterator[Exporting]:
    made = Exporting(f"http://{address}")
    try:
        yield made
    finally:
        await asyncio.to_thread(made.close)


def owners(spans: list[trace_pb2.Span]) -> list[trace_pb2.Span]:
    return [span for span in spans if span.kind == KIND.SPAN_KIND_ATTEMPT]


def check_whole(spans: list[trace_pb2.Span]) -> None:
    """No span twice, none without its parent, no gap within an owner's time nor between two owners of a task."""
    assert set(Counter(span.span_id for span in spans).values()) == {1}
    known = {span.span_id for span in spans}
    assert all(span.parent_id in known for span in spans[1:])
    assert not spans[0].parent_id
    for owner in owners(spans):
        tiles = [span for span in spans if span.parent_id == owner.span_id]
        assert (tiles[0].start_time, tiles[-1].end_time) == (owner.start_time, owner.end_time)
        assert all(before.end_time == after.start_time for before, after in itertools.pairwise(tiles))
    for before, after in itertools.pairwise(owners(spans)):
        assert before.end_time == after.start_time


@pytest.mark.timeout(180)
async def test_one_trace_over_a_failover_and_a_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver, "DELAY", 1.5)
    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(receiver())
        export = await stack.enter_async_context(exporting(collector.address))
        federation = await stack.enter_async_context(rig("r1", "r2", archived=export.archived))
        endpoints = [node.server.address for node in federation.nodes]
        client = await stack.enter_async_context(AsyncClient(endpoints))
        eu: FakeCluster = await stack.enter_async_context(fake_cluster("eu", endpoints, seconds=3600))
        made = await client.create_run(graph("move", "after"), deadline=CLOCK.wall() + 300, run_id="story")
        await running_on(client, f"{made.name}/tasks/move", "eu")
        early = await client.get_trace(made.name)
        assert early[0].open
        assert owners(early)[0].open

        await stack.enter_async_context(fake_cluster("us", endpoints, seconds=3))
        await eu.die()
        shard = shard_of_run(names.parse_run(made.name))
        owner, other = sorted(federation.nodes, key=lambda node: shard not in node.owned)
        await running_on(client, f"{made.name}/tasks/move", "us")
        await owner.replica.kill()
        await owner.server.stop(0)
        async with time_limit(60):
            done = await client.wait_run(made.name)
        assert done.state == run_pb2.RUN_STATE_SUCCEEDED

        live = await client.get_trace(made.name)
        await until(lambda: bool(federation.history._kept), 60)
        await until(lambda: not other.replica.controller.owned()[shard].machine._state.runs)  # type: ignore[attr-defined]
        archived = await client.get_trace(made.name)
        assert archived == live
        check_whole(live)
        assert {span.trace_id for span in live} == {trace_id_of(made.uid)}
        first, second, after = owners(live)
        assert (first.span_id, first.start_time) == (owners(early)[0].span_id, owners(early)[0].start_time)
        assert [(span.task, span.cluster) for span in owners(live)] == [("move", "eu"), ("move", "us"), ("after", "us")]
        assert [(link.span_id, link.relation) for link in second.links] == [(first.span_id, "replaces")]
        assert traces.attributes(first)["baton.evidence"] == "timed"
        assert traces.attributes(second)["baton.moved_from"] == "eu"
        assert first.critical
        assert second.critical
        assert after.critical

        await until(lambda: len(collector.spans) >= len(live), 60)
        assert {each.span_id.hex(): each.name for each in collector.spans} == {s.span_id: s.name for s in live}
        assert len(collector.spans) == len(live)

        await check_views(other, live)


async def check_views(node: Node, spans: list[trace_pb2.Span]) -> None:
    """The command line and the web port show the same."""
    shown = await baton(node, "trace", "story")
    lines = [line for line in shown.splitlines() if " move " in line]
    assert "eu" in lines[0]
    assert "LOST" in lines[0]
    assert "moved from eu" in lines[1]
    assert all(line.startswith("*") for line in lines)
    otlp = json.loads(await baton(node, "trace", "story", "-o", "otlp"))
    assert otlp == traces.otlp(spans)
    plain = json.loads(await baton(node, "trace", "story", "--json"))
    assert [each["spanId"] for each in plain["spans"]] == [each.span_id for each in spans]
    jaeger = json.loads(await baton(node, "trace", "story", "-o", "jaeger"))
    assert jaeger == traces.jaeger(spans)
    async with web(node) as port:
        uid = spans[0].trace_id[8:]
        for id_ in (spans[0].trace_id, uid):
            status, body = await get(port, f"/api/traces/{id_}")
            assert (status, json.loads(body)) == (200, jaeger)
        status, body = await get(port, "/trace/default/story")
        assert status == 200
        assert body.count(b"<tr") == 1 + len(owners(spans))
        assert b"<script" not in body
        assert (await get(port, "/api/traces/" + "0" * 32))[0] == 404
        assert (await get(port, "/trace/default/none"))[0] == 404
        assert (await get(port, "/trace/default/No%3Cb%3E"))[0] == 404


async def test_a_trace_comes_in_parts_and_with_otlp_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.services.trace.PART_SPANS", 4)
    async with rig("r1", "r2") as federation:
        endpoints = [node.server.address for node in federation.nodes]
        async with AsyncClient(endpoints) as client, fake_cluster("eu", endpoints):
            made = await client.create_run(graph("a", "b", "c"), deadline=CLOCK.wall() + 60)
            async with time_limit(40):
                await client.wait_run(made.name)
            whole = await client.get_trace(made.name)
            check_whole(whole)
            stub = client._caller.endpoint.traces
            parts = [
                part async for part in stub.GetTrace(trace_pb2.GetTraceRequest(run=made.name, skip=3, otlp_json=True))
            ]
            assert [span for part in parts for span in part.spans] == whole[3:]
            assert {part.total for part in parts} == {len(whole)}
            for part in parts:
                assert 0 < len(part.spans) <= 4
                assert json.loads(part.otlp_json) == traces.otlp(part.spans)


async def test_what_is_not_there_and_what_is_no_name() -> None:
    async with rig("r1") as federation, AsyncClient([federation.nodes[0].server.address]) as client:
        for none in ("none", "namespaces/default/runs/none"):
            with pytest.raises(errors.NotFound):
                await client.get_trace(none)
        with pytest.raises(errors.InvalidField):
            await client.get_trace("none/such")
        async with grpc.aio.insecure_channel(federation.nodes[0].server.address) as channel:
            short = trace_pb2_grpc.TraceServiceStub(channel).GetTrace(trace_pb2.GetTraceRequest(run="none"), timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as refused:  # only clients complete names
                await anext(aiter(short))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_collector_that_is_down_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver, "DELAY", 0.1)
    async with AsyncExitStack() as stack:
        export = await stack.enter_async_context(exporting("127.0.0.1:9"))
        federation = await stack.enter_async_context(rig("r1", archived=export.archived))
        endpoints = [federation.nodes[0].server.address]
        client = await stack.enter_async_context(AsyncClient(endpoints))
        await stack.enter_async_context(fake_cluster("eu", endpoints))
        for place in range(3):
            made = await client.create_run(graph("a"), deadline=CLOCK.wall() + 60)
            async with time_limit(40):
                assert (await client.wait_run(made.name)).state == run_pb2.RUN_STATE_SUCCEEDED
            assert len(await client.get_trace(made.name)) > 1
            await until(lambda kept=place + 1: len(federation.history._kept) == kept)  # type: ignore[misc]
