"""The three graphs: wide, chain, and one of many. All tasks are no-op `python` tasks with packed code."""

from __future__ import annotations

from pathlib import Path

from baton.packing import PackedCode, pack
from baton.v1 import graph_pb2

TASKS = Path(__file__).with_name("tasks")

NOTHING, MOMENT = "noop:nothing", "noop:moment"


def wide(tasks: int) -> graph_pb2.GraphSpec:
    """A root, `tasks` that wait for it, a join that waits for them."""
    spec, code = _with_code()
    _add(spec, code, "root", NOTHING)
    for number in range(tasks):
        _add(spec, code, f"t-{number:05}", NOTHING, "root")
    _add(spec, code, "join", NOTHING, *(f"t-{number:05}" for number in range(tasks)))
    return spec


def chain(length: int) -> graph_pb2.GraphSpec:
    """`length` tasks, each of which waits for the one before and returns when it ran."""
    spec, code = _with_code()
    for number in range(length):
        _add(spec, code, f"t-{number:05}", MOMENT, *([f"t-{number - 1:05}"] if number else []))
    return spec


def five() -> graph_pb2.GraphSpec:
    """A root, three that wait for it, a join."""
    return wide(3)


def _with_code() -> tuple[graph_pb2.GraphSpec, PackedCode]:
    spec, code = graph_pb2.GraphSpec(), pack(TASKS)
    spec.codes.add(sha256=code.sha256, zip=code.zip)
    return spec, code


def _add(spec: graph_pb2.GraphSpec, code: PackedCode, task_id: str, function: str, *parents: str) -> None:
    task = spec.tasks.add(id=task_id, parents=parents)
    task.python.function, task.python.args_json, task.python.code = function, "{}", code.sha256
