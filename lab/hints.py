"""What `baton local` tells a person to type next.

Theory: a hint is pasted. So it is written as the command itself was called, with the flags that lead to this federation if a
command without flags would take another one, and names only files that are there.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from baton import contexts
from baton.cli import session
from baton.errors import InvalidField
from lab.layout import Layout, default_directory
from lab.supervisor import context_name

EXAMPLE = "examples/timezones/graph.yaml"
"""A graph to try, where the command is typed in a checkout."""


def say(status: dict[str, Any]) -> None:
    """Prints where the federation is and what to try."""
    layout, baton = _say_where(status), session.invoked()
    context = context_flag(layout)
    click.echo("try")
    click.echo(f"  {baton} get clusters{context}")
    if Path(EXAMPLE).is_file():
        click.echo(f"  {baton} run {EXAMPLE} --wait{context}")
    else:
        click.echo(f"  {baton} init - | {baton} run - --wait{context}")
    click.echo(f"  {baton} local kill {status['settings']['clusters'][0]}{suffix(layout)}")


def say_restored(status: dict[str, Any]) -> None:
    """Prints what to do about an etcd that looks restored."""
    layout = _say_where(status)
    click.echo("next, with the file that was restored")
    click.echo(f"  {session.invoked()} admin restored --backup FILE{context_flag(layout)}")
    click.echo(
        "  which shows what is suspected, asks, and lets work go on; if nobody restored it on purpose, answer no and find out first"
    )


def _say_where(status: dict[str, Any]) -> Layout:
    layout = Layout(Path(status["directory"]))
    click.echo(f"  address  {','.join(status['endpoints'])}  (context {context_name(layout)})")
    click.echo(f"  logs     {status['logs']}")
    return layout


def suffix(layout: Layout) -> str:
    """The flags that name the directory, if it needs any."""
    elsewhere = layout.directory != default_directory(os.environ).absolute()
    return f" --directory {shlex.quote(str(layout.directory))}" if elsewhere else ""


def context_flag(layout: Layout) -> str:
    """The flag that names the federation's context, unless a command without flags takes it."""
    name = context_name(layout)
    try:
        current, _ = contexts.read_contexts(os.environ)
    except InvalidField:
        return ""  # no command will work before the file is mended, and each says so
    taken = os.environ.get(contexts.CONTEXT_VARIABLE) or current
    return "" if taken == name else f" --context {name}"
