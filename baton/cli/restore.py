"""`baton admin restore`: a backup becomes an etcd directory again; and what a restore has changed, told from the runs (PROTOCOL J12).

Theory. A backup is etcd's own snapshot, so etcd's own tool restores it: the directory it makes is a new etcd cluster that remembers
nothing newer. What it cannot hold is everything acknowledged after the backup. Of that, runs that had ended are kept as far as they
were in history, which a restore of etcd does not touch: a run gets there seconds after its end, and at once when a replica that
lives on notices the restore (`control_plane/archiver.py`). What had not ended, or ended with nobody left to tell, is forgotten, and
its work is stopped by the agents that still have it. The report is made from the runs themselves, by their times and by the
incarnation in their attempts' fences, and from what replicas and agents remember of runs that nobody knows any more.

The directory is made beside its place and moved there when it is whole: it is there completely or not at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from baton import etcd_tools, names
from baton.backup import Backup, NotABackup, read_backup
from baton.cli import render, session
from baton.client import AsyncClient
from baton.clock import Clock
from baton.errors import InvalidField
from baton.v1 import admin_pb2, cluster_pb2, run_pb2

TOOL_SECONDS = 600.0
"""For etcdutl: it copies the whole file. 2 GiB take a minute on a slow disk."""

DEFAULT_MEMBER = "default"
"""What etcd calls a member without --name."""

STEPS = """\
Next:
  1. start etcd on {data_dir}{peers} (every member restored from this same file), reachable where the replicas look for it
  2. start the replicas, or leave them running; agents come back by themselves and need nothing
  3. `baton get shards` says when the restore is noticed: from then on nothing is written
  4. `baton admin restored --backup {file}` lets work go on, once every agent has ended what was placed after the backup, and
     tells which runs differ. If nobody who knows more than the backup is alive (step 3 shows no suspicion), it changes nothing,
     and nothing is needed
What cannot be kept is what was acknowledged after the backup. Runs that had ended since are kept if history has them: it gets a run
some seconds after its end, and at once when a replica that lives through the restore notices it. Every other run created since is
forgotten, results accepted since are accepted anew, quotas and graphs are as they were. Work that was placed since is ended by its
guard; that of `on_cluster_lost: wait` and `never_rerun` may overlap with its repetition until it is stopped."""


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, exists=True))
@click.option("--data-dir", required=True, type=click.Path(file_okay=False), help="etcd's directory to be made.")
@click.option("--name", default="", help="etcd's --name of this member; as it will be started.")
@click.option(
    "--initial-cluster", default="", metavar="NAME=URL,...", help="As etcd's; for a cluster of several members."
)
@click.option("--initial-advertise-peer-urls", "peer_urls", default="", metavar="URL", help="As etcd's.")
@click.option(
    "--etcdutl",
    default="",
    metavar="PATH",
    help="etcd's tool; by default beside BATON_ETCD, then what `scripts/tools etcd` built, then on PATH.",
)
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
    flags = member_flags(name, initial_cluster, peer_urls)
    tool = _tool(etcdutl)
    backup = whole_backup(file)
    with _made_whole(Path(data_dir)) as draft:
        _run([tool, "snapshot", "restore", file, "--data-dir", str(draft), *flags])
    if as_json:
        told = {"revision": backup.revision, "bytes": backup.size, "newestChange": moment(backup.wall)}
        render.echo_data({"file": file, "dataDir": data_dir, "snapshot": told}, "json")
        return
    click.echo(f"{data_dir} holds the backup: {describe(backup)}")
    click.echo(STEPS.format(data_dir=data_dir, file=file, peers=f" with --name {name}" if name else ""))


def whole_backup(file: str) -> Backup:
    """What the file knows last. Raises InvalidField with one line for people if it is no whole backup."""
    try:
        return read_backup(Path(file))
    except NotABackup as error:
        raise InvalidField(str(error)) from None
    except OSError as error:
        raise InvalidField(f"{file} cannot be read: {error.strerror}") from None


def describe(backup: Backup) -> str:
    """A backup in words."""
    until = f"everything up to {moment(backup.wall)}" if backup.wall else "nothing that ever happened"
    return f"{until}, revision {backup.revision}, {backup.size} bytes"


def moment(wall: float) -> str:
    """Wall seconds for people; empty for 0."""
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if wall else ""


def member_flags(name: str, initial_cluster: str, peer_urls: str) -> list[str]:
    """The words for etcdutl about the member, which belong together. Raises InvalidField that says which is missing."""
    me, urls = name or DEFAULT_MEMBER, peer_urls
    members: dict[str, list[str]] = {}
    for entry in filter(None, initial_cluster.split(",")):
        member, equals, url = entry.partition("=")
        if not (member and equals and url):
            raise InvalidField(f"--initial-cluster {initial_cluster}: write it as NAME=URL,NAME=URL")
        members.setdefault(member, []).append(url)
    if members and me not in members:
        missing = f"--name {name} is not in it" if name else "say with --name which of them this is"
        raise InvalidField(f"--initial-cluster {initial_cluster}: {missing} ({', '.join(members)})")
    if not members and (name or urls):
        url = urls or "http://HOST:2380"
        raise InvalidField(
            f"--name and --initial-advertise-peer-urls need --initial-cluster too: --initial-cluster {me}={url}"
        )
    if urls and members and sorted(urls.split(",")) != sorted(members[me]):
        raise InvalidField(
            f"--initial-advertise-peer-urls {urls} is not what --initial-cluster says of {me}: {','.join(members[me])}"
        )
    flags = {"--name": name, "--initial-cluster": initial_cluster}
    flags["--initial-advertise-peer-urls"] = ",".join(members[me]) if members else ""
    return [word for flag, value in flags.items() if value for word in (flag, value)]


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A place beside `target` for the body to fill; it becomes `target` if the body succeeds, and is removed if not. Raises
    InvalidField."""
    try:
        if target.exists() and any(target.iterdir()):
            raise InvalidField(f"{target} is not empty: a restore makes a new directory, and never touches an old one")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as around:
            draft = Path(around) / "data"
            yield draft
            draft.replace(target)
    except OSError as error:
        raise InvalidField(f"{target} cannot be made: {error.strerror}") from None


