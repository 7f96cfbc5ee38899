"""Graph files: `apiVersion: baton/v1`, `kind: Graph`, read into a GraphSpec with the run's options.

Theory: the file is a thin, strict spelling of `graph.proto`; it adds only what saves typing (defaults, units, `after`)
and nothing that needs evaluation. Every fault is told with file, line, field, what and the fix; faults that the shared
judge (`baton.validate`) finds by protobuf path are led back to the line that caused them. `${here}` in argv and env is
replaced by the absolute folder of the file, for scripts and data that are installed beside it on every cluster.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from baton import graphfile_python, graphschema, names, quantity, validate
from baton.graphfile_yaml import GraphFileError, Node, Problem, Reader, parse, read_text
from baton.v1 import graph_pb2

__all__ = ["GraphFile", "GraphFileError", "Problem", "load", "loads"]

_LAST_STEP = re.compile(r"(\.[A-Za-z_]+|\[\d+\]|\[\"[^\"]*\"\])$")
_OF_TASK = re.compile(r"spec\.tasks\[\d+\]")
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph and how its file wants it run. Exactly one of the deadlines is set, or none."""

    path: str
    name: str
    spec: graph_pb2.GraphSpec
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    deadline_seconds: float | None = None
    """Deadline from the start of the run, in seconds."""
    deadline_at: float | None = None
    """Absolute deadline, seconds since the epoch."""
    priority: int = 0
    locate: Callable[[str], tuple[int, str]] = field(default=lambda path: (1, path), repr=False, compare=False)
    """Protobuf path (of a violation) -> line and path in the file."""

    def problem(self, path: str, what: str) -> Problem:
        """A fault that was found later, e.g. by the server, at the line that caused it."""
        line, where = self.locate(path)
        return Problem(self.path, line, where, what)


def load(path: str) -> GraphFile:
    """Reads and judges a graph file (`-`: standard input). Raises GraphFileError."""
    here = Path.cwd() if path == "-" else Path(path).absolute().parent
    return loads(read_text(path), path=path, here=str(here))


def loads(text: str, *, path: str = "<text>", here: str = "") -> GraphFile:
    """Reads and judges the text of a graph file. Raises GraphFileError."""
    loading = _Loading(Reader(path), here)
    graph = loading.graph(parse(path, text))
    if any(not problem.field.startswith("metadata") for problem in loading.reader.problems):
        raise GraphFileError(loading.reader.problems)  # a graph half read would be blamed for the other half
    for each in validate.violations(graph.spec):
        line, where = loading.origin_of(each.field)
        loading.reader.add(line, where, each.message)
    if loading.reader.problems:
        raise GraphFileError(loading.reader.problems)
    return graph


