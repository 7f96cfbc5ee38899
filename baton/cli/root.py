"""The root of `baton`: its commands, those of plug-ins, and the one place where failures become exit codes.

Theory: a command raises what went wrong and does not know how it is told; here it is told, once, without a stack trace.
Commands of other packages (`baton local`) come through the entry-point group `baton.commands`, so that `baton` imports
neither plane nor the lab. An entry point that does not load is an error only when it is used.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

import click

from baton.cli import admin, clusters, inspect, interruptible, runs, session, timeline, trace
from baton.errors import BatonError
from baton.graphfile import GraphFileError

PLUGINS = "baton.commands"
"""Entry-point group: name of the command -> a click command."""


class _Root(click.Group):
    """The group, with plug-ins and failures."""

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
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(session.UNREACHABLE)
        except BrokenPipeError:
            # `baton get runs | head`: whoever read has enough. Standard output goes nowhere, so that the exit is silent.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(session.SUCCEEDED)


def _broken(name: str, message: str) -> click.Command:
    def fail() -> None:
        raise click.UsageError(message)

    return click.Command(name, callback=fail, short_help="(cannot be loaded)")


@click.group(
    cls=_Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 succeeded, 1 failed, 2 usage or bad input, 3 deadline, 4 cancelled, 5 not found,"
    " 6 unreachable or unknown.",
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
def version() -> None:
    """Print the version of this command line.

    \b
    Example:
      baton version
    """
    try:
        number = importlib.metadata.version("baton-federation")
    except importlib.metadata.PackageNotFoundError:
        number = "unknown (not installed)"
    click.echo(f"baton {number}")


for _command in (
    runs.run,
    runs.validate,
    runs.watch,
    runs.cancel,
    runs.logs,
    runs.result,
    inspect.get,
    inspect.describe,
    clusters.cordon,
    clusters.uncordon,
    clusters.drain,
    timeline.timeline,
    trace.trace,
    admin.admin,
):
    main.add_command(_command)
