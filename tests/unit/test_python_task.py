"""`python` tasks on their way: judged, read from a file, stored, dispatched, and understood by the agent."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton import graphfile, pythontask, validate
from baton.graphfile import GraphFileError
from baton.internal import events_pb2
from baton.v1 import agent_pb2, graph_pb2
from cluster_agent import translate as agent_translate
from cluster_agent import workload
from cluster_agent.core import events as on
from cluster_agent.core.commands import StartOrder
from cluster_agent.guard.protocol import code_from_wire, code_to_wire, start_from_wire, start_to_wire
from control_plane import codec
from control_plane.agent_codec import DispatchWriter
from control_plane.controller import OwnedShard
from control_plane.core.admission import task_parts
from control_plane.core.model import AttemptId
from control_plane.core.views import DispatchView
from control_plane.services import translate

ZIP = b"some archive"
SHA = hashlib.sha256(ZIP).hexdigest()


def graph(**fields: Any) -> graph_pb2.GraphSpec:
    """A program, and a call that takes its result."""
    spec = graph_pb2.GraphSpec()
    spec.codes.add(sha256=SHA, zip=ZIP)
    spec.tasks.add(id="a").process.argv.append("true")
    call = spec.tasks.add(id="b", parents=["a"]).python
    call.function, call.args_json, call.code = "steps.clean:Box.run", '[{"$baton.result": "a"}, 1]', SHA
    call.requirements.extend(["numpy==2.1.0", "small[extra] >= 1, < 2", "x @ https://host/x.whl"])
    for name, value in fields.items():
        if isinstance(value, list):
            call.ClearField(cast(Any, name))
            getattr(call, name).extend(value)
        else:
            setattr(call, name, value)
    return spec


def faults(spec: graph_pb2.GraphSpec) -> dict[str, str]:
    return {each.field: each.message for each in validate.violations(spec)}


def test_a_good_call_has_no_faults() -> None:
    assert faults(graph()) == {}
    assert faults(graph(args_json="{}", requirements=[])) == {}
    assert faults(graph(args_json='{"$baton.args": [1], "x": null}')) == {}


@pytest.mark.parametrize(
    ("field", "value", "place", "words"),
    [
        ("function", "steps.run", "function", "module:function"),
        ("function", "steps:", "function", "module:function"),
        ("function", "os; rm:x", "function", "module:function"),
        ("function", "a" * 400 + ":b", "function", "module:function"),
        ("args_json", "", "args_json", "no JSON"),
        ("args_json", "[NaN]", "args_json", "NaN is no JSON"),
        ("args_json", "[1, -Infinity]", "args_json", "-Infinity is no JSON"),
        ("args_json", '"x"', "args_json", "array"),
        ("args_json", "[" * 5000 + "]" * 5000, "args_json", "nested too deeply"),
        ("args_json", json.dumps(["x" * 70_000]), "args_json", "65536"),
        ("args_json", '[{"$baton.result": "b"}]', "args_json", "none of the task's parents"),
        ("args_json", '[{"$baton.result": 7}]', "args_json", "none of the task's parents"),
        ("args_json", '[{"$baton.results": ["b", 0, 2]}]', "args_json", "none of the task's parents"),
        ("args_json", '[{"$baton.results": ["a", 2, 1]}]', "args_json", "none of the task's parents"),
        ("args_json", '[{"$baton.results": "a"}]', "args_json", "none of the task's parents"),
        ("args_json", '{"$baton.args": 1}', "args_json", "no array"),
        ("requirements", ["--index-url=http://evil"], "requirements[0]", "no package"),
        ("requirements", ["ok", "../folder"], "requirements[1]", "no package"),
        ("requirements", ["x\n-r evil"], "requirements[0]", "no package"),
        ("requirements", ["p"] * 65, "requirements", "64"),
        ("code", "0" * 64, "code", "not among"),
    ],
)
def test_faults_of_a_call_are_named(field: str, value: object, place: str, words: str) -> None:
    found = faults(graph(**{field: value}))
    assert list(found) == [f"spec.tasks[1].python.{place}"]
    assert words in found[f"spec.tasks[1].python.{place}"]


def test_faults_of_code_are_named() -> None:
    spec = graph()
    spec.codes.add(sha256="0" * 64, zip=b"x")
    spec.codes.add(sha256="1" * 64, zip=b"x" * 70_000)
    found = faults(spec)
    assert "not the hash" in found["spec.codes[1].sha256"]
    assert "65536" in found["spec.codes[2].zip"]


FILE = """\
apiVersion: baton/v1
kind: Graph
spec:
  defaults:
    argv: ["true"]
  tasks:
    - id: a
    - id: b
      after: [a]
      python:
        function: operator:add
        args: [{result: a}, 2, [true, null, 1.5]]
        kwargs: {deep: {result: a}, other: {x: text}}
        requirements: ["numpy==2.1.0"]
