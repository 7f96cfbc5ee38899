"""Graphs in plain Python: what calls, handles and maps make, what is refused, and what travels."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import baton
from baton import client_sync, contexts, names, packing, sdk, sdk_run, validate
from baton.clock import SystemEntropy
from baton.errors import InvalidField
from baton.sdk import Graph, task
from baton.sdk_run import Results
from baton.v1 import graph_pb2, run_pb2


@task
def load(name: str = "x", **more: Any) -> list[str]:
    """Loads."""
    return [name, *more]


@task(retry=3, timeout="90s", cpu=0.5, memory="64Mi", requirements=["numpy==2.1.0"], clusters=["eu"])
def size(of: Any, scale: int = 1) -> int:
    return len(of) * scale


@task
def total(sizes: list[int]) -> int:
    return sum(sizes)


def built(graph: Graph) -> dict[str, graph_pb2.Task]:
    spec = graph.spec()
    assert validate.violations(spec) == []
    return {each.id: each for each in spec.tasks}


def test_calls_make_nodes_and_handles_make_edges() -> None:
    with Graph(pack=False) as graph:
        first = load("a", flag=True)
        second = size(first, scale=2)
        third = total([second, {"deep": [first]}])
    tasks = built(graph)
    assert list(tasks) == [first.id, second.id, third.id] == ["load", "size", "total"]
    assert [list(each.parents) for each in tasks.values()] == [[], ["load"], ["size", "load"]]
    assert tasks["load"].python.function == f"{__name__}:load"
    assert json.loads(tasks["load"].python.args_json) == {"$baton.args": ["a"], "flag": True}
    assert json.loads(tasks["size"].python.args_json) == {"$baton.args": [{"$baton.result": "load"}], "scale": 2}
    assert json.loads(tasks["total"].python.args_json) == {
        "$baton.args": [[{"$baton.result": "size"}, {"deep": [{"$baton.result": "load"}]}]]
    }


def test_options_are_fields_of_the_task() -> None:
    with Graph(pack=False) as graph:
        size("abc")
        size.using(retry={"attempts": 2, "backoff": "1s"}, trigger="all_done", on_cluster_lost="wait", hedge=True)(
            "abc"
        )
    one, two = built(graph).values()
    assert (one.retry.max_attempts, one.timeout.seconds, one.resources.cpu_millis) == (3, 90, 500)
    assert (one.resources.memory_bytes, list(one.clusters)) == (64 << 20, ["eu"])
    assert list(one.python.requirements) == ["numpy==2.1.0"]
    assert (two.retry.max_attempts, two.retry.initial_backoff.seconds, two.timeout.seconds) == (2, 1, 90)
    assert two.trigger_rule == graph_pb2.TRIGGER_RULE_ALL_DONE
    assert two.on_cluster_lost == graph_pb2.ON_CLUSTER_LOST_WAIT
    assert two.hedge


def test_map_makes_a_node_per_item() -> None:
    with Graph(pack=False) as graph:
        sizes = size.map(["a", load()], scale=3)
        total(sizes)
    tasks = built(graph)
    assert list(tasks) == ["load", "size-0", "size-1", "total"]
    assert json.loads(tasks["size-1"].python.args_json) == {"$baton.args": [{"$baton.result": "load"}], "scale": 3}
    assert list(tasks["total"].parents) == ["size-0", "size-1"]


def test_programs_and_functions_mix() -> None:
    with Graph(pack=False) as graph:
        words = graph.task("words", argv=["sh", "-c", "echo '[1]' > $BATON_RESULT"], env={"A": "1"}, timeout="5s")
        after = size(words)
        graph.task("last", argv=["true"], after=[after])
        with pytest.raises(ValueError, match="already"):
            graph.task("last", argv=["true"])
    tasks = built(graph)
    assert tasks["words"].process.env["A"] == "1"
    assert list(tasks["size"].parents) == ["words"]
    assert list(tasks["last"].parents) == ["size"]


def test_equal_names_get_numbers() -> None:
    with Graph(pack=False):
        assert [load().id for _ in range(3)] == ["load", "load-2", "load-3"]


def test_outside_a_graph_a_task_is_its_function() -> None:
    assert load("a") == ["a"]
    assert size([1, 2], scale=2) == 4
    assert load.__doc__ == "Loads."
    with pytest.raises(RuntimeError, match="with Graph"):
        size.map([1])


def cyclic() -> list[object]:
    """A list that holds itself."""
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (object(), "object is no JSON"),
        ({1, 2}, "set is no JSON"),
        (b"x", "bytes is no JSON"),
        (lambda: 1, "function is no JSON"),
        (float("nan"), "no JSON"),
        ({1: 2}, "the key 1 is no text"),
        ("\ud800", r"load\(\).*no JSON"),
        (cyclic(), r"load\(\).*no JSON"),
        ({"$baton.result": "x"}, "pass the handle"),
        ({"$baton.results": ["x", 0, 3]}, "pass the handle"),
    ],
)
def test_arguments_that_are_no_json_are_refused_where_they_are_given(argument: object, words: str) -> None:
    with Graph(pack=False), pytest.raises(TypeError, match=words):
        load(argument)


def test_the_join_of_a_wide_map_names_its_parents_as_a_range() -> None:
    with Graph(pack=False) as graph:
        total([load.map([str(n) for n in range(5000)])])
    [joined] = [each for each in built(graph).values() if each.id == "total"]
    assert json.loads(joined.python.args_json) == {"$baton.args": [[{"$baton.results": ["load-", 0, 5000]}]]}
    assert len(joined.parents) == 5000


def test_a_handle_is_no_value_and_belongs_to_its_graph() -> None:
    with Graph(pack=False):
        foreign = load()
    with Graph(pack=False), pytest.raises(TypeError, match="another graph"):
        size(foreign)
    with pytest.raises(TypeError, match="not known while the graph is built"):
        list(foreign)
    with pytest.raises(TypeError, match="let a task decide"):
        bool(foreign)


def test_a_function_nobody_can_import_is_refused() -> None:
    @task
    def inner() -> None: ...

    with Graph(), pytest.raises(TypeError, match="cannot be imported by a worker"):
        inner()


def test_unknown_options_and_bad_values_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"@task: 'retries' is no option; did you mean 'retry'.*requirements, retry, timeout"
    ):
        task(retries=3)
    with pytest.raises(TypeError, match=r"load\.using\(\): 'timeuot' is no option; did you mean 'timeout'"):
        load.using(timeuot="1m")
    with pytest.raises(TypeError, match="'zzz' is no option; The options are"):
        task(zzz=1)
    with pytest.raises(TypeError, match="3 is no function"):
        task(3)  # type: ignore[call-overload]
    graph = Graph()
    for wrong, right in (("mem", "memory"), ("depends_on", "after"), ("environ", "env")):
        with pytest.raises(TypeError, match=f"task 'a': '{wrong}' is no option; did you mean '{right}'"):
            graph.task("a", argv=["true"], **{wrong: "1"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="run: 'namespce' is no option; did you mean 'namespace'"):
        graph.run(deadline="1m", namespce="x")
    assert graph.nodes == []
    graph.task("a", argv=["true"])  # what was refused has left no trace
    with Graph(pack=False) as graph:
        load.using(timeout="soon")()
    with pytest.raises(InvalidField, match="timeout"):
        graph.spec()
    for options, words in (
        ({"timeout": 60}, 'timeout: 60: write a text with units, e.g. "30s"'),
        ({"retry": "3"}, "retry: '3': write a number of attempts"),
        ({"retry": {"attempts": "many"}}, "retry.attempts: 'many': write a number"),
        ({"memory": "lots"}, "memory: 'lots'"),
    ):
        graph = Graph()
        graph.task("a", argv=["true"], **options)
        with pytest.raises(InvalidField, match=words):
            graph.spec()


def test_programs_are_refused_where_they_are_written_and_not_by_protobuf() -> None:
    graph = Graph()
    first = graph.task("first", argv=["true"], memory=1024)
    assert graph.spec().tasks[0].resources.memory_bytes == 1024
    other = Graph().task("other", argv=["true"])
    for error, options, words in (
        (TypeError, {"argv": "ls -l"}, r"task 'a': argv: write a list of words, \['ls', '-l'\]"),
        (TypeError, {"argv": ["sleep", 3]}, r"task 'a': argv\[1\]: 3 is no text"),
        (TypeError, {"argv": ["a"], "env": {"N": 1}}, r"task 'a': env\['N'\]: 1 is no text"),
        (TypeError, {"argv": ["a"], "after": first}, r"task 'a': after: write a list of handles"),
        (TypeError, {"argv": ["a"], "after": ["first"]}, "task 'a': after: 'first' is no handle"),
        (TypeError, {"argv": ["a"], "after": [other]}, "other is a task of another graph"),
    ):
        with pytest.raises(error, match=words):
            graph.task("a", **options)
    with pytest.raises(ValueError, match="the id of a task, 'A b': use a-z"):
        graph.task("A b", argv=["true"])
    with pytest.raises(ValueError, match="the name of the graph, 'Bad Name': use a-z"):
        Graph("Bad Name")
    assert [node.id for node in graph.nodes] == ["first"]


def test_one_text_where_a_list_is_meant_is_refused_and_not_taken_letter_by_letter() -> None:
    with pytest.raises(TypeError, match=r"requirements: write a list, \['numpy'\]"):
        task(requirements="numpy")
    with pytest.raises(TypeError, match="clusters: write a list"):
        load.using(clusters="eu")
    with pytest.raises(TypeError, match="files: write a list"):
        Graph(files="*.json")


@pytest.mark.parametrize(("pattern", "words"), [("/etc/passwd", "no pattern below"), ("../*.txt", "leaves")])
def test_files_outside_the_scripts_folder_are_refused_by_name(tmp_path: Path, pattern: str, words: str) -> None:
    (tmp_path / "outside.txt").write_text("x")
    (tmp_path / "project").mkdir()
    with pytest.raises(InvalidField, match=words):
        packing.pack(tmp_path / "project", [pattern])


def script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in a folder of its own."""
    (folder / "steps.py").write_text("from baton import task\n@task\ndef one(): return 1\n")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("steps", None)
    module = __import__("steps")
    monkeypatch.delitem(sys.modules, "steps", raising=False)
    monkeypatch.setitem(sys.modules, "steps", module)
    return module


