"""`baton admin restore`: a backup becomes an etcd directory again; and what a restore has changed, told from the runs (PROTOCOL J12).

Theory. A backup is etcd's own snapshot, so etcd's own tool restores it: the directory it makes is a new etcd cluster that remembers
nothing newer. What it cannot hold is everything acknowledged after the backup. Of that, what had ended is kept by history, which a
restore of etcd does not touch; what had not ended is forgotten, and its work is stopped by the agents that still have it. The
report is made from the runs themselves: by their times, and by the incarnation in their attempts' fences.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from baton import names
from baton.cli import render, session
from baton.client import AsyncClient
from baton.v1 import run_pb2

TOOL_SECONDS = 600.0
"""For etcdutl: it copies the whole file. 2 GiB take a minute on a slow disk."""

STEPS = """\
Next:
  1. start etcd on {data_dir}{peers} (every member restored from this same file), reachable where the replicas look for it
  2. start the replicas, or leave them running; agents come back by themselves and need nothing
  3. `baton get shards` says when the restore is noticed: from then on nothing is written
  4. `baton admin restored --backup {file}` lets work go on, once every agent has ended what was placed after the backup, and
     tells which runs differ. If nobody who knows more than the backup is alive (step 3 shows no suspicion), it does nothing,
     and nothing is needed
What cannot be kept: everything acknowledged after the backup, except runs that had ended (history has them): runs created since and
not ended are forgotten, results accepted since are accepted anew, quotas and graphs are as they were. Work that was placed since
is ended by its guard; that of `on_cluster_lost: wait` and `never_rerun` may overlap with its repetition until it is stopped."""


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, exists=True))
@click.option("--data-dir", required=True, type=click.Path(file_okay=False), help="etcd's directory to be made.")
@click.option("--name", default="", help="etcd's --name of this member; as it will be started.")
@click.option(
    "--initial-cluster", default="", metavar="NAME=URL,...", help="As etcd's; for a cluster of several members."
)
@click.option("--initial-advertise-peer-urls", "peer_urls", default="", metavar="URL", help="As etcd's.")
@click.option("--etcdutl", default="", metavar="PATH", help="etcd's tool; by default beside BATON_ETCD, then on PATH.")
@session.json_output
def restore(
    file: str, data_dir: str, name: str, initial_cluster: str, peer_urls: str, etcdutl: str, *, as_json: bool
) -> None:
    """Make a new etcd directory of a backup, and say what to do next.

    Nothing is running on it yet, and no federation is asked. FILE is what `baton admin backup` wrote.

    \b
    Example:
      baton admin restore federation.db --data-dir /var/lib/etcd-restored
    """
    target = Path(data_dir)
    if target.exists() and any(target.iterdir()):
        raise click.UsageError(
            f"{data_dir} is not empty: a restore makes a new directory, and never touches an old one"
        )
    tool = _tool(etcdutl)
    status = json.loads(_run([tool, "snapshot", "status", file, "-w", "json"], f"{file} is no whole backup"))
    flags = {"--name": name, "--initial-cluster": initial_cluster, "--initial-advertise-peer-urls": peer_urls}
    words = [word for flag, value in flags.items() if value for word in (flag, value)]
    _run([tool, "snapshot", "restore", file, "--data-dir", data_dir, *words], "etcdutl could not restore it")
    if as_json:
        render.echo_data({"file": file, "dataDir": data_dir, "snapshot": status}, "json")
        return
    click.echo(
        f"{data_dir} holds the backup: revision {status.get('revision')}, {status.get('totalKey')} keys, "
        f"{status.get('totalSize')} bytes"
    )
    click.echo(STEPS.format(data_dir=data_dir, file=file, peers=f" with --name {name}" if name else ""))


def _tool(named: str) -> str:
    """The path of etcdutl. Raises UsageError that says where to get it."""
    beside = Path(os.environ.get("BATON_ETCD", "")).parent / "etcdutl" if os.environ.get("BATON_ETCD") else None
    found = named or (str(beside) if beside and os.access(beside, os.X_OK) else shutil.which("etcdutl"))
    if not found or not shutil.which(found):
        raise click.UsageError(
            "etcdutl is not found: it comes with etcd (3.5 and newer); put it on PATH or name it with --etcdutl"
        )
    return found


def _run(command: Sequence[str], problem: str) -> str:
    """What a command prints. Raises UsageError with its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise click.UsageError(f"{problem}: {error}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise click.UsageError(f"{problem}: {session.clean(last[0]) if last else 'etcdutl failed'}")
    return done.stdout


@dataclass(slots=True)
class Differences:
    """What a restore changed, as far as runs tell. Names of runs, in order."""

    kept: list[str] = field(default_factory=list)
    """Created after the backup, and ended: history has them, and the store knows nothing of them."""
    from_history: list[str] = field(default_factory=list)
    """Created before the backup, ended after it: their outcome is history's; what the restored store would do is not done."""
    live: dict[str, int] = field(default_factory=dict)
    """Not final: they go on from where the backup has them -> tasks that were placed anew in the new incarnation so far."""

    def plain(self) -> dict[str, Any]:
        """For -o json."""
        return {"keptByHistory": self.kept, "outcomeFromHistory": self.from_history, "goOn": self.live}


async def differences(client: AsyncClient, backup_wall: float, incarnation: int) -> Differences:
    """Look through all runs. `backup_wall`: when the backup was made, wall seconds. Raises BatonError."""
    spaces = {names.DEFAULT_NAMESPACE, *[each.name for each in await client.list_namespaces()]}
    found = Differences()
    for space in sorted(spaces):
        async for run in client.list_runs(space):
            if run.state < run_pb2.RUN_STATE_SUCCEEDED:
                tasks = [task async for task in client.list_tasks(run.name)]
                found.live[run.name] = sum(_again(task, incarnation) for task in tasks)
            elif render.seconds(run.create_time) > backup_wall:
                found.kept.append(run.name)
            elif render.seconds(run.finish_time) > backup_wall:
                found.from_history.append(run.name)
    return found


def _again(task: run_pb2.TaskStatus, incarnation: int) -> bool:
    return any(attempt.fence.startswith(f"{incarnation}.") for attempt in task.attempts)


def tell(found: Differences) -> None:
    """For people."""
    parts: Mapping[str, Sequence[str]] = {
        "created after the backup, had ended: kept by history": found.kept,
        "ended after the backup: history's outcome stands": found.from_history,
        "go on from where the backup has them": [
            f"{name} ({count} tasks placed anew so far)" if count else name for name, count in found.live.items()
        ],
    }
    for what, runs in parts.items():
        click.echo(f"{len(runs)} runs {what}{':' if runs else ''}")
        for run in runs:
            click.echo(f"  {session.clean(run)}")
    click.echo(
        "runs created after the backup that had not ended are forgotten: replicas log `work of an unknown run is stopped` with\n"
        "their uids as agents report them; whoever wanted them has to ask again"
    )
