"""Graphs in plain Python: `@task` functions become nodes, their calls inside a `Graph` become edges.

    @task(retry=3, timeout="1m")
    def count(word): ...

    with Graph("words") as graph:
        total = add(count.map(["a", "b"]))     # the list of handles makes two edges
    if __name__ == "__main__":
        print(graph.run(deadline="5m")[total])

Theory: nothing runs while a graph is built; a call makes a node and returns a handle, and a handle among the arguments of
another call makes an edge, whose result takes its place on the cluster (`{"$baton.result": "<task id>"}`). Outside a
`with Graph()` a task is the plain function, so it can be tested as one. The script's folder is packed and travels with the
graph (`packing` says what does and what does not); a worker imports the script by its file name, so what must not happen
there belongs under `if __name__ == "__main__"`.

This module loads nothing heavy: workers import it through the user's script.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, overload

from baton import names, pythontask

if TYPE_CHECKING:
    from baton.sdk_run import AsyncStartedRun, Results, StartedRun
    from baton.v1 import graph_pb2

__all__ = ["Graph", "Handle", "Options", "Task", "task"]

P = ParamSpec("P")
R = TypeVar("R")

_building: ContextVar[Graph | None] = ContextVar("baton_graph", default=None)


@dataclass(frozen=True, slots=True)
class Options:
    """How a task is run; the words of a graph file. Durations are texts such as "90s"; None means the default."""

    requirements: tuple[str, ...] = ()
    """Packages as pip names them; a virtual environment per set."""
    retry: int | Mapping[str, Any] | None = None
    """Attempts in all, or {attempts, backoff, max_backoff, multiplier, losses}."""
    timeout: str | None = None
    cpu: float | str | None = None
    memory: str | None = None
    disk: str | None = None
    clusters: tuple[str, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    trigger: str = ""
    on_cluster_lost: str = ""
    hedge: bool = False
    require_isolation: bool = False
    expected: str | None = None
    grace: str | None = None


@dataclass(frozen=True, slots=True)
class Handle(Generic[R]):
    """A node of a graph: stands for its future result. Pass it to other tasks; look its value up in the results."""

    id: str
    graph: Graph = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"the result of {self.id} is not known while the graph is built: let a task look into it")

    def __bool__(self) -> bool:
        raise TypeError(f"the result of {self.id} is not known while the graph is built: let a task decide on it")


@dataclass(frozen=True, slots=True)
class Node:
    """A task of a graph as it was written down."""

    id: str
    parents: tuple[str, ...]
    options: Options
    function: str = ""
    args_json: str = ""
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


class Task(Generic[P, R]):
    """What `@task` makes of a function: the function outside a graph, a maker of nodes inside one."""

    def __init__(self, function: Callable[P, R], options: Options) -> None:
        self.baton_function = function
        self.options = options
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Inside `with Graph()`: a node, told by its handle. Outside: the function's own value."""
        graph = _building.get()
        if graph is None:
            return self.baton_function(*args, **named)
        return graph.call(self, args, named)

    def map(self, items: Iterable[Any], **named: Any) -> list[Handle[R]]:
        """One node per item, which is the first argument; `named` are the same for all. Raises RuntimeError outside a graph."""
        graph = _building.get()
        if graph is None:
            raise RuntimeError(f"{self.__name__}.map() makes nodes: call it inside `with Graph(...)`")
        return [
            graph.call(self, (item,), named, task_id=graph.fresh(f"{_slug(self.__name__)}-{n}"))
            for n, item in enumerate(items)
        ]

    def using(self, **options: Any) -> Task[P, R]:
        """The same function with other options."""
        return Task(self.baton_function, replace(self.options, **_frozen(f"{self.__name__}.using()", options)))


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(**options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(
    function: Callable[P, R] | None = None, /, **options: Any
) -> Task[P, R] | Callable[[Callable[P, R]], Task[P, R]]:
    """Makes a function a task; `options` are the fields of Options. Raises TypeError for an unknown one, naming the known."""
    chosen = Options(**_frozen("@task", options))
    if function is not None:
        if not callable(function):
            raise TypeError(f"@task: {function!r} is no function: write options by name, such as @task(retry=3)")
        return Task(function, chosen)
    return lambda inner: Task(inner, chosen)


class Graph:
    """A graph under construction, and the way to run it."""

    def __init__(self, name: str = "", *, pack: bool = True, files: Sequence[str] = ()) -> None:
        """Runs are named `name` and a few letters (`graph.run(name=...)` says all of it). `files` travel beside the script's
        python files;
        `pack=False` sends no code: the functions are installed on the clusters."""
        if name and (problem := names.id_problem(name)):
            raise ValueError(f"the name of the graph, {problem}")
        self.name = name
        self.nodes: list[Node] = []
        if isinstance(files, str):
            raise TypeError(f"files: write a list, [{files!r}]")
        self._pack, self._files = pack, tuple(files)
        self._ids: set[str] = set()
        self._folders: set[Path] = set()
        self._token: Token[Graph | None] | None = None

    def __enter__(self) -> Self:
        self._token = _building.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _building.reset(self._token)
            self._token = None

    def call(
        self,
        what: Task[..., R],
        args: Sequence[Any],
        named: Mapping[str, Any],
        *,
        task_id: str = "",
        after: Sequence[Handle[Any]] = (),
    ) -> Handle[R]:
        """A node that calls a task's function. Raises TypeError for arguments that are no JSON."""
        where = f"{what.__name__}()"
        parents: dict[str, None] = dict.fromkeys(self._parents(where, after))
        if pythontask.ARGS_KEY in named:
            raise TypeError(f"{where}: {pythontask.ARGS_KEY} is no name for an argument")
        try:
            value: dict[str, Any] = {n: self._encode(each, parents, f"{where} {n}") for n, each in named.items()}
            value[pythontask.ARGS_KEY] = [
                self._encode(each, parents, f"{where} argument {n}") for n, each in enumerate(args)
            ]
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
            text.encode()
        except (ValueError, RecursionError) as error:  # a text with half a surrogate pair is a ValueError
            raise TypeError(f"{where}: the arguments are no JSON: {error}") from None
        return self._add(
            Node(task_id or self.fresh(_slug(what.__name__)), tuple(parents), what.options, self._named(what), text)
        )

    def task(
        self,
        task_id: str,
        *,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        after: Sequence[Handle[Any]] = (),
        **options: Any,
    ) -> Handle[Any]:
        """A node that runs a program: argv, never a shell string. Its result is the file $BATON_RESULT names.

        Raises TypeError for an option that is not known and for words that are no text, ValueError for a bad id."""
        where = f"task {task_id!r}"
        if problem := names.task_id_problem(task_id):
            raise ValueError(f"the id of a task, {problem}")
        if task_id in self._ids:
            raise ValueError(f"{task_id!r} is already the id of a task of this graph")
        chosen = Options(**_frozen(where, options, ("argv", "env", "after")))
        if isinstance(argv, str):
            raise TypeError(f"{where}: argv: write a list of words, {argv.split()!r}; no shell reads it")
        words = tuple(_text(where, f"argv[{n}]", each) for n, each in enumerate(argv))
        variables = {key: _text(where, f"env[{key!r}]", each) for key, each in (env or {}).items()}
        parents = tuple(dict.fromkeys(self._parents(where, after)))
        self._ids.add(task_id)
        return self._add(Node(task_id, parents, chosen, argv=words, env=variables))

    def fresh(self, wish: str) -> str:
        """An id that no task of this graph has: the wish itself, or with a number."""
        found, number = wish, 1
        while found in self._ids:
            number += 1
            found = f"{wish}-{number}"
        self._ids.add(found)
        return found

    def spec(self) -> graph_pb2.GraphSpec:
        """The graph as it is sent, its code packed. Raises InvalidField when the code is too large."""
        from baton import sdk_run  # noqa: PLC0415 - loads protobuf

        return sdk_run.spec_of(self.nodes, sorted(self._folders) if self._pack else [], self._files)

    def run(self, *, deadline: str | float, endpoint: str | Sequence[str] = (), **where: Any) -> Results:
        """Creates a run and waits for its results. `deadline`: from now ("5m", or seconds). `endpoint` and `context`,
        `namespace` name the federation as the command line does; by default the current context. `name`: the run's id; `priority`:
        -1000 to 1000.

        Raises RunFailed (with the tasks that failed) and BatonError.
        """
        return self.start(deadline=deadline, endpoint=endpoint, **where).results()

    async def run_async(self, *, deadline: str | float, endpoint: str | Sequence[str] = (), **where: Any) -> Results:
        """As `run`, on the caller's loop."""
        return await (await self.start_async(deadline=deadline, endpoint=endpoint, **where)).results()

    def start(self, *, deadline: str | float, endpoint: str | Sequence[str] = (), **where: Any) -> StartedRun:
        """Creates a run and does not wait: `as_completed()` of what it returns gives results as they come. As `run` otherwise."""
        _refuse_in_worker()
        from baton import client_sync, sdk_run  # noqa: PLC0415 - loads gRPC

        work = self.start_async(deadline=deadline, endpoint=endpoint, **where)
        return sdk_run.StartedRun(client_sync.wait(work))

    async def start_async(
        self, *, deadline: str | float, endpoint: str | Sequence[str] = (), **where: Any
    ) -> AsyncStartedRun:
        """As `start`, on the caller's loop."""
        _refuse_in_worker()
        from baton import sdk_run  # noqa: PLC0415 - loads gRPC

        _refuse_unknown("run", where, ("context", "namespace", "name", "priority"), ("deadline", "endpoint"))
        endpoints = (endpoint,) if isinstance(endpoint, str) and endpoint else tuple(endpoint)
        return await sdk_run.start(self, deadline=deadline, endpoints=endpoints, **where)

    def _parents(self, where: str, after: Sequence[Handle[Any]]) -> Iterator[str]:
        """The ids of the handles. Raises TypeError for anything else."""
        if isinstance(after, Handle | str):
            raise TypeError(f"{where}: after: write a list of handles, after=[...]")
        for each in after:
            if not isinstance(each, Handle):
                raise TypeError(f"{where}: after: {each!r} is no handle: pass what the task's call gave")
            if each.graph is not self:
                raise TypeError(f"{where}: after: {each.id} is a task of another graph")
            yield each.id

    def _add(self, node: Node) -> Handle[Any]:
        self.nodes.append(node)
        return Handle(node.id, self)

    def _encode(self, value: Any, parents: dict[str, None], where: str) -> Any:
        """JSON, with handles as references. Raises TypeError naming the argument."""
        if isinstance(value, Handle):
            if value.graph is not self:
                raise TypeError(f"{where}: {value.id} is a task of another graph")
            parents[value.id] = None
            return {pythontask.RESULT_KEY: value.id}
        if isinstance(value, list | tuple):
            parts = [self._encode(each, parents, where) for each in value]
            ids = [each.id for each in value if isinstance(each, Handle)]
            numbered = pythontask.as_range(ids) if len(ids) == len(parts) else None
            return {pythontask.RANGE_KEY: numbered} if numbered else parts
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{where}: the key {key!r} is no text, so it is no JSON")
            if set(value) & {pythontask.RESULT_KEY, pythontask.RANGE_KEY} and len(value) == 1:
                raise TypeError(f"{where}: pass the handle of a task instead of {next(iter(value))}")
            return {key: self._encode(each, parents, where) for key, each in value.items()}
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(
            f"{where}: {type(value).__name__} is no JSON: pass numbers, texts, lists, dicts, or the handle of a task"
        )

    def _named(self, what: Task[..., Any]) -> str:
        """module:qualname as a worker imports it. Raises TypeError for a function that no import can find."""
        module, qualname = what.__module__, what.__qualname__
        if "<" in qualname:
            raise TypeError(f"{qualname} cannot be imported by a worker: define it at the top of a module")
        if not self._pack:
            return f"{module}:{qualname}"
        loaded = sys.modules.get(module)
        file = getattr(loaded, "__file__", None)
        if file is None:
            raise TypeError(f"{qualname} is defined in no file: put it into a script, or use Graph(pack=False)")
        if module == "__main__":
            spec = getattr(loaded, "__spec__", None)
            module = spec.name if spec is not None else Path(file).stem
        if not all(part.isidentifier() for part in module.split(".")):
            raise TypeError(f"{Path(file).name} is no name of a module: use letters, digits and underscores")
        depth = module.count(".") + (Path(file).name == "__init__.py")
        self._folders.add(Path(file).resolve().parents[depth])
        return f"{module}:{qualname}"


def _refuse_in_worker() -> None:
    if os.environ.get("BATON_IMPORTING"):
        raise RuntimeError(
            'a worker imported this script, which runs a graph: put that under if __name__ == "__main__"'
        )


def _slug(name: str) -> str:
    """A task id made of a function's name."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-_")[:50] or "task"


def _text(where: str, name: str, value: Any) -> str:
    """A word of a program's argv or environment. Raises TypeError: what a number should look like is its writer's to say."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: {name}: {value!r} is no text: write str(...) of it")
    return value


