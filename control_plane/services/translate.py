"""Between the public messages and the core's values: pure translation, no decisions.

A graph comes in by names of parents and leaves as dense indices; equal specs become one object (DESIGN 13), so a graph of
100,000 like tasks costs one spec. What goes out is made from views, never from live state (PROTOCOL J8). Defaults that
`graph.proto` promises are filled in here, so that the core sees only values that mean something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from baton.v1 import admin_pb2, graph_pb2, run_pb2
from control_plane.agent_codec import artifact_source
from control_plane.core.model import GraphTask, OnClusterLost, PythonCall, Resources, RetryPolicy, TaskSpec, TriggerRule
from control_plane.core.views import AttemptView, GraphView, NamespaceView, RunEventView, RunView, TaskView

NameOf = Callable[[str], str]
"""Cluster uid -> its name."""

Pairs = tuple[tuple[str, str], ...]

DEFAULT_CPU_MILLIS = 1000
DEFAULT_GRACE = 3.0
DEFAULT_RETRY = RetryPolicy()
"""What graph.proto says of fields left out."""


def pairs(of: Mapping[str, str]) -> Pairs:
    """A map as the core keeps it: sorted, so that equal maps are equal values."""
    return tuple(sorted(of.items()))


def timestamp(wall: float) -> Timestamp | None:
    """Wall seconds on the wire; None for "not yet"."""
    if wall <= 0:
        return None
    # In whole microseconds: a float of today's seconds carries no more, and no rounding makes 1e9 nanoseconds of it.
    seconds, micros = divmod(round(wall * 1e6), 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def wall_of(time: Timestamp) -> float:
    """Inverse of `timestamp`."""
    return time.seconds + time.nanos / 1e9


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def duration(of: float) -> Duration | None:
    """Seconds on the wire; None for none."""
    if of <= 0:
        return None
    whole, micros = divmod(round(of * 1e6), 1_000_000)
    return Duration(seconds=whole, nanos=micros * 1000)


# -- graphs ------------------------------------------------------------------------------------------------------------


def graph_tasks(spec: graph_pb2.GraphSpec) -> tuple[GraphTask, ...]:
    """The tasks of a valid graph (`baton.validate.violations` found nothing)."""
    index = {task.id: number for number, task in enumerate(spec.tasks)}
    specs: dict[bytes, TaskSpec] = {}
    values: dict[TaskSpec, TaskSpec] = {}
    codes = {code.sha256: code.zip for code in spec.codes}
    tasks: list[GraphTask] = []
    bare = graph_pb2.Task()
    for task in spec.tasks:
        # Tasks of a graph are alike but for name and parents: bytes are compared ten times faster than specs are made.
        bare.CopyFrom(task)
        bare.ClearField("id")
        bare.ClearField("parents")
        alike = bare.SerializeToString(deterministic=True)
        value = specs.get(alike)
        if value is None:
            value = task_spec(task, codes)
            value = specs[alike] = values.setdefault(value, value)
        tasks.append(GraphTask(task.id, tuple(index[parent] for parent in task.parents), value))
    return tuple(tasks)


def task_spec(task: graph_pb2.Task, codes: Mapping[str, bytes]) -> TaskSpec:
    """What equal tasks share. `codes`: zip archives by their hash, empty for stored ones."""
    return TaskSpec(
        argv=tuple(task.process.argv),
        env=pairs(task.process.env),
        resources=_resources(task.resources),
        trigger=TriggerRule(task.trigger_rule or TriggerRule.ALL_SUCCEEDED),
        retry=_retry(task.retry),
        timeout=seconds(task.timeout),
        grace=seconds(task.termination_grace) if task.HasField("termination_grace") else DEFAULT_GRACE,
        expected=seconds(task.expected_duration),
        on_cluster_lost=OnClusterLost(task.on_cluster_lost or OnClusterLost.RERUN_AFTER_FENCE),
        hedge=task.hedge,
        require_isolation=task.require_isolation,
        selector=pairs(task.cluster_selector),
        clusters=tuple(sorted(set(task.clusters))),
        tolerations=tuple(sorted(set(task.tolerations))),
        python=_python_call(task.python, codes) if task.HasField("python") else None,
    )


def _python_call(of: graph_pb2.PythonTask, codes: Mapping[str, bytes]) -> PythonCall:
    requirements = tuple(sorted(set(of.requirements)))  # a set: its environment is found by it
    return PythonCall(of.function, of.args_json, requirements, of.code, codes[of.code] if of.code else b"")


def _resources(of: graph_pb2.Resources) -> Resources:
    return Resources(
        cpu_millis=of.cpu_millis or DEFAULT_CPU_MILLIS,
        memory_bytes=of.memory_bytes,
        disk_bytes=of.disk_bytes,
        processes=of.processes,
        extended=tuple(sorted((name, amount) for name, amount in of.extended.items() if amount)),
    )


def _retry(of: graph_pb2.RetryPolicy) -> RetryPolicy:
    first = seconds(of.initial_backoff) if of.HasField("initial_backoff") else DEFAULT_RETRY.initial_backoff
    most = seconds(of.max_backoff) if of.HasField("max_backoff") else DEFAULT_RETRY.max_backoff
    return RetryPolicy(
        max_attempts=of.max_attempts or DEFAULT_RETRY.max_attempts,
        initial_backoff=first,
        max_backoff=most,
        multiplier=of.backoff_multiplier or DEFAULT_RETRY.multiplier,
        max_infrastructure_losses=of.max_infrastructure_losses or DEFAULT_RETRY.max_infrastructure_losses,
    )


def graph_spec(tasks: Sequence[GraphTask]) -> graph_pb2.GraphSpec:
    """Inverse of `graph_tasks`, with the defaults written out."""
    spec = graph_pb2.GraphSpec()
    codes: dict[str, bytes] = {}
    for task in tasks:
        value = task.spec
        message = spec.tasks.add(
            id=task.id,
            parents=[tasks[parent].id for parent in task.parents],
            trigger_rule=int(value.trigger),  # equal numbers, by contract of core.model
            resources=graph_pb2.Resources(
                cpu_millis=value.resources.cpu_millis,
                memory_bytes=value.resources.memory_bytes,
                disk_bytes=value.resources.disk_bytes,
                processes=value.resources.processes,
                extended=dict(value.resources.extended),
            ),
            require_isolation=value.require_isolation,
            cluster_selector=dict(value.selector),
            clusters=value.clusters,
            tolerations=value.tolerations,
            retry=graph_pb2.RetryPolicy(
                max_attempts=value.retry.max_attempts,
                initial_backoff=duration(value.retry.initial_backoff),
                max_backoff=duration(value.retry.max_backoff),
                backoff_multiplier=value.retry.multiplier,
                max_infrastructure_losses=value.retry.max_infrastructure_losses,
            ),
            timeout=duration(value.timeout),
            on_cluster_lost=int(value.on_cluster_lost),
            hedge=value.hedge,
            expected_duration=duration(value.expected),
            process=graph_pb2.ProcessTask(argv=value.argv, env=dict(value.env)) if value.python is None else None,
            python=python_task(value.python) if value.python is not None else None,
        )
        if value.python is not None and value.python.code:
            codes[value.python.code] = value.python.code_zip
        # A grace of 0 s is a wish, not a default.
        message.termination_grace.CopyFrom(duration(value.grace) or Duration())
    spec.codes.extend(graph_pb2.Code(sha256=sha256, zip=code, stored=not code) for sha256, code in codes.items())
    return spec


def python_task(call: PythonCall) -> graph_pb2.PythonTask:
    """The call, without the code it names."""
    return graph_pb2.PythonTask(
        function=call.function, args_json=call.args_json, requirements=call.requirements, code=call.code
    )


def graph(view: GraphView, *, with_spec: bool) -> graph_pb2.Graph:
    """A version of a graph."""
    return graph_pb2.Graph(
        name=f"namespaces/{view.namespace}/graphs/{view.graph_id}",
        uid=view.uid,
        version=view.version,
        spec=graph_spec(view.tasks) if with_spec else None,
        etag=view.etag,
        labels=dict(view.labels),
        annotations=dict(view.annotations),
        create_time=timestamp(view.created),
        update_time=timestamp(view.updated),
    )


# -- runs --------------------------------------------------------------------------------------------------------------


def run(view: RunView, shard: str) -> run_pb2.Run:
    """A run as it stands."""
    return run_pb2.Run(
        name=view.name,
        uid=view.uid,
        graph=view.graph,
        graph_version=view.graph_version,
        state=int(view.state),  # type: ignore[arg-type]  # equal numbers, by contract of core.model
        reason=view.reason,
        deadline_time=timestamp(view.deadline),
        create_time=timestamp(view.created),
        finish_time=timestamp(view.finished),
        task_count=view.task_total,
        tasks_by_state={int(state): count for state, count in view.tasks_by_state.items() if count},
        priority=view.priority,
        labels=dict(view.labels),
        annotations=dict(view.annotations),
        etag=view.etag,
        event_number=view.event_number,
        accepted_results=view.accepted_results,
        refused_results=view.refused_results,
        resumed_from=view.resumed_from,
        shard=shard,
    )


def task(view: TaskView, name_of: NameOf) -> run_pb2.TaskStatus:
    """A task with all its attempts."""
    return run_pb2.TaskStatus(
        id=view.id,
        index=view.index,
        state=int(view.state),  # type: ignore[arg-type]  # as above
        attempts=[attempt(each, name_of) for each in view.attempts],
        result=view.result,
        reason=view.reason,
        parents=view.parents,
        accepted_results=view.accepted_results,
        artifacts=map(artifact_source, view.artifacts),
        checkpoint=artifact_source(view.checkpoint) if view.checkpoint is not None else None,
    )


def attempt(view: AttemptView, name_of: NameOf) -> run_pb2.Attempt:
    """One placement; its fence is (incarnation of the placement, n) (PROTOCOL F1)."""
    return run_pb2.Attempt(
        n=view.id.n,
        fence=view.fence,
        cluster=name_of(view.cluster),
        generation=view.generation,
        state=int(view.state),  # type: ignore[arg-type]  # as above
        place_time=timestamp(view.placed),
        start_time=timestamp(view.start),
        finish_time=timestamp(view.end),
        exit_code=view.exit_code,
        message=view.message,
        evidence=int(view.evidence),  # type: ignore[arg-type]  # as above
        overlap_possible=view.overlap,
        hedge=view.hedge,
        refused_results=view.refused_results,
        checkpoint=view.checkpoint,
        resumed_from=view.resumed_from,
    )


def run_event(view: RunEventView, task_id: Callable[[int], str], name_of: NameOf) -> run_pb2.RunEvent:
    """One numbered change."""
    columns = zip(view.tasks, view.states, view.ns, view.clusters, view.reasons, strict=True)
    return run_pb2.RunEvent(
        number=view.number,
        time=timestamp(view.wall),
        state=int(view.run_state),  # type: ignore[arg-type]  # as above
        kind=view.kind,
        changes=[
            run_pb2.TaskChange(
                index=index,
                id=task_id(index),
                state=int(state),  # type: ignore[arg-type]  # as above
                attempt=n,
                cluster=name_of(cluster) if cluster else "",
                reason=reason,
            )
            for index, state, n, cluster, reason in columns
        ],
    )


# -- namespaces --------------------------------------------------------------------------------------------------------


def namespace(view: NamespaceView) -> admin_pb2.Namespace:
    """A namespace; its etag is made from its values, since it has no version."""
    return admin_pb2.Namespace(
        name=view.name,
        weight=view.weight,
        live_task_quota=view.live_task_quota,
        retention=duration(view.retention),
        etag=f"{view.weight:g}.{view.live_task_quota}.{view.retention:g}",
    )


def matching(labels: Mapping[str, str], wanted: Iterable[tuple[str, str]]) -> bool:
    """Whether all wanted labels are carried."""
    return all(labels.get(key) == value for key, value in wanted)
