"""Events <-> `baton.internal.events`, generically: the field names are the same on both sides (PROTOCOL J1, J11).

Theory. Each event class gets a plan at import: for every field, how it goes into its message and how it comes back.
Scalars and columns go as they are; enums as their numbers; pairs, tasks and optional exit codes through a converter
each. A class that is missing on either side, or a field of a type without a converter, fails at import, not at three
in the morning.

Equal specs become one object when read (DESIGN 13), by an `Interned` table that lives as long as one recovery.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from baton.internal import events_pb2 as pb
from control_plane.core import events as ev
from control_plane.core.events import Event
from control_plane.core.model import (
    GraphTask,
    OnClusterLost,
    PythonCall,
    Resources,
    RetryPolicy,
    TaskSpec,
    TriggerRule,
)
from control_plane.refusals import TooNew

FEATURE_LEVEL = 2
"""The highest feature level this program reads and writes (PROTOCOL J11). Raised with every new event."""

LEVELS: Mapping[type, int] = {
    **dict.fromkeys(typing.get_args(ev.Event), 1),
    ev.ArtifactsPublished: ev.ARTIFACTS_LEVEL,
    ev.CheckpointsCommitted: ev.ARTIFACTS_LEVEL,
}
"""The feature level from which an event may be written."""

NO_EXIT_CODE = -(1 << 31)
"""Stands for None in a packed column; no process exits with it."""


class Interned:
    """Specs and packed codes seen so far, by value."""

    __slots__ = ("_codes", "_specs")

    def __init__(self) -> None:
        self._specs: dict[TaskSpec, TaskSpec] = {}
        self._codes: dict[bytes, bytes] = {}

    def code(self, code: bytes) -> bytes:
        """The first object that was equal to `code`: a run of many parts holds its code once."""
        return self._codes.setdefault(code, code)

    def spec(self, spec: TaskSpec) -> TaskSpec:
        """The first object that was equal to `spec`."""
        return self._specs.setdefault(spec, spec)


# -- converters --------------------------------------------------------------------------------------------------------

Pairs = tuple[tuple[str, str], ...]
_Put = Callable[[Any, str, Any], None]
_Take = Callable[[Any, Interned], Any]


def _put_scalar(message: Any, name: str, value: Any) -> None:
    setattr(message, name, value)


def _put_column(message: Any, name: str, value: Any) -> None:
    getattr(message, name).extend(value)


def _put_pairs(message: Any, name: str, value: Pairs) -> None:
    column = getattr(message, name)
    for key, text in value:
        column.add(key=key, value=text)


def _put_exit_codes(message: Any, name: str, value: Sequence[int | None]) -> None:
    getattr(message, name).extend(NO_EXIT_CODE if code is None else code for code in value)


def _put_tasks(message: Any, name: str, value: Sequence[GraphTask]) -> None:
    columns: pb.TaskColumns = getattr(message, name)
    columns.SetInParent()
    numbers: dict[TaskSpec, int] = {}
    codes: dict[bytes, int] = {}
    seen: dict[int, int] = {}  # id() of a spec object -> its number: hashing a spec for every task would cost the most
    spec_of: list[int] = []
    for task in value:
        number = seen.get(id(task.spec))
        if number is None:
            number = numbers.get(task.spec)
            if number is None:
                number = numbers[task.spec] = len(numbers)
                stored = columns.specs.add()
                _write_spec(task.spec, stored)
                if task.spec.python is not None:
                    _write_call(task.spec.python, stored.python, codes)
            seen[id(task.spec)] = number
        spec_of.append(number)
    columns.ids.extend(task.id for task in value)
    columns.parent_counts.extend(len(task.parents) for task in value)
    columns.parents.extend(parent for task in value for parent in task.parents)
    columns.spec_of.extend(spec_of)
    columns.codes.extend(codes)


def _write_call(call: PythonCall, message: pb.StoredPythonCall, codes: dict[bytes, int]) -> None:
    message.function, message.args_json, message.code = call.function, call.args_json, call.code
    message.requirements.extend(call.requirements)
    if call.code_zip:
        message.code_index = 1 + codes.setdefault(call.code_zip, len(codes))


def _read_call(message: pb.StoredPythonCall, codes: Sequence[bytes]) -> PythonCall:
    return PythonCall(
        message.function,
        message.args_json,
        tuple(message.requirements),
        message.code,
        codes[message.code_index - 1] if message.code_index else b"",
    )


def _write_spec(spec: TaskSpec, message: pb.StoredTaskSpec) -> None:
    message.argv.extend(spec.argv)
    _put_pairs(message, "env", spec.env)
    message.resources.cpu_millis = spec.resources.cpu_millis
    message.resources.memory_bytes = spec.resources.memory_bytes
    message.resources.disk_bytes = spec.resources.disk_bytes
    message.resources.processes = spec.resources.processes
    for name, count in spec.resources.extended:
        message.resources.extended.add(name=name, count=count)
    message.trigger = spec.trigger
    for field in dataclasses.fields(RetryPolicy):
        setattr(message.retry, field.name, getattr(spec.retry, field.name))
    message.timeout, message.grace, message.expected = spec.timeout, spec.grace, spec.expected
    message.on_cluster_lost = spec.on_cluster_lost
    message.hedge, message.require_isolation = spec.hedge, spec.require_isolation
    _put_pairs(message, "selector", spec.selector)
    message.clusters.extend(spec.clusters)
    message.tolerations.extend(spec.tolerations)


def _read_spec(message: pb.StoredTaskSpec, codes: Sequence[bytes]) -> TaskSpec:
    resources, retry = message.resources, message.retry
    return TaskSpec(
        argv=tuple(message.argv),
        env=_take_pairs(message.env),
        resources=Resources(
            cpu_millis=resources.cpu_millis,
            memory_bytes=resources.memory_bytes,
            disk_bytes=resources.disk_bytes,
            processes=resources.processes,
            extended=tuple((amount.name, amount.count) for amount in resources.extended),
        ),
        trigger=TriggerRule(message.trigger),
        retry=RetryPolicy(**{f.name: getattr(retry, f.name) for f in dataclasses.fields(RetryPolicy)}),
        timeout=message.timeout,
        grace=message.grace,
        expected=message.expected,
        on_cluster_lost=OnClusterLost(message.on_cluster_lost),
        hedge=message.hedge,
        require_isolation=message.require_isolation,
        selector=_take_pairs(message.selector),
        clusters=tuple(message.clusters),
        tolerations=tuple(message.tolerations),
        python=_read_call(message.python, codes) if message.HasField("python") else None,
    )


def _take_pairs(column: Any) -> Pairs:
    return tuple((pair.key, pair.value) for pair in column)


def _take_tasks(columns: pb.TaskColumns, interned: Interned) -> tuple[GraphTask, ...]:
    codes = [interned.code(code) for code in columns.codes]
    specs = [interned.spec(_read_spec(spec, codes)) for spec in columns.specs]
    parents = tuple(columns.parents)
    tasks: list[GraphTask] = []
    start = 0
    for task_id, count, number in zip(columns.ids, columns.parent_counts, columns.spec_of, strict=True):
        tasks.append(GraphTask(task_id, parents[start : start + count], specs[number]))
        start += count
    return tuple(tasks)


def _plan_of(hint: Any) -> tuple[_Put, _Take]:
    """How a field of type `hint` is put and taken. Raises TypeError for a type nobody taught us."""
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return _put_scalar, lambda value, _: hint(value)
    if hint in (str, int, float, bool, bytes):
        return _put_scalar, lambda value, _: value
    if hint == tuple[GraphTask, ...]:
        return _put_tasks, _take_tasks
    if hint == Pairs:
        return _put_pairs, lambda column, _: _take_pairs(column)
    if hint == tuple[int | None, ...]:
        return _put_exit_codes, lambda column, _: tuple(None if code == NO_EXIT_CODE else code for code in column)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if issubclass(item, IntEnum):
            return _put_column, lambda column, _: tuple(map(item, column))
        if item in (str, int, float, bool, bytes):
            return _put_column, lambda column, _: tuple(column)
    raise TypeError(f"no stored form for a field of type {hint}")


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """One event class: its member of the oneof, and the plan of its fields."""

    event: type
    member: str
    fields: tuple[tuple[str, _Put, _Take], ...]


def _kind(event: type) -> _Kind:
    member = re.sub(r"(?<!^)(?=[A-Z])", "_", event.__name__).lower()
    stored = set(getattr(pb.Event(), member).DESCRIPTOR.fields_by_name)
    hints = typing.get_type_hints(event)
    if stored != set(hints):
        raise TypeError(f"{event.__name__} and its stored form differ in {sorted(stored ^ set(hints))}")
    return _Kind(event, member, tuple((name, *_plan_of(hint)) for name, hint in hints.items()))


_BY_CLASS = {event: _kind(event) for event in typing.get_args(ev.Event)}
_BY_MEMBER = {kind.member: kind for kind in _BY_CLASS.values()}


def write_event(event: Event, message: pb.Event, level: int) -> None:
    """Fill an empty message. `level` is the federation's feature level: raises TooNew for an event above it (J11)."""
    needed = LEVELS[type(event)]
    if needed > level:
        raise TooNew(f"{type(event).__name__} needs feature level {needed}, the federation is at {level}")
    kind = _BY_CLASS[type(event)]
    inner = getattr(message, kind.member)
    inner.SetInParent()
    for name, put, _ in kind.fields:
        put(inner, name, getattr(event, name))


def read_event(message: pb.Event, interned: Interned) -> Event:
    """The event of a message. Raises TooNew if it is none we know, or holds a number of an enum we do not know
    (J11)."""
    member = message.WhichOneof("kind")
    if member is None:
        raise TooNew("the log holds an event this version does not know; run a version that does")
    kind = _BY_MEMBER[member]
    inner = getattr(message, member)
    try:
        event: Event = kind.event(**{name: take(getattr(inner, name), interned) for name, _, take in kind.fields})
    except ValueError as error:
        raise TooNew(f"the log holds a {kind.event.__name__} this version does not know: {error}") from error
    return event