_LISTS = frozenset({"requirements", "clusters", "tolerations"})
"""The options that are lists of texts."""

_KNOWN = tuple(each.name for each in fields(Options))

_SYNONYMS = {
    "retries": "retry",
    "attempts": "retry",
    "max_retries": "retry",
    "execution_timeout": "timeout",
    "depends_on": "after",
    "parents": "after",
    "upstream": "after",
    "trigger_rule": "trigger",
    "cpus": "cpu",
    "mem": "memory",
    "packages": "requirements",
    "cluster": "clusters",
    "expected_duration": "expected",
}
"""Words of other tools, and of the API, that are too far from ours for the nearest spelling to find."""


def _refuse_unknown(where: str, given: Iterable[str], known: tuple[str, ...], more: tuple[str, ...] = ()) -> None:
    """Raises TypeError for the first option that is not known, naming the nearest and all; `more` are parameters beside them."""
    for name in given:
        if name not in known:
            right = (*known, *more)
            close = [_SYNONYMS[name]] if _SYNONYMS.get(name) in right else difflib.get_close_matches(name, right, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{where}: {name!r} is no option; {meant}The options are {', '.join(right)}")


def _frozen(where: str, options: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options with their lists as tuples. Raises TypeError for one that is not known, and for one text where a list is meant: its
    letters would be taken."""
    _refuse_unknown(where, options, _KNOWN, more)
    for name in _LISTS & options.keys():
        if isinstance(options[name], str):
            raise TypeError(f"{name}: write a list, [{options[name]!r}]")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
