"""One trace of a run whose cluster and replica die (DESIGN 11): clients, the command line and a collector see the same.

The collector is this test's own; the spans that a task makes itself go there too, by nothing but its TRACEPARENT.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from baton.leases import PROFILES
from baton.traces import SERVICE
from baton.v1 import trace_pb2
from control_plane.core.span_model import attempt_span_id, trace_id_of
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import Fed

RECOVERY = 5.0 + 3 * (PROFILES["fast"].lost + PROFILES["fast"].guard)
"""Bound of waits for a copy elsewhere, seconds: a replica's lease, and L + G three times for a machine that has much to do."""

OWN_SERVICE = "own"

OWN_SPAN = f"""
import os
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

provider = TracerProvider(resource=Resource({{"service.name": "{OWN_SERVICE}"}}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=os.environ["COLLECTOR"], insecure=True)))
context = TraceContextTextMapPropagator().extract({{"traceparent": os.environ["TRACEPARENT"]}})
with provider.get_tracer("own").start_as_current_span("own work", context=context):
    pass
provider.shutdown()
"""
"""What an instrumented program does."""

Told = dict[str, Any]
"""A span in one form, whichever way it came."""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OpenTelemetry collector: all spans it was sent, by `service.name`."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Told]] = defaultdict(list)
        self.endpoint = ""

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        for resource in request.resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans[service] += map(_from_wire, scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    made, server = Collector(), grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)


def _attributes(of: Iterable[Any]) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of}


def _from_wire(span: Any) -> Told:
    return {
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "name": span.name,
        "time": (span.start_time_unix_nano, span.end_time_unix_nano),
        "attributes": _attributes(span.attributes),
        "events": [(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events],
        "links": [(link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes)) for link in span.links],
        "status": (span.status.code, span.status.message),
    }


def _json_attributes(of: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in of:
        ((kind, value),) = each["value"].items()
        found[each["key"]] = int(value) if kind == "intValue" else value
    return found


def _from_json(span: Any) -> Told:
    status = span["status"]
    return {
        "trace": span["traceId"],
        "id": span["spanId"],
        "parent": span.get("parentSpanId", ""),
        "name": span["name"],
        "time": (int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])),
        "attributes": _json_attributes(span["attributes"]),
        "events": [(e["name"], int(e["timeUnixNano"]), _json_attributes(e["attributes"])) for e in span["events"]],
        "links": [(each["traceId"], each["spanId"], _json_attributes(each["attributes"])) for each in span["links"]],
        "status": (status.get("code", 0), status.get("message", "")),
    }


def _by_id(spans: Iterable[Told]) -> dict[str, Told]:
    """No id has two contents."""
    found: dict[str, Told] = {}
    for span in spans:
        assert found.setdefault(span["id"], span) == span, "one id, two spans"
    return found


def _owners(spans: Iterable[trace_pb2.Span]) -> dict[str, list[trace_pb2.Span]]:
    """The spans of attempts, by task, in order."""
    found: dict[str, list[trace_pb2.Span]] = defaultdict(list)
    for span in spans:
        if span.kind == trace_pb2.SPAN_KIND_ATTEMPT:
            found[span.task].append(span)
    return found


def _check_whole(spans: list[trace_pb2.Span]) -> None:
    """A tree with one root and no span twice; no gap in the time of an owner, nor between two owners of a task."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "a span twice"
    assert [span.name for span in spans if not span.parent_id] == [spans[0].name]
    assert all(span.parent_id in by_id for span in spans[1:])
    for owners in _owners(spans).values():
        for owner in owners:
            phases = [span for span in spans if span.parent_id == owner.span_id]
            assert (phases[0].start_time, phases[-1].end_time) == (owner.start_time, owner.end_time)
            for before, after in itertools.pairwise(phases):
                assert before.end_time == after.start_time, f"a gap in {owner.name}"
        for before, after in itertools.pairwise(owners):
            assert before.end_time == after.start_time, f"a gap between owners of {after.task}"


async def _begin(fed: Fed, collector: Collector, directory: Path) -> tuple[str, str]:
    """A run with work on eu that can move, and work on us; its name and the replica that owns it."""
    script = directory / "own_span.py"
    script.write_text(OWN_SPAN)
    own = fed.task("own", f"{sys.executable} {script}\n", after=["moved"])
    own.resources.memory_bytes = 512 << 20
    own.process.env["COLLECTOR"] = collector.endpoint
    tasks = [
        fed.quick("first"),
        fed.gated("moved", "go", after=["first"]),
        fed.gated("beside", "go", clusters=["us"]),
        own,
        fed.quick("last", after=["own", "beside"]),
    ]
    for other in ("us", "ap"):
        await fed.client.cordon_cluster(f"clusters/{other}")
    run = await fed.run("story", tasks)
    await fed.running(run.name, "moved")
    for other in ("us", "ap"):
        await fed.client.uncordon_cluster(f"clusters/{other}")
    await fed.running(run.name, "beside")
    return run.name, (await fed.owners())[run.shard]


@pytest.mark.timeout(240)
async def test_one_trace_of_a_run_whose_cluster_and_replica_are_killed(
    fed_here: MakeFederation, tmp_path: Path
) -> None:
    async with collecting() as collector, fed_here(collector=collector.endpoint, timeout=30.0) as fed:
        await fed.eventually(fed.balanced, "both replicas to have their shards")
        name, owner = await _begin(fed, collector, tmp_path)
        early = await fed.client.get_trace(name)
        await fed.lab.kill("eu")
        await fed.lab.kill(owner)
        await fed.running(name, "moved", attempt=2, patience=RECOVERY)
        fed.open_gate("go")
        tasks = await fed.accepted_once(name)
        run = await fed.client.get_run(name)

        spans = await fed.client.get_trace(name)
        _check_whole(spans)
        assert {span.trace_id for span in spans} == {trace_id_of(run.uid)}
        owners = _owners(spans)
        assert {task: len(found) for task, found in owners.items()} == {t.id: len(t.attempts) for t in tasks.values()}
        for index, task in enumerate(("first", "moved", "beside", "own", "last")):
            expected = [attempt_span_id(run.uid, index, attempt.n) for attempt in tasks[task].attempts]
            assert [span.span_id for span in owners[task]] == expected
        lost, again = owners["moved"]
        assert [(link.span_id, link.relation) for link in again.links] == [(lost.span_id, "replaces")]
        assert (lost.cluster, lost.status) == ("eu", trace_pb2.SPAN_STATUS_ERROR)
        assert again.cluster in ("us", "ap")
        before, after = ({span.span_id: span for span in each} for each in (early, spans))
        assert before.keys() <= after.keys(), "what the dead replica told is still there"
        assert before[lost.span_id].start_time == lost.start_time

        await fed.eventually(lambda: len(collector.spans[SERVICE]) >= len(spans), "the collector's copy")
        shown = await fed.cli("trace", "story", "-o", "otlp")
        assert shown.returncode == 0, shown.stderr
        ((resource,),) = json.loads(shown.stdout).values()
        printed = _by_id(map(_from_json, resource["scopeSpans"][0]["spans"]))
        assert printed.keys() == after.keys()
        assert _by_id(collector.spans[SERVICE]) == printed

        (own,) = collector.spans[OWN_SERVICE]
        assert (own["trace"], own["parent"]) == (trace_id_of(run.uid), owners["own"][0].span_id)

        waterfall = await fed.cli("trace", "story")
        first, second = (line for line in waterfall.stdout.splitlines() if " moved " in line)
        assert "LOST" in first
        assert "moved from eu" in second
