"""`baton admin`: for the operators of a federation."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration

from baton import quantity
from baton.backup import Backup
from baton.cli import render, session
from baton.cli import restore as restoring
from baton.cli.render import Column, Kind
from baton.client import AsyncClient
from baton.clock import Clock
from baton.contexts import Context
from baton.errors import WrongState
from baton.leases import PROFILES, recovery_seconds
from baton.v1 import admin_pb2

PATIENCE = 3 * max(map(recovery_seconds, PROFILES.values()))
"""Seconds that `restored` waits at most: what the most patient clusters need, and twice more, for a replica that restarts counts
anew. Smaller: given up when it is nearly over; larger: replicas that restart again and again hide behind a countdown."""

SHORTEST_WAIT = 0.2
"""Seconds between two tries at least; the time left is told in whole milliseconds, rounded down."""


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
@click.option("--now", is_flag=True, help="Do not wait: you know that no work from after the snapshot survives.")
@click.option(
    "--backup",
    "file",
    type=click.Path(dir_okay=False, exists=True),
    help="The file that was restored: also tell which runs differ from what it knows.",
)
@session.json_output
@session.connected
def restored(*, yes: bool, now: bool, file: str | None, as_json: bool, to: Context) -> None:
    """Say that etcd was restored from a snapshot on purpose (PROTOCOL J12); work goes on after it.

    Shows first what is suspected, and asks. Then waits until every agent has ended what was placed after the snapshot, so
    that nothing runs beside its repetition. With --now it may.

    \b
    Example:
      baton admin restored --backup federation.db
      baton admin restored --yes
    """
    backup = restoring.whole_backup(file) if file is not None else None
    before = session.ask(to, AsyncClient.list_shards)
    _say_suspicion(before, file, backup)
    if before.restore_suspected and not yes:
        click.confirm("What was acknowledged after the snapshot may be lost. Was etcd restored on purpose?", abort=True)

    async def confirm(client: AsyncClient) -> tuple[int, restoring.Differences | None]:
        # Without a suspicion that was shown nobody has said yes to one; only --yes speaks of one that comes meanwhile.
        incarnation = await until_taken(client) if before.restore_suspected or yes else before.incarnation
        if backup is None:
            return incarnation, None
        return incarnation, await restoring.differences(client, backup.wall, incarnation)

    async def until_taken(client: AsyncClient) -> int:
        end = client.clock.boot() + PATIENCE
        while True:
            try:
                return await client.confirm_restored(now=now)
            except WrongState as early:
                if early.retry_after is None or client.clock.boot() + early.retry_after > end:
                    raise
                await _count_down(client.clock, max(early.retry_after, SHORTEST_WAIT))

    incarnation, found = session.ask(to, confirm)
    if as_json:
        told = {"differences": found.plain()} if found is not None else {}
        render.echo_data({"incarnation": incarnation, "changed": incarnation != before.incarnation, **told}, "json")
        return
    if incarnation == before.incarnation:
        click.echo(f"nothing is suspected, and nothing was changed: incarnation {incarnation}")
    else:
        click.echo(f"incarnation {incarnation}")
    if found is not None:
        restoring.tell(found)


def _say_suspicion(answer: admin_pb2.ListShardsResponse, file: str | None, backup: Backup | None) -> None:
    """What the question is about, on standard error."""
    if answer.restore_suspected:
        click.echo(f"etcd looks restored: {session.clean(answer.restore_detail)}", err=True)
    if backup is not None:
        click.echo(f"{file}: {restoring.describe(backup)}", err=True)


async def _count_down(clock: Clock, seconds: float) -> None:
    """Wait, and say how long on standard error: every second on one line of a terminal, else once."""
    text = "work from after the snapshot may still run; confirming in"
    if not sys.stderr.isatty():
        click.echo(f"{text} {math.ceil(seconds)} s", err=True)
        await clock.sleep(seconds)
        return
    end = clock.boot() + seconds
    while (left := end - clock.boot()) > 0:
        click.echo(f"\r{text} {math.ceil(left)} s ", err=True, nl=False)
        await clock.sleep(min(left, 1.0))
    click.echo(err=True)


@admin.command()
@session.output(*render.FORMATS)
@session.connected
def namespaces(form: str, to: Context) -> None:
    """List namespaces.

    \b
    Example:
      baton admin namespaces -o json
    """
    render.show(_NAMESPACES, session.ask(to, AsyncClient.list_namespaces), form)


@admin.command()
@click.argument("file", type=click.Path(dir_okay=False))
@session.json_output
@session.connected
def backup(file: str, as_json: bool, to: Context) -> None:
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
        found = restoring.whole_backup(str(draft))
        draft.replace(target)
    except OSError as error:
        raise click.UsageError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    if as_json:
        told = {"bytes": size, "revision": found.revision, "newestChange": restoring.moment(found.wall)}
        render.echo_data({"file": file, **told}, "json")
    else:
        click.echo(f"{file}: {restoring.describe(found)}")


admin.add_command(restoring.restore)
