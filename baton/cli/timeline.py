"""`baton timeline`: which cluster ran what and when, with moves, retries and evidence; and the sums that prove a run.

Theory: attempts are recorded, not reconstructed, so the timeline of a moved task shows both owners, how sure the first
one's death is (PROTOCOL F6), and every late result that was refused (F8). The sums are counted from the tasks, not
taken from the run's own counters: "accepted once" is then something this command found, not something it was told.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import click

from baton import quantity
from baton.cli import completion, render, session
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.contexts import Context
from baton.v1 import run_pb2

WIDTH = 36
"""Characters of a bar; with the columns beside it the lines of short names fit a terminal of 120."""


def moved(task: run_pb2.TaskStatus) -> bool:
    """Whether the task was taken from one cluster and given to another (not: refused for room, or hedged)."""
    placed = [each for each in task.attempts if each.state != run_pb2.ATTEMPT_STATE_REJECTED and not each.hedge]
    taken = (run_pb2.ATTEMPT_STATE_LOST, run_pb2.ATTEMPT_STATE_STOPPED)
    return any(
        before.state in taken and before.cluster != after.cluster for before, after in itertools.pairwise(placed)
    )


def result_sha256(tasks: Sequence[run_pb2.TaskStatus]) -> str:
    """One hash over all accepted results and artifacts, by task id: equal for equal outcomes, however the work was moved about."""
    digest = hashlib.sha256()
    for task in sorted(tasks, key=lambda each: each.id):
        digest.update(f"{task.id} {render.task_state(task.state)} {len(task.result)}\n".encode())
        digest.update(task.result)
        for source in sorted(task.artifacts, key=lambda each: each.artifact.name):
            digest.update(f"{source.artifact.name} {source.artifact.size} ".encode() + source.artifact.digest)
    return digest.hexdigest()


def summary(run: run_pb2.Run, tasks: Sequence[run_pb2.TaskStatus]) -> dict[str, Any]:
    """The sums of a run: what `baton timeline --json` and `baton run --wait --json` print as `summary`."""
    attempts = [attempt for task in tasks for attempt in task.attempts]
    return {
        "run_state": render.run_state(run.state),
        "tasks": len(tasks),
        "attempts": len(attempts),
        "accepted_results": sum(task.accepted_results for task in tasks),
        "max_accepted_per_task": max((task.accepted_results for task in tasks), default=0),
        "moved_tasks": sum(moved(task) for task in tasks),
        "stale_results_refused": sum(attempt.refused_results for attempt in attempts),
        "overlap_possible": sum(attempt.overlap_possible for attempt in attempts),
        "result_sha256": result_sha256(tasks),
    }


async def fetch(client: AsyncClient, name: str) -> tuple[run_pb2.Run, list[run_pb2.TaskStatus]]:
    """A run and all its tasks. Raises BatonError."""
    run = await client.get_run(name)
    return run, [task async for task in client.list_tasks(name)]


@click.command()
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@session.json_output
@session.connected
def timeline(run: str, as_json: bool, to: Context) -> None:
    """Show which cluster ran what when, with moves, retries, evidence and refused late results.

    \b
    Example:
      baton timeline nightly
      baton timeline nightly --json
    """
    name = str(session.run_name(run, to))
    found, tasks = session.ask(to, lambda client: fetch(client, name))
    if as_json:
        data: dict[str, Any] = {"run": render.plain(found), "summary": summary(found, tasks)}
        data["tasks"] = [{**render.plain(task), "moved": moved(task)} for task in tasks]
        render.echo_data(data, "json")
        return
    _show(found, tasks, SystemClock().wall())


def _show(run: run_pb2.Run, tasks: Sequence[run_pb2.TaskStatus], now: float) -> None:
    begin = render.seconds(run.create_time)
    end = max(render.seconds(run.finish_time) or now, begin + 0.001)
    click.echo(f"{run.name}  {render.run_state(run.state)}  {quantity.format_seconds(end - begin)}")
    click.echo()
    rows = sorted(
        ((render.seconds(attempt.place_time), task, attempt) for task in tasks for attempt in task.attempts),
        key=lambda row: (row[0], row[1].index, row[2].n),
    )
    heads = ["AT", "CLUSTER", "TASK", "FENCE", "STATE", "TOOK", "WHEN".ljust(WIDTH), "NOTE"]
    render.table(heads, (_row(task, attempt, begin, end) for _, task, attempt in rows))
    click.echo()
    heads = ["TASK", "STATE", "ACCEPTED", "REFUSED", "ATTEMPTS", "PATH"]
    render.table(heads, (_sums(task) for task in tasks))
    click.echo()
    render.facts((key.replace("_", " "), str(value)) for key, value in summary(run, tasks).items())


def _row(task: run_pb2.TaskStatus, attempt: run_pb2.Attempt, begin: float, end: float) -> list[str]:
    placed = render.seconds(attempt.place_time)
    start = render.seconds(attempt.start_time) or placed
    stop = render.seconds(attempt.finish_time) or end
    return [
        f"+{quantity.format_seconds(max(0.0, placed - begin))}",
        attempt.cluster,
        task.id,
        attempt.fence,
        render.attempt_state(attempt.state),
        quantity.format_seconds(max(0.0, stop - start)),
        _bar(start, stop, begin, end),
        "; ".join(_notes(task, attempt)),
    ]


def _bar(start: float, stop: float, begin: float, end: float) -> str:
    """Where in the run's time the attempt was: `[   ====   ]`. Clusters' clocks may differ; so it is clamped."""
    inner = WIDTH - 2
    scale = inner / (end - begin)
    left = min(inner - 1, max(0, int((start - begin) * scale)))
    right = min(inner, max(left + 1, round((stop - begin) * scale)))
    return f"[{' ' * left}{'=' * (right - left)}{' ' * (inner - right)}]"


def _notes(task: run_pb2.TaskStatus, attempt: run_pb2.Attempt) -> list[str]:
    notes = []
    earlier = [each for each in task.attempts if each.n < attempt.n and each.state != run_pb2.ATTEMPT_STATE_REJECTED]
    if attempt.hedge:
        notes.append("hedge")
    elif earlier and earlier[-1].cluster != attempt.cluster:
        notes.append(f"moved from {earlier[-1].cluster}")
    elif earlier:
        notes.append("again")
    if attempt.resumed_from:
        maker, _, name = attempt.resumed_from.partition("/")
        notes.append(f"resumed from {name} of attempt {maker}")
    if attempt.checkpoint:
        notes.append(f"saved {attempt.checkpoint}")
    if attempt.evidence:
        notes.append(f"evidence {render.evidence(attempt.evidence)}")
    if attempt.overlap_possible:
        notes.append("overlap_possible")
    if attempt.refused_results:
        notes.append(f"{attempt.refused_results} late result(s) refused")
    if attempt.message and attempt.state != run_pb2.ATTEMPT_STATE_SUCCEEDED:
        notes.append(attempt.message)
    return notes


def _sums(task: run_pb2.TaskStatus) -> list[str]:
    return [
        task.id,
        render.task_state(task.state),
        str(task.accepted_results),
        str(sum(attempt.refused_results for attempt in task.attempts)),
        str(len(task.attempts)),
        " > ".join(attempt.cluster for attempt in task.attempts),
    ]
