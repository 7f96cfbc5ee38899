"""A trace in the forms that others read: OTLP-JSON, the shape of Jaeger's query API, and a waterfall of text.

Theory: `baton.v1.Span` is the trace; everything here is a view of it, made by the same code for the command line and for a replica's
web port. OTLP-JSON follows its specification: ids in hex, times as decimal text, enums as numbers. Jaeger's form is what its
user interface and Grafana's data source ask `/api/traces/{id}` for: times in whole microseconds, one process per cluster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from baton.v1 import trace_pb2

SERVICE = "baton"
"""`service.name` of the control plane's spans."""

SCOPE = "baton.run"

INTERNAL = 1
"""OTLP's SPAN_KIND_INTERNAL."""


def value(of: trace_pb2.SpanValue) -> str | int | bool:
    """An attribute's value."""
    kind = of.WhichOneof("value")
    if kind == "flag":
        return of.flag
    return of.number if kind == "number" else of.text


def attributes(span: trace_pb2.Span) -> dict[str, str | int | bool]:
    """All attributes, in order of name; the marks of critical and open spans among them."""
    found = {key: value(span.attributes[key]) for key in sorted(span.attributes)}
    if span.critical:
        found["baton.critical_path"] = True
    if span.open:
        found["baton.open"] = True
    return found


# -- OTLP --------------------------------------------------------------------------------------------------------------


def otlp(spans: Sequence[trace_pb2.Span]) -> dict[str, Any]:
    """Spans as an ExportTraceServiceRequest in OTLP's JSON form."""
    resource = {"attributes": _otlp_attributes({"service.name": SERVICE})}
    scope = {"scope": {"name": SCOPE}, "spans": [_otlp_span(span) for span in spans]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}


def otlp_json(spans: Sequence[trace_pb2.Span]) -> bytes:
    """`otlp` as bytes."""
    return json.dumps(otlp(spans), separators=(",", ":")).encode()


def _otlp_span(span: trace_pb2.Span) -> dict[str, Any]:
    made: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "parentSpanId": span.parent_id,
        "name": span.name,
        "kind": INTERNAL,
        "startTimeUnixNano": str(span.start_time.ToNanoseconds()),
        "endTimeUnixNano": str(span.end_time.ToNanoseconds()),
        "attributes": _otlp_attributes(attributes(span)),
        "events": [
            {
                "timeUnixNano": str(event.time.ToNanoseconds()),
                "name": event.name,
                "attributes": _otlp_attributes({"baton.detail": event.detail}) if event.detail else [],
            }
            for event in span.events
        ],
        "links": [
            {
                "traceId": span.trace_id,
                "spanId": link.span_id,
                "attributes": _otlp_attributes({"baton.link": link.relation}),
            }
            for link in span.links
        ],
        "status": {"code": int(span.status), "message": span.message} if span.status else {},
    }
    if not span.parent_id:
        del made["parentSpanId"]
    return made


def _otlp_attributes(of: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _otlp_value(each)} for key, each in of.items()]


def _otlp_value(of: str | int | bool) -> dict[str, Any]:
    if isinstance(of, bool):
        return {"boolValue": of}
    return {"intValue": str(of)} if isinstance(of, int) else {"stringValue": of}


# -- Jaeger ------------------------------------------------------------------------------------------------------------


def jaeger(spans: Sequence[trace_pb2.Span]) -> dict[str, Any]:
    """Spans as an answer of Jaeger's `/api/traces/{id}`: one process for the control plane, one for each cluster."""
    clusters = sorted({span.cluster for span in spans if span.cluster})
    process_of = {"": "p0", **{name: f"p{number}" for number, name in enumerate(clusters, 1)}}
    processes = {
        key: {"serviceName": f"{SERVICE}/{name}" if name else SERVICE, "tags": _tags({"baton.cluster": name})}
        for name, key in process_of.items()
    }
    data = []
    if spans:
        made = [_jaeger_span(span, process_of[span.cluster]) for span in spans]
        data = [{"traceID": spans[0].trace_id, "spans": made, "processes": processes, "warnings": None}]
    return {"data": data, "total": 0, "limit": 0, "offset": 0, "errors": None}


def _jaeger_span(span: trace_pb2.Span, process: str) -> dict[str, Any]:
    def reference(kind: str, span_id: str) -> dict[str, str]:
        return {"refType": kind, "traceID": span.trace_id, "spanID": span_id}

    tags: dict[str, Any] = {**attributes(span), "span.kind": "internal"}
    if span.status:
        tags["otel.status_code"] = "OK" if span.status == trace_pb2.SPAN_STATUS_OK else "ERROR"
    if span.status == trace_pb2.SPAN_STATUS_ERROR:
        tags["error"] = True
        tags["otel.status_description"] = span.message
    references = [reference("CHILD_OF", span.parent_id)] if span.parent_id else []
    references += [reference("FOLLOWS_FROM", link.span_id) for link in span.links]
    start = span.start_time.ToMicroseconds()
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "operationName": span.name,
        "references": references,
        "startTime": start,
        "duration": span.end_time.ToMicroseconds() - start,
        "tags": _tags(tags),
        "logs": [
            {
                "timestamp": event.time.ToMicroseconds(),
                "fields": _tags({"event": event.name, "baton.detail": event.detail}),
            }
            for event in span.events
        ],
        "processID": process,
        "warnings": None,
    }


def _tags(of: dict[str, Any]) -> list[dict[str, Any]]:
    def kind(of: object) -> str:
        return "bool" if isinstance(of, bool) else "int64" if isinstance(of, int) else "string"

    return [{"key": key, "type": kind(each), "value": each} for key, each in of.items()]
