"""`baton get` and `baton describe`: looking without touching."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import click

from baton import names
from baton.cli import completion, render, session
from baton.cli import restore as restoring
from baton.cli.render import Column, Kind
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.contexts import Context
from baton.v1 import admin_pb2, cluster_pb2, run_pb2

Item = TypeVar("Item")

_WHAT = ("runs", "run", "tasks", "task", "clusters", "cluster", "replicas", "shards")
_SINGULAR = {"run": "runs", "task": "tasks", "cluster": "clusters"}


def _runs(now: float) -> Kind[run_pb2.Run]:
    def done(run: run_pb2.Run) -> str:
        count = run.tasks_by_state
        final = (run_pb2.TASK_STATE_SUCCEEDED, run_pb2.TASK_STATE_SKIPPED)
        return f"{sum(count[state] for state in final if state in count)}/{run.task_count}"

    return Kind(
        "runs",
        lambda run: run.name,
        [
            Column("RUN", lambda run: run.name.rpartition("/")[2]),
            Column("STATE", lambda run: render.run_state(run.state)),
            Column("DONE", done),
            Column("AGE", lambda run: render.age(run.create_time, now)),
            Column("DEADLINE", lambda run: render.moment(run.deadline_time)),
            Column("REASON", lambda run: run.reason),
            Column("PRIORITY", lambda run: str(run.priority), wide=True),
            Column("ACCEPTED", lambda run: str(run.accepted_results), wide=True),
            Column("REFUSED", lambda run: str(run.refused_results), wide=True),
            Column("SHARD", lambda run: run.shard, wide=True),
            Column("UID", lambda run: run.uid, wide=True),
        ],
    )


def _tasks(run: str) -> Kind[run_pb2.TaskStatus]:
    def clusters(task: run_pb2.TaskStatus) -> str:
        return " > ".join(attempt.cluster for attempt in task.attempts)

    return Kind(
        "tasks",
        lambda task: f"{run}/tasks/{task.id}",
        [
            Column("TASK", lambda task: task.id),
            Column("STATE", lambda task: render.task_state(task.state)),
            Column("ATTEMPTS", lambda task: str(len(task.attempts))),
            Column("CLUSTER", lambda task: task.attempts[-1].cluster if task.attempts else ""),
            Column("REASON", lambda task: task.reason),
            Column("CLUSTERS", clusters, wide=True),
            Column("FENCE", lambda task: task.attempts[-1].fence if task.attempts else "", wide=True),
            Column("ACCEPTED", lambda task: str(task.accepted_results), wide=True),
            Column("PARENTS", lambda task: ",".join(task.parents), wide=True),
        ],
    )


def _free(cluster: cluster_pb2.Cluster) -> str:
    free = sum(shape.count * shape.cpu_millis for shape in cluster.shapes)
    whole = sum(shape.count * shape.total_cpu_millis for shape in cluster.shapes)
    return f"{free / 1000:g}/{whole / 1000:g}"


def _health(cluster: cluster_pb2.Cluster) -> str:
    return render.word(cluster_pb2.ClusterHealth, cluster.health, "CLUSTER_HEALTH_")


def _admission(cluster: cluster_pb2.Cluster) -> str:
    return render.word(cluster_pb2.ClusterAdmission, cluster.admission, "CLUSTER_ADMISSION_")


def _labels(cluster: cluster_pb2.Cluster) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(cluster.labels.items()))


def _clusters(now: float) -> Kind[cluster_pb2.Cluster]:
    return Kind(
        "clusters",
        lambda cluster: cluster.name,
        [
            Column("CLUSTER", lambda cluster: cluster.name.rpartition("/")[2]),
            Column("HEALTH", _health),
            Column("ADMISSION", _admission),
            Column("ATTEMPTS", lambda cluster: str(cluster.attempts)),
            Column("CPU FREE", _free),
            Column("HEARTBEAT", lambda cluster: render.age(cluster.heartbeat_time, now)),
            Column("PROFILE", lambda cluster: cluster.profile, wide=True),
            Column("GENERATION", lambda cluster: str(cluster.generation), wide=True),
            Column("REPLICA", lambda cluster: cluster.replica, wide=True),
            Column("ISOLATION", lambda cluster: "yes" if cluster.isolation else "no", wide=True),
            Column("LABELS", _labels, wide=True),
            Column("TAINTS", lambda cluster: ",".join(cluster.taints), wide=True),
        ],
    )


def _replicas(now: float) -> Kind[admin_pb2.Replica]:
    return Kind(
        "replicas",
        lambda replica: replica.id,
        [
            Column("REPLICA", lambda replica: replica.id),
            Column("ADDRESS", lambda replica: replica.address),
            Column("SHARDS", lambda replica: str(replica.shards)),
            Column("AGE", lambda replica: render.age(replica.start_time, now)),
            Column("VERSION", lambda replica: replica.version),
            Column("LEVEL", lambda replica: str(replica.feature_level)),
        ],
    )


_SHARDS: Kind[admin_pb2.Shard] = Kind(
    "shards",
    lambda shard: shard.id,
    [
        Column("SHARD", lambda shard: shard.id),
        Column("REPLICA", lambda shard: shard.replica),
        Column("PREFERRED", lambda shard: shard.preferred),
    ],
)


@click.command()
@click.argument("what", type=click.Choice(_WHAT), required=False, metavar="|".join(_WHAT))
@click.argument("name", required=False, shell_complete=completion.complete_things)
@session.output(*render.FORMATS)
@session.connected
def get(what: str | None, name: str | None, form: str, to: Context) -> None:
    """List runs, the tasks of a run, clusters, replicas or shards; or show one by NAME.

    \b
    Example:
      baton get runs
      baton get tasks nightly -o wide
      baton get task nightly/report -o json
      baton get clusters -o name
    """
    if what is None:
        raise click.UsageError(f"get what? Name one of {', '.join(_WHAT)}")
    now = SystemClock().wall()
    plural = _SINGULAR.get(what, what)
    if plural == "tasks":
        _get_tasks(what, name, form, to)
    elif plural == "runs":
        if name is None and what == "run":
            raise click.UsageError("which run? Write `baton get run NAME`, or `baton get runs` for all")
        full = session.run_name(name, to) if name else None

        async def runs(client: AsyncClient) -> list[run_pb2.Run]:
            if full:
                return [await client.get_run(str(full))]
            found = await _all(client.list_runs(to.namespace))
            return sorted(found, key=lambda run: render.seconds(run.create_time))

        render.show(_runs(now), session.ask(to, runs), form, alone=full is not None)
    elif plural == "clusters":
        if name is None and what == "cluster":
            raise click.UsageError("which cluster? Write `baton get cluster NAME`, or `baton get clusters` for all")
        cluster = session.cluster_name(name) if name else None

        async def clusters(client: AsyncClient) -> list[cluster_pb2.Cluster]:
            return [await client.get_cluster(str(cluster))] if cluster else await _all(client.list_clusters())

        render.show(_clusters(now), session.ask(to, clusters), form, alone=cluster is not None)
    elif name is not None:
        raise click.UsageError(f"`baton get {what}` takes no name")
    elif what == "replicas":
        render.show(_replicas(now), session.ask(to, AsyncClient.list_replicas), form)
    else:
        answer = session.ask(to, AsyncClient.list_shards)
        render.show(_SHARDS, list(answer.shards), form)
        if answer.restore_suspected:
            click.echo(f"etcd looks restored: {session.clean(answer.restore_detail)}", err=True)
            click.echo(
                "nothing is written until `baton admin restored`; `--backup FILE` shows what the backup knows", err=True
            )
        for line in restoring.forgotten_lines(answer):
            click.echo(f"forgotten by the restore: {session.clean(line)}", err=True)


def _get_tasks(what: str, name: str | None, form: str, to: Context) -> None:
    if name is None:
        wanted = "RUN/TASK" if what == "task" else "RUN"
        raise click.UsageError(f"which one? Write `baton get {what} {wanted}`")
    if what == "task" or ("/" in name and not name.startswith("namespaces/")):
        one = session.task_name(name, to)
        task = session.ask(to, lambda client: client.get_task(str(one)))
        render.show(_tasks(str(one.parent)), [task], form, alone=True)
        return
    run = str(session.run_name(name, to))
    tasks = session.ask(to, lambda client: _all(client.list_tasks(run)))
    render.show(_tasks(run), tasks, form)


async def _all(items: AsyncIterator[Item]) -> list[Item]:
    return [item async for item in items]


class _Describe(click.Group):
    """A name without a kind is a run's, unless it is written as a task's or a cluster's."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            text = args[0]
            short = "/" in text and not text.startswith("namespaces/")
            kind = "cluster" if text.startswith("clusters/") else "task" if short or "/tasks/" in text else "run"
            args = [kind, *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Describe)