def test_the_scripts_folder_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "__init__.py").write_text("x = 1\n")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.py").write_text("")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    (tmp_path / "venv" / "big.py").write_text("")
    module = script(tmp_path, monkeypatch)
    with Graph(files=["*.json"]) as graph:
        module.one()
    spec = graph.spec()
    [code] = spec.codes
    assert code.sha256 == hashlib.sha256(code.zip).hexdigest() == spec.tasks[0].python.code
    names = zipfile.ZipFile(io.BytesIO(code.zip)).namelist()
    assert names == ["data.json", "steps.py", "sub/__init__.py"]
    assert validate.violations(spec) == []
    assert graph.spec().codes[0].sha256 == code.sha256


def test_code_over_the_limit_names_the_limit_and_the_largest_file(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("")
    (tmp_path / "large.py").write_bytes(b"x" * (packing.MAX_FOLDER_BYTES + 1))
    with pytest.raises(InvalidField, match=r"over the limit of 10485760 \(largest: large.py"):
        packing.pack(tmp_path)
    with pytest.raises(InvalidField, match="names no file"):
        packing.pack(tmp_path, ["gone.csv"])


def test_a_script_run_as_main_is_called_by_its_file_name(tmp_path: Path) -> None:
    text = "from baton import Graph, task\n@task\ndef one(): return 1\nwith Graph() as g: one()\n"
    for name, said in (("my_graph", "my_graph:one"), ("my-graph", "use letters, digits and underscores")):
        path = tmp_path / f"{name}.py"
        path.write_text(text + "print(g.spec().tasks[0].python.function)\n")
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=60)
        assert said in done.stdout + done.stderr


