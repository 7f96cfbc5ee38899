"""The testing kit: a whole federation in memory, under virtual time, to unit-test graphs in milliseconds.

    from baton.testing import Federation

    def test_my_graph_survives_the_loss_of_a_cluster():
        with Federation(clusters=["eu", "us"]) as fed:
            fed.lose(when="count-0")                      # whichever cluster runs it, 0.5 s after its start
            done = fed.run(graph)
        assert done.state == "SUCCEEDED"
        assert done.results[answer] == 5
        assert len(done.clusters("count-0")) == 2          # it was moved

Theory. What runs is the product: production replicas and agents over a store in memory, with their leases and fences; only clocks,
wires and processes are played. Time passes only when nothing is left to do, so the 20 s that a lost cluster's work waits for cost
nothing. A `python` task really calls its function, in this process; what a program (argv) does is scripted by the test. Equal
tests go equal ways: nothing is random, nothing depends on the machine's speed.

The machinery lives in the package `lab` (it needs both planes, `baton` imports neither) and is loaded with the first Federation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from baton import graphfile, names, quantity, sdk_run
from baton.errors import InvalidField
from baton.sdk import Graph, Handle
from baton.sdk_run import Results
from baton.v1 import graph_pb2, run_pb2

__all__ = ["Call", "Ended", "Federation", "Finished", "Program"]

_MACHINERY = "lab.testing"
"""Module whose `make` gives the machinery; loaded by name, since nothing in `baton` may import a plane."""

DEFAULT_DEADLINE = "10m"
"""Of a run whose graph names none. Virtual, so it costs nothing; long enough for several losses one after the other."""

DEFAULT_SECONDS = 1.0
"""How long a task lasts unless the test says otherwise: a heartbeat of `fast` is 2 s, so short tasks end between two."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a scripted program is told: an attempt of a `process` task."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """BATON_* included; BATON_FENCE is the attempt's fence."""
    inputs: Mapping[str, str]
    """Results of its parents, as text."""
    task: str
    attempt: int
    """From 1."""
    cluster: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a scripted program ends, after `seconds` of virtual time. `result`: text, bytes, or anything JSON can hold."""

    result: Any = None
    exit_code: int = 0
    seconds: float = DEFAULT_SECONDS
    output: str = ""
    """What `baton logs` would show."""


Program = Callable[[Call], Any]
"""A scripted program: returns an Ended, or just its result. An exception is an error of the test and ends `run`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that is final, whatever its state."""

    run: run_pb2.Run
    results: Results
    """By handle or task id; None for a task without a result."""
    tasks: Mapping[str, run_pb2.TaskStatus] = field(repr=False)
    outputs: Mapping[str, str] = field(repr=False)
    """Task id -> what its newest attempt printed."""

    @property
    def state(self) -> str:
        """SUCCEEDED, FAILED, CANCELLED or DEADLINE_EXCEEDED."""
        return run_pb2.RunState.Name(self.run.state).removeprefix("RUN_STATE_")

    @property
    def seconds(self) -> float:
        """Virtual seconds from creation to the end."""
        return _seconds(self.run.finish_time) - _seconds(self.run.create_time)

    @property
    def failures(self) -> dict[str, str]:
        """Failed task -> why."""
        failed = run_pb2.TASK_STATE_FAILED
        return {name: sdk_run.why_failed(task) for name, task in self.tasks.items() if task.state == failed}

    def state_of(self, task: str | Handle[Any]) -> str:
        """SUCCEEDED, FAILED, SKIPPED, ..."""
        return run_pb2.TaskState.Name(self._task(task).state).removeprefix("TASK_STATE_")

    def attempts(self, task: str | Handle[Any]) -> list[run_pb2.Attempt]:
        """All placements of a task, oldest first, with cluster, fence, state and evidence."""
        return list(self._task(task).attempts)

    def clusters(self, task: str | Handle[Any]) -> list[str]:
        """Where a task's attempts were placed, oldest first."""
        return [attempt.cluster for attempt in self.attempts(task)]

    def _task(self, task: str | Handle[Any]) -> run_pb2.TaskStatus:
        return self.tasks[task if isinstance(task, str) else task.id]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a Federation is made of."""

    clusters: Mapping[str, Mapping[str, str]]
    """Name -> labels."""
    cpus: int
    replicas: int
    profile: str
    programs: Mapping[str, Program] | Program | None
    seconds: Mapping[str, float]
    """Task id or function name -> virtual seconds of a `python` task."""
    default_seconds: float


class Machinery(Protocol):
    """What lies behind a Federation (lab/testing.py)."""

    def now(self) -> float:
        """Virtual seconds since it was made."""
        ...

    def plan(self, action: str, target: str, when: str, at: float, lasts: float | None) -> None:
        """Does something to a cluster or replica later. Raises ValueError for one that is not there."""
        ...

    def sleep(self, seconds: float) -> None:
        """Lets virtual time pass."""
        ...

    def finish(self, request: run_pb2.CreateRunRequest, lifetime: float) -> Finished:
        """Creates a run and lets time pass until it is final."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Federation:
    """A federation in memory. Times are virtual seconds; call it from a plain function, not from a coroutine."""

    def __init__(
        self,
        clusters: Sequence[str] | Mapping[str, Mapping[str, str]] = ("eu", "us", "ap"),
        *,
        programs: Mapping[str, Program] | Program | None = None,
        seconds: float | Mapping[str, float] = DEFAULT_SECONDS,
        cpus: int = 4,
        replicas: int = 1,
        profile: str = "fast",
    ) -> None:
        """`clusters`: names, or name -> labels; `cpus` of each. `programs`: argv[0] -> what it does, or one for all.
        `seconds`: how long `python` tasks last, for all or by task id or function name. `profile`: lease values, as of agents.

        Raises InvalidField for a bad name, RuntimeError where `lab` is not installed.
        """
        labelled = clusters if isinstance(clusters, Mapping) else {name: {} for name in clusters}
        for name in labelled:
            if problem := names.id_problem(name):
                raise InvalidField(f"clusters: {problem}")
        by_name = seconds if isinstance(seconds, Mapping) else {}
        default = DEFAULT_SECONDS if isinstance(seconds, Mapping) else seconds
        self._plan = Plan(labelled, cpus, replicas, profile, programs, by_name, default)
        self._open: Machinery | None = None

    def __enter__(self) -> Self:
        try:
            machinery = importlib.import_module(_MACHINERY)
        except ImportError as error:
            raise RuntimeError(f"the testing kit needs the package {_MACHINERY.partition('.')[0]}: {error}") from None
        self._open = machinery.make(self._plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    @property
    def _machinery(self) -> Machinery:
        if self._open is None:
            raise RuntimeError("a Federation lives inside `with Federation(...) as fed:`")
        return self._open

    @property
    def now(self) -> float:
        """Virtual seconds since the federation was made; it stands still between two calls."""
        return self._machinery.now()

    def run(self, graph: Graph | graph_pb2.GraphSpec | str | Path, *, deadline: str = "", name: str = "") -> Finished:
        """Runs a graph (or the graph file of that path) to its end, whatever that is. `deadline` from now, such as "5m".

        Raises GraphFileError, InvalidField, Infeasible as a real federation does, and what a scripted program raises.
        """
        spec, lifetime = _read(graph)
        if deadline:
            lifetime = quantity.duration_nanos(deadline) / 1e9
        request = run_pb2.CreateRunRequest(
            namespace=names.DEFAULT_NAMESPACE,
            run_id=name or (graph.name if isinstance(graph, Graph) else ""),
            spec=spec,
        )
        return self._machinery.finish(request, lifetime)

    def lose(self, cluster: str = "", *, when: str = "", at: float | None = None) -> None:
        """A power cut: agent, guard and work of a cluster are gone, `at` seconds from now; with `when`, `at` seconds (0.5) after
        that task of the next run first starts, and without a `cluster` it is the one where it does. Raises ValueError."""
        self._machinery.plan("lose", cluster, when, _moment(at, when), None)

    def cut(self, cluster: str = "", *, seconds: float | None = None, when: str = "", at: float | None = None) -> None:
        """The network between a cluster and all replicas is gone, for so long or until `heal`; its work goes on up to its fence.
        `when` and `at` as of `lose`."""
        self._machinery.plan("cut", cluster, when, _moment(at, when), seconds)

    def heal(self, cluster: str, *, at: float = 0.0) -> None:
        """Ends a cut."""
        self._machinery.plan("heal", cluster, "", at, None)

    def restore(self, cluster: str, *, at: float = 0.0) -> None:
        """A lost cluster boots again, with the disk it had."""
        self._machinery.plan("restore", cluster, "", at, None)

    def kill_replica(self, replica: str = "r0", *, when: str = "", at: float | None = None) -> None:
        """SIGKILL of a replica ("r0", "r1", ...); it starts again 1 s later. `when` and `at` as of `lose`."""
        self._machinery.plan("kill_replica", replica, when, _moment(at, when), None)

    def kill_agent(self, cluster: str = "", *, when: str = "", at: float | None = None) -> None:
        """SIGKILL of a cluster's agent alone; it starts again 1 s later and adopts the work, which went on under its guard.
        `when` and `at` as of `lose`."""
        self._machinery.plan("kill_agent", cluster, when, _moment(at, when), None)

    def sleep(self, seconds: float) -> None:
        """Lets virtual time pass, e.g. until a cluster that was lost before is known to be."""
        self._machinery.sleep(seconds)


def _moment(at: float | None, when: str) -> float:
    """Right at its start an attempt is not yet reported running, which is rarely meant: hence half a second after it."""
    return at if at is not None else 0.5 if when else 0.0


def _read(graph: Graph | graph_pb2.GraphSpec | str | Path) -> tuple[graph_pb2.GraphSpec, float]:
    """The spec, its functions by name only (they are called in this process), and the seconds to its deadline."""
    lifetime = quantity.duration_nanos(DEFAULT_DEADLINE) / 1e9
    if isinstance(graph, Graph):
        return sdk_run.spec_of(graph.nodes, [], ()), lifetime
    if isinstance(graph, graph_pb2.GraphSpec):
        return graph, lifetime
    file = graphfile.load(str(graph))
    return file.spec, file.deadline_seconds or lifetime


def _seconds(stamp: Any) -> float:
    return float(stamp.seconds + stamp.nanos / 1e9)