def describe() -> None:
    """Show everything about one run, task or cluster; a NAME alone is a run's.

    \b
    Example:
      baton describe nightly
      baton describe task nightly/report
      baton describe cluster eu
    """


@describe.command("run")
@click.argument("name", shell_complete=completion.complete_runs)
@session.json_output
@session.connected
def describe_run(name: str, as_json: bool, to: Context) -> None:
    """Show a run: state, times, tasks by state.

    \b
    Example:
      baton describe run nightly
    """
    full = str(session.run_name(name, to))
    run = session.ask(to, lambda client: client.get_run(full))
    if as_json:
        render.echo_data(render.plain(run), "json")
        return
    states = ", ".join(f"{count} {render.task_state(state)}" for state, count in sorted(run.tasks_by_state.items()))
    render.facts(
        [
            ("Name", run.name),
            ("Uid", run.uid),
            ("State", render.run_state(run.state)),
            ("Reason", run.reason),
            ("Graph", f"{run.graph} version {run.graph_version}" if run.graph else ""),
            ("Resumed from", run.resumed_from),
            ("Created", render.moment(run.create_time)),
            ("Deadline", render.moment(run.deadline_time)),
            ("Finished", render.moment(run.finish_time)),
            ("Priority", str(run.priority)),
            ("Tasks", f"{run.task_count}: {states}"),
            ("Results", f"{run.accepted_results} accepted, {run.refused_results} refused"),
            ("Events", str(run.event_number)),
            ("Shard", run.shard),
            ("Labels", _pairs(run.labels)),
            ("Annotations", _pairs(run.annotations)),
        ]
    )


