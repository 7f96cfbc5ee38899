"""`baton trace`: one run as a waterfall, with the chain that decided when it ended; or in the forms of OTLP and Jaeger.

Theory: a line is an attempt, that is one owner of a task from when the task waited for it until it was the owner no more. A
moved task has a line for each owner, in order, and the later one says from where it was moved. The bar shows the phases, so
it is seen at once whether time went into waiting for a place or into work. Lines marked `*` are the critical path: making
anything else faster does not make the run shorter.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from baton import quantity, traces
from baton.cli import completion, render, session
from baton.contexts import Context
from baton.v1 import trace_pb2

WIDTH = 44
"""Characters of a bar; with short names a line fits a terminal of 120."""

ROWS = 200
"""Lines shown without --all: the critical path and moves first, then in order of time."""

FORMS = ("waterfall", "json", "otlp", "jaeger")

PHASES = {
    trace_pb2.SPAN_KIND_QUEUE: ".",
    trace_pb2.SPAN_KIND_DISPATCH: "-",
    trace_pb2.SPAN_KIND_EXECUTE: "=",
    trace_pb2.SPAN_KIND_REPORT: "+",
}


@click.command()
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@session.output(*FORMS)
@click.option("--all", "everything", is_flag=True, help=f"Every line, not only {ROWS}.")
@session.connected
def trace(run: str, form: str, everything: bool, to: Context) -> None:
    """Show where a run's time went: every owner of every task, and the critical path.

    \b
    Example:
      baton trace nightly
      baton trace nightly -o otlp > trace.json
    """
    name = str(session.run_name(run, to))
    spans = session.ask(to, lambda client: client.get_trace(name))
    if form == "otlp":
        render.echo_data(traces.otlp(spans), "json")
    elif form == "json":
        render.echo_data({"spans": [render.plain(span) for span in spans]}, "json")
    elif form == "jaeger":
        render.echo_data(traces.jaeger(spans), "json")
    else:
        _waterfall(spans, ROWS if not everything else len(spans))


def _waterfall(spans: Sequence[trace_pb2.Span], most: int) -> None:
    root = spans[0]
    begin, end = _bounds(root)
    for span in spans:
        end = max(end, _bounds(span)[1])
    outcome = _text(root, "baton.outcome")
    click.echo(f"{root.name}  {outcome}  {quantity.format_seconds(end - begin)}  trace {root.trace_id}")
    click.echo("* critical path   . waits for a place   - dispatched   = runs   + reported")
    click.echo()
    children: dict[str, list[trace_pb2.Span]] = {}
    for span in spans:
        children.setdefault(span.parent_id, []).append(span)
    owners = children.get(root.span_id, [])
    chosen = sorted(owners, key=lambda span: (not (span.critical or span.links), _bounds(span), span.task))[:most]
    chosen.sort(key=lambda span: (_bounds(span)[0], span.task, span.attempt))
    heads = ["", "TASK", "FENCE", "CLUSTER", "OUTCOME", "TOOK", "WHEN".ljust(WIDTH), "NOTE"]
    by_id = {span.span_id: span for span in spans}
    rows = (_row(span, children.get(span.span_id, [span]), by_id, begin, end) for span in chosen)
    render.table(heads, rows)
    if len(owners) > len(chosen):
        click.echo(f"... and {len(owners) - len(chosen)} more: use --all")
    if left_out := _text(root, "baton.trace.tasks_left_out"):
        click.echo(f"... {left_out} tasks are beyond what one trace holds: see `baton timeline`")
    click.echo()
    critical = [span for span in spans if span.critical and span.parent_id and span.kind in PHASES]
    phases = (
        (render.word(trace_pb2.SpanKind, kind, "SPAN_KIND_").lower(), _sum(critical, kind))
        for kind in PHASES
        if any(span.kind == kind for span in critical)
    )
    render.facts([("critical path", ", ".join(f"{word} {quantity.format_seconds(spent)}" for word, spent in phases))])


def _sum(spans: Sequence[trace_pb2.Span], kind: int) -> float:
    return sum(end - start for span in spans if span.kind == kind for start, end in [_bounds(span)])


def _row(
    span: trace_pb2.Span,
    phases: Sequence[trace_pb2.Span],
    by_id: dict[str, trace_pb2.Span],
    begin: float,
    end: float,
) -> list[str]:
    start, stop = _bounds(span)
    return [
        "*" if span.critical else " ",
        span.task,
        _text(span, "baton.fence"),
        span.cluster,
        _text(span, "baton.outcome"),
        quantity.format_seconds(stop - start),
        bar(phases, begin, end),
        "; ".join(_notes(span, by_id)),
    ]


def bar(phases: Sequence[trace_pb2.Span], begin: float, end: float) -> str:
    """Where in the run's time each phase was: `[  ..-====+  ]`. Where several share a place, the longest shows."""
    inner = WIDTH - 2
    scale = inner / max(end - begin, 1e-6)
    cells = [" "] * inner
    for phase in sorted(phases, key=lambda each: _bounds(each)[1] - _bounds(each)[0]):
        start, stop = _bounds(phase)
        left = min(inner - 1, max(0, int((start - begin) * scale)))
        right = min(inner, max(left + 1, round((stop - begin) * scale)))
        cells[left:right] = PHASES.get(phase.kind, ".") * (right - left)
    return f"[{''.join(cells)}]"


def _notes(span: trace_pb2.Span, by_id: dict[str, trace_pb2.Span]) -> list[str]:
    notes = []
    for link in span.links:
        before = by_id.get(link.span_id)
        if link.relation == "hedges":
            notes.append("hedge")
        elif before is not None and before.cluster != span.cluster:
            notes.append(f"moved from {before.cluster}")
        else:
            notes.append("again")
    if evidence := _text(span, "baton.evidence"):
        notes.append(f"evidence {evidence}")
    if span.attributes["baton.overlap_possible"].flag if "baton.overlap_possible" in span.attributes else False:
        notes.append("overlap_possible")
    if refused := _text(span, "baton.refused_results"):
        notes.append(f"{refused} late result(s) refused")
    if span.open:
        notes.append("goes on")
    if span.message:
        notes.append(span.message)
    return notes


def _text(span: trace_pb2.Span, key: str) -> str:
    return str(traces.value(span.attributes[key])) if key in span.attributes else ""


def _bounds(span: trace_pb2.Span) -> tuple[float, float]:
    return render.seconds(span.start_time), render.seconds(span.end_time)
