"""From a Graph of the SDK to a run and its results: the part that loads protobuf and gRPC."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration

from baton import contexts, names, packing, quantity
from baton.client import AsyncClient, Tls
from baton.errors import InvalidField
from baton.v1 import graph_pb2, run_pb2

if TYPE_CHECKING:
    from baton.sdk import Graph, Handle, Node, Options

SHOWN_FAILURES = 5
"""Failed tasks that a RunFailed tells in words; `failures` has all."""


class RunFailed(Exception):
    """A run ended otherwise than by success. `failures`: task id -> why."""

    def __init__(self, run: run_pb2.Run, failures: Mapping[str, str]) -> None:
        self.run, self.failures = run, dict(failures)
        self.state = run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_")
        told = [f"{task}: {why}" for task, why in list(failures.items())[:SHOWN_FAILURES]]
        more = [f"({len(failures) - SHOWN_FAILURES} more)"] if len(failures) > SHOWN_FAILURES else []
        super().__init__("; ".join([f"{run.name} ended as {self.state}", *told, *more]))


class Results(Mapping[str, Any]):
    """Results by handle or task id, read as JSON where they are JSON; tasks without a result are None."""

    def __init__(self, run: run_pb2.Run, found: Mapping[str, bytes]) -> None:
        self.run = run
        self._found = found

    def __getitem__(self, task: str | Handle[Any]) -> Any:
        data = self._found[task if isinstance(task, str) else task.id]
        if not data:
            return None
        try:
            return json.loads(data)
        except ValueError:
            return data.decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def spec_of(nodes: Sequence[Node], folders: Sequence[Path], files: Sequence[str]) -> graph_pb2.GraphSpec:
    """The graph as it is sent. Raises InvalidField."""
    spec = graph_pb2.GraphSpec()
    code = ""
    if folders:
        if len(folders) > 1:
            listed = ", ".join(map(str, folders))
            raise InvalidField(f"the tasks' functions lie in several folders ({listed}): keep them below the script's")
        packed = packing.pack(folders[0], files)
        code = packed.sha256
        spec.codes.add(sha256=code, zip=packed.zip)
    for node in nodes:
        task = spec.tasks.add(id=node.id, parents=node.parents)
        _apply(node.options, task)
        if node.function:
            task.python.function, task.python.args_json, task.python.code = node.function, node.args_json, code
            task.python.requirements.extend(node.options.requirements)
        else:
            task.process.argv.extend(node.argv)
            task.process.env.update(node.env)
    return spec


async def run(
    graph: Graph,
    *,
    deadline: str | float,
    endpoints: Sequence[str] = (),
    context: str = "",
    namespace: str = "",
    name: str = "",
    priority: int = 0,
) -> Results:
    """Creates the run, waits until it is final, reads all results. Raises RunFailed, BatonError."""
    to = contexts.resolve(endpoints=endpoints, context=context, namespace=namespace, env=os.environ)
    seconds = _seconds(deadline, "deadline") if isinstance(deadline, str) else float(deadline)
    spec = graph.spec()
    tls = Tls(to.ca, to.certificate, to.key) if to.ca or to.certificate or to.key else None
    async with AsyncClient(to.endpoints, tls=tls) as client:
        created = await client.create_run(
            spec,
            deadline=client.clock.wall() + seconds,
            namespace=to.namespace,
            run_id=name or graph.name,
            priority=priority,
        )
        ended = await client.wait_run(created.name)
        results: dict[str, bytes] = {}
        failures: dict[str, str] = {}
        async for task in client.list_tasks(ended.name):
            results[task.id] = task.result
            if task.state == run_pb2.TASK_STATE_FAILED:
                last = next((each.message for each in reversed(task.attempts) if each.message), "")
                failures[task.id] = last or task.reason
    if ended.state != run_pb2.RUN_STATE_SUCCEEDED:
        raise RunFailed(ended, failures)
    return Results(ended, results)


def _apply(options: Options, task: graph_pb2.Task) -> None:
    """The options as fields of a task. Raises InvalidField naming the option."""
    for name, into in (
        ("timeout", task.timeout),
        ("expected", task.expected_duration),
        ("grace", task.termination_grace),
    ):
        text = getattr(options, name)
        if text is not None:
            _set_duration(text, name, into)
    if options.cpu is not None:
        task.resources.cpu_millis = _amount(str(options.cpu), "cpu")
    if options.memory is not None:
        task.resources.memory_bytes = _amount(options.memory, "memory")
    if options.disk is not None:
        task.resources.disk_bytes = _amount(options.disk, "disk")
    if isinstance(options.retry, int):
        task.retry.max_attempts = options.retry
    elif options.retry is not None:
        _apply_retry(options.retry, task.retry)
    task.clusters.extend(options.clusters)
    task.cluster_selector.update(options.selector)
    task.tolerations.extend(options.tolerations)
    if options.trigger:
        task.trigger_rule = _choice(graph_pb2.TriggerRule, "TRIGGER_RULE", options.trigger, "trigger")
    if options.on_cluster_lost:
        task.on_cluster_lost = _choice(
            graph_pb2.OnClusterLost, "ON_CLUSTER_LOST", options.on_cluster_lost, "on_cluster_lost"
        )
    task.hedge, task.require_isolation = options.hedge, options.require_isolation


def _apply_retry(of: Mapping[str, Any], retry: graph_pb2.RetryPolicy) -> None:
    for key, value in of.items():
        match key:
            case "attempts":
                retry.max_attempts = int(value)
            case "losses":
                retry.max_infrastructure_losses = int(value)
            case "multiplier":
                retry.backoff_multiplier = float(value)
            case "backoff":
                _set_duration(value, "retry.backoff", retry.initial_backoff)
            case "max_backoff":
                _set_duration(value, "retry.max_backoff", retry.max_backoff)
            case _:
                raise InvalidField(f"retry.{key}: is not known; use attempts, backoff, max_backoff, multiplier, losses")


def _set_duration(text: str, name: str, into: Duration) -> None:
    into.FromNanoseconds(round(_seconds(text, name) * 1e9))


def _seconds(text: str, name: str) -> float:
    try:
        return quantity.duration_nanos(text) / 1e9
    except ValueError as error:
        raise InvalidField(f"{name}: {names.quote(text)}: {error}") from None


def _amount(text: str, name: str) -> int:
    try:
        return quantity.cpu_millis(text) if name == "cpu" else quantity.amount_bytes(text)
    except ValueError as error:
        raise InvalidField(f"{name}: {names.quote(text)}: {error}") from None


def _choice(enum: Any, prefix: str, word: str, name: str) -> Any:
    known = [each.removeprefix(f"{prefix}_").lower() for each in enum.keys() if not each.endswith("UNSPECIFIED")]  # noqa: SIM118 - an enum wrapper, no dict
    if word not in known:
        raise InvalidField(f"{name}: {names.quote(word)} is not known; use {', '.join(known)}")
    return enum.Value(f"{prefix}_{word.upper()}")
