"""The grammar of names: what a user may call things, and how ids become resource names and back.

Theory: a name is a path (`namespaces/{ns}/runs/{run}/tasks/{task}`) whose collection words are fixed and whose ids have
one grammar, so that a name is parsed without asking anybody. Ids are DNS labels, because clusters and runs become
Kubernetes object names later; task ids also take `_` and `.`, because people name steps after functions and modules.
A name is only a name: identity is the `uid` (DESIGN section 1), and nothing here says that the thing exists.
Pure: used by the client, the command line and the servers alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_NAMESPACE = "default"
"""Used where a request or a command names none."""

MAX_ID = 63
"""Characters of an id: one DNS label. Longer ids would not fit into Kubernetes names made from them."""

MAX_LABELS = 64
"""Labels of one resource (DESIGN section 14): they are indexed, so each costs a row in history."""

MAX_ANNOTATION_BYTES = 16 * 1024
"""Keys and values of all annotations together (DESIGN section 14): they ride in the run's journal event."""

_LONGEST = 512
"""Characters of a name that is looked at: more than twice the longest good one."""

_QUOTED = 60
"""Characters of foreign text that a message repeats: a 1 MB name must not make a 1 MB error."""

ID_GRAMMAR = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
"""Of ids of namespaces, graphs, runs and clusters, to be matched whole."""

TASK_ID_GRAMMAR = re.compile(r"[a-z0-9](?:[-a-z0-9_.]{0,61}[a-z0-9])?")
"""Of ids of tasks."""

_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_./]{0,125}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_TAINT = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_./=:]{0,126}[A-Za-z0-9])?")
_EXTENDED = re.compile(r"[a-z0-9](?:[-a-z0-9./]{0,61}[a-z0-9])?")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")


Kind = Literal["run", "task", "graph", "cluster"]
"""What a name may name."""

_COLLECTIONS: dict[Kind, tuple[str, ...]] = {
    "run": ("namespaces", "runs"),
    "task": ("namespaces", "runs", "tasks"),
    "graph": ("namespaces", "graphs"),
    "cluster": ("clusters",),
}
"""The collection words of each kind's full name, from the outside in."""


class InvalidName(ValueError):
    """A text that is no name of the wanted kind; the message says what is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class RunName:
    """`namespaces/{namespace}/runs/{run}`."""

    namespace: str
    run: str

    def __str__(self) -> str:
        return f"namespaces/{self.namespace}/runs/{self.run}"


@dataclass(frozen=True, slots=True)
class GraphName:
    """`namespaces/{namespace}/graphs/{graph}`."""

    namespace: str
    graph: str

    def __str__(self) -> str:
        return f"namespaces/{self.namespace}/graphs/{self.graph}"


@dataclass(frozen=True, slots=True)
class TaskName:
    """`namespaces/{namespace}/runs/{run}/tasks/{task}`."""

    namespace: str
    run: str
    task: str

    def __str__(self) -> str:
        return f"namespaces/{self.namespace}/runs/{self.run}/tasks/{self.task}"

    @property
    def parent(self) -> RunName:
        """The run it belongs to."""
        return RunName(self.namespace, self.run)


@dataclass(frozen=True, slots=True)
class ClusterName:
    """`clusters/{cluster}`."""

    cluster: str

    def __str__(self) -> str:
        return f"clusters/{self.cluster}"


def quote(text: str) -> str:
    """`text` for use in a message: printable, quoted, at most 60 characters of it."""
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}... ({len(text)} characters)"


def id_problem(text: str) -> str | None:
    """What is wrong with an id of a namespace, graph, run or cluster; None if nothing is."""
    return _problem(text, ID_GRAMMAR, "a-z, 0-9 and '-', beginning and ending with a letter or digit")


def task_id_problem(text: str) -> str | None:
    """What is wrong with a task's id; None if nothing is."""
    return _problem(text, TASK_ID_GRAMMAR, "a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit")


def label_key_problem(text: str) -> str | None:
    """What is wrong with the key of a label, selector or annotation; None if nothing is."""
    return _problem(text, _LABEL_KEY, "letters, digits, '-', '_', '.' and '/', at both ends a letter or digit", 127)


def label_value_problem(text: str) -> str | None:
    """What is wrong with a label's value (may be empty); None if nothing is."""
    if _LABEL_VALUE.fullmatch(text):
        return None
    return f"{quote(text)}: use at most 63 letters, digits, '-', '_' and '.', at both ends a letter or digit"


def taint_problem(text: str) -> str | None:
    """What is wrong with a taint or toleration; None if nothing is."""
    return _problem(text, _TAINT, "letters, digits and '-_./=:', at both ends a letter or digit", 128)


def extended_problem(text: str) -> str | None:
    """What is wrong with the name of an extended resource such as `gpus`; None if nothing is."""
    return _problem(text, _EXTENDED, "a-z, 0-9, '-', '.' and '/', at both ends a letter or digit")


def env_problem(text: str) -> str | None:
    """What is wrong with the name of an environment variable of a task; None if nothing is."""
    if text.startswith("BATON_"):
        return f"{quote(text)}: names that begin with BATON_ are set by Baton; choose another"
    return _problem(text, _ENV, "letters, digits and '_', not beginning with a digit", 256)


