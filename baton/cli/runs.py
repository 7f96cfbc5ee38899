"""`baton run`, `watch`, `cancel`, `logs`, `result`: the life of a run from a terminal.

Theory: the run lives in the federation, not in this process. Ctrl-C therefore detaches and says how to come back and how
to stop the run; only `baton cancel` cancels. A file is judged here first, so that its faults are told with their lines;
what only the server can say (a taken name, a deadline that has passed) is led back to the file's lines, too.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import click

from baton import names, quantity
from baton import validate as judge
from baton.artifact_wire import is_large
from baton.artifacts import RESULT
from baton.cli import INTERRUPTED, completion, render, session, timeline
from baton.cli.progress import Progress
from baton.client import FINAL_STATES, PATIENCE_SECONDS, AsyncClient
from baton.clock import SystemClock
from baton.contexts import Context
from baton.errors import InvalidField, NameTaken, WatchCompacted
from baton.graphfile import GraphFile, GraphFileError, load
from baton.v1 import run_pb2

LOOK_SECONDS = 10.0
"""How long `baton logs` without -f looks for the output of a cluster that does not answer: two of a replica's tries to reach it.
Longer: a person waits for what a lost cluster cannot tell; shorter: a change of replicas looks like a loss."""


@click.command()
@click.argument("file")
@click.option("--wait/--no-wait", default=False, help="Show progress until the run is final.")
@click.option("--deadline", metavar="TIME", help="From now (10m) or absolute; wins over the file's.")
@click.option("--name", metavar="ID", help="The run's id; wins over metadata.name.")
@click.option("--priority", type=click.IntRange(-1000, 1000), help="Wins over the file's.")
@session.json_output
@session.request_id_option
@session.connected
def run(
    file: str,
    *,
    wait: bool,
    deadline: str | None,
    name: str | None,
    priority: int | None,
    as_json: bool,
    request_id: str,
    to: Context,
) -> None:
    """Create a run of the graph in FILE (`-`: standard input).

    Ctrl-C while waiting detaches; the run goes on.

    \b
    Example:
      baton run examples/timezones/graph.yaml --wait --deadline 5m
      baton run graph.yaml --name nightly --json
    """
    if name and (problem := names.id_problem(name)):
        raise click.BadParameter(problem, param_hint="--name")
    graph = load(file)
    ends = round(_deadline(graph, deadline), 3)  # milliseconds, as they are sent and shown

    async def story() -> None:
        async with session.open_client(to) as client:
            created = await _create(
                client,
                graph,
                deadline=ends,
                namespace=to.namespace,
                run_id=name or graph.name,
                priority=graph.priority if priority is None else priority,
                request_id=request_id,
            )
            if wait:
                await _wait(client, created, after=0, as_json=as_json)
            elif as_json:
                render.echo_data({"run": render.plain(created)}, "json")
            else:
                click.echo(created.name)
                _hints(created.name, to)

    _until_detached(story(), to)


async def _create(
    client: AsyncClient,
    graph: GraphFile,
    *,
    deadline: float,
    namespace: str,
    run_id: str,
    priority: int,
    request_id: str,
) -> run_pb2.Run:
    """Creates the run; what the server refuses is told as the command line's user can mend it."""
    identity = request_id or client.new_request_id()
    # A repetition must be the same request (PROTOCOL O8), and a deadline "from now" would be another one.
    moment = datetime.fromtimestamp(deadline, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    options = f"--request-id {identity} --deadline {moment}"
    try:
        with session.repeatable(options):
            return await client.create_run(
                graph.spec,
                deadline=deadline,
                namespace=namespace,
                run_id=run_id,
                priority=priority,
                labels=graph.labels,
                annotations=graph.annotations,
                request_id=identity,
            )
    except NameTaken as error:
        error.message = (
            f"{error.message.partition(';')[0]}; choose another: --name NEW, or `metadata.name` in {graph.path}"
        )
        raise
    except InvalidField as error:
        if not error.field_violations:
            raise
        raise GraphFileError([graph.problem(each.field, each.message) for each in error.field_violations]) from None


def _deadline(graph: GraphFile, flag: str | None) -> float:
    """The absolute deadline, in seconds since the epoch; one that has passed is told where it was written."""
    now = SystemClock().wall()
    if flag is not None:
        try:
            absolute = re.match(r"\d{4}-", flag) is not None
            at = quantity.instant(flag) if absolute else now + quantity.duration_nanos(flag) / 1e9
        except ValueError as error:
            raise click.BadParameter(f"{names.quote(flag)}: {error}", param_hint="--deadline") from None
        if at <= now:
            raise click.BadParameter(f"{names.quote(flag)} is in the past", param_hint="--deadline")
        if at > now + judge.MAX_SECONDS:
            raise click.BadParameter(f"{names.quote(flag)} is more than 30 days ahead", param_hint="--deadline")
        return at
    if graph.deadline_seconds is not None:
        return now + graph.deadline_seconds
    if graph.deadline_at is None:
        problem = graph.problem("spec", "has no deadline: add `deadline: 10m`, or pass --deadline 10m")
        raise GraphFileError([problem])
    if graph.deadline_at <= now:
        raise GraphFileError([graph.problem("deadline_time", "is in the past: choose a later one, or pass --deadline")])
    return graph.deadline_at


@click.command()
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@click.option("--after", type=click.IntRange(min=0), default=0, help="Number of the last event already seen.")
@session.json_output
@session.connected
def watch(run: str, after: int, as_json: bool, to: Context) -> None:
    """Show a run's progress until it is final; the exit code is its outcome. JSON is one line for every event.

    \b
    Example:
      baton watch nightly
      baton watch nightly --json
    """
    name = str(session.run_name(run, to))

    async def story() -> None:
        async with session.open_client(to) as client:
            try:
                if as_json:
                    await _print_events(client, name, after)
                else:
                    await _wait(client, await client.get_run(name), after=after, as_json=False)
            except asyncio.CancelledError:
                raise _Detached("") from None  # a question: whether it was answered does not matter

    _until_detached(story(), to)


async def _print_events(client: AsyncClient, name: str, after: int) -> None:
    state = run_pb2.RUN_STATE_UNSPECIFIED
    async for message in client.watch_run(name, after_event=after):
        for event in message.events:
            click.echo(render.one_line(event))
        if message.HasField("run"):
            state = message.run.state
    _leave(state)


async def _wait(client: AsyncClient, run: run_pb2.Run, *, after: int, as_json: bool) -> None:
    """Shows progress until the run is final, then its outcome; ends the command with the run's exit code."""
    last = run
    try:
        with Progress() as progress:
            try:
                async for message in client.watch_run(run.name, after_event=after):
                    progress.show(message)
                    if message.HasField("run"):
                        last = message.run
            except WatchCompacted:  # the first events are no longer kept: go on with what is
                last = await client.wait_run(run.name)
    except asyncio.CancelledError:
        raise _Detached(run.name) from None
    last, tasks = await timeline.fetch(client, last.name)
    sums = timeline.summary(last, tasks)
    if as_json:
        render.echo_data({"run": render.plain(last), "summary": sums}, "json")
    else:
        _tell_outcome(last, tasks, sums)
    _leave(last.state)


def _tell_outcome(run: run_pb2.Run, tasks: list[run_pb2.TaskStatus], sums: dict[str, Any]) -> None:
    took = quantity.format_seconds(render.seconds(run.finish_time) - render.seconds(run.create_time))
    click.echo(f"{run.name} {render.run_state(run.state)} in {took}")
    if run.reason:
        click.echo(f"reason: {session.clean(run.reason)}")
    for task in tasks:
        if task.state == run_pb2.TASK_STATE_FAILED:
            click.echo(f"failed: {task.id}: {session.clean(task.reason)}")
    accepted, most = sums["accepted_results"], sums["max_accepted_per_task"]
    click.echo(f"{sums['tasks']} tasks, {accepted} results accepted (at most {most} per task)")
    click.echo(f"{sums['moved_tasks']} moved, {sums['stale_results_refused']} late results refused")


DETACH_SECONDS = 0.2
"""A wait that a ctrl-C cancelled and that still stands is cancelled again after this long: an answer that comes in the same
moment can take a cancellation with it (gRPC's unary calls). Shorter would cut what a wait tidies up; longer is felt."""


class _Detached(Exception):
    """Ctrl-C ended a wait for this run; without a name: a question whose repetition harms nothing."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run


def _until_detached(story: Coroutine[Any, Any, None], to: Context) -> None:
    """Runs a story that the first ctrl-C cancels; the second has Python's own effect and ends the process."""

    async def guarded() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(story)

        def detach() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            task.cancel()
            loop.call_later(DETACH_SECONDS, insist)

        def insist() -> None:
            if not task.done():
                task.cancel()
                loop.call_later(DETACH_SECONDS, insist)

        try:
            loop.add_signal_handler(signal.SIGINT, detach)
        except (ValueError, RuntimeError):
            pass  # not the main thread: then ctrl-C is somebody else's
        await task

    try:
        asyncio.run(guarded())
    except _Detached as detached:
        click.echo("\ndetached; the run goes on" if detached.run else "interrupted", err=True)
        if detached.run:
            _hints(detached.run, to)
        sys.exit(INTERRUPTED)
    except asyncio.CancelledError:
        look = f"{session.invoked()} get runs{_space(to)}{session.same_federation()}"
        click.echo(f"\ninterrupted before an answer: look with `{look}` before you repeat it", err=True)
        sys.exit(INTERRUPTED)


def _hints(name: str, to: Context) -> None:
    run = names.parse_run(name).run
    flags = _space(to) + session.same_federation()
    click.echo(f"  watch:  {session.invoked()} watch {run}{flags}", err=True)
    click.echo(f"  cancel: {session.invoked()} cancel {run}{flags}", err=True)


def _space(to: Context) -> str:
    """The flag that names the namespace, if it needs any."""
    return "" if to.namespace == names.DEFAULT_NAMESPACE else f" -n {to.namespace}"


def _leave(state: run_pb2.RunState.ValueType) -> None:
    sys.exit(session.EXIT_OF_STATE.get(state, session.UNREACHABLE))


@click.command()
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@click.option("--reason", default="", help="Why, for the record.")
@click.option("--wait/--no-wait", default=False, help="Wait until the run is final.")
@session.request_id_option
@session.json_output
@session.connected
def cancel(run: str, *, reason: str, wait: bool, request_id: str, as_json: bool, to: Context) -> None:
    """Ask a run to stop.

    \b
    Example:
      baton cancel nightly --reason "wrong input"
    """
    name = str(session.run_name(run, to))

    async def story(client: AsyncClient) -> run_pb2.Run:
        identity = request_id or client.new_request_id()
        with session.repeatable(f"--request-id {identity}"):
            found = await client.cancel_run(name, reason=reason, request_id=identity)
        return await client.wait_run(name) if wait and found.state not in FINAL_STATES else found

    found = session.ask(to, story)
    if as_json:
        render.echo_data(render.plain(found), "json")
    else:
        click.echo(f"{found.name} {render.run_state(found.state)}")


@click.command()
@click.argument("task", metavar="RUN/TASK", shell_complete=completion.complete_tasks)
@click.option("-f", "--follow", is_flag=True, help="Go on until the attempt has ended.")
@click.option("--attempt", type=click.IntRange(min=0), default=0, help="Its number; the newest if left out.")
@click.option("--offset", type=click.IntRange(min=0), default=0, help="First byte.")
@session.connected
def logs(task: str, follow: bool, attempt: int, offset: int, to: Context) -> None:
    """Print the captured output of a task's attempt, as it is; of a moved task's earlier ones, too.

    Output stays on the cluster where it was written: while that one is lost it cannot be read, and can again when it is back.

    \b
    Example:
      baton logs nightly/report -f
      baton logs nightly/report --attempt 1
    """
    name = str(session.task_name(task, to))

    async def story() -> None:
        async with session.open_client(to) as client:
            patience = PATIENCE_SECONDS if follow else LOOK_SECONDS
            async for piece in client.follow_logs(
                name, attempt=attempt, offset=offset, follow=follow, patience=patience
            ):
                click.echo(piece.data, nl=False)

    asyncio.run(story())


@click.command()
@click.argument("task", metavar="RUN/TASK", shell_complete=completion.complete_tasks)
@session.connected
def result(task: str, to: Context) -> None:
    """Print the accepted result of a task, byte for byte.

    \b
    Example:
      baton result nightly/report
    """
    name = str(session.task_name(task, to))
    found = session.ask(to, lambda client: client.get_task(name))
    if not found.accepted_results:
        click.echo(f"error: {name} is {render.task_state(found.state)}: it has no result", err=True)
        sys.exit(session.FAILED)
    if is_large(found):
        of = names.parse_task(name)
        session.ask(to, lambda client: client.artifacts.download(str(of.parent), of.task, RESULT, sys.stdout.buffer))
        return
    click.echo(found.result, nl=False)
