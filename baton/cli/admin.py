"""`baton admin`: for the operators of a federation."""

from __future__ import annotations

import os
from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration

from baton import quantity
from baton.cli import render, session
from baton.cli.render import Column, Kind
from baton.client import AsyncClient
from baton.contexts import Context
from baton.v1 import admin_pb2


def _days(duration: Duration) -> str:
    return quantity.format_seconds(float(duration.seconds)) if duration.seconds else ""


_NAMESPACES: Kind[admin_pb2.Namespace] = Kind(
    "namespaces",
    lambda space: space.name,
    [
        Column("NAMESPACE", lambda space: space.name),
        Column("WEIGHT", lambda space: f"{space.weight:g}"),
        Column("LIVE TASKS AT MOST", lambda space: str(space.live_task_quota or "default")),
        Column("RETENTION", lambda space: _days(space.retention)),
        Column("ETAG", lambda space: space.etag, wide=True),
    ],
)


@click.group()
def admin() -> None:
    """Operate the federation.

    \b
    Example:
      baton admin namespaces
      baton admin backup federation.db
    """


@admin.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@session.connected
def restored(yes: bool, to: Context) -> None:
    """Say that etcd was restored from a snapshot on purpose (PROTOCOL J12); work goes on after it.

    \b
    Example:
      baton admin restored --yes
    """
    if not yes:
        click.confirm("What was acknowledged after the snapshot may be lost. Was etcd restored on purpose?", abort=True)
    click.echo(f"incarnation {session.ask(to, AsyncClient.confirm_restored)}")


@admin.command()
@click.option("-o", "--output", type=click.Choice(render.FORMATS), default="table", show_default=True)
@session.connected
def namespaces(output: str, to: Context) -> None:
    """List namespaces.

    \b
    Example:
      baton admin namespaces -o json
    """
    render.show(_NAMESPACES, session.ask(to, AsyncClient.list_namespaces), output)


@admin.command()
@click.argument("file", type=click.Path(dir_okay=False))
@session.connected
def backup(file: str, to: Context) -> None:
    """Write a consistent backup of the store (an etcd snapshot) to FILE, readable by you only.

    \b
    Example:
      baton admin backup federation.db
    """
    target = Path(file)
    if target.exists():
        raise click.UsageError(f"{file} is there already: choose another name or remove it")
    draft = target.with_name(target.name + ".partial")

    async def save(client: AsyncClient) -> int:
        size = 0
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            async for piece in client.backup():
                out.write(piece)
                size += len(piece)
        return size

    try:
        size = session.ask(to, save)
        draft.replace(target)
    except OSError as error:
        raise click.UsageError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    click.echo(f"{file}: {size} bytes")
