"""The judge of graphs: every fault named by its path, and a good graph left alone."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import validate
from baton.v1 import graph_pb2, run_pb2

NOW = 1_800_000_000.0


def graph(*edges: tuple[str, tuple[str, ...]]) -> graph_pb2.GraphSpec:
    spec = graph_pb2.GraphSpec()
    for task, parents in edges:
        spec.tasks.add(id=task, parents=parents).process.argv.append("true")
    return spec


def faults(spec: graph_pb2.GraphSpec) -> dict[str, str]:
    return {each.field: each.message for each in validate.violations(spec)}


def one() -> tuple[graph_pb2.GraphSpec, graph_pb2.Task]:
    spec = graph(("a", ()))
    return spec, spec.tasks[0]


def test_good_graph() -> None:
    spec = graph(("a", ()), ("b", ("a",)), ("c", ("a", "b")))
    task = spec.tasks[0]
    task.process.env["PATH"] = "/bin"
    task.resources.cpu_millis = 500
    task.resources.extended["example.com/gpu"] = 1
    task.retry.max_attempts = 3
    task.retry.backoff_multiplier = 1.5
    task.retry.initial_backoff.FromMilliseconds(10)
    task.timeout.FromSeconds(60)
    task.cluster_selector["region"] = "eu"
    task.clusters.append("eu")
    task.tolerations.append("spot=true")
    assert faults(spec) == {}


def test_zero_tasks() -> None:
    assert list(faults(graph_pb2.GraphSpec())) == ["spec.tasks"]


def test_duplicate_id_names_the_first() -> None:
    found = faults(graph(("a", ()), ("b", ()), ("a", ())))
    assert list(found) == ["spec.tasks[2].id"]
    assert "tasks[0]" in found["spec.tasks[2].id"]


def test_edges_that_lead_nowhere() -> None:
    found = faults(graph(("a", ("x",)), ("b", ("b",)), ("c", ("a", "a"))))
    assert "no task" in found["spec.tasks[0].parents[0]"]
    assert "itself" in found["spec.tasks[1].parents[0]"]
    assert "twice" in found["spec.tasks[2].parents[1]"]


def test_cycle_is_named_in_running_order() -> None:
    found = faults(graph(("start", ()), ("a", ("start", "c")), ("b", ("a",)), ("c", ("b",)), ("end", ("c",))))
    assert list(found) == ["spec.tasks[1].parents[1]"]
    assert "a -> b -> c -> a" in found["spec.tasks[1].parents[1]"]


def test_a_long_cycle_is_found_without_recursion_and_told_shortly() -> None:
    size = 20_000
    found = faults(graph(*((f"t{n}", (f"t{(n - 1) % size}",)) for n in range(size))))
    (message,) = found.values()
    assert len(message) < 300
    assert f"({size + 1 - 12} more)" in message


def test_a_chain_of_20000_is_good() -> None:
    assert faults(graph(*((f"t{n}", (f"t{n - 1}",) if n else ()) for n in range(20_000)))) == {}


@st.composite
def edges(draw: st.DrawFn) -> list[list[int]]:
    count = draw(st.integers(1, 8))
    drawn = [draw(st.lists(st.integers(0, count - 1), unique=True)) for _ in range(count)]
    return [[parent for parent in parents if parent != child] for child, parents in enumerate(drawn)]


@given(edges())
def test_a_cycle_is_told_exactly_if_there_is_one(parents: list[list[int]]) -> None:
    found = validate.violations(graph(*((f"t{n}", tuple(f"t{p}" for p in up)) for n, up in enumerate(parents))))
    reach = {n: set(up) for n, up in enumerate(parents)}
    for _ in parents:
        for near in reach.values():
            near |= {far for step in near for far in reach[step]}
    assert bool(found) == any(n in reach[n] for n in reach)
    for each in found:
        told = [int(word[1:]) for word in each.message.split(": ")[1].split(";")[0].split(" -> ")]
        assert told[0] == told[-1]
        assert all(before in parents[after] for before, after in itertools.pairwise(told))


@pytest.mark.parametrize("bad", ["", "A", "a b", "-a", "a" * 64, "ä", "a" * 1_000_000, "a\0"])
def test_bad_ids(bad: str) -> None:
    spec, task = one()
    task.id = bad
    found = validate.violations(spec)
    assert [each.field for each in found] == ["spec.tasks[0].id"]
    assert len(found[0].message) < 300


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ([], "spec.tasks[0].process.argv"),
        ([""], "spec.tasks[0].process.argv"),
        (["a", "b\0c"], "spec.tasks[0].process.argv[1]"),
        (["a", "x" * 65536], "spec.tasks[0].process.argv"),
    ],
)
def test_bad_argv(argv: list[str], field: str) -> None:
    spec, task = one()
    del task.process.argv[:]
    task.process.argv.extend(argv)
    assert list(faults(spec)) == [field]


@pytest.mark.parametrize(
    ("name", "value"), [("BATON_X", ""), ("", ""), ("A=B", ""), ("1A", ""), ("A", "x\0"), ("A\0", "")]
)
def test_bad_env(name: str, value: str) -> None:
    spec, task = one()
    task.process.env[name] = value
    assert all(field.startswith("spec.tasks[0].process.env") for field in faults(spec))
    assert faults(spec)


def test_env_is_limited() -> None:
    spec, task = one()
    task.process.env["A"] = "x" * 32768
    assert list(faults(spec)) == ["spec.tasks[0].process.env"]


def test_no_process() -> None:
    spec = graph_pb2.GraphSpec()
    spec.tasks.add(id="a")
    assert list(faults(spec)) == ["spec.tasks[0].process"]


@pytest.mark.parametrize("field", ["cpu_millis", "memory_bytes", "disk_bytes", "processes"])
@pytest.mark.parametrize("amount", [-1, -(2**63), 2**63 - 1])
def test_bad_resources(field: str, amount: int) -> None:
    spec, task = one()
    setattr(task.resources, field, amount)
    assert list(faults(spec)) == [f"spec.tasks[0].resources.{field}"]


def test_bad_extended_resources() -> None:
    spec, task = one()
    task.resources.extended["gpus"] = -1
    assert list(faults(spec)) == ['spec.tasks[0].resources.extended["gpus"]']


@pytest.mark.parametrize("multiplier", [math.nan, math.inf, -math.inf, -1.0, 0.5, 10.1])
def test_bad_multiplier(multiplier: float) -> None:
    spec, task = one()
    task.retry.backoff_multiplier = multiplier
    assert list(faults(spec)) == ["spec.tasks[0].retry.backoff_multiplier"]


@pytest.mark.parametrize(
    ("field", "amount"), [("max_attempts", -1), ("max_attempts", 101), ("max_infrastructure_losses", 1001)]
)
def test_bad_retry(field: str, amount: int) -> None:
    spec, task = one()
    setattr(task.retry, field, amount)
    assert list(faults(spec)) == [f"spec.tasks[0].retry.{field}"]


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(-1, 0), (0, -1), (1, -1), (0, 10**9), (31 * 86400, 0), (2**62, 0), (-1, 1), (0, 0)]
)
def test_bad_durations(seconds: int, nanos: int) -> None:
    spec, task = one()
    task.timeout.seconds, task.timeout.nanos = seconds, nanos
    assert list(faults(spec)) == ["spec.tasks[0].timeout"]


def test_backoff_has_a_floor() -> None:
    spec, task = one()
    task.retry.initial_backoff.FromMilliseconds(9)
    assert list(faults(spec)) == ["spec.tasks[0].retry.initial_backoff"]


def test_bad_places() -> None:
    spec, task = one()
    task.clusters.append("EU")
    task.tolerations.append("a b")
    task.cluster_selector["region"] = "a b"
    assert set(faults(spec)) == {
        "spec.tasks[0].clusters[0]",
        "spec.tasks[0].tolerations[0]",
        'spec.tasks[0].cluster_selector["region"]',
    }


def test_unknown_enum_numbers() -> None:
    spec = graph_pb2.GraphSpec.FromString(graph(("a", ())).SerializeToString())
    task = graph_pb2.Task.FromString(spec.tasks[0].SerializeToString() + b"\x18\x63\x58\x63")  # fields 3 and 11 = 99
    spec.tasks[0].CopyFrom(task)
    assert set(faults(spec)) == {"spec.tasks[0].trigger_rule", "spec.tasks[0].on_cluster_lost"}


def test_faults_are_bounded() -> None:
    assert len(validate.violations(graph(*((f"t{n}", ("x",)) for n in range(1000))))) == validate.MAX_VIOLATIONS


@given(st.binary(max_size=300))
def test_any_message_is_judged(data: bytes) -> None:
    try:
        spec = graph_pb2.GraphSpec.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's DecodeError: not ours to judge
        return
    validate.violations(spec)


def request(ahead: float = 60.0) -> run_pb2.CreateRunRequest:
    made = run_pb2.CreateRunRequest(spec=graph(("a", ())))
    made.deadline_time.FromMilliseconds(int((NOW + ahead) * 1000))
    return made


def request_fields(made: run_pb2.CreateRunRequest) -> list[str]:
    return [each.field for each in validate.request_violations(made, NOW)]


def test_good_request() -> None:
    assert request_fields(request()) == []


@pytest.mark.parametrize("ahead", [-1.0, 0.0, 31 * 86400.0, -NOW])
def test_bad_deadlines(ahead: float) -> None:
    assert request_fields(request(ahead)) == ["deadline_time"]


@pytest.mark.parametrize("nanos", [-5, 1_000_000_000])
def test_a_deadline_that_is_no_time(nanos: int) -> None:
    made = request()
    made.deadline_time.nanos = nanos
    assert request_fields(made) == ["deadline_time"]


def test_bad_request_fields() -> None:
    made = request()
    made.ClearField("deadline_time")
    made.namespace, made.run_id, made.priority = "A", "B", 1001
    made.labels["a b"] = ""
    made.annotations["a b"] = ""
    made.graph, made.graph_version = "graphs/x", -1
    assert request_fields(made) == [
        "namespace",
        "run_id",
        "deadline_time",
        "priority",
        'labels["a b"]',
        'annotations["a b"]',
        "graph",
        "graph",
        "graph_version",
    ]


@pytest.mark.parametrize("args", ['[{"$baton.result": "a"}]', '[{"\\u0024baton.result": "a"}]'])
def test_tasks_that_differ_in_their_parents_alone_are_judged_apart(args: str) -> None:
    spec = graph(("a", ()))
    for name, parents in (("b", ["a"]), ("c", ["a"]), ("d", [])):
        task = spec.tasks.add(id=name, parents=parents)
        task.python.function, task.python.args_json = "steps:run", args
    assert list(faults(spec)) == ["spec.tasks[3].python.args_json"]


def test_each_of_many_equal_faults_is_named() -> None:
    spec = graph(("a", ()), ("b", ()), ("c", ()))
    for task in spec.tasks:
        task.retry.max_attempts = -1
    assert list(faults(spec)) == [f"spec.tasks[{number}].retry.max_attempts" for number in range(3)]
