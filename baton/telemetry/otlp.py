"""Finished runs' spans to a collector, over OTLP (gRPC).

Theory. Spans are made from a finished run's record, with their own ids and times, so nothing of the SDK's tracing runs: a
`ReadableSpan` is filled in by hand and given to the exporter, in a thread of its own. What waits for that thread is bounded;
what does not fit is dropped and counted. A collector that is down or slow thus costs a counter, nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from baton import traces
from baton.v1 import trace_pb2

log = logging.getLogger(__name__)

QUEUED_RUNS = 256
"""Runs that wait to be exported. Fewer: a burst of short runs loses traces; more: memory, for a collector that is down."""

QUEUED_TASKS = 100_000
"""Tasks of the runs that wait, together: about 100 MB. One larger run may wait alone."""

EXPORT_SECONDS = 5.0
"""For one request to the collector. Longer only lets a dead one hold back the next run."""

EXPORT_SPANS = 512
"""Spans of one request: the exporter's own default for batches; far under a collector's 4 MiB."""

LEAVE_SECONDS = 2.0
"""How long the end of the process waits for what is being exported; what waits behind it is dropped."""

Work = Callable[[], Sequence[trace_pb2.Span]]
"""Makes the spans of one run; called in the exporter's thread."""


class SpanSender:
    """Exports finished runs' spans over OTLP (gRPC), in a thread of its own."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._waiting: queue.Queue[tuple[Work, int] | None] = queue.Queue(QUEUED_RUNS)
        self._tasks = 0
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self.sent_spans = 0
        self.failed_runs = 0
        """Runs that the collector did not take in time, in whole or in part."""
        self.dropped_runs = 0
        """Runs that found the queue full."""
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def offer(self, work: Work, tasks: int = 1) -> bool:
        """Export the spans that `work` makes, some time; False if too much waits: then it is dropped. Never blocks. `tasks`: how
        large the run is that `work` holds."""
        with self._lock:
            fits = not self._tasks or self._tasks + tasks <= QUEUED_TASKS
            if fits:
                try:
                    self._waiting.put_nowait((work, tasks))
                    self._tasks += tasks
                except queue.Full:
                    fits = False
            self.dropped_runs += not fits
        return fits

    def close(self) -> None:
        """End; what waits is dropped. Blocks LEAVE_SECONDS at most."""
        self._leaving.set()
        while True:
            try:
                self._waiting.put_nowait(None)
                break
            except queue.Full:
                self._waiting.get_nowait()
                self.dropped_runs += 1
        self._thread.join(LEAVE_SECONDS / 2)
        self._exporter.shutdown()
        self._thread.join(LEAVE_SECONDS / 2)

    def _run(self) -> None:
        while (next_ := self._waiting.get()) is not None and not self._leaving.is_set():
            work, tasks = next_
            try:
                if not self._send(work()):
                    self.failed_runs += 1
            except Exception:  # whatever the exporter raises must not end the thread
                self.failed_runs += 1
                log.exception("a trace could not be exported")
            with self._lock:
                self._tasks -= tasks

    def _send(self, spans: Sequence[trace_pb2.Span]) -> bool:
        for start in range(0, len(spans), EXPORT_SPANS):
            part = [readable(span) for span in spans[start : start + EXPORT_SPANS]]
            if self._exporter.export(part) is not SpanExportResult.SUCCESS:
                return False
            self.sent_spans += len(part)
        return True


def otlp_sender(endpoint: str) -> SpanSender:
    """A sender to a collector at http://host:port (plain) or https://host:port."""
    plain = not endpoint.startswith("https://")
    address = endpoint if "://" in endpoint else f"http://{endpoint}"
    return SpanSender(OTLPSpanExporter(endpoint=address, insecure=plain, timeout=EXPORT_SECONDS))


_RESOURCE = Resource({"service.name": traces.SERVICE})
_SCOPE = InstrumentationScope(traces.SCOPE)
_CODES = {trace_pb2.SPAN_STATUS_OK: StatusCode.OK, trace_pb2.SPAN_STATUS_ERROR: StatusCode.ERROR}


def readable(span: trace_pb2.Span) -> ReadableSpan:
    """A span as the SDK's exporters take it, with the ids and times it has."""
    failed = span.status == trace_pb2.SPAN_STATUS_ERROR
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=_RESOURCE,
        attributes=traces.attributes(span),
        events=[
            Event(event.name, {"baton.detail": event.detail} if event.detail else {}, event.time.ToNanoseconds())
            for event in span.events
        ],
        links=[Link(_context(span.trace_id, link.span_id), {"baton.link": link.relation}) for link in span.links],
        kind=SpanKind.INTERNAL,
        status=Status(_CODES.get(span.status, StatusCode.UNSET), span.message if failed else None),
        start_time=span.start_time.ToNanoseconds(),
        end_time=span.end_time.ToNanoseconds(),
        instrumentation_scope=_SCOPE,
    )


def _context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
