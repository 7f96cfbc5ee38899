"""What leaves for Prometheus and OpenTelemetry: text that parses, spans with the ids and times they have, bounded queues."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client.parser import text_string_to_metric_families

from baton import traces, webport
from baton.telemetry import COUNTER, GAUGE, HISTOGRAM, Family, Histogram, exposition
from baton.telemetry.otlp import QUEUED_RUNS, QUEUED_TASKS, SpanSender, readable
from baton.v1 import trace_pb2
from control_plane.services.trace import spans_of
from tests.unit.core.test_spans import failed_over, record

NEVER = 30.0


def made() -> list[trace_pb2.Span]:
    return spans_of(record(failed_over().machine))


def broken() -> list[trace_pb2.Span]:
    raise LookupError("a bug in making spans")


class Collector(SpanExporter):
    """Takes what it is given once `open` is set; `answer` is what it says."""

    def __init__(self, answer: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.open = threading.Event()
        self.busy = threading.Event()
        self.answer = answer
        self.got: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.busy.set()
        assert self.open.wait(NEVER)
        self.got += spans
        return self.answer

    def shutdown(self) -> None:
        self.open.set()


def test_text_parses_and_has_every_sample() -> None:
    histogram = Histogram((1.0, 10.0))
    for value in (0.5, 1.0, 5.0, 100.0):
        histogram.observe(value)
    families = [
        Family("baton_a_total", COUNTER, "A.", ("namespace",)).add(3, 'x"y'),
        Family("baton_b", GAUGE, "B.").add(0.5),
        Family("baton_c_seconds", HISTOGRAM, "C.").add(histogram),
    ]
    text, kind = exposition(families)
    assert kind.startswith("text/plain")
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    assert found["baton_a_total", (("namespace", 'x"y'),)] == 3
    assert found["baton_b", ()] == 0.5
    assert found["baton_c_seconds_bucket", (("le", "1.0"),)] == 2
    assert found["baton_c_seconds_bucket", (("le", "10.0"),)] == 3
    assert found["baton_c_seconds_bucket", (("le", "+Inf"),)] == found["baton_c_seconds_count", ()] == 4
    assert found["baton_c_seconds_sum", ()] == 106.5


def test_exported_spans_are_those_of_the_trace() -> None:
    spans = made()
    request = encode_spans([readable(span) for span in spans])
    (resource,) = request.resource_spans
    told = {span.span_id.hex(): span for span in resource.scope_spans[0].spans}
    assert set(told) == {span.span_id for span in spans}
    for span in spans:
        sent = told[span.span_id]
        assert (sent.trace_id.hex(), sent.parent_span_id.hex()) == (span.trace_id, span.parent_id)
        assert sent.start_time_unix_nano == span.start_time.ToNanoseconds()
        assert sent.end_time_unix_nano == span.end_time.ToNanoseconds()
        assert [link.span_id.hex() for link in sent.links] == [link.span_id for link in span.links]
        assert {each.key for each in sent.attributes} == set(traces.attributes(span))
        assert int(sent.status.code) == int(span.status)


def test_otlp_json_says_the_same_as_the_library() -> None:
    spans = made()
    (ours,) = json.loads(traces.otlp_json(spans))["resourceSpans"]
    (theirs,) = encode_spans([readable(span) for span in spans]).resource_spans
    for mine, its in zip(ours["scopeSpans"][0]["spans"], theirs.scope_spans[0].spans, strict=True):
        assert (mine["spanId"], mine["name"], mine["kind"]) == (its.span_id.hex(), its.name, its.kind)
        assert int(mine["startTimeUnixNano"]) == its.start_time_unix_nano
        assert {each["key"] for each in mine["attributes"]} == {each.key for each in its.attributes}
        assert [event["name"] for event in mine["events"]] == [event.name for event in its.events]
        assert mine["status"].get("code", 0) == its.status.code


def test_jaegers_shape() -> None:
    spans = made()
    (trace,) = traces.jaeger(spans)["data"]
    assert trace["traceID"] == spans[0].trace_id
    assert {process["serviceName"] for process in trace["processes"].values()} == {"baton", "baton/X", "baton/Y"}
    by_id = {span["spanID"]: span for span in trace["spans"]}
    moved = next(span for span in spans if span.links)
    kinds = [reference["refType"] for reference in by_id[moved.span_id]["references"]]
    assert kinds == ["CHILD_OF", "FOLLOWS_FROM"]
    assert all(span["duration"] >= 0 for span in trace["spans"])
    assert traces.jaeger([])["data"] == []


def test_a_slow_collector_costs_what_does_not_fit_and_no_time() -> None:
    collector = Collector()
    sender = SpanSender(collector)
    assert sender.offer(made)
    assert collector.busy.wait(NEVER)
    taken = sum(sender.offer(made) for _ in range(QUEUED_RUNS + 10))
    assert taken == QUEUED_RUNS
    assert sender.dropped_runs == 10
    sender.close()
    assert sender.dropped_runs >= 10


def test_large_runs_wait_one_at_a_time() -> None:
    collector = Collector()
    sender = SpanSender(collector)
    assert sender.offer(made, 10 * QUEUED_TASKS)
    assert not sender.offer(made, 1)
    assert sender.dropped_runs == 1
    sender.close()


def test_a_collector_that_refuses_is_counted() -> None:
    collector = Collector(SpanExportResult.FAILURE)
    collector.open.set()
    sender = SpanSender(collector)
    assert sender.offer(made)
    assert sender.offer(broken)
    assert collector.busy.wait(NEVER)
    sender.close()
    assert sender.sent_spans == 0
    assert sender.failed_runs >= 1


async def ask(port: webport.WebPort, request: bytes) -> bytes:
    host, _, number = port.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(number))
    writer.write(request)
    await writer.drain()
    answer = await asyncio.wait_for(reader.read(), NEVER)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_the_web_port_answers_get_and_nothing_else() -> None:
    async def route(path: str) -> webport.Answer | None:
        if path == "/boom":
            raise RuntimeError("a bug")
        return webport.Answer(path.encode()) if path == "/a b" else None

    port = webport.WebPort(route)
    await port.start("127.0.0.1", 0)
    try:
        assert (await ask(port, b"GET /a%20b?x=1 HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n/a b")
        assert (await ask(port, b"HEAD /a%20b HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
        assert b" 404 " in await ask(port, b"GET /b HTTP/1.1\r\n\r\n")
        assert b" 405 " in await ask(port, b"POST /a%20b HTTP/1.1\r\n\r\n")
        assert b" 503 " in await ask(port, b"GET /boom HTTP/1.1\r\n\r\n")
        assert await ask(port, b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n") == b""
    finally:
        await port.close()


def test_the_web_port_stays_on_loopback_unless_told() -> None:
    assert webport.check_address("127.0.0.1:0", anywhere=False) == ("127.0.0.1", 0)
    assert webport.check_address("[::1]:9", anywhere=False) == ("::1", 9)
    assert webport.check_address("0.0.0.0:9", anywhere=True) == ("0.0.0.0", 9)
    with pytest.raises(webport.NotLoopback):
        webport.check_address("0.0.0.0:9", anywhere=False)
    for bad in ("x", "127.0.0.1", "127.0.0.1:99999", ":1"):
        with pytest.raises(ValueError, match="is not host:port"):
            webport.check_address(bad, anywhere=True)
