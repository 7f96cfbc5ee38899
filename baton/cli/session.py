"""What every command shares: the flags that name a federation, the client's life, and the exit code of a failure.

Theory: scripts read exit codes, people read messages. Codes: 0 succeeded, 1 failed, 2 usage or bad input, 3 deadline,
4 cancelled, 5 not found, 6 unreachable or unknown. A failure whose effect is unknown is always 6, whatever else it says:
a script that reads anything else may conclude too much (PROTOCOL J6).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from baton import contexts, names, requestid
from baton.client import AsyncClient, tls_of
from baton.contexts import Context
from baton.errors import UNKNOWN, BatonError
from baton.v1 import run_pb2

SUCCEEDED, FAILED, BAD_INPUT, DEADLINE, CANCELLED, NOT_FOUND, UNREACHABLE = range(7)

EXIT_OF_STATE = {
    run_pb2.RUN_STATE_SUCCEEDED: SUCCEEDED,
    run_pb2.RUN_STATE_FAILED: FAILED,
    run_pb2.RUN_STATE_DEADLINE_EXCEEDED: DEADLINE,
    run_pb2.RUN_STATE_CANCELLED: CANCELLED,
}
"""Final state of a run -> exit code; a state that is not final is UNREACHABLE: its outcome is not known."""

_EXIT_OF_REASON = {
    "INVALID_FIELD": BAD_INPUT,
    "NAME_TAKEN": BAD_INPUT,
    "REQUEST_ID_REUSED": BAD_INPUT,
    "REQUEST_ID_EXPIRED": BAD_INPUT,
    "REQUEST_ID_AHEAD": BAD_INPUT,
    "LIMIT_EXCEEDED": BAD_INPUT,
    "INFEASIBLE": DEADLINE,
    "NOT_FOUND": NOT_FOUND,
    "UNREACHABLE": UNREACHABLE,
    "NOT_OWNED": UNREACHABLE,
    "STORE_UNAVAILABLE": UNREACHABLE,
    "DRAINING": UNREACHABLE,
    "TIMED_OUT": UNREACHABLE,
    "INTERNAL": UNREACHABLE,
    "RESTORE_SUSPECTED": UNREACHABLE,
}

COMMAND_VARIABLE = "BATON_COMMAND"
"""Environment variable of a wrapper such as scripts/baton: what its user types instead of `baton`."""

Answer = TypeVar("Answer")
Command = TypeVar("Command", bound=Callable[..., Any])


def exit_code(error: BatonError) -> int:
    """The exit code of a failed call."""
    if error.applied == UNKNOWN:
        return UNREACHABLE
    return _EXIT_OF_REASON.get(error.reason, FAILED)


def say_error(error: BatonError) -> None:
    """Prints a failure on standard error: what, which fields, and whether it may have happened."""
    click.echo(f"error: {clean(error.message)}", err=True)
    for each in error.field_violations:
        if each.message not in error.message:  # else it would be said twice
            click.echo(f"  {clean(each.field)}: {clean(each.message)}", err=True)
    notes = getattr(error, "__notes__", ())
    for note in notes:
        click.echo(f"  {note}", err=True)
    if not notes and error.applied == UNKNOWN and exit_code(error) == UNREACHABLE and error.reason != "UNREACHABLE":
        click.echo("  it is not known whether the call took effect; look before you repeat it", err=True)


@contextmanager
def repeatable(options: str) -> Iterator[None]:
    """Within it, a failure whose effect is unknown says with which options the command meets its first try (O8)."""
    try:
        yield
    except BatonError as error:
        if error.applied == UNKNOWN:
            error.add_note(f"it is not known whether it took effect; to repeat it safely, add {options}")
        raise


def own_version() -> str:
    """The version of this command line; "" where it is not installed."""
    try:
        return importlib.metadata.version("baton-federation")
    except importlib.metadata.PackageNotFoundError:
        return ""


def invoked() -> str:
    """What the user of this process types for `baton`: scripts/baton of a checkout, or a path where it is not on PATH."""
    if wrapper := os.environ.get(COMMAND_VARIABLE):
        return clean(wrapper)
    path = Path(sys.argv[0])
    if path.name != "baton" or str(path.parent) in os.environ.get("PATH", "").split(os.pathsep):
        return "baton"
    return clean(sys.argv[0])


def same_federation() -> str:
    """The flags that named the federation of this command, for one that its user is told to type next; "" if there were none."""
    ctx = click.get_current_context(silent=True)
    if ctx is None:
        return ""
    outer, own = ctx.find_root().params, ctx.params
    words = [word for each in own.get("endpoint") or outer.get("endpoint") or () for word in ("--endpoint", each)]
    if context := own.get("context") or outer.get("context"):
        words += ["--context", context]
    return clean(f" {shlex.join(words)}") if words else ""


def request_id_option(command: Command) -> Command:
    """--request-id, of commands that change something; not in the help, for only an error's reader needs it."""
    return click.option("--request-id", default="", hidden=True, callback=_request_id)(command)


