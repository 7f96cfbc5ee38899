"""The testing kit: what users' tests may rely on. Production replicas and agents, virtual time, real functions."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton import Graph, task
from baton.errors import InvalidField
from baton.testing import Call, Ended, Federation, Finished
from baton.v1 import run_pb2

CALLS: list[str] = []


@task
def count(text: str) -> int:
    CALLS.append(os.environ["BATON_FENCE"])
    print("counting on", os.environ["BATON_CLUSTER"])
    return len(text.split())


@task
def total(counts: list[int | None]) -> int:
    return sum(each or 0 for each in counts)


@task(retry={"attempts": 3, "backoff": "1s"})
def shaky(until: int) -> str:
    if int(os.environ["BATON_ATTEMPT"]) < until:
        raise ValueError("not yet")
    return "there"


@task
async def slowly(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


@task
def odd() -> Any:
    return {1, 2}


@pytest.fixture(autouse=True)
def _nothing_called() -> None:
    CALLS.clear()


def words() -> tuple[Graph, Any]:
    with Graph() as graph:
        answer = total(count.map(["a b c", "d e"]))
    return graph, answer


def programs(*ids: str, **options: Any) -> Graph:
    graph = Graph()
    last: list[Any] = []
    for name in ids:
        last = [graph.task(name, argv=["work", name], after=last, **options)]
    return graph


def test_functions_are_called_and_results_flow() -> None:
    graph, answer = words()
    with Federation() as fed:
        done = fed.run(graph)
        again = fed.run(graph)
    assert (done.state, done.results[answer], again.results["total"]) == ("SUCCEEDED", 5, 5)
    assert CALLS == ["1.1"] * 4
    assert done.outputs["count-0"].startswith("counting on ")
    assert "BATON_FENCE" not in os.environ


def test_a_lost_clusters_work_is_moved_and_its_function_called_again() -> None:
    graph, answer = words()
    with Federation(["eu", "us"], seconds={"count": 10}) as fed:
        fed.lose(when="count-0")
        done = fed.run(graph)
    assert done.results[answer] == 5
    first, second = done.attempts("count-0")
    assert (first.state, second.state) == (run_pb2.ATTEMPT_STATE_LOST, run_pb2.ATTEMPT_STATE_SUCCEEDED)
    assert first.cluster != second.cluster
    assert done.tasks["count-0"].accepted_results == 1
    assert "1.2" in CALLS


def test_a_short_cut_moves_nothing_and_a_long_one_does() -> None:
    def story(seconds: float | None) -> Finished:
        with Federation(["eu", "us"], programs=lambda _call: Ended(seconds=15)) as fed:
            fed.cut(when="a", seconds=seconds)
            return fed.run(programs("a"))

    assert len(story(4.0).clusters("a")) == 1
    moved = story(None)
    assert (moved.state, len(set(moved.clusters("a")))) == ("SUCCEEDED", 2)


def test_work_that_may_not_be_copied_waits_for_its_cluster() -> None:
    with Federation(["eu", "us"], programs=lambda _call: Ended(seconds=5)) as fed:
        fed.lose("eu", when="a")
        fed.restore("eu", at=60)
        done = fed.run(programs("a", on_cluster_lost="wait", clusters=["eu"]))
    assert done.state == "SUCCEEDED"
    assert done.clusters("a") == ["eu", "eu"]
    assert done.seconds > 60


def test_a_replica_dies_and_another_goes_on() -> None:
    with Federation(["eu"], replicas=2, programs=lambda _call: Ended(seconds=10)) as fed:
        fed.kill_replica("r0", when="a", at=1)
        done = fed.run(programs("a", "b"))
    assert done.state == "SUCCEEDED"
    assert [len(done.clusters(name)) for name in "ab"] == [1, 1]


def test_an_agent_dies_and_its_work_goes_on() -> None:
    with Federation(["eu", "us"], programs=lambda _call: Ended(seconds=10)) as fed:
        fed.kill_agent(when="a")
        done = fed.run(programs("a"))
    assert (done.state, len(done.clusters("a"))) == ("SUCCEEDED", 1)
    assert done.seconds < 20


def test_programs_are_scripted_and_see_their_inputs() -> None:
    seen: list[Call] = []

    def work(call: Call) -> Any:
        seen.append(call)
        if call.task == "b" and call.attempt == 1:
            return Ended(exit_code=3, seconds=2, output="oh no")
        return {"of": call.task}

    with Federation(["eu"], programs={"work": work}) as fed:
        done = fed.run(programs("a", "b", retry=2))
    assert [(call.task, call.attempt, call.cluster) for call in seen] == [
        ("a", 1, "eu"),
        ("b", 1, "eu"),
        ("b", 2, "eu"),
    ]
    assert seen[1].inputs == {"a": '{"of": "a"}'}
    assert done.results["b"] == {"of": "b"}
    assert done.attempts("b")[0].exit_code == 3


def test_what_the_test_forgot_is_an_error_of_the_test() -> None:
    with Federation(["eu"]) as fed, pytest.raises(LookupError, match="does not say what 'work' does"):
        fed.run(programs("a"))
    with Federation(["eu"], programs=lambda call: 1 / 0) as fed, pytest.raises(ZeroDivisionError):
        fed.run(programs("a"))
    with Federation(["eu"], programs=lambda call: None) as fed:
        fed.lose(when="typo")
        with pytest.raises(ValueError, match="no such task"):
            fed.run(programs("a"))
        with pytest.raises(ValueError, match="none of eu"):
            fed.lose("us")
    with pytest.raises(InvalidField):
        Federation(["No Name"])
    with pytest.raises(RuntimeError, match="with Federation"):
        _ = Federation().now


def test_functions_that_raise_return_no_json_or_are_coroutines() -> None:
    with Graph() as graph:
        fine, late, bad = slowly(1), shaky(3), odd()
    with Federation(["eu"]) as fed:
        done = fed.run(graph)
    assert (done.state, done.results[fine], done.results[late]) == ("FAILED", 2, "there")
    assert [attempt.message.partition(" (")[0] for attempt in done.attempts(late)] == ["ValueError: not yet"] * 2 + [""]
    assert done.failures == {bad.id: "the function returned set, not JSON: Object of type set is not JSON serializable"}
    assert done.state_of(bad) == "FAILED"


def test_a_deadline_passes_in_no_time() -> None:
    with Federation(["eu"], programs=lambda _call: Ended(seconds=3600)) as fed:
        done = fed.run(programs("a"), deadline="2m")
    assert done.state == "DEADLINE_EXCEEDED"
    assert 119 < done.seconds < 180  # the way to the replica counts, too


def test_labels_choose_the_cluster_and_files_are_graphs(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(
        "apiVersion: baton/v1\nkind: Graph\nspec:\n  deadline: 5m\n  tasks:\n"
        "    - {id: a, argv: [work], selector: {zone: cold}}\n"
    )
    with Federation({"eu": {"zone": "warm"}, "us": {"zone": "cold"}}, programs=lambda _call: "done") as fed:
        done = fed.run(file)
    assert (done.clusters("a"), done.results["a"]) == (["us"], "done")


def test_equal_tests_go_equal_ways() -> None:
    def story() -> tuple[float, list[list[str]]]:
        graph, _answer = words()
        with Federation(seconds={"count": 10}) as fed:
            fed.lose(when="count-1")
            done = fed.run(graph)
            return done.seconds, [done.clusters(name) for name in done.tasks]

    assert story() == story()


async def test_in_a_coroutine_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="to_thread"), Federation(["eu"]):
        pass
    graph, answer = words()

    def story() -> Any:
        with Federation(["eu"]) as fed:
            return fed.run(graph).results[answer]

    assert await asyncio.to_thread(story) == 5


def test_the_example_passes(checkout: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checkout / "examples" / "python")]
    done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_what_the_page_shows_passes_with_the_graph_of_the_readme(checkout: Path, tmp_path: Path) -> None:
    (graph,) = re.findall(r"```python\n(# my_graph.py\n.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    page = re.findall(r"```python\n(.*?)```", (checkout / "docs" / "testing.md").read_text(), re.DOTALL)
    (tmp_path / "my_graph.py").write_text(graph)
    (tmp_path / "test_page.py").write_text(page[0])
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".", "."]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_still_imports_neither_plane(checkout: Path) -> None:
    code = "import sys, baton.testing; print([m for m in sys.modules if m.split('.')[0] in ('lab','control_plane','cluster_agent')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
