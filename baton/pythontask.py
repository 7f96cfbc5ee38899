"""What a `python` task must be, and how its arguments name results of other tasks: the words the SDK, the judge and the
worker share.

Arguments are JSON: an array is positional, an object is named, and the name "$baton.args" in an object holds positional
ones. Anywhere in them {"$baton.result": "<task id>"} stands for the result of that parent, put in its place on the
cluster where the task runs, and {"$baton.results": ["part-", 0, 3]} for the list of those of part-0, part-1 and part-2: the
join of a wide map would fill its 64 KiB with names. (cluster_agent/guard/python_worker.py reads the same words without
importing this: it runs where nothing of Baton is installed.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the SDK needs the words in workers, which have no protobuf
    from baton.v1 import graph_pb2

RESULT_KEY, RANGE_KEY, ARGS_KEY = "$baton.result", "$baton.results", "$baton.args"

MAX_ARGS_BYTES = 64 * 1024
"""Published limit of DESIGN section 14."""

MAX_REQUIREMENTS = 64
MAX_REQUIREMENT = 300
"""Of one requirement, in characters: an URL fits. Larger sets are better a package of their own."""

MAX_CODE_BYTES = 64 * 1024
"""Of packed code. It is stored in the run's journal, where a batch has room for 256 KiB a shard (PROTOCOL J2), and goes
with each batch of dispatches; the client stores larger code as an artifact first (`baton.artifacts.MAX_CODE_PACK_BYTES`)."""

MAX_CODES = 8
"""Distinct codes of a graph: one is usual. More would let one graph fill a journal batch."""

MAX_TASKS = 1_000_000
"""Of a graph (DESIGN 14): no range of parents is longer."""

RANGE_MIN = 3
"""Fewer results are as short one by one, and easier to read."""

MAX_REPEATS = 4
"""Times that ranges may name the results of all parents. Without a bound, 64 KiB of ranges would stand for a thousand million
values, to be looked at by the judge and made by the worker."""

_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\s*(\[[A-Za-z0-9._,\s-]*\])?\s*"
    r"(@\s*[a-z+]+://\S+|\(?[<>=!~][<>=!~\w.*+,\s-]*\)?)?\s*(;[^\n]*)?"
)

Fault = tuple[str, str]
"""A path below the task, and what is wrong there."""


def faults(task: graph_pb2.PythonTask, parents: Sequence[str], codes: frozenset[str]) -> Iterator[Fault]:
    """All faults of a call. `codes`: hashes of the code that comes with the graph."""
    if not _FUNCTION.fullmatch(task.function) or len(task.function) > 300:
        yield "function", "write module:function, such as steps.clean:run (letters, digits, underscores and dots)"
    if (problem := args_problem(task.args_json, parents)) is not None:
        yield "args_json", problem
    if len(task.requirements) > MAX_REQUIREMENTS:
        yield "requirements", f"has {len(task.requirements)} entries: at most {MAX_REQUIREMENTS} are allowed"
    for position, requirement in enumerate(task.requirements[:MAX_REQUIREMENTS]):
        if len(requirement) > MAX_REQUIREMENT or not _REQUIREMENT.fullmatch(requirement):
            yield (
                f"requirements[{position}]",
                "is no package as pip names one, such as numpy==2.1.0 (no options, no paths)",
            )
    if task.code and task.code not in codes:
        yield "code", "is not among the graph's codes: send the packed code with the graph"


def args_problem(text: str, parents: Sequence[str]) -> str | None:
    """What is wrong with the arguments; None if nothing is."""
    size = len(text.encode(errors="replace"))
    if size > MAX_ARGS_BYTES:
        return f"holds {size} bytes: at most {MAX_ARGS_BYTES} are allowed; let the function read bigger data itself"
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:
        return f"is no JSON: {error}"
    if not isinstance(value, list | dict):
        return "must be a JSON array (positional arguments) or object (named ones)"
    if isinstance(value, dict) and not isinstance(value.get(ARGS_KEY, []), list):
        return f"has a {ARGS_KEY} that is no array"
    known, most = set(parents), MAX_REPEATS * len(parents) + MAX_ARGS_BYTES
    for count, reference in enumerate(results_in(value)):
        if not isinstance(reference, str) or reference not in known:
            return f"asks for the result of {json.dumps(reference)[:80]}, which is none of the task's parents"
        if count >= most:
            return f"asks for more than {most} results: name the result of each parent at most {MAX_REPEATS} times"
    return None


def results_in(value: object) -> Iterator[object]:
    """What every reference to a result in JSON arguments names."""
    queue = [value]
    while queue:
        here = queue.pop()
        if isinstance(here, list):
            queue.extend(here)
        elif isinstance(here, dict):
            if len(here) == 1 and RESULT_KEY in here:
                yield here[RESULT_KEY]
            elif len(here) == 1 and RANGE_KEY in here:
                yield from _ranged(here[RANGE_KEY])
            else:
                queue.extend(here.values())


def _ranged(value: object) -> Iterator[object]:
    """The ids that a range of results names; the value itself if it is none."""
    match value:
        case [str(prefix), int(first), int(end)] if (
            0 <= first < end <= first + MAX_TASKS and type(first) is type(end) is int
        ):
            yield from (f"{prefix}{number}" for number in range(first, end))
        case str(text):
            yield [text]  # no range, and never the id of a parent
        case _:
            yield value


def as_range(ids: Sequence[str]) -> list[object] | None:
    """`ids` as one range: numbered without gaps and leading zeros behind one prefix; None if they are not, or too few to gain."""
    if len(ids) < RANGE_MIN:
        return None
    match = _NUMBERED.fullmatch(ids[0])
    if match is None:
        return None
    prefix, first = match[1], int(match[2])
    consecutive = all(id_ == f"{prefix}{first + place}" for place, id_ in enumerate(ids))
    return [prefix, first, first + len(ids)] if consecutive else None


def code_faults(codes: Sequence[graph_pb2.Code]) -> Iterator[Fault]:
    """All faults of the code that comes with a graph."""
    if len(codes) > MAX_CODES:
        yield "", f"has {len(codes)} entries: at most {MAX_CODES} are allowed"
        return
    for position, code in enumerate(codes):
        if code.stored:
            if code.zip:
                yield f"[{position}].zip", "is set beside `stored`: send one of them"
            elif not _SHA256.fullmatch(code.sha256):
                yield f"[{position}].sha256", "is no sha-256 in lower-case hex"
        elif not code.zip:
            yield f"[{position}].zip", "is empty: send the code, or put it with ArtifactService and say `stored`"
        elif len(code.zip) > MAX_CODE_BYTES:
            yield f"[{position}].zip", f"holds {len(code.zip)} bytes: at most {MAX_CODE_BYTES} are allowed"
        elif hashlib.sha256(code.zip).hexdigest() != code.sha256:
            yield f"[{position}].sha256", "is not the hash of the zip beside it"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")
