"""From a Graph of the SDK to a run and its results: the part that loads protobuf and gRPC."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from baton import client_sync, contexts, names, packing, quantity
from baton.artifact_wire import is_large
from baton.artifacts import RESULT
from baton.client import AsyncClient, tls_of
from baton.clock import Entropy, SystemEntropy
from baton.errors import InvalidField
from baton.v1 import graph_pb2, run_pb2

if TYPE_CHECKING:
    from baton.sdk import Graph, Handle, Node, Options

Number = TypeVar("Number", int, float)

SUFFIX_BYTES = 4
"""Of chance behind a run's name. 4,000 runs of one graph that history still holds meet by chance once in 500 such histories; the
second is refused, not mixed up."""

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
    """Results by handle or task id, read as JSON where they are JSON; tasks without a result are None. One over 16 KiB is an
    artifact: it is fetched when it is first looked at, and kept."""

    def __init__(
        self,
        run: run_pb2.Run,
        found: Mapping[str, bytes],
        large: Mapping[str, Callable[[], Awaitable[bytes]]] | None = None,
    ) -> None:
        """`large`: how those are fetched that were not yet."""
        self.run = run
        self._found = dict(found)
        self._large = dict(large or {})

    def __getitem__(self, task: str | Handle[Any]) -> Any:
        name = task if isinstance(task, str) else task.id
        if name in self._large:  # blocks: on a loop of one's own, `fetch` first
            client_sync.wait(self.fetch(name))
        return value_of(self._found[name])

    async def fetch(self, task: str | Handle[Any]) -> Any:
        """`results[task]` for asyncio: a large result is waited for without blocking the loop. Raises KeyError, BatonError."""
        name = task if isinstance(task, str) else task.id
        if name in self._large:
            self._found[name] = await self._large[name]()
            self._large.pop(name, None)
        return value_of(self._found[name])

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


class StartedRun:
    """A run of a graph that goes on by itself; as `graph.start()` gives it. Each call opens a connection of its own.

    `async_started` is the same for asyncio (`await graph.start_async()`).
    """

    def __init__(self, of: AsyncStartedRun) -> None:
        self.async_started = of
        self.name = of.name

    def as_completed(self) -> Iterator[tuple[str, Any]]:
        """(task id, result) of each task that succeeds, as soon as it has. Raises RunFailed at the end unless the run did."""
        return client_sync.drain(self.async_started.as_completed())

    def results(self) -> Results:
        """Waits until the run is final. Raises RunFailed, BatonError. Ctrl-C ends the waiting, not the run, and says so."""
        try:
            return client_sync.wait(self.async_started.results())
        except KeyboardInterrupt as interrupt:
            short = self.name.removeprefix(f"namespaces/{names.DEFAULT_NAMESPACE}/runs/")
            interrupt.add_note(f"{self.name} goes on: `baton watch {short}` follows it, `baton cancel {short}` ends it")
            raise

    def cancel(self, reason: str = "") -> None:
        """Asks the run to stop. Raises WrongState (it is final otherwise)."""
        client_sync.wait(self.async_started.cancel(reason))


class AsyncStartedRun:
    """A run of a graph that goes on by itself, for asyncio."""

    def __init__(self, run: run_pb2.Run, to: contexts.Context) -> None:
        self.run, self.name = run, run.name
        self._to = to

    async def as_completed(self) -> AsyncIterator[tuple[str, Any]]:
        """As StartedRun."""
        failures: dict[str, str] = {}
        async with _client(self._to) as client:
            async for task in client.as_completed(self.name):
                if task.state == run_pb2.TASK_STATE_SUCCEEDED:
                    large = is_large(task)
                    data = await client.artifacts.read(self.name, task.id, RESULT) if large else task.result
                    yield task.id, value_of(data)
                elif task.state == run_pb2.TASK_STATE_FAILED:
                    failures[task.id] = why_failed(task)
            ended = await client.get_run(self.name)
        if ended.state != run_pb2.RUN_STATE_SUCCEEDED:
            raise RunFailed(ended, failures)

    async def results(self) -> Results:
        """As StartedRun."""
        async with _client(self._to) as client:
            ended = await client.wait_run(self.name)
            tasks = [task async for task in client.list_tasks(self.name)]
        if ended.state != run_pb2.RUN_STATE_SUCCEEDED:
            failed = [task for task in tasks if task.state == run_pb2.TASK_STATE_FAILED]
            raise RunFailed(ended, {task.id: why_failed(task) for task in failed})
        large = {task.id: partial(self._read, task.id) for task in tasks if is_large(task)}
        return Results(ended, {task.id: task.result for task in tasks}, large)

    async def _read(self, task: str) -> bytes:
        """A large result. Raises BatonError."""
        async with _client(self._to) as client:
            return await client.artifacts.read(self.name, task, RESULT)

    async def cancel(self, reason: str = "") -> None:
        """As StartedRun."""
        async with _client(self._to) as client:
            await client.cancel_run(self.name, reason=reason)


async def start(
    graph: Graph,
    *,
    deadline: str | float,
    endpoints: Sequence[str] = (),
    context: str = "",
    namespace: str = "",
    name: str = "",
    priority: int = 0,
) -> AsyncStartedRun:
    """Creates the run. Raises BatonError."""
    to = contexts.resolve(endpoints=endpoints, context=context, namespace=namespace, env=os.environ)
    seconds = _seconds(deadline, "deadline") if isinstance(deadline, str) else float(deadline)
    spec = graph.spec()
    async with _client(to) as client:
        created = await client.create_run(
            spec,
            deadline=client.clock.wall() + seconds,
            namespace=to.namespace,
            run_id=name or run_id_of(graph.name, SystemEntropy()),
            priority=priority,
        )
    return AsyncStartedRun(created, to)


def run_id_of(graph: str, entropy: Entropy) -> str:
    """Id of one more run of a graph: its name and a few letters, so that a script can be run again (a finished run keeps its name).
    Empty, for the server to choose, if the graph has no name."""
    return f"{graph[: names.MAX_ID - 1 - 2 * SUFFIX_BYTES]}-{entropy.token(SUFFIX_BYTES)}" if graph else ""


def value_of(data: bytes) -> Any:
    """A result as its user sees it: JSON where it is JSON, else text; None where there is none."""
    if not data:
        return None
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def why_failed(task: run_pb2.TaskStatus) -> str:
    """The last attempt's own words, or the task's reason."""
    return next((each.message for each in reversed(task.attempts) if each.message), "") or task.reason


def _client(to: contexts.Context) -> AsyncClient:
    return AsyncClient(to.endpoints, namespace=to.namespace, tls=tls_of(to))


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
        task.resources.memory_bytes = _amount(str(options.memory), "memory")
    if options.disk is not None:
        task.resources.disk_bytes = _amount(str(options.disk), "disk")
    if isinstance(options.retry, int):
        task.retry.max_attempts = options.retry
    elif options.retry is not None:
        if not isinstance(options.retry, Mapping):
            raise InvalidField(
                f'retry: {options.retry!r}: write a number of attempts, or {{"attempts": 3, "backoff": "1s"}}'
            )
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
                retry.max_attempts = _number(value, "retry.attempts", int)
            case "losses":
                retry.max_infrastructure_losses = _number(value, "retry.losses", int)
            case "multiplier":
                retry.backoff_multiplier = _number(value, "retry.multiplier", float)
            case "backoff":
                _set_duration(value, "retry.backoff", retry.initial_backoff)
            case "max_backoff":
                _set_duration(value, "retry.max_backoff", retry.max_backoff)
            case _:
                raise InvalidField(f"retry.{key}: is not known; use attempts, backoff, max_backoff, multiplier, losses")


def _number(value: Any, name: str, kind: Callable[[Any], Number]) -> Number:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InvalidField(f"{name}: {value!r}: write a number") from None


def _set_duration(text: str, name: str, into: Duration) -> None:
    into.FromNanoseconds(round(_seconds(text, name) * 1e9))


def _seconds(text: str, name: str) -> float:
    if not isinstance(text, str):
        raise InvalidField(f'{name}: {text!r}: write a text with units, e.g. "30s", "10m" or "500ms"')
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