"""


def test_a_graph_file_calls_functions() -> None:
    tasks = graphfile.loads(FILE).spec.tasks
    assert (tasks[0].WhichOneof("kind"), tasks[1].WhichOneof("kind")) == ("process", "python")
    assert tasks[1].python.function == "operator:add"
    assert json.loads(tasks[1].python.args_json) == {
        "$baton.args": [{"$baton.result": "a"}, 2, [True, None, 1.5]],
        "deep": {"$baton.result": "a"},
        "other": {"x": "text"},
    }
    assert list(tasks[1].python.requirements) == ["numpy==2.1.0"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("operator:add", "operator", 11, "module:function"),
        ("{result: a}, 2", "{result: z}, 2", 13, "none of the task's parents"),
        ("numpy==2.1.0", "-r evil", 14, "no package"),
        ("function:", "func:", 11, "function"),
        ("      python:", "      argv: [x]\n      python:", 10, "keep one"),
        ("2, [true", ".nan, [true", 12, "finite"),
    ],
)
def test_faults_in_a_file_are_told_with_their_line(old: str, new: str, line: int, words: str) -> None:
    with pytest.raises(GraphFileError) as caught:
        graphfile.loads(FILE.replace(old, new))
    assert any(each.line == line and words in str(each) for each in caught.value.problems), str(caught.value)


def test_a_call_survives_the_api_and_the_journal() -> None:
    tasks = translate.graph_tasks(graph())
    call = tasks[1].spec.python
    assert call is not None
    assert (call.code, call.code_zip, tasks[1].spec.argv) == (SHA, ZIP, ())
    assert translate.graph_tasks(translate.graph_spec(tasks)) == tasks
    stored = events_pb2.TasksAdded()
    codec._put_tasks(stored, "tasks", (*tasks, *tasks))
    assert list(stored.tasks.codes) == [ZIP]
    read = codec._take_tasks(events_pb2.TasksAdded.FromString(stored.SerializeToString()).tasks, codec.Interned())
    assert read == (*tasks, *tasks)


def test_code_counts_once_in_the_weight_of_a_part() -> None:
    spec = graph_pb2.GraphSpec()
    data = b"z" * 60_000
    sha256 = hashlib.sha256(data).hexdigest()
    spec.codes.add(sha256=sha256, zip=data)
    for number in range(600):
        call = spec.tasks.add(id=f"t{number}").python
        call.function, call.args_json, call.code = "m:f", f"[{number}]", sha256
    cut = list(task_parts(translate.graph_tasks(spec)))
    assert sum(map(len, cut)) == 600
    assert 2 <= len(cut) <= 4


def dispatches() -> agent_pb2.Dispatches:
    """Two attempts of one call, as an owner writes them."""
    spec = translate.graph_tasks(graph())[1].spec
    shard = SimpleNamespace(id="03", incarnation=1, epoch=7, epoch_revision=7, seq=2, nonce="n", create_revision=7)
    writer = DispatchWriter(cast(OwnedShard, shard), 5)
    for number in (1, 2):
        view = DispatchView("run", "team", "r", "b", spec, 9.0, {"a": b"3"}, "", 1, "1.1", keep_at_fence=False)
        writer.add(AttemptId("run", number, 1, "beef"), view)
    return writer.message(1)


def test_a_dispatch_carries_the_code_once_and_the_agent_makes_a_start_of_it() -> None:
    message = dispatches()
    assert [code.sha256 for code in message.codes] == [SHA]
    assert len(message.templates) == 1
    event = agent_translate.owner_event(1, agent_pb2.SessionResponse(dispatches=message))
    assert isinstance(event, on.Dispatched)
    first = event.assignments[0]
    request = workload.start_request(StartOrder(first.key, 5, first.spec, None), "eu")
    call = request.python
    assert call is not None
    assert (call.function, call.tenant, call.code_zip, request.argv) == ("steps.clean:Box.run", "team", ZIP, ())
    again = start_from_wire(json.loads(json.dumps(start_to_wire(request))))
    assert again.python is not None
    assert (again.python.function, again.python.args_json, again.python.code) == (call.function, call.args_json, SHA)
    assert code_from_wire(code_to_wire(call)) == (SHA, ZIP)


def test_code_that_does_not_come_with_its_message_ends_the_stream() -> None:
    message = dispatches()
    message.ClearField("codes")
    with pytest.raises(agent_translate.BadMessage, match="code"):
        agent_translate.owner_event(1, agent_pb2.SessionResponse(dispatches=message))


def test_a_range_names_the_results_of_numbered_parents() -> None:
    parents = [f"part-{n}" for n in range(10_000)]
    assert pythontask.as_range(parents) == ["part-", 0, 10_000]
    text = json.dumps([{"$baton.results": ["part-", 0, 10_000]}])
    assert pythontask.args_problem(text, parents) is None
    assert list(pythontask.results_in(json.loads(text))) == parents
    assert "'part-" not in text


@pytest.mark.parametrize(
    "ids", [["a-0", "a-1"], ["a-0", "a-1", "a-3"], ["a-0", "b-1", "a-2"], ["a-08", "a-09", "a-10"], ["x"] * 3]
)
def test_what_is_not_numbered_without_gaps_is_no_range(ids: list[str]) -> None:
    assert pythontask.as_range(ids) is None


def test_ranges_may_not_stand_for_more_than_the_parents_can_explain() -> None:
    parents = [f"p{n}" for n in range(60_000)]
    text = json.dumps([{"$baton.results": ["p", 0, 60_000]}] * 1000)
    problem = pythontask.args_problem(text, parents)
    assert problem is not None
    assert "at most 4 times" in problem
