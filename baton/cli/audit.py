"""`baton audit`: what a run's own history proves of the promise, and what it cannot (PROTOCOL F6).

Exit code 0: nothing contradicts the promise; what is declared or unproven is printed with the reason. 1: it was broken.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import cast

import click

from baton import audit as judge
from baton.audit import Audit, Verdict
from baton.cli import completion, render, session
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.contexts import Context
from baton.errors import BatonError
from baton.v1 import run_pb2

SHOWN = 50
"""Findings printed; all of them are in -o json."""

_HOW = {
    judge.REPORT: "after the earlier attempt was reported over",
    judge.REJECTION: "after the earlier one was rejected, and never ran",
    judge.TIMER: "after the time of the earlier one's guard had passed: no overlap while the bounds of its lease held (F5)",
    judge.NOBODY: "with no word of the earlier one's end",
}


@click.command()
@click.argument("name", metavar="RUN", shell_complete=completion.complete_runs)
@session.json_output
@session.connected
def audit(name: str, as_json: bool, to: Context) -> None:
    """Check from a run's history that each task had one owner at a time, one accepted result, and was final in time.

    "No overlap" is claimed only where the evidence carries it: a declared overlap and what nobody can know are named. Exit
    code 1 if a promise was broken. A run that still goes on is checked so far.

    \b
    Example:
      baton audit nightly
      baton audit nightly -o json
    """
    full = str(session.run_name(name, to))
    found = session.ask(to, lambda client: _audit(client, full))
    if as_json:
        render.echo_data(_plain(found), "json")
    else:
        _tell(found)
    if found.verdict is Verdict.VIOLATED:
        click.get_current_context().exit(session.FAILED)


async def _audit(client: AsyncClient, name: str) -> Audit:
    """Read and judge. Tasks are read after the run, so that a run that is final has final tasks."""
    run = await client.get_run(name)
    events = await _events(client, run)
    tasks = [task async for task in client.list_tasks(name)]
    return judge.audit(run, tasks, SystemClock().wall(), events)


async def _events(client: AsyncClient, run: run_pb2.Run) -> list[run_pb2.RunEvent]:
    """The run's events up to what `run` says; fewer if they are not kept. They only add certainty, so their lack is no failure."""
    found: list[run_pb2.RunEvent] = []
    if not run.event_number:
        return found
    async with contextlib.aclosing(
        cast("AsyncGenerator[run_pb2.WatchRunResponse]", client.watch_run(run.name))
    ) as watch:
        with contextlib.suppress(BatonError):
            async for message in watch:
                found += message.events
                if found and found[-1].number >= run.event_number:
                    break
    return found


def _plain(found: Audit) -> dict[str, object]:
    return {
        "run": found.run,
        "verdict": found.verdict.value,
        "final": found.final,
        "tasks": found.tasks,
        "attempts": found.attempts,
        "acceptedResults": found.accepted,
        "refusedResults": found.refused,
        "handovers": dict(sorted(found.handovers.items())),
        "findings": [
            {"verdict": each.verdict.value, "rule": each.rule, "task": each.task, "text": each.text}
            for each in found.findings
        ],
        "findingsNotKept": sum(found.counts.values()) - len(found.findings),
    }


def _tell(found: Audit) -> None:
    by_clocks = (
        ", as far as the bounds of F5 held" if found.verdict is Verdict.PROVEN and found.handovers[judge.TIMER] else ""
    )
    so_far = "" if found.final else " so far (the run goes on)"
    click.echo(f"{session.clean(found.run)}: {found.verdict.value}{by_clocks}{so_far}")
    click.echo(
        f"  {found.tasks} tasks, {found.attempts} attempts, {found.accepted} results accepted, "
        f"{found.refused} stale results refused"
    )
    for how, count in sorted(found.handovers.items()):
        click.echo(f"  {count} placed {_HOW[how]}")
    for each in sorted(found.findings, key=lambda finding: -finding.verdict.weight)[:SHOWN]:
        where = f"task {each.task}: " if each.task else ""
        click.echo(session.clean(f"{each.verdict.value} ({each.rule}): {where}{each.text}"))
    more = sum(found.counts.values()) - min(SHOWN, len(found.findings))
    if more:
        click.echo(f"{more} more; `-o json` has the first {judge.FINDINGS:,}")