class _Loading:
    """One reading of one file: the reader, and where each protobuf path came from."""

    def __init__(self, reader: Reader, here: str) -> None:
        self.reader = reader
        self.here = here
        self._origin: dict[str, tuple[int, str]] = {}
        self._default_origin: dict[str, tuple[int, str]] = {}
        self._setters: dict[str, Callable[[graph_pb2.Task, Node, str], None]] = {
            "id": self._id,
            "argv": self._argv,
            "python": self._python,
            "env": self._env,
            "parents": self._parents,
            "after": self._parents,
            "trigger": self._trigger,
            "resources": self._resources,
            "retry": self._retry,
            "timeout": self._timeout,
            "on_cluster_lost": self._on_cluster_lost,
            "hedge": self._hedge,
            "clusters": self._clusters,
            "selector": self._selector,
            "tolerations": self._tolerations,
            "require_isolation": self._require_isolation,
            "expected": self._expected,
            "grace": self._grace,
        }

    # --- the frame -----------------------------------------------------------------------------------------------

    def graph(self, top: Node) -> GraphFile:
        """The whole file; complaints are in the reader."""
        reader = self.reader
        entries = reader.mapping(top, graphschema.TOP)
        for key, wanted in (("apiVersion", graphschema.API_VERSION), ("kind", graphschema.KIND)):
            if key in entries:
                reader.choice(entries[key], [wanted])
            elif top.kind == "map":
                reader.add(top.line, key, "is missing", f"add `{key}: {wanted}`")
        name, labels, annotations = self._metadata(entries.get("metadata"))
        spec = graph_pb2.GraphSpec()
        relative: float | None = None
        absolute: float | None = None
        priority = 0
        if "spec" in entries:
            parts = reader.mapping(entries["spec"], graphschema.SPEC)
            if "deadline" in parts:
                self._mark("deadline_time", parts["deadline"])
                relative, absolute = self._deadline(parts["deadline"])
            if "priority" in parts:
                priority = self._priority(parts["priority"])
            self._tasks(entries["spec"], parts, spec)
        elif top.kind == "map":
            reader.add(top.line, "spec", "is missing", "add `spec:` with `tasks:`")
        return GraphFile(reader.path, name, spec, labels, annotations, relative, absolute, priority, self.origin_of)

    def _metadata(self, node: Node | None) -> tuple[str, dict[str, str], dict[str, str]]:
        if node is None:
            return "", {}, {}
        entries = self.reader.mapping(node, graphschema.METADATA)
        name = ""
        if "name" in entries:
            name = self.reader.text(entries["name"]) or ""
            if problem := names.id_problem(name):
                self.reader.complain(entries["name"], problem)
        labels = self._texts(entries["labels"]) if "labels" in entries else {}
        annotations = self._texts(entries["annotations"]) if "annotations" in entries else {}
        if found := names.labels_problem(labels):
            self.reader.complain(entries["labels"], found[1])
        if found := names.annotations_problem(annotations):
            self.reader.complain(entries["annotations"], found[1])
        return name, labels, annotations

    def _deadline(self, node: Node) -> tuple[float | None, float | None]:
        if node.kind not in {"str", "timestamp"}:
            self.reader.complain(node, "has no unit", "write a duration (30m) or a moment (2026-11-30T18:00:00Z)")
            return None, None
        text = str(node.raw.value)
        try:
            if re.match(r"\d{4}-", text):
                return None, quantity.instant(text)
            seconds = quantity.duration_nanos(text) / 1e9
        except ValueError as error:
            self.reader.complain(node, f"is {names.quote(text)}", str(error))
            return None, None
        if not 0 < seconds <= validate.MAX_SECONDS:
            self.reader.complain(node, f"is {names.quote(text)}", "write more than 0s and at most 30d")
        return seconds, None

    def _priority(self, node: Node) -> int:
        value = self.reader.integer(node)
        if value is not None and not -1000 <= value <= 1000:
            self.reader.complain(node, f"is {value}", "use -1000 to 1000")
        return value or 0

    def _tasks(self, spec_node: Node, parts: dict[str, Node], spec: graph_pb2.GraphSpec) -> None:
        defaults = graph_pb2.Task()
        if "defaults" in parts:
            allowed = [key for key in graphschema.TASK if key not in graphschema.OF_ONE_TASK]
            for key, node in self.reader.mapping(parts["defaults"], allowed).items():
                self._setters[key](defaults, node, "")
            self._default_origin = {path: at for path, at in self._origin.items() if path.startswith(".")}
        self._origin["spec"] = (spec_node.line, "spec")
        if "tasks" not in parts:
            if spec_node.kind == "map":
                self.reader.complain(spec_node, "has no tasks", "add `tasks:` with at least one task")
            return
        self._origin["spec.tasks"] = (parts["tasks"].line, "spec.tasks")
        for number, node in enumerate(self.reader.sequence(parts["tasks"])):
            at = f"spec.tasks[{number}]"
            self._origin[at] = (node.line, at)
            task = spec.tasks.add()
            task.CopyFrom(defaults)
            entries = self.reader.mapping(node, graphschema.TASK)
            if "parents" in entries and "after" in entries:
                self.reader.complain(entries["after"], "is given beside `parents`", "they mean the same; keep one")
            graphfile_python.choose_kind(task, entries, self.reader)
            for key, value in entries.items():
                self._setters[key](task, value, at)
            if "id" not in entries and node.kind == "map":
                self.reader.complain(node, "has no id", "add `id:`")

    def origin_of(self, path: str) -> tuple[int, str]:
        """Line and file path of the nearest written ancestor of a protobuf path; what a default brought, there."""
        task = _task_of(path)
        here = path
        while here != task:
            found = self._origin.get(here) or self._default_origin.get(here.removeprefix(task))
            if found:
                return found
            shorter = _LAST_STEP.sub("", here)
            if shorter == here:
                return 1, path
            here = shorter
        return self._origin.get(task, (1, ""))[0], path

    # --- the fields of a task ------------------------------------------------------------------------------------

    def _mark(self, path: str, node: Node) -> None:
        self._origin[path] = (node.line, node.field)

    def _id(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.id", node)
        task.id = self.reader.text(node) or ""

    def _argv(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.process.argv", node)
        task.process.ClearField("argv")
        for number, item in enumerate(self.reader.sequence(node)):
            self._mark(f"{at}.process.argv[{number}]", item)
            text = self.reader.text(item, numbers=True)
            task.process.argv.append(self._expand(text or ""))
        task.process.SetInParent()

    def _env(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.process.env", node)
        for name, item in self.reader.mapping(node, None).items():
            self._mark(f'{at}.process.env["{name}"]', item)
            text = self.reader.text(item, numbers=True)
            if text is not None:
                task.process.env[name] = self._expand(text)

    def _python(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        graphfile_python.read(self.reader, node, task.python, lambda path, item: self._mark(f"{at}.python{path}", item))

    def _expand(self, text: str) -> str:
        return text.replace("${here}", self.here)

    def _parents(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        task.parents.extend(self._list(node, f"{at}.parents"))

    def _trigger(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.trigger_rule", node)
        word = self.reader.choice(node, graphschema.TRIGGERS)
        if word:
            task.trigger_rule = graph_pb2.TriggerRule.Value(f"TRIGGER_RULE_{word.upper()}")

    def _on_cluster_lost(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.on_cluster_lost", node)
        word = self.reader.choice(node, graphschema.POLICIES)
        if word:
            task.on_cluster_lost = graph_pb2.OnClusterLost.Value(f"ON_CLUSTER_LOST_{word.upper()}")

    def _hedge(self, task: graph_pb2.Task, node: Node, _at: str) -> None:
        task.hedge = bool(self.reader.boolean(node))

    def _require_isolation(self, task: graph_pb2.Task, node: Node, _at: str) -> None:
        task.require_isolation = bool(self.reader.boolean(node))

    def _clusters(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        task.ClearField("clusters")
        task.clusters.extend(self._list(node, f"{at}.clusters"))

    def _tolerations(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        task.ClearField("tolerations")
        task.tolerations.extend(self._list(node, f"{at}.tolerations"))

    def _selector(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.cluster_selector", node)
        task.cluster_selector.update(self._texts(node))

    def _timeout(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._duration(node, task.timeout, f"{at}.timeout")

    def _expected(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._duration(node, task.expected_duration, f"{at}.expected_duration")

    def _grace(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._duration(node, task.termination_grace, f"{at}.termination_grace")

    def _resources(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.resources", node)
        into = task.resources
        for key, item in self.reader.mapping(node, graphschema.RESOURCES).items():
            path = f"{at}.resources"
            if key == "cpu":
                into.cpu_millis = self._amount(item, f"{path}.cpu_millis", quantity.cpu_millis)
            elif key == "memory":
                into.memory_bytes = self._amount(item, f"{path}.memory_bytes", quantity.amount_bytes)
            elif key == "disk":
                into.disk_bytes = self._amount(item, f"{path}.disk_bytes", quantity.amount_bytes)
            elif key == "processes":
                into.processes = self._whole(item, f"{path}.processes")
            else:
                for name, extra in self.reader.mapping(item, None).items():
                    into.extended[name] = self._whole(extra, f'{path}.extended["{name}"]')

    def _retry(self, task: graph_pb2.Task, node: Node, at: str) -> None:
        self._mark(f"{at}.retry", node)
        into = task.retry
        for key, item in self.reader.mapping(node, graphschema.RETRY).items():
            if key == "attempts":
                into.max_attempts = self._whole(item, f"{at}.retry.max_attempts", least=1)
            elif key == "losses":
                into.max_infrastructure_losses = self._whole(item, f"{at}.retry.max_infrastructure_losses")
            elif key == "multiplier":
                self._mark(f"{at}.retry.backoff_multiplier", item)
                into.backoff_multiplier = self.reader.number(item) or 0.0
            elif key == "backoff":
                self._duration(item, into.initial_backoff, f"{at}.retry.initial_backoff")
            else:
                self._duration(item, into.max_backoff, f"{at}.retry.max_backoff")

    # --- values --------------------------------------------------------------------------------------------------

    def _list(self, node: Node, path: str) -> list[str]:
        self._mark(path, node)
        texts = []
        for number, item in enumerate(self.reader.sequence(node)):
            self._mark(f"{path}[{number}]", item)
            texts.append(self.reader.text(item) or "")
        return texts

    def _texts(self, node: Node) -> dict[str, str]:
        pairs = self.reader.mapping(node, None).items()
        return {key: self.reader.text(item, numbers=True) or "" for key, item in pairs}

    def _duration(self, node: Node, into: Duration, path: str) -> None:
        self._mark(path, node)
        text = str(node.raw.value) if node.kind in {"str", "int", "float"} else None
        try:
            nanos = quantity.duration_nanos(text if text is not None else "")
        except ValueError as error:
            self.reader.complain(node, f"is {names.quote(text)}" if text is not None else "is no duration", str(error))
            return
        if nanos < 0:
            self.reader.complain(node, f"is {names.quote(str(text))}", "write a duration that is not negative")
            return
        into.FromNanoseconds(min(nanos, (validate.MAX_SECONDS + 1) * 10**9))

    def _amount(self, node: Node, path: str, read: Callable[[str], int]) -> int:
        self._mark(path, node)
        if node.kind == "float" and self.reader.number(node) is None:
            return 0  # NaN or infinite: the reader has complained
        text = str(node.raw.value) if node.kind in {"str", "int", "float"} else None
        try:
            amount = read(text if text is not None else "")
        except ValueError as error:
            self.reader.complain(node, f"is {names.quote(text)}" if text is not None else "is no amount", str(error))
            return 0
        return self._bounded(node, amount)

    def _whole(self, node: Node, path: str, least: int = 0) -> int:
        self._mark(path, node)
        if node.kind == "float" and self.reader.number(node) is None:
            return 0  # NaN or infinite: the reader has complained
        amount = self.reader.integer(node)
        if amount is not None and not least <= amount <= _MAX_INT32:
            self.reader.complain(node, f"is {amount}", f"use a whole number from {least} to {_MAX_INT32}")
            return 0
        return amount or 0

    def _bounded(self, node: Node, amount: int) -> int:
        if not 0 <= amount <= validate.MAX_QUANTITY:
            what = f"is {names.quote(str(node.raw.value))}"
            self.reader.complain(node, what, "write an amount that is not negative and below 1Pi")
            return 0
        return amount


def _task_of(path: str) -> str:
    found = _OF_TASK.match(path)
    return found[0] if found else ""
