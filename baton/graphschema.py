"""The JSON Schema of graph files, for editors: completion, words on hover, red lines while one writes.

Theory. The fields of a graph file are said once, here: `graphfile` reads no key that has no entry in these tables, and the schema is
made of nothing else; grammars and limits come from `names` and `validate`. A schema sees less than the judge (no cycles, no
unknown parents, no bytes), so it never says that a file is good; but it must not call a good file bad. What may be a text or a
number in YAML (`cpu: 2`, `argv: [sleep, 5]`) is both here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from baton import names, pythontask, validate

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""What the keywords mean; a name, nothing is fetched."""

API_VERSION = "baton/v1"
KIND = "Graph"
TRIGGERS = ("all_succeeded", "all_done", "any_failed", "none_failed")
POLICIES = ("rerun_after_fence", "wait", "never_rerun")

Part = dict[str, Any]


def _pattern(grammar: Any) -> str:
    return f"^(?:{grammar.pattern})$"


def _text(description: str, **more: Any) -> Part:
    return {"type": "string", "description": description, **more}


def _texts(description: str, of: Part | None = None) -> Part:
    """A list of texts."""
    return {"type": "array", "items": of or {"type": "string"}, "description": description}


def _pairs(description: str) -> Part:
    """name -> text, or a number as it is written."""
    return {"type": "object", "additionalProperties": {"type": ["string", "number"]}, "description": description}


def _duration(description: str) -> Part:
    return _text(
        f"{description} A duration: 500ms, 30s, 10m, 1h30m.", pattern=r"^([0-9]{1,12}(\.[0-9]{1,9})?(ms|us|s|m|h|d))+$"
    )


def _amount(description: str, unit: str) -> Part:
    return {
        "description": description,
        "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": rf"^[0-9]+(\.[0-9]+)?({unit})?$"}],
    }


def _whole(description: str, least: int, most: int) -> Part:
    return {"type": "integer", "minimum": least, "maximum": most, "description": description}


def _object(fields: Mapping[str, Part], description: str, **more: Any) -> Part:
    return {
        "type": "object",
        "description": description,
        "properties": dict(fields),
        "additionalProperties": False,
        **more,
    }


_BYTES = "(Ki|Mi|Gi|Ti|Pi|k|K|M|G|T|P)?B?"
_INT32 = 2**31 - 1
_ID = _text(f"At most {names.MAX_ID} of a-z, 0-9 and -.", pattern=_pattern(names.ID_GRAMMAR))
_TASK_ID = _text(
    f"Unique in the graph: at most {names.MAX_ID} of a-z, 0-9, -, _ and .", pattern=_pattern(names.TASK_ID_GRAMMAR)
)
_PARENTS = _texts("Tasks that must be final before this one.", {"type": "string"})

RESOURCES: dict[str, Part] = {
    "cpu": _amount("CPUs: 0.5, 2 or 500m. Default 1.", "m"),
    "memory": _amount("Bytes: 256Mi, 1Gi. Default: no limit.", _BYTES),
    "disk": _amount("Bytes of private disk: 1Gi. Default: no limit.", _BYTES),
    "processes": _whole("Most processes and threads at one time; 0: no limit.", 0, _INT32),
    "extended": {
        "type": "object",
        "additionalProperties": {"type": "integer", "minimum": 0},
        "description": "Countable extras by name, such as gpus: 1.",
    },
}

RETRY: dict[str, Part] = {
    "attempts": _whole("Attempts that may end in a failure of the application, the first included. Default 1.", 1, 100),
    "backoff": _duration("Upper bound of the first wait; the wait is drawn from nothing to it. Default 1s."),
    "max_backoff": _duration("Cap of that bound. Default 60s."),
    "multiplier": {"type": "number", "minimum": 1, "maximum": 10, "description": "Growth of the bound. Default 2."},
    "losses": _whole("Attempts that may be lost with their cluster. Default 20.", 0, 1000),
}

