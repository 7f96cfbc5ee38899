"""What a graph must be before anybody works on it: structure, limits and grammar, without knowing any cluster.

Theory: a bad graph is refused whole, before it has an identity, with every fault named by its field path; so the
command line (which turns paths into file:line) and the server share this one judge, and it is a pure function of the
message. It is linear in the size of the graph and never recurses: 1,000,000 tasks in one chain are as good as any. What
depends on time (a deadline in the past) gets `now` as an argument; what depends on the fleet (nobody carries that
label) is the scheduler's to say, as a reason for waiting.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from baton import names, pythontask
from baton.v1 import graph_pb2, run_pb2

MAX_TASKS = 1_000_000
MAX_ARGV_BYTES = 64 * 1024
MAX_ENV_BYTES = 32 * 1024
"""The published limits of DESIGN section 14. Larger ones would let one task fill a journal batch (256 KiB)."""

MAX_PARENTS_SHOWN = 12
"""Tasks of a cycle that the message names. All of a cycle of 100,000 would tell less than its ends."""

MAX_VIOLATIONS = 100
"""Faults collected before the judge stops. Fewer hide; more fill screens and memory for one repeated mistake."""

MAX_SECONDS = 30 * 24 * 3600
"""Longest duration that means anything: the farthest deadline (run.proto)."""

MAX_QUANTITY = 1 << 50
"""Largest amount of a resource: one pebibyte, or as many thousandths. More is a slip of the unit, not a wish."""

MIN_BACKOFF_SECONDS = 0.01
"""Shortest backoff (graph.proto). Shorter: a task that fails at once turns into load on the journal."""

_INT_RANGES = {"max_attempts": (0, 100), "max_infrastructure_losses": (0, 1000)}
_TRIGGERS = frozenset(graph_pb2.TriggerRule.values())
_LOST = frozenset(graph_pb2.OnClusterLost.values())


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault: a path such as `spec.tasks[3].parents[0]`, and what is wrong and what would be right."""

    field: str
    message: str


class _Full(Exception):
    """Enough faults were found."""


class _Faults:
    """The list of faults, bounded."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, message: str) -> None:
        self.found.append(Violation(field, message))
        if len(self.found) >= MAX_VIOLATIONS:
            raise _Full


def violations(spec: graph_pb2.GraphSpec, at: str = "spec") -> list[Violation]:
    """All faults of a graph (at most 100), in order of tasks; the graph's shape last. Empty: it is good."""
    faults = _Faults()
    try:
        _judge(spec, at, faults)
    except _Full:
        pass
    return faults.found


def request_violations(request: run_pb2.CreateRunRequest, now: float) -> list[Violation]:
    """All faults of a request for a run; `now` is the judge's wall clock in seconds. Empty: it may be tried."""
    faults = _Faults()
    try:
        _judge_request(request, now, faults)
    except _Full:
        pass
    return faults.found


def _judge_request(request: run_pb2.CreateRunRequest, now: float, faults: _Faults) -> None:
    for field, text in (("namespace", request.namespace), ("run_id", request.run_id)):
        if text and (problem := names.id_problem(text)):
            faults.add(field, problem)
    _judge_deadline(request, now, faults)
    if not -1000 <= request.priority <= 1000:
        faults.add("priority", f"is {request.priority}: use -1000 to 1000")
    if found := names.labels_problem(dict(request.labels)):
        faults.add(_key("labels", found[0]), found[1])
    if found := names.annotations_problem(dict(request.annotations)):
        faults.add(_key("annotations", found[0]), found[1])
    if request.graph:
        if request.HasField("spec"):
            faults.add("graph", "is set beside an inline spec: send one of them")
        try:
            names.parse_graph(request.graph)
        except names.InvalidName as error:
            faults.add("graph", str(error))
    else:
        _judge(request.spec, "spec", faults)
    if request.graph_version < 0:
        faults.add("graph_version", "is negative: use 0 for the newest")


def _judge_deadline(request: run_pb2.CreateRunRequest, now: float, faults: _Faults) -> None:
    if not request.HasField("deadline_time"):
        faults.add("deadline_time", "is required: every run has one absolute deadline")
    elif not 0 <= request.deadline_time.nanos <= 999_999_999:
        faults.add("deadline_time", f"has {request.deadline_time.nanos} nanoseconds: use 0 to 999,999,999")
    else:
        ahead = request.deadline_time.seconds + request.deadline_time.nanos / 1e9 - now
        if ahead <= 0:
            faults.add("deadline_time", f"lies {-ahead:.0f} s in the past: choose a later one")
        elif ahead > MAX_SECONDS:
            faults.add("deadline_time", "lies more than 30 days ahead: choose an earlier one")