def _request_id(_ctx: click.Context, _param: click.Parameter, text: str) -> str:
    try:
        if text:
            requestid.time_of(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return text


def output(*forms: str) -> Callable[[Command], Command]:
    """-o FORM and --json; the command receives `form`, one of `forms`: the first unless one is asked for."""

    def decorate(command: Command) -> Command:
        @click.option(
            "-o",
            "--output",
            "form",
            type=click.Choice(forms),
            default=forms[0],
            show_default=True,
            help="How it is printed.",
        )
        @click.option("--json", "flagged", is_flag=True, help="The same as -o json.")
        @functools.wraps(command)
        def wrapped(*args: Any, form: str, flagged: bool, **kwargs: Any) -> Any:
            return command(*args, form="json" if flagged else form, **kwargs)

        return cast("Command", wrapped)

    return decorate


def json_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """-o text|json and --json, of commands that tell one thing; the command receives `as_json`."""

    @output("text", "json")
    @functools.wraps(command)
    def wrapped(*args: Any, form: str, **kwargs: Any) -> Any:
        return command(*args, as_json=form == "json", **kwargs)

    return wrapped


def connection_options(command: Command) -> Command:
    """--endpoint, --context and -n, of the group or of a command."""
    command = click.option("--endpoint", multiple=True, metavar="HOST:PORT", help="A replica; may be repeated.")(
        command
    )
    command = click.option("--context", default="", metavar="NAME", help="A context of the contexts file.")(command)
    return click.option("-n", "--namespace", default="", metavar="NS", help="The namespace.")(command)


def connected(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the flags that name a federation; it receives `to: Context`."""

    @connection_options
    @click.pass_context
    @functools.wraps(command)
    def wrapped(
        ctx: click.Context, /, *args: Any, endpoint: tuple[str, ...], context: str, namespace: str, **kwargs: Any
    ) -> Any:
        outer = ctx.find_root().params
        to = contexts.resolve(
            endpoints=endpoint or outer.get("endpoint", ()),
            context=context or outer.get("context", ""),
            namespace=namespace or outer.get("namespace", ""),
            env=os.environ,
        )
        return command(*args, to=to, **kwargs)

    return wrapped


def open_client(to: Context) -> AsyncClient:
    """The client of a context. Raises InvalidField or Denied."""
    return AsyncClient(to.endpoints, namespace=to.namespace, tls=tls_of(to))


def ask(to: Context, question: Callable[[AsyncClient], Awaitable[Answer]]) -> Answer:
    """Runs one question with a client of its own. Raises BatonError."""

    async def asking() -> Answer:
        async with open_client(to) as client:
            return await question(client)

    return asyncio.run(asking())


def run_name(text: str, to: Context) -> names.RunName:
    """A run as a person names it; a bad name is a usage error."""
    return _or_usage(lambda: names.short_run(text, to.namespace))


def task_name(text: str, to: Context) -> names.TaskName:
    """A task as a person names it; a bad name is a usage error."""
    return _or_usage(lambda: names.short_task(text, to.namespace))


def cluster_name(text: str) -> names.ClusterName:
    """A cluster as a person names it; a bad name is a usage error."""
    return _or_usage(lambda: names.short_cluster(text))


def _or_usage(read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except names.InvalidName as error:
        raise click.UsageError(str(error)) from None


def clean(text: str) -> str:
    """Foreign text for a terminal: control characters, which could move its cursor or colour it, are shown as marks."""
    return "".join(char if char.isprintable() else "?" if char not in "\n\t" else " " for char in text)