@describe.command("task")
@click.argument("name", metavar="RUN/TASK", shell_complete=completion.complete_tasks)
@session.json_output
@session.connected
def describe_task(name: str, as_json: bool, to: Context) -> None:
    """Show a task: state, every attempt with cluster, fence and evidence, and its result.

    \b
    Example:
      baton describe task nightly/report
    """
    full = session.task_name(name, to)
    task = session.ask(to, lambda client: client.get_task(str(full)))
    if as_json:
        render.echo_data(render.plain(task), "json")
        return
    render.facts(
        [
            ("Task", str(full)),
            ("State", render.task_state(task.state)),
            ("Reason", task.reason),
            ("Parents", ", ".join(task.parents)),
            ("Accepted results", str(task.accepted_results)),
            ("Checkpoint", _checkpoint(task)),
        ]
    )
    if task.attempts:
        click.echo()
        heads = ["ATTEMPT", "CLUSTER", "FENCE", "STATE", "STARTED", "ENDED", "EXIT", "EVIDENCE", "REFUSED", "MESSAGE"]
        render.table(heads, (_attempt_row(attempt) for attempt in task.attempts))
    if task.artifacts:
        click.echo()
        rows = ([each.artifact.name, str(each.artifact.size), each.artifact.digest.hex()] for each in task.artifacts)
        render.table(["ARTIFACT", "BYTES", "DIGEST"], rows)
    if task.result:
        text = task.result.decode("utf-8", "replace")
        click.echo(f"\nResult ({len(task.result)} bytes):")
        for line in text.splitlines():
            click.echo(f"  {session.clean(line)}")


def _checkpoint(task: run_pb2.TaskStatus) -> str:
    """The checkpoint that the next attempt would start from."""
    if not task.HasField("checkpoint"):
        return ""
    last = task.checkpoint
    return f"{last.artifact.name} of attempt {last.attempt.n}, {last.artifact.size} bytes"


def _attempt_row(attempt: run_pb2.Attempt) -> list[str]:
    proof = render.evidence(attempt.evidence) + (" overlap_possible" if attempt.overlap_possible else "")
    return [
        f"{attempt.n}{' (hedge)' if attempt.hedge else ''}",
        attempt.cluster,
        attempt.fence,
        render.attempt_state(attempt.state),
        render.moment(attempt.start_time),
        render.moment(attempt.finish_time),
        str(attempt.exit_code) if attempt.HasField("exit_code") else "",
        proof,
        str(attempt.refused_results),
        attempt.message,
    ]


@describe.command("cluster")
@click.argument("name", shell_complete=completion.complete_clusters)
@session.json_output
@session.connected
def describe_cluster(name: str, as_json: bool, to: Context) -> None:
    """Show a cluster: health, admission, capacity, session.

    \b
    Example:
      baton describe cluster eu
    """
    full: names.ClusterName = session.cluster_name(name)
    cluster = session.ask(to, lambda client: client.get_cluster(str(full)))
    if as_json:
        render.echo_data(render.plain(cluster), "json")
        return
    render.facts(
        [
            ("Name", cluster.name),
            ("Uid", cluster.uid),
            ("Health", _health(cluster)),
            ("Admission", _admission(cluster)),
            ("Generation", str(cluster.generation)),
            ("Served by", cluster.replica),
            ("Heartbeat", render.moment(cluster.heartbeat_time)),
            ("Profile", cluster.profile),
            ("Attempts", str(cluster.attempts)),
            ("CPU free/all", _free(cluster)),
            ("Isolation", "enforced by cgroups" if cluster.isolation else "not enforced"),
            ("Orphan killer", "yes" if cluster.orphan_killer else "no: a loss has evidence `none`"),
            ("Labels", _labels(cluster)),
            ("Taints", ", ".join(cluster.taints)),
            ("First seen", render.moment(cluster.create_time)),
            ("Agent", cluster.agent_version),
        ]
    )


def _pairs(labels: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