def _judge(spec: graph_pb2.GraphSpec, at: str, faults: _Faults) -> None:
    count = len(spec.tasks)
    if count == 0:
        faults.add(f"{at}.tasks", "is empty: a graph has at least one task")
        return
    if count > MAX_TASKS:
        faults.add(f"{at}.tasks", f"has {count} tasks: at most {MAX_TASKS} are allowed")
        return
    index: dict[str, int] = {}
    for number, task in enumerate(spec.tasks):
        task_id = task.id
        if problem := names.task_id_problem(task_id):
            faults.add(f"{at}.tasks[{number}].id", problem)
        elif task_id in index:
            faults.add(
                f"{at}.tasks[{number}].id",
                f"{names.quote(task_id)} is already the id of tasks[{index[task_id]}]: ids are unique in a graph",
            )
        else:
            index[task_id] = number
    for place, message in pythontask.code_faults(spec.codes):
        faults.add(f"{at}.codes{place}", message)
    codes = frozenset(code.sha256 for code in spec.codes)
    good: set[bytes] = set()
    bare = graph_pb2.Task()
    for number, task in enumerate(spec.tasks):
        # Tasks of a graph are alike but for name and parents: what was found good once is not judged again.
        bare.CopyFrom(task)
        bare.ClearField("id")
        bare.ClearField("parents")
        alike = bare.SerializeToString(deterministic=True)
        if alike in good:
            continue
        before = len(faults.found)
        _judge_task(task, codes, f"{at}.tasks[{number}]", faults)
        if len(faults.found) == before and not _may_name_results(task.python.args_json):
            good.add(alike)
    _judge_shape(spec, at, index, faults)


def _may_name_results(args_json: str) -> bool:
    """Whether arguments may refer to results of parents, which makes them good only beside these; an escape may hide it."""
    return pythontask.RESULT_KEY in args_json or "\\u" in args_json


def _judge_task(task: graph_pb2.Task, codes: frozenset[str], at: str, faults: _Faults) -> None:
    if task.trigger_rule not in _TRIGGERS:
        faults.add(f"{at}.trigger_rule", f"{task.trigger_rule} is no trigger rule this version knows")
    if task.on_cluster_lost not in _LOST:
        faults.add(f"{at}.on_cluster_lost", f"{task.on_cluster_lost} is no policy this version knows")
    if task.HasField("resources"):
        _judge_resources(task.resources, f"{at}.resources", faults)
    if task.HasField("retry"):
        _judge_retry(task.retry, f"{at}.retry", faults)
    if task.HasField("timeout"):
        _judge_duration(task.timeout, f"{at}.timeout", faults, positive=True)
    if task.HasField("expected_duration"):
        _judge_duration(task.expected_duration, f"{at}.expected_duration", faults)
    if task.HasField("termination_grace"):
        _judge_duration(task.termination_grace, f"{at}.termination_grace", faults)
    _judge_places(task, at, faults)
    if task.WhichOneof("kind") is None:
        faults.add(f"{at}.process", "is missing: say what the task runs")
    elif task.HasField("python"):
        for place, message in pythontask.faults(task.python, task.parents, codes):
            faults.add(f"{at}.python.{place}", message)
    else:
        _judge_process(task.process, f"{at}.process", faults)


def _judge_places(task: graph_pb2.Task, at: str, faults: _Faults) -> None:
    if task.cluster_selector and (found := names.labels_problem(dict(task.cluster_selector))):
        faults.add(_key(f"{at}.cluster_selector", found[0]), found[1])
    for position, cluster in enumerate(task.clusters):
        if problem := names.id_problem(cluster):
            faults.add(f"{at}.clusters[{position}]", problem)
    for position, taint in enumerate(task.tolerations):
        if problem := names.taint_problem(taint):
            faults.add(f"{at}.tolerations[{position}]", problem)


def _judge_process(process: graph_pb2.ProcessTask, at: str, faults: _Faults) -> None:
    argv = process.argv
    if not argv or not argv[0]:
        faults.add(f"{at}.argv", 'is empty: name a program, e.g. ["python3", "step.py"]')
    size = 0
    for position, argument in enumerate(argv):
        size += len(argument.encode(errors="replace"))
        if "\0" in argument:
            faults.add(f"{at}.argv[{position}]", "holds a NUL character: no program can receive one")
    if size > MAX_ARGV_BYTES:
        faults.add(f"{at}.argv", f"holds {size} bytes: at most {MAX_ARGV_BYTES} are allowed; put data into a file")
    if not process.env:
        return
    size = 0
    for name, value in process.env.items():
        size += len(name.encode(errors="replace")) + len(value.encode(errors="replace"))
        if problem := names.env_problem(name):
            faults.add(_key(f"{at}.env", name), problem)
        if "\0" in value:
            faults.add(_key(f"{at}.env", name), "holds a NUL character: no program can receive one")
    if size > MAX_ENV_BYTES:
        faults.add(f"{at}.env", f"holds {size} bytes: at most {MAX_ENV_BYTES} are allowed")


def _judge_resources(resources: graph_pb2.Resources, at: str, faults: _Faults) -> None:
    for field in ("cpu_millis", "memory_bytes", "disk_bytes", "processes"):
        _judge_quantity(getattr(resources, field), f"{at}.{field}", faults)
    for name, amount in resources.extended.items():
        field = _key(f"{at}.extended", name)
        if problem := names.extended_problem(name):
            faults.add(field, problem)
        _judge_quantity(amount, field, faults)


