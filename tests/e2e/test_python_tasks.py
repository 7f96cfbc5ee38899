"""Python tasks as a user writes them: a script, run as `python my_graph.py`, against real etcd, replicas, agents, guards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_local import Home, eventually

MY_GRAPH = """
import json, os, time
from baton import Graph, task
from helpers import double

@task
def numbers():
    return list(range(12))

@task(retry=2, timeout="1m")
def work(n, *, known):
    print("working on", n, "at", os.environ["BATON_CLUSTER"])
    time.sleep(3)
    return {"n": double(known[n]), "cluster": os.environ["BATON_CLUSTER"]}

@task
def join(parts):
    return {"sum": sum(each["n"] for each in parts), "clusters": sorted({each["cluster"] for each in parts})}

if __name__ == "__main__":
    with Graph("moved") as graph:
        answer = join(work.map(range(12), known=numbers()))
    print(json.dumps(graph.run(deadline="3m")[answer]))
"""

BAD_GRAPH = """
import os, time
from baton import Graph, RunFailed, task
safe = {"clusters": ["us", "ap"]}

@task(**safe)
def raises(): raise ValueError("bad word")
@task(**safe)
def leaves(): os._exit(4)
@task(timeout="1s", grace="200ms", **safe)
def hangs(): time.sleep(60)
@task(**safe)
def large(): return "x" * 20_000
@task(requirements=["missing-package @ file:///nowhere/missing_package-1.0-py3-none-any.whl"], **safe)
def needs(): return 1
@task(trigger="all_done", **safe)
def last(parts): return parts

if __name__ == "__main__":
    with Graph() as graph:
        last([raises(), leaves(), hangs(), large(), needs()])
    try:
        graph.run(deadline="2m")
    except RunFailed as error:
        import json
        print(json.dumps({"state": error.state, "run": error.run.name, "failures": error.failures}))
"""


def script(home: Home, name: str, text: str) -> Path:
    folder = home.path / name
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    (folder / "helpers.py").write_text("def double(x): return 2 * x\n")
    return folder / f"{name}.py"


def run_script(home: Home, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, path], env=home.env, cwd=home.path, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    found = Home(tmp_path_factory.mktemp("python"))
    found.baton("local", "up", "--detach")
    yield found
    found.baton("local", "down", "--delete", code=None)


@pytest.fixture(scope="module")
def bad(home: Home) -> Iterator[subprocess.Popen[str]]:
    """Runs beside the other test, which mostly waits; on the clusters that are not killed."""
    process = run_script(home, script(home, "bad_graph", BAD_GRAPH))
    yield process
    process.kill()
    process.wait()


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("bad")
def test_a_script_finishes_over_three_clusters_when_one_is_killed_and_its_folder_is_gone(home: Home) -> None:
    path = script(home, "my_graph", MY_GRAPH)
    process = run_script(home, path)

    def places() -> dict[str, str]:
        if home.baton("get", "run", "moved", code=None).returncode != 0:
            return {}
        tasks = json.loads(home.baton("get", "tasks", "moved", "-o", "json").stdout)["tasks"]
        return {
            each["id"]: each["attempts"][-1]["cluster"]
            for each in tasks
            if each["state"] == "TASK_STATE_RUNNING" and each["id"].startswith("work")
        }

    try:
        eventually(lambda: "eu" in places().values(), "work to run on eu")
        home.baton("local", "kill", "eu")
        shutil.rmtree(path.parent)
        out, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(out)["sum"] == 132
    assert {"ap", "us"} <= set(json.loads(out)["clusters"])
    run = json.loads(home.baton("get", "run", "moved", "-o", "json").stdout)
    assert "SUCCEEDED" in json.dumps(run)
    tasks = json.loads(home.baton("get", "tasks", "moved", "-o", "json").stdout)["tasks"]
    assert any(len({each["cluster"] for each in task["attempts"]}) > 1 for task in tasks)
    assert all(task["acceptedResults"] == 1 for task in tasks)


def test_failures_say_who_is_at_fault(home: Home, bad: subprocess.Popen[str]) -> None:
    out, _ = bad.communicate(timeout=60)
    found = json.loads(out)
    assert found["state"] == "FAILED"
    words = {
        "raises": "ValueError: bad word (bad_graph.py:7",
        "leaves": "ended in mid-task, by exit code 4",
        "hangs": "timed out",
        "large": "over the limit of 16 KiB",
        "needs": "package missing-package",
    }
    assert set(found["failures"]) == set(words)
    for task, expected in words.items():
        assert expected in found["failures"][task], found["failures"]
    result = home.baton("result", f"{found['run'].rpartition('/')[2]}/last")
    assert json.loads(result.stdout) == [None] * 5
    assert "Traceback" in home.baton("logs", f"{found['run'].rpartition('/')[2]}/raises").stdout
