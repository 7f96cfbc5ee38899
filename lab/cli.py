"""`baton local`: a federation of real processes on this machine, and the faults to break it with.

Theory: these commands only ask; the supervisor (supervisor.py) owns every process, and `up` without `--detach` *is* one.
Exit codes are those of `baton`: 0 done, 1 it failed, 2 usage, 5 no such part, 6 nothing is running there.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from baton import contexts
from baton.cli import INTERRUPTED, render, session
from baton.clock import SystemClock
from baton.errors import InvalidField
from baton.leases import PROFILES
from lab import control, hints, processes
from lab.control import NotRunning, Refused
from lab.deleting import delete_state
from lab.etcd_binary import EtcdNotFound
from lab.health import headline, part_word
from lab.layout import BadSettings, Layout, Settings, default_directory
from lab.parts import PartFailed
from lab.supervisor import AlreadyRunning, supervise, why

DONE, FAILED, USAGE, NO_SUCH_PART, NOTHING_RUNS = 0, 1, 2, 5, 6

DETACH_SECONDS = 120.0
"""For a detached federation to be ready; its supervisor gives up before that, with a reason."""

DOWN_SECONDS = 60.0
"""For everything to have ended. A replica may take ten seconds to give its shards away."""

LOOK_SECONDS = 0.1


@click.group()
def local() -> None:
    """Run a whole federation on this machine, and break it.

    \b
    Example:
      baton local up --detach
      baton local kill eu
      baton local down
    """


def _in_directory(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--directory",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where its state is kept. Default: ${XDG_STATE_HOME:-~/.local/state}/baton/local",
    )(command)


def _layout(directory: Path | None) -> Layout:
    return Layout((directory or default_directory(os.environ)).absolute())


# --- up and down ------------------------------------------------------------------------------------------------------


@local.command()
@click.option("--replicas", type=int, help="Replicas of the control plane.  [default: 2]")
@click.option("--clusters", metavar="NAMES", help="Names of the clusters, with commas.  [default: eu,us,ap]")
@click.option("--profile", type=click.Choice(sorted(PROFILES)), help="Lease profile of the clusters.  [default: fast]")
@click.option("--cpus", type=int, help="CPUs promised to the work of each cluster.  [default: 4]")
@click.option("--apart/--together", default=None, help="Let no cluster see another one's files.  [default: --together]")
@click.option("--detach", is_flag=True, help="Leave it running and give the terminal back.")
@_in_directory
def up(
    replicas: int | None,
    clusters: str | None,
    profile: str | None,
    cpus: int | None,
    apart: bool | None,
    detach: bool,
    directory: Path | None,
) -> None:
    """Start etcd, replicas and clusters; what was there before goes on.

    Without --detach it runs until ctrl-C, which ends all of it and nothing else. What is not given is as it was the last
    time.

    \b
    Example:
      baton local up
      baton local up --replicas 3 --clusters eu,us --profile balanced --detach
    """
    layout = _layout(directory)
    names = tuple(name.strip() for name in clusters.split(",")) if clusters is not None else None
    given = {"replicas": replicas, "clusters": names, "profile": profile, "cpus": cpus, "apart": apart}
    asked = {key: value for key, value in given.items() if value is not None}
    try:
        settings = replace(layout.stored_settings() or Settings(), **asked).checked()  # type: ignore[arg-type]
        layout.make()
        if not layout.is_live():
            contexts.check_writable(os.environ)
    except (BadSettings, InvalidField) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        message = f"{layout.directory} cannot hold a federation ({error.strerror}); name another with --directory"
        raise click.UsageError(message) from None
    if layout.is_live():
        _say_live(layout, settings, changed=bool(asked))
    elif detach:
        _start_detached(layout, settings)
    else:
        _run_here(layout, settings)


def _say_live(layout: Layout, settings: Settings, *, changed: bool) -> None:
    """A federation is there already: that is what was asked for, unless it is another one."""
    status = _ask(layout, "status")
    if (how := headline(status, session.invoked(), hints.suffix(layout), hints.context_flag(layout))) != status[
        "stage"
    ]:
        click.echo(how)
    click.echo(f"already {status['stage']} in {layout.directory}")
    hints.say(status)
    if changed and Settings(**{**status["settings"], "clusters": tuple(status["settings"]["clusters"])}) != settings:
        first = f"{session.invoked()} local down{hints.suffix(layout)}"
        click.echo(f"it is not what these options ask for: `{first}` first, or another --directory", err=True)
        raise SystemExit(FAILED)


def _run_here(layout: Layout, settings: Settings) -> None:
    def ready(status: dict[str, Any]) -> None:
        _say_ready(status)
        click.echo("\nctrl-C ends it; its state is kept")

    click.echo(_starting(settings))
    try:
        asyncio.run(supervise(layout, settings, ready))
    except (AlreadyRunning, EtcdNotFound, PartFailed, InvalidField, OSError) as error:
        click.echo(f"error: {why(error, layout)}", err=True)
        raise SystemExit(FAILED) from None
    click.echo(
        f"stopped; `{session.invoked()} local up{hints.suffix(layout)}` goes on with what is in {layout.directory}"
    )


def _start_detached(layout: Layout, settings: Settings) -> None:
    layout.make()
    log = layout.log("supervisor")
    log.unlink(missing_ok=True)
    words = ["--directory", str(layout.directory), "--replicas", str(settings.replicas), "--cpus", str(settings.cpus)]
    words += ["--clusters", ",".join(settings.clusters), "--profile", settings.profile]
    words += ["--apart"] if settings.apart else []
    click.echo(_starting(settings))
    with log.open("ab") as out:
        supervisor = subprocess.Popen(
            processes.python("lab.supervisor", *words),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=processes.environment(),
            start_new_session=True,
        )
    clock = SystemClock()
    deadline = clock.boot() + DETACH_SECONDS
    while clock.boot() < deadline:
        try:
            supervisor.wait(LOOK_SECONDS)
        except KeyboardInterrupt:
            go_on = f"`{session.invoked()} local status{hints.suffix(layout)}` shows it, `down` ends it"
            click.echo(f"\ninterrupted; it goes on starting: {go_on}", err=True)
            raise SystemExit(INTERRUPTED) from None
        except subprocess.TimeoutExpired:
            try:
                status = control.ask(layout, "status")
            except NotRunning:
                continue  # not yet
            if status["stage"] == "running":
                _say_ready(status)
                supervisor.returncode = 0  # it goes on without us
                return
        else:
            said = processes.tail(log, 8_000).strip()
            click.echo(f"error: {said or f'it ended and could not say why in {log}; is the disk full?'}", err=True)
            raise SystemExit(FAILED)
    supervisor.terminate()
    supervisor.wait()
    click.echo(f"error: it was not ready within {DETACH_SECONDS:.0f} s; see {layout.logs}", err=True)
    raise SystemExit(FAILED)


def _starting(settings: Settings) -> str:
    clusters = ", ".join(settings.clusters)
    return f"starting etcd, {settings.replicas} replica(s) and the clusters {clusters} ({settings.profile})"


def _say_ready(status: dict[str, Any]) -> None:
    if status["warning"]:
        click.echo(status["warning"], err=True)
    if not status["restored"]:
        click.echo(f"ready: etcd {status['etcd_version']}")
        hints.say(status)
        return
    click.echo(
        f"up, but etcd looks restored from a backup, and nothing is written: {session.clean(status['restored'])}"
    )
    hints.say_restored(status)


@local.command()
@click.option("--delete", is_flag=True, help="Delete the state too: runs, results, logs.")
@_in_directory
def down(delete: bool, directory: Path | None) -> None:
    """End everything; its state is kept, unless --delete.

    \b
    Example:
      baton local down --delete
    """
    layout = _layout(directory)
    try:
        control.ask(layout, "down")
    except NotRunning:
        click.echo("nothing is running")
    except (Refused, TimeoutError) as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(FAILED) from None
    clock = SystemClock()
    deadline = clock.boot() + DOWN_SECONDS
    while layout.is_live():
        if clock.boot() > deadline:
            click.echo(f"error: the supervisor still runs after {DOWN_SECONDS:.0f} s; see {layout.logs}", err=True)
            raise SystemExit(FAILED)
        asyncio.run(clock.sleep(LOOK_SECONDS))
    if delete:
        problem = delete_state(layout)
        if problem:
            click.echo(f"error: {problem}", err=True)
            raise SystemExit(FAILED)
        click.echo(f"deleted {layout.directory}")
    elif layout.state.exists():
        click.echo(f"stopped; its state is kept in {layout.directory}")


@local.command()
@session.output("table", "json", "yaml")
@_in_directory
def status(form: str, directory: Path | None) -> None:
    """Show every part: how it is, its network, its process.

    \b
    Example:
      baton local status
    """
    layout = _layout(directory)
    found = _ask(layout, "status")
    if form != "table":
        render.echo_data(found, form)
        return
    click.echo(headline(found, session.invoked(), hints.suffix(layout), hints.context_flag(layout)))
    click.echo(f"profile {found['profile']}  etcd {found['etcd_version']}  logs {found['logs']}\n")
    rows = [["etcd", "etcd", found["store"]["state"], "-", str(found["store"]["pid"] or "-"), "-"]]
    for kind, group in (("replica", found["replicas"]), ("cluster", found["clusters"])):
        for each in group:
            web = each.get("web") if each["pid"] else ""
            rows.append([kind, each["name"], each["state"], each["network"], str(each["pid"] or "-"), web or "-"])
    render.table(["KIND", "NAME", "STATE", "NETWORK", "PID", "METRICS"], rows)


# --- faults -----------------------------------------------------------------------------------------------------------


@local.command()
@click.argument("name")
@click.option("--agent-only", is_flag=True, help="Only the agent: guard and workloads go on until their lease ends.")
@_in_directory
def kill(name: str, agent_only: bool, directory: Path | None) -> None:
    """Kill all of a cluster at once, as a power cut would; or a replica; or etcd.

    \b
    Example:
      baton local kill eu
      baton local kill replica-1
    """
    layout = _layout(directory)
    hint = f"`{session.invoked()} local start {name}{hints.suffix(layout)}` brings it back"
    before = part_word(_ask(layout, "status"), name)
    _ask(layout, "kill", name=name, flag=agent_only)
    if before == "dead" or (agent_only and before == "agent dead"):
        what = f"the agent of {name}" if agent_only else name
        click.echo(f"{what} was dead already; {hint}")
        return
    what = f"the agent of {name} was killed" if agent_only else f"{name} was killed, everything of it"
    click.echo(f"{what}; {hint}")


@local.command()
@click.argument("name")
@_in_directory
def start(name: str, directory: Path | None) -> None:
    """Start a killed cluster, agent, replica or etcd again.

    \b
    Example:
      baton local start eu
    """
    _ask(_layout(directory), "start", name=name)
    click.echo(f"{name} runs")


@local.command()
@click.argument("name")
@click.option("--all", "everything", is_flag=True, help="Its guard and workloads too: the whole machine stands still.")
@_in_directory
def freeze(name: str, everything: bool, directory: Path | None) -> None:
    """Stop a cluster's agent (SIGSTOP) without ending it; or a replica; or etcd.

    \b
    Example:
      baton local freeze us
    """
    layout = _layout(directory)
    _ask(layout, "freeze", name=name, flag=everything)
    click.echo(f"{name} is frozen; `{session.invoked()} local thaw {name}{hints.suffix(layout)}` lets it go on")


@local.command()
@click.argument("name")
@_in_directory
def thaw(name: str, directory: Path | None) -> None:
    """Let a frozen part go on.

    \b
    Example:
      baton local thaw us
    """
    _ask(_layout(directory), "thaw", name=name)
    click.echo(f"{name} goes on")


@local.command()
@click.argument("name")
@_in_directory
def cut(name: str, directory: Path | None) -> None:
    """Take the network of a cluster or replica away: connections stay open, nothing arrives.

    \b
    Example:
      baton local cut ap
    """
    layout = _layout(directory)
    _ask(layout, "cut", name=name)
    click.echo(
        f"{name} is cut off; `{session.invoked()} local heal {name}{hints.suffix(layout)}` gives its network back"
    )


@local.command()
@click.argument("name")
@_in_directory
def heal(name: str, directory: Path | None) -> None:
    """Give the network back.

    \b
    Example:
      baton local heal ap
    """
    _ask(_layout(directory), "heal", name=name)
    click.echo(f"{name} has its network back")


def _ask(layout: Layout, order: str, **words: Any) -> dict[str, Any]:
    """Have it done, or say why not and leave."""
    try:
        return control.ask(layout, order, **words)
    except NotRunning:
        start = f"{session.invoked()} local up{hints.suffix(layout)}"
        click.echo(f"nothing is running in {layout.directory}; `{start}` starts it", err=True)
        raise SystemExit(NOTHING_RUNS) from None
    except Refused as refused:
        click.echo(f"error: {refused}", err=True)
        raise SystemExit(NO_SUCH_PART if refused.unknown_name else FAILED) from None
    except TimeoutError:
        click.echo(f"error: no answer; it is not known whether it was done; see {layout.logs}", err=True)
        raise SystemExit(NOTHING_RUNS) from None