def _judge_quantity(amount: int, field: str, faults: _Faults) -> None:
    if amount < 0:
        faults.add(field, f"is {amount}: must not be negative")
    elif amount > MAX_QUANTITY:
        faults.add(field, f"is {amount}: more than {MAX_QUANTITY} is no amount of anything")


def _judge_retry(retry: graph_pb2.RetryPolicy, at: str, faults: _Faults) -> None:
    for field, (low, high) in _INT_RANGES.items():
        amount = getattr(retry, field)
        if not low <= amount <= high:
            faults.add(f"{at}.{field}", f"is {amount}: use {low + 1} to {high}, or 0 for the default")
    multiplier = retry.backoff_multiplier
    if multiplier != 0 and not (math.isfinite(multiplier) and 1 <= multiplier <= 10):
        faults.add(f"{at}.backoff_multiplier", f"is {multiplier}: use 1 to 10, or 0 for the default")
    if retry.HasField("initial_backoff"):
        _judge_backoff(retry.initial_backoff, f"{at}.initial_backoff", faults)
    if retry.HasField("max_backoff"):
        _judge_backoff(retry.max_backoff, f"{at}.max_backoff", faults)


def _judge_backoff(duration: Duration, field: str, faults: _Faults) -> None:
    seconds = _judge_duration(duration, field, faults)
    if seconds is not None and seconds < MIN_BACKOFF_SECONDS:
        faults.add(field, f"is {seconds:g} s: use at least {MIN_BACKOFF_SECONDS} s")


def _judge_duration(duration: Duration, field: str, faults: _Faults, *, positive: bool = False) -> float | None:
    """The duration in seconds, or None after saying what is wrong with it."""
    seconds, nanos = duration.seconds, duration.nanos
    if not -999_999_999 <= nanos <= 999_999_999 or seconds * nanos < 0:
        faults.add(field, f"has {nanos} nanoseconds: use 0 to 999,999,999")
        return None
    if seconds < 0 or nanos < 0:
        faults.add(field, f"is {seconds + nanos / 1e9:g} s: must not be negative")
        return None
    if seconds > MAX_SECONDS:
        faults.add(field, f"is {seconds} s: more than 30 days is refused")
        return None
    if positive and seconds == 0 and nanos == 0:
        faults.add(field, "is 0 s: leave it out for no limit")
        return None
    return seconds + nanos / 1e9


def _judge_shape(spec: graph_pb2.GraphSpec, at: str, index: dict[str, int], faults: _Faults) -> None:
    """Unknown parents, edges to itself, doubled edges, cycles."""
    waits = [0] * len(spec.tasks)
    children: dict[int, list[int]] = {}
    for number, task in enumerate(spec.tasks):
        seen: set[str] = set()
        for position, parent in enumerate(task.parents):
            field = f"{at}.tasks[{number}].parents[{position}]"
            if parent in seen:
                faults.add(field, f"{names.quote(parent)} is listed twice: name each parent once")
            elif parent not in index:
                faults.add(field, f"{names.quote(parent)} is no task of this graph")
            elif index[parent] == number:
                faults.add(field, f"{names.quote(parent)} waits for itself: remove the edge")
            else:
                waits[number] += 1
                children.setdefault(index[parent], []).append(number)
            seen.add(parent)
    free = deque(number for number, count in enumerate(waits) if count == 0)
    done = 0
    while free:
        number = free.popleft()
        done += 1
        for child in children.get(number, ()):
            waits[child] -= 1
            if waits[child] == 0:
                free.append(child)
    if done < len(spec.tasks):
        _name_cycle(spec, at, index, waits, faults)


def _name_cycle(spec: graph_pb2.GraphSpec, at: str, index: dict[str, int], waits: list[int], faults: _Faults) -> None:
    """Every task that still waits has a parent that still waits: walking up from any of them must meet itself."""
    here = next(number for number, count in enumerate(waits) if count > 0)
    step: dict[int, int] = {}
    path: list[int] = []
    while here not in step:
        step[here] = len(path)
        path.append(here)
        here = next(
            index[parent]
            for parent in spec.tasks[here].parents
            if parent in index and index[parent] != here and waits[index[parent]] > 0
        )
    cycle = path[step[here] :]
    first = spec.tasks[cycle[0]]
    # The walk goes from child to parent; people read the other way, in the order in which tasks would run.
    order = [spec.tasks[number].id for number in [cycle[0], *reversed(cycle)]]
    if len(order) > MAX_PARENTS_SHOWN:
        left_out = len(order) - MAX_PARENTS_SHOWN
        order = [*order[: MAX_PARENTS_SHOWN - 2], f"({left_out} more)", *order[-2:]]
    follows = spec.tasks[cycle[1 % len(cycle)]].id
    position = list(first.parents).index(follows)
    faults.add(
        f"{at}.tasks[{cycle[0]}].parents[{position}]",
        f"closes a cycle: {' -> '.join(order)}; remove one of these edges",
    )


def _key(field: str, key: str) -> str:
    """The path of a map's entry, bounded; of the map itself for an empty key."""
    if not key:
        return field
    return f'{field}["{key if len(key) <= names.MAX_ID else key[: names.MAX_ID] + "..."}"]'