def _tool(named: str) -> str:
    """The path of etcdutl. Raises InvalidField that says where to get it."""
    if named:
        if found := shutil.which(named):
            return found
        what = "cannot be executed" if Path(named).exists() else "does not exist"
        raise InvalidField(f"--etcdutl {named} {what}")
    built = [str(each) for each in etcd_tools.beside_etcd("etcdutl", os.environ)]
    for candidate in (*built, "etcdutl"):
        if found := shutil.which(candidate):
            return found
    raise InvalidField(
        "etcdutl is not found: it comes with etcd (3.5 and newer), and `scripts/tools etcd` builds it; put it on PATH or name it"
        " with --etcdutl"
    )


def _run(command: Sequence[str]) -> None:
    """Runs etcdutl. Raises InvalidField with its last word."""
    problem = "etcdutl could not restore it"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InvalidField(f"{problem} within {TOOL_SECONDS:.0f} s") from None
    except OSError as error:
        raise InvalidField(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = [line for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.startswith("Error:")]
        last = (said or (done.stderr.strip() or done.stdout.strip()).splitlines())[-1:]
        raise InvalidField(
            f"{problem}: {last[0].removeprefix('Error:').strip() if last else f'exit code {done.returncode}'}"
        )


@dataclass(slots=True)
class Differences:
    """What a restore changed, as far as runs and memories tell. Names of runs, in order."""

    kept: list[str] = field(default_factory=list)
    """Created after the backup, and ended: history has them, and the store knows nothing of them."""
    from_history: list[str] = field(default_factory=list)
    """Created before the backup, ended after it: their outcome is history's; what the restored store would do is not done."""
    live: dict[str, int] = field(default_factory=dict)
    """Not final: they go on from where the backup has them -> tasks that were placed anew in the new incarnation so far."""
    forgotten: list[str] = field(default_factory=list)
    """What a replica or an agent still remembers, and neither the store nor history: a line each, of a run's name or uid."""

    def plain(self) -> dict[str, Any]:
        """For -o json."""
        return {
            "keptByHistory": self.kept,
            "outcomeFromHistory": self.from_history,
            "goOn": self.live,
            "forgotten": self.forgotten,
        }


SETTLE_SECONDS = 30.0
"""How long the report waits for owners and inventories after the confirmation: agents come back within seconds. Shorter: what only
they remember is not named; longer: a cluster that stays away delays every report."""

LOOK_SECONDS = 0.5
"""Between looks."""


async def differences(client: AsyncClient, backup_wall: float, incarnation: int) -> Differences:
    """Look through all runs. `backup_wall`: of the newest change in the backup, wall seconds. Raises BatonError."""
    found = Differences(forgotten=await _forgotten(client, client.clock))
    spaces = {names.DEFAULT_NAMESPACE, *[each.name for each in await client.list_namespaces()]}
    for space in sorted(spaces):
        async for run in client.list_runs(space):
            if run.state < run_pb2.RUN_STATE_SUCCEEDED:
                tasks = [task async for task in client.list_tasks(run.name)]
                found.live[run.name] = sum(_again(task, incarnation) for task in tasks)
            elif render.seconds(run.create_time) > backup_wall:
                found.kept.append(run.name)
            elif render.seconds(run.finish_time) > backup_wall:
                found.from_history.append(run.name)
    found.kept.sort()
    found.from_history.sort()
    found.live = dict(sorted(found.live.items()))
    return found


async def _forgotten(client: AsyncClient, clock: Clock) -> list[str]:
    """What is remembered of runs that nobody knows, once everybody who may tell is back. Raises BatonError."""
    end = clock.boot() + SETTLE_SECONDS
    while True:
        answer = await client.list_shards()
        settled = all(shard.replica for shard in answer.shards) and await _all_back(client)
        if settled or clock.boot() > end:
            break
        await clock.sleep(LOOK_SECONDS)
    await clock.sleep(LOOK_SECONDS)  # inventories are taken in just after a session has opened
    return forgotten_lines(await client.list_shards())


async def _all_back(client: AsyncClient) -> bool:
    return all([each.health == cluster_pb2.CLUSTER_HEALTH_READY async for each in client.list_clusters()])


def forgotten_lines(answer: admin_pb2.ListShardsResponse) -> list[str]:
    """Runs that somebody remembers and nobody knows: what the detail says when nothing is suspected (any more)."""
    return [] if answer.restore_suspected else answer.restore_detail.splitlines()


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
        "forgotten, as far as replicas and agents remember": found.forgotten,
    }
    for what, runs in parts.items():
        click.echo(f"{len(runs)} runs {what}{':' if runs else ''}")
        for run in runs:
            click.echo(f"  {session.clean(run)}")
    click.echo(
        "A run created after the backup is forgotten unless history had it: one that had not ended, and one that ended so shortly\n"
        "before the loss that no replica lived to archive it. Such runs are named above only if a replica that lived through the\n"
        "restore remembers them, or an agent still has their work (and stops it); whoever wanted them has to ask again."
    )
