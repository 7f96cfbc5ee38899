"""Python tasks as a user writes them: a script, run as `python my_graph.py`, against real etcd, replicas, agents, guards."""

from __future__ import annotations

import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import processes
from tests.e2e.test_local import Home, eventually

MY_GRAPH = """
import json, os, time
from baton import Graph, artifact_path, input_path, task
from helpers import double
from table import TABLE

CLUSTERS = "CLUSTERS_FOLDER"

@task
def numbers():
    return list(range(12))

@task(retry=2, timeout="1m")
def work(n, *, known):
    print("working on", n, "at", os.environ["BATON_CLUSTER"])
    artifact_path(f"note-{n}.txt").write_text(os.environ["BATON_CLUSTER"])
    others = [each for each in ("eu", "us", "ap") if each != os.environ["BATON_CLUSTER"]]
    seen = sum(len(os.listdir(os.path.join(CLUSTERS, each))) for each in others) + len(os.listdir(CLUSTERS + "/../artifacts"))
    time.sleep(30 if os.environ["BATON_CLUSTER"] == "eu" else 3)  # eu is killed while it works
    return {"n": double(known[n]), "cluster": os.environ["BATON_CLUSTER"], "seen": seen, "long": TABLE[:30_000]}

@task
def join(parts):
    notes = {input_path(f"work-{n}", f"note-{n}.txt").read_text() for n in range(12)}
    clusters = sorted({each["cluster"] for each in parts})
    assert notes == set(clusters) and all(len(each["long"]) == 30_000 for each in parts)
    return {"sum": sum(each["n"] for each in parts), "clusters": clusters, "seen": sum(each["seen"] for each in parts)}

if __name__ == "__main__":
    with Graph("moved") as graph:
        answer = join(work.map(range(12), known=numbers()))
    print(json.dumps(graph.run(deadline="3m", name="moved")[answer]))
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
def odd(): return {1, 2}
@task(**safe)
def unsavable():
    from baton import checkpoint
    checkpoint.save(object())
@task(**safe)
def misnamed():
    from baton import artifact_path
    artifact_path("fine.txt").symlink_to("/etc/hostname")
@task(requirements=["missing-package @ file:///nowhere/missing_package-1.0-py3-none-any.whl"], **safe)
def needs(): return 1
@task(trigger="all_done", **safe)
def last(parts): return parts

if __name__ == "__main__":
    with Graph() as graph:
        last([raises(), leaves(), hangs(), odd(), unsavable(), misnamed(), needs()])
    try:
        graph.run(deadline="2m")
    except RunFailed as error:
        import json
        print(json.dumps({"state": error.state, "run": error.run.name, "failures": error.failures}))
"""


@functools.cache
def may_be_apart() -> bool:
    """Whether this host lets clusters have mount namespaces: root does, and so do user namespaces; some containers do not."""
    words = "import sys; from cluster_agent.guard import host; host.cover(sys.argv[1:])"
    probe = [sys.executable, "-c", words, tempfile.gettempdir()]
    return subprocess.run(probe, cwd=processes.ROOT, capture_output=True, check=False, timeout=30).returncode == 0


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
    found.baton("local", "up", "--detach", "--apart" if may_be_apart() else "--together")
    yield found
    found.baton("local", "down", "--delete", code=None)


@pytest.fixture(scope="module")
def bad(home: Home) -> Iterator[subprocess.Popen[str]]:
    """Runs beside the other test, which mostly waits; on the clusters that are not killed."""
    process = run_script(home, script(home, "bad_graph", BAD_GRAPH))
    with process:
        yield process
        process.kill()


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("bad")
def test_a_script_finishes_over_three_clusters_when_one_is_killed_and_its_folder_is_gone(home: Home) -> None:
    """Each cluster sees nothing of the others' disks, nor of the store's: results, files and code went through the federation."""
    table = f"TABLE = '{random.Random(1).randbytes(150_000).hex()}'\n"  # too much to ride with the graph: it is stored
    path = script(home, "my_graph", MY_GRAPH.replace("CLUSTERS_FOLDER", str(home.layout.directory / "clusters")))
    path.with_name("table.py").write_text(table)
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
    assert json.loads(out)["seen"] == 0 or not may_be_apart()
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
        "odd": "the function returned set, not JSON",
        "unsavable": "a checkpoint is bytes or JSON, and this object is neither",
        "misnamed": "artifact 'fine.txt' is a symbolic link",
        "needs": "package missing-package",
    }
    assert set(found["failures"]) == set(words)
    for task, expected in words.items():
        assert expected in found["failures"][task], found["failures"]
    result = home.baton("result", f"{found['run'].rpartition('/')[2]}/last")
    assert json.loads(result.stdout) == [None] * 7
    assert "Traceback" in home.baton("logs", f"{found['run'].rpartition('/')[2]}/raises").stdout
