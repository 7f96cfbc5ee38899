"""The root of `baton`: its commands, those of plug-ins, and the one place where failures become exit codes.

Theory: a command raises what went wrong and does not know how it is told; here it is told, once, without a stack trace.
Commands of other packages (`baton local`) come through the entry-point group `baton.commands`, so that `baton` imports
neither plane nor the lab. An entry point that does not load is an error only when it is used.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

import click

from baton.cli import (
    INTERRUPTED,
    admin,
    artifacts,
    audit,
    authoring,
    clusters,
    completion,
    diff,
    doctor,
    inspect,
    interruptible,
    render,
    runs,
    session,
    timeline,
    trace,
)
from baton.errors import BatonError
from baton.graphfile import GraphFileError

PLUGINS = "baton.commands"
"""Entry-point group: name of the command -> a click command."""


_SYNONYMS = (
    ("--json", "-o json", "--form", "--format", "--output"),
    ("--endpoint", "--server", "--host", "--address", "--url"),
    ("--namespace", "-n", "--ns", "--tenant"),
    ("--context", "--cluster", "--kube-context"),
    ("--wait", "--watch", "--follow", "-f", "-w"),
    ("--name", "--run", "--run-id", "--id"),
    ("--deadline", "--timeout", "--until"),
    ("--yes", "-y", "--force", "--assume-yes"),
)
"""Words for one wish, in other tools and in other commands of ours: whoever writes one is told the one that the command has."""


_ELSEWHERE = {
    "help": "--help",
    "submit": "run FILE",
    "apply": "run FILE",
    "create": "run FILE",
    "start": "run FILE",
    "trigger": "run FILE",
    "stop": "cancel RUN",
    "delete": "cancel RUN",
    "kill": "cancel RUN",
    "terminate": "cancel RUN",
    "ls": "get runs",
    "list": "get runs",
    "ps": "get runs",
    "runs": "get runs",
    "tasks": "get tasks RUN",
    "clusters": "get clusters",
    "nodes": "get clusters",
    "status": "describe RUN",
    "show": "describe RUN",
    "inspect": "describe RUN",
    "explain": "describe RUN/TASK",
    "log": "logs RUN/TASK",
    "history": "timeline RUN",
    "events": "watch RUN",
    "plan": "validate FILE",
    "lint": "validate FILE",
    "up": "local up",
    "down": "local down",
    "backup": "admin backup FILE",
    "restore": "admin restore FILE",
    "namespaces": "admin namespaces",
}
"""What other tools call it -> what it is here: a newcomer's first guess costs one line, not a look at the help."""


class _Root(click.Group):
    """The group, with plug-ins and failures."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in _ELSEWHERE and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}: use `{session.invoked()} {_ELSEWHERE[args[0]]}`.")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's; output that cannot be written (a full disk) ends with UNREACHABLE: what was asked for may have been done."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            _to_nowhere()
            what = session.clean(str(error.filename)) if error.filename else "the output"
            click.echo(f"error: {what} cannot be read or written: {error.strerror or error}", err=True)
            sys.exit(session.UNREACHABLE)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *importlib.metadata.entry_points(group=PLUGINS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in importlib.metadata.entry_points(group=PLUGINS, name=cmd_name):
            try:
                loaded = entry.load()
            except (ImportError, AttributeError) as error:
                message = f"the command {cmd_name!r} cannot be loaded ({error}); install the package it comes with"
                return _broken(cmd_name, message)
            return loaded if isinstance(loaded, click.Command) else None
        return None

    def invoke(self, ctx: click.Context) -> object:
        interruptible()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader that has gone shows here, not in the interpreter's last breath
            return result
        except GraphFileError as error:
            for problem in error.problems:
                click.echo(session.clean(str(problem)), err=True)
            ctx.exit(session.BAD_INPUT)
        except BatonError as error:
            session.say_error(error)
            ctx.exit(session.exit_code(error))
        except click.NoSuchOption as error:
            raise _with_right_one(error) from None
        except click.Abort as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise  # somebody said no
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # `baton get runs | head`: whoever read has enough. Standard output goes nowhere, so that the exit is silent.
            _to_nowhere()
            ctx.exit(session.SUCCEEDED)


def _to_nowhere() -> None:
    """Standard output leads nowhere from here on, so that what it still holds is no second failure at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_right_one(error: click.NoSuchOption) -> click.NoSuchOption:
    """What other tools call it, or other commands of this one, as this command does: the first of its synonyms that it has."""
    command = error.ctx.command if error.ctx is not None else None
    known = {name for param in command.params for name in param.opts} if command is not None else set()
    for group in _SYNONYMS:
        if error.option_name in {each.partition(" ")[0] for each in group}:
            right = [each for each in group if each.partition(" ")[0] in known and each != error.option_name]
            if right:
                words = f"No such option {error.option_name!r}: use {right[0]}."
                return click.NoSuchOption(error.option_name, words, ctx=error.ctx)
    return error


def _broken(name: str, message: str) -> click.Command:
    """A stand-in for a command that does not load: whatever it is given, `--help` too, the answer is why."""

    def fail(words: tuple[str, ...]) -> None:
        del words
        raise click.UsageError(message)

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
        short_help="(cannot be loaded)",
    )


@click.group(
    cls=_Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 succeeded, 1 failed, 2 usage or bad input, 3 deadline, 4 cancelled, 5 not found,"
    " 6 unreachable or unknown, 130 interrupted.",
)
@session.connection_options
def main(endpoint: tuple[str, ...], context: str, namespace: str) -> None:
    """Baton: one graph of tasks, one deadline, many clusters.

    \b
    Example:
      baton local up --detach
      baton run examples/timezones/graph.yaml --wait --deadline 5m
    """


@main.command()
@session.json_output
def version(as_json: bool) -> None:
    """Print the version of this command line.

    \b
    Example:
      baton version
    """
    if as_json:
        render.echo_data({"version": session.own_version()}, "json")
    else:
        click.echo(f"baton {session.own_version() or 'unknown (not installed)'}")


for _command in (
    runs.run,
    authoring.init,
    authoring.validate,
    authoring.schema,
    diff.diff,
    doctor.doctor,
    completion.completion,
    runs.watch,
    runs.cancel,
    runs.logs,
    runs.result,
    artifacts.artifacts,
    inspect.get,
    inspect.describe,
    clusters.cordon,
    clusters.uncordon,
    clusters.drain,
    timeline.timeline,
    trace.trace,
    audit.audit,
    admin.admin,
):
    main.add_command(_command)