PYTHON: dict[str, Part] = {
    "function": _text("module:function, such as steps.clean:run."),
    "args": {
        "type": "array",
        "description": "Positional arguments: any JSON; {result: TASK} stands for the result of a parent.",
    },
    "kwargs": {"type": "object", "description": "Named arguments, as args."},
    "requirements": {
        **_texts("Packages as pip names them, such as numpy==2.1.0."),
        "maxItems": pythontask.MAX_REQUIREMENTS,
    },
}

TASK: dict[str, Part] = {
    "id": _TASK_ID,
    "argv": {
        "type": "array",
        "items": {"type": ["string", "number"]},
        "minItems": 1,
        "description": "Program and arguments, never a shell line. ${here} is the folder of this file. The result is what the"
        " program writes to the file $BATON_RESULT names.",
    },
    "python": _object(PYTHON, "A function to call instead of a program.", required=["function"]),
    "env": _pairs("Environment of the program; names that begin with BATON_ are Baton's."),
    "parents": _PARENTS,
    "after": {**_PARENTS, "description": "The same as parents."},
    "trigger": {
        "enum": list(TRIGGERS),
        "description": "When to start once all parents are final. Default all_succeeded.",
    },
    "resources": _object(RESOURCES, "What it needs; reserved while it runs."),
    "retry": _object(RETRY, "How failures are retried."),
    "timeout": _duration("Longest run time of one attempt. Default: none."),
    "on_cluster_lost": {
        "enum": list(POLICIES),
        "description": "What happens when its cluster is lost: a copy once it must be dead (default); wait for the cluster; or"
        " never a copy.",
    },
    "hedge": {
        "type": "boolean",
        "description": "Start a second copy when the cluster is suspect; for work that may run twice.",
    },
    "clusters": _texts("Clusters that may run it. Default: any.", _ID),
    "selector": _pairs("Labels that the cluster must carry."),
    "tolerations": _texts("Taints of clusters that it accepts."),
    "require_isolation": {"type": "boolean", "description": "Go only where limits are enforced by cgroups."},
    "expected": _duration("Declared run time, for the critical path. Default: learned."),
    "grace": _duration("Time between TERM and KILL. Default 3s."),
}

OF_ONE_TASK = frozenset({"id", "parents", "after"})
"""Fields that make no sense as a default for all tasks."""

DEADLINE: Part = {
    "description": "When every task is final: from the start of the run (30m), or a moment (2026-11-30T18:00:00Z).",
    "type": "string",
    "minLength": 2,
}

SPEC: dict[str, Part] = {
    "deadline": DEADLINE,
    "priority": _whole("Higher goes first. Default 0.", -1000, 1000),
    "defaults": _object(
        {name: part for name, part in TASK.items() if name not in OF_ONE_TASK},
        "Fields of every task that does not set them.",
    ),
    "tasks": {
        "type": "array",
        "minItems": 1,
        "maxItems": validate.MAX_TASKS,
        "items": _object(TASK, "A node of the graph.", required=["id"]),
        "description": "The nodes of the graph.",
    },
}

METADATA: dict[str, Part] = {
    "name": {**_ID, "description": "Id of the run, unless --name gives another. Default: made by the server."},
    "labels": _pairs(f"At most {names.MAX_LABELS}; runs are listed by them."),
    "annotations": _pairs("Words for people and programs, at most 16 KiB."),
}

TOP: dict[str, Part] = {
    "apiVersion": {"const": API_VERSION, "description": "Version of this format."},
    "kind": {"const": KIND, "description": "What this file is."},
    "metadata": _object(METADATA, "Name and labels."),
    "spec": _object(SPEC, "The graph.", required=["tasks"]),
}


def schema() -> Part:
    """The whole schema, as plain data."""
    whole = _object(TOP, "A task graph of Baton: `baton run FILE`.", required=["apiVersion", "kind", "spec"])
    return {"$schema": DIALECT, "title": "Baton graph", **whole}