def _problem(text: str, grammar: re.Pattern[str], words: str, longest: int = MAX_ID) -> str | None:
    if grammar.fullmatch(text):
        return None
    if not text:
        return f"is empty: use 1 to {longest} of {words}"
    if len(text) > longest:
        return f"{quote(text)} is too long: use at most {longest} characters"
    return f"{quote(text)}: use {words}"


def labels_problem(labels: dict[str, str]) -> tuple[str, str] | None:
    """The first problem of a label map as (key or "", what is wrong); None if there is none."""
    if len(labels) > MAX_LABELS:
        return "", f"has {len(labels)} labels; at most {MAX_LABELS} are allowed"
    for key, value in labels.items():
        if problem := label_key_problem(key) or label_value_problem(value):
            return key, problem
    return None


def annotations_problem(annotations: dict[str, str]) -> tuple[str, str] | None:
    """The first problem of an annotation map as (key or "", what is wrong); None if there is none."""
    size = sum(len(key.encode(errors="replace")) + len(value.encode(errors="replace"))
               for key, value in annotations.items())  # fmt: skip
    if size > MAX_ANNOTATION_BYTES:
        return "", f"holds {size} bytes; at most {MAX_ANNOTATION_BYTES} are allowed"
    for key in annotations:
        if problem := label_key_problem(key):
            return key, problem
    return None


def parse_run(name: str) -> RunName:
    """Reads `namespaces/{namespace}/runs/{run}`. Raises InvalidName."""
    namespace, run = _ids(name, ("namespaces", "runs"))
    return RunName(namespace, run)


def parse_graph(name: str) -> GraphName:
    """Reads `namespaces/{namespace}/graphs/{graph}`. Raises InvalidName."""
    namespace, graph = _ids(name, ("namespaces", "graphs"))
    return GraphName(namespace, graph)


def parse_task(name: str) -> TaskName:
    """Reads `namespaces/{namespace}/runs/{run}/tasks/{task}`. Raises InvalidName."""
    namespace, run, task = _ids(name, ("namespaces", "runs", "tasks"))
    return TaskName(namespace, run, task)


def parse_cluster(name: str) -> ClusterName:
    """Reads `clusters/{cluster}`. Raises InvalidName."""
    (cluster,) = _ids(name, ("clusters",))
    return ClusterName(cluster)


def full_name(kind: Kind, text: str, namespace: str) -> str:
    """The full name of what a person writes: a full name as it is, or the ids alone (`RUN`, `RUN/TASK`, `GRAPH`, `CLUSTER`), which
    are completed with `namespace`. Raises InvalidName naming both forms."""
    collections = _COLLECTIONS[kind]
    parts = text.split("/") if len(text) <= _LONGEST else []
    written = [word for word in collections if word != "namespaces"]
    if parts[:1] == [collections[0]] and len(parts) > 1:
        ids = parts[1::2] if tuple(parts[::2]) == collections and len(parts) == 2 * len(collections) else []
    else:
        ids = ([namespace] if len(written) < len(collections) else []) + parts
    forms = f"{'/'.join(map(_upper, written))} or {'/'.join(f'{word}/{_upper(word)}' for word in collections)}"
    if len(ids) != len(collections):
        raise InvalidName(f"{quote(text)} names no {kind}: write {forms}")
    for word, part in zip(collections, ids, strict=True):
        if problem := _problem_in(word, part):
            raise InvalidName(f"{quote(text)} names no {kind}: {word[:-1]} {problem}; write {forms}")
    return "/".join(f"{word}/{part}" for word, part in zip(collections, ids, strict=True))


def short_run(text: str, namespace: str) -> RunName:
    """What a person types for a run: its id, or its full name. Raises InvalidName."""
    return parse_run(full_name("run", text, namespace))


def short_task(text: str, namespace: str) -> TaskName:
    """What a person types for a task: `RUN/TASK`, or its full name. Raises InvalidName."""
    return parse_task(full_name("task", text, namespace))


def short_cluster(text: str) -> ClusterName:
    """What a person types for a cluster: its id, or its full name. Raises InvalidName."""
    return parse_cluster(full_name("cluster", text, DEFAULT_NAMESPACE))


def _upper(word: str) -> str:
    """A collection's word as the place of an id in a form: `runs` -> RUN."""
    return word[:-1].upper()


def _ids(name: str, collections: tuple[str, ...]) -> tuple[str, ...]:
    form = "/".join(f"{word}/{{{word[:-1]}}}" for word in collections)
    parts = name.split("/") if len(name) <= _LONGEST else []
    if len(parts) != 2 * len(collections) or tuple(parts[::2]) != collections:
        raise InvalidName(f"{quote(name)} is not of the form {form}")
    ids = tuple(parts[1::2])
    for word, text in zip(collections, ids, strict=True):
        if problem := _problem_in(word, text):
            raise InvalidName(f"{word[:-1]} in {quote(name)}: {problem}")
    return ids


def _problem_in(collection: str, text: str) -> str | None:
    """What is wrong with an id of a collection; None if nothing is."""
    return task_id_problem(text) if collection == "tasks" else id_problem(text)
