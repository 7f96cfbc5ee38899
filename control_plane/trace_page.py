"""The waterfall as one HTML page: no script, no asset, everything escaped. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from baton import quantity, traces
from baton.v1 import trace_pb2

ROWS = 2000
"""Attempts shown: a browser draws that at once. The critical path and moved tasks are kept first."""

_STYLE = """
body{font:13px/1.4 system-ui,sans-serif;margin:1.5rem;color:#1b1f24;background:#fff}
h1{font-size:1.2rem;margin:0 0 .2rem}p{margin:.2rem 0 1rem;color:#57606a}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:2px 8px;white-space:nowrap;vertical-align:middle}
th{border-bottom:1px solid #d0d7de;color:#57606a;font-weight:600}td.when{width:55%;padding:2px 0}
tr.critical td:first-child{border-left:4px solid #cf222e}tr td:first-child{border-left:4px solid transparent}
.bar{position:relative;height:14px;background:#f6f8fa}
.bar i{position:absolute;top:0;height:14px;min-width:1px}
.queue{background:#d0d7de}.dispatch{background:#d4a72c}.execute{background:#2da44e}.report{background:#54aeff}
.bad .execute,.bad .dispatch{background:#cf222e}
.key i{display:inline-block;width:12px;height:12px;margin:0 4px 0 12px;vertical-align:-2px}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}.bar{background:#161b22}}
"""

_PHASE = {
    trace_pb2.SPAN_KIND_QUEUE: "queue",
    trace_pb2.SPAN_KIND_DISPATCH: "dispatch",
    trace_pb2.SPAN_KIND_EXECUTE: "execute",
    trace_pb2.SPAN_KIND_REPORT: "report",
}


def page(name: str, spans: Sequence[trace_pb2.Span]) -> bytes:
    """The page of a run's trace; `spans[0]` is its root."""
    root = spans[0]
    begin = root.start_time.ToNanoseconds()
    whole = max(1, max(span.end_time.ToNanoseconds() for span in spans) - begin)
    children: dict[str, list[trace_pb2.Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id, []).append(span)
    owners = sorted(children.get(root.span_id, []), key=lambda span: not (span.critical or span.links))[:ROWS]
    owners.sort(key=lambda span: (span.start_time.ToNanoseconds(), span.task, span.attempt))
    rows = "".join(_row(span, children.get(span.span_id, [span]), begin, whole) for span in owners)
    left_out = len(children.get(root.span_id, [])) - len(owners)
    more = f"<p>{left_out} more attempts are not shown.</p>" if left_out else ""
    started = datetime.fromtimestamp(begin / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    facts = (
        f"{_text(root, 'baton.outcome')}, {quantity.format_seconds(whole / 1e9)}, from {started}, trace {root.trace_id}"
    )
    key = "".join(f'<i class="{word}"></i>{said}' for word, said in _KEY)
    heads = "".join(f"<th>{head}</th>" for head in ("task", "fence", "cluster", "outcome", "took", "when", "note"))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(name)}</h1><p>{escape(facts)}</p>"
        f'<p class="key">{key}; a red edge marks the critical path</p>'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{more}</body></html>"
    ).encode()


_KEY = (("queue", "waits for a place"), ("dispatch", "dispatched"), ("execute", "runs"), ("report", "reported"))


def _row(span: trace_pb2.Span, phases: Sequence[trace_pb2.Span], begin: int, whole: int) -> str:
    took = quantity.format_seconds((span.end_time.ToNanoseconds() - span.start_time.ToNanoseconds()) / 1e9)
    cells = (span.task, _text(span, "baton.fence"), span.cluster, _text(span, "baton.outcome"), took)
    classes = [
        *(["critical"] if span.critical else []),
        *(["bad"] if span.status == trace_pb2.SPAN_STATUS_ERROR else []),
    ]
    return (
        f'<tr class="{" ".join(classes)}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}'
        f'<td class="when"><div class="bar">{"".join(_bar(phase, begin, whole) for phase in phases)}</div></td>'
        f"<td>{escape(_note(span))}</td></tr>"
    )


def _bar(phase: trace_pb2.Span, begin: int, whole: int) -> str:
    start, end = phase.start_time.ToNanoseconds(), phase.end_time.ToNanoseconds()
    left, width = 100 * max(0, start - begin) / whole, 100 * max(0, end - start) / whole
    title = f"{phase.name}: {quantity.format_seconds((end - start) / 1e9)}"
    style = f"left:{left:.3f}%;width:{width:.3f}%"
    return f'<i class="{_PHASE.get(phase.kind, "queue")}" style="{style}" title="{escape(title)}"></i>'


def _note(span: trace_pb2.Span) -> str:
    notes = []
    if moved := _text(span, "baton.moved_from"):
        notes.append(f"moved from {moved}")
    notes += [link.relation for link in span.links if not moved]
    if evidence := _text(span, "baton.evidence"):
        notes.append(f"evidence {evidence}")
    if "baton.overlap_possible" in span.attributes and span.attributes["baton.overlap_possible"].flag:
        notes.append("overlap_possible")
    if span.open:
        notes.append("goes on")
    return "; ".join([*notes, *([span.message] if span.message else [])])


def _text(span: trace_pb2.Span, key: str) -> str:
    return str(traces.value(span.attributes[key])) if key in span.attributes else ""