def test_the_package_loads_neither_grpc_nor_protobuf_for_a_worker() -> None:
    program = "import sys; from baton import Graph, task; print([m for m in sys.modules if m in ('grpc', 'google')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_graph_that_runs_while_a_worker_imports_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_IMPORTING", "1")
    with pytest.raises(RuntimeError, match="__main__"):
        Graph().run(deadline="1m")


def test_results_are_read_by_handle() -> None:
    with Graph(pack=False):
        one, two = load(), load()
    results = Results(run_pb2.Run(), {one.id: b'{"a": 1}', two.id: b"plain", "none": b""})
    assert results[one] == {"a": 1}
    assert (results[two], results["none"], len(results)) == ("plain", None, 3)


def test_the_package_names_what_it_has() -> None:
    assert baton.Graph is sdk.Graph
    with pytest.raises(AttributeError, match="nothing"):
        _ = baton.nothing


def test_every_run_of_a_named_graph_has_a_name_of_its_own() -> None:
    """A finished run keeps its name: the second run of a script must not be refused for it."""
    first, second = (sdk_run.run_id_of("words", SystemEntropy()) for _ in range(2))
    assert first != second
    assert first.startswith("words-")
    assert names.id_problem(sdk_run.run_id_of("w" * 63, SystemEntropy())) is None
    assert sdk_run.run_id_of("", SystemEntropy()) == ""


def test_ctrl_c_ends_the_waiting_and_says_that_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(work: Coroutine[Any, Any, Any]) -> None:
        work.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(client_sync, "wait", interrupted)
    for name, typed in (
        ("namespaces/default/runs/words-1a2b", "words-1a2b"),
        ("namespaces/team/runs/words-1a2b", "namespaces/team/runs/words-1a2b"),  # else looked for in the default one
    ):
        to = contexts.Context(endpoints=("127.0.0.1:1",))
        started = sdk_run.StartedRun(sdk_run.AsyncStartedRun(run_pb2.Run(name=name), to))
        with pytest.raises(KeyboardInterrupt) as told:
            started.results()
        assert f"`baton watch {typed}`" in told.value.__notes__[0]
