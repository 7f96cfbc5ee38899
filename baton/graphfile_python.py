"""The `python:` part of a task in a graph file: `{function:, args:, kwargs:, requirements:}`.

Arguments are YAML values of any depth that JSON can hold; `{result: TASK}` stands for the result of a parent. A graph file
packs no code: the function comes with a requirement or with the Python that the agent runs in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from baton import graphschema
from baton.graphfile_yaml import Node, Reader
from baton.pythontask import ARGS_KEY, RESULT_KEY
from baton.v1 import graph_pb2


def read(reader: Reader, node: Node, into: graph_pb2.PythonTask, mark: Callable[[str, Node], None]) -> None:
    """Fill in the call; `mark(path, node)` notes where each part of it stands."""
    mark("", node)
    into.SetInParent()
    entries = reader.mapping(node, graphschema.PYTHON)
    arguments: dict[str, Any] = {}
    for key, item in entries.items():
        if key == "function":
            mark(".function", item)
            into.function = reader.text(item) or ""
        elif key == "args":
            mark(".args_json", item)
            arguments[ARGS_KEY] = [_value(reader, each) for each in reader.sequence(item)]
        elif key == "kwargs":
            mark(".args_json", item)
            arguments.update((name, _value(reader, each)) for name, each in reader.mapping(item, None).items())
        else:
            mark(".requirements", item)
            into.ClearField("requirements")
            for number, each in enumerate(reader.sequence(item)):
                mark(f".requirements[{number}]", each)
                into.requirements.append(reader.text(each) or "")
    into.args_json = json.dumps(arguments, ensure_ascii=False)


def choose_kind(task: graph_pb2.Task, entries: Mapping[str, Node], reader: Reader) -> None:
    """A task's own kind wins over the one that a default brought; two of its own are one too many."""
    if "python" in entries:
        for key in ("argv", "env"):
            if key in entries:
                reader.complain(
                    entries[key], "is given beside `python`", "a task runs a program or a function; keep one"
                )
        task.ClearField("process")
    elif "argv" in entries:
        task.ClearField("python")


def _value(reader: Reader, node: Node) -> Any:
    match node.kind:
        case "map":
            entries = reader.mapping(node, None)
            if list(entries) == ["result"]:
                return {RESULT_KEY: reader.text(entries["result"])}
            return {name: _value(reader, each) for name, each in entries.items()}
        case "seq":
            return [_value(reader, each) for each in reader.sequence(node)]
        case "int":
            return reader.integer(node)
        case "float":
            return reader.number(node)
        case "bool":
            return reader.boolean(node)
        case "null":
            return None
    return reader.text(node)
