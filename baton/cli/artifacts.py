"""`baton artifacts`: the files that tasks made, as a list, and one of them as a file.

Theory: what is shown is what a commit published; what an attempt wrote and nobody accepted is not there. A file has its name only
once every byte of it was proved, so a download that was interrupted leaves nothing that looks whole.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from baton.cli import completion, render, session
from baton.client import AsyncClient
from baton.contexts import Context
from baton.v1 import agent_pb2

STDOUT = "-"


def _size(size: int) -> str:
    """Bytes for people, as graph files write amounts: 512, 1.5Ki, 20.0Mi."""
    value, unit = float(size), ""
    for larger in ("Ki", "Mi", "Gi"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}{unit}" if unit else str(size)


_KIND: render.Kind[agent_pb2.ArtifactSource] = render.Kind(
    "artifacts",
    lambda source: f"{source.task_id}/{source.artifact.name}",
    (
        render.Column("TASK", lambda source: source.task_id),
        render.Column("NAME", lambda source: source.artifact.name),
        render.Column("SIZE", lambda source: _size(source.artifact.size)),
        render.Column("ATTEMPT", lambda source: str(source.attempt.n)),
        render.Column("DIGEST", lambda source: source.artifact.digest.hex()[:16]),
        render.Column("CLUSTER UID", lambda source: source.cluster_uid, wide=True),
    ),
)


class _WithList(click.Group):
    """A group whose first word may be a run: then it lists."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in {"-h", "--help"}:
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithList)
def artifacts() -> None:
    """The files that a run's tasks made: RUN [TASK] lists them, `get` fetches one.

    \b
    Example:
      baton artifacts nightly
      baton artifacts nightly train -o json
      baton artifacts get nightly train model.bin -o model.bin
    """


@artifacts.command("list")
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@click.argument("task", metavar="[TASK]", default="")
@session.output(*render.FORMATS)
@session.connected
def list_(run: str, task: str, form: str, to: Context) -> None:
    """List the artifacts that the tasks of a run, or one of them (RUN TASK or RUN/TASK), have published.

    \b
    Example:
      baton artifacts list nightly
      baton artifacts list nightly/train
    """
    if not task and (run.count("/") == 1 or "/tasks/" in run):
        of = session.task_name(run, to)
        run, task = str(of.parent), of.task
    name = str(session.run_name(run, to))

    async def ask(client: AsyncClient) -> list[agent_pb2.ArtifactSource]:
        return [source async for source in client.artifacts.list(name, task)]

    render.show(_KIND, session.ask(to, ask), form)


@artifacts.command()
@click.argument("run", metavar="RUN", shell_complete=completion.complete_runs)
@click.argument("task", metavar="TASK")
@click.argument("name", metavar="NAME")
@click.option(
    "-o", "--output", "path", metavar="FILE", default="", help="Where to; - is standard output. Default: NAME."
)
@session.connected
def get(run: str, task: str, name: str, path: str, to: Context) -> None:
    """Fetch one artifact, proved against what was published.

    \b
    Example:
      baton artifacts get nightly train model.bin
      baton artifacts get nightly report table.csv -o - | head
    """
    of = str(session.run_name(run, to))
    target = Path(path or name)
    target = target / name if target.is_dir() else target

    async def fetch() -> None:
        async with session.open_client(to) as client:
            if path == STDOUT:
                await client.artifacts.download(of, task, name, sys.stdout.buffer)
                return
            ref = await client.artifacts.save(of, task, name, target)
            click.echo(f"{target}: {_size(ref.size)}", err=True)

    try:
        asyncio.run(fetch())
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        click.echo(f"error: {target} cannot be written: {error.strerror}", err=True)
        sys.exit(session.FAILED)
