"""`baton diff RUN_A RUN_B`: what went another way in the second run.

Theory. Two runs of one graph are compared task by task, by id; the exit code is that of diff(1): 0 the same, 1 different, other
numbers trouble. Everything a run decided is compared exactly. How long it took is never the same twice, so times count as different
only when they differ by more than a person would call noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from baton import quantity
from baton.cli import completion, render, session, timeline
from baton.client import AsyncClient
from baton.contexts import Context
from baton.v1 import run_pb2

SAME, DIFFERENT = 0, 1

NOISE_SECONDS, NOISE_PART = 1.0, 0.25
"""Times differ by more than a second and more than a quarter of the longer one. Less is the machine's mood, and hides the rest."""

SHOWN_CHARS = 60
"""Of a result in the table; -o json has all of it."""

Comparable = Callable[[run_pb2.TaskStatus], Any]


def duration(task: run_pb2.TaskStatus) -> float | None:
    """Seconds that the last attempt with both ends took; None if none has."""
    for attempt in reversed(task.attempts):
        if attempt.start_time.seconds and attempt.finish_time.seconds:
            return render.seconds(attempt.finish_time) - render.seconds(attempt.start_time)
    return None


FIELDS: dict[str, Comparable] = {
    "state": lambda task: render.task_state(task.state),
    "result": lambda task: task.result.decode("utf-8", "replace"),
    "artifacts": lambda task: [
        f"{each.artifact.name} {each.artifact.digest.hex()}"
        for each in sorted(task.artifacts, key=lambda each: each.artifact.name)
    ],
    "attempts": lambda task: len(task.attempts),
    "clusters": lambda task: [attempt.cluster for attempt in task.attempts],
    "duration": duration,
}
"""What is compared, in the order in which it is told."""


def differences(
    before: Sequence[run_pb2.TaskStatus], after: Sequence[run_pb2.TaskStatus], fields: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry for each task that differs: `task`, and per field its value in both runs; None where there is no such task."""
    old, new = {task.id: task for task in before}, {task.id: task for task in after}
    found = []
    for task_id in [*old, *(each for each in new if each not in old)]:
        one, other = old.get(task_id), new.get(task_id)
        changed: dict[str, list[Any]] = {}
        if one is None or other is None:
            changed["state"] = [each and FIELDS["state"](each) for each in (one, other)]
        else:
            values = {field: (FIELDS[field](one), FIELDS[field](other)) for field in fields}
            changed = {field: list(pair) for field, pair in values.items() if not _equal(field, *pair)}
        if changed:
            found.append({"task": task_id, "changed": changed})
    return found


def _equal(field: str, one: Any, other: Any) -> bool:
    if field != "duration" or one is None or other is None:
        return bool(one == other)
    return bool(abs(one - other) <= max(NOISE_SECONDS, NOISE_PART * max(one, other)))


@click.command()
@click.argument("before", metavar="RUN_A", shell_complete=completion.complete_runs)
@click.argument("after", metavar="RUN_B", shell_complete=completion.complete_runs)
@click.option("--only", multiple=True, type=click.Choice(list(FIELDS)), help="Compare only this; may be repeated.")
@session.json_output
@session.connected
def diff(before: str, after: str, only: tuple[str, ...], as_json: bool, to: Context) -> None:
    """Show which tasks of two runs differ in state, result, artifacts, attempts, clusters or duration.

    Durations differ if they do by more than a second and a quarter. Exit codes: 0 the same, 1 different, others trouble.

    \b
    Example:
      baton diff monday tuesday
      baton diff monday tuesday --only result --only state -o json
    """
    names = [str(session.run_name(name, to)) for name in (before, after)]

    async def both(client: AsyncClient) -> list[tuple[run_pb2.Run, list[run_pb2.TaskStatus]]]:
        return [await timeline.fetch(client, name) for name in names]

    (run_a, tasks_a), (run_b, tasks_b) = session.ask(to, both)
    found = differences(tasks_a, tasks_b, only or list(FIELDS))
    states = [render.run_state(run.state) for run in (run_a, run_b)]
    same = not found and (states[0] == states[1] or bool(only and "state" not in only))
    if as_json:
        runs = [{"name": run.name, "state": state} for run, state in zip((run_a, run_b), states, strict=True)]
        render.echo_data({"same": same, "runs": runs, "tasks": found}, "json")
    elif same:
        click.echo(f"the same: {len(tasks_a)} tasks, {states[0]}")
    else:
        click.echo(f"{names[0]} {states[0]}\n{names[1]} {states[1]}")
        rows = [(each["task"], field, *map(_shown, pair)) for each in found for field, pair in each["changed"].items()]
        if rows:
            render.table(["TASK", "WHAT", "RUN_A", "RUN_B"], rows)
    raise click.exceptions.Exit(SAME if same else DIFFERENT)


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, float):
        return quantity.format_seconds(value)
    text = " > ".join(value) if isinstance(value, list) else str(value)
    text = text.replace("\n", " ").strip()
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."
