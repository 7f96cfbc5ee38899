"""`baton local`, as typed: real etcd, replicas and clusters, real faults, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster_agent.guard import proctree
from lab.layout import Layout
from lab.processes import Identity, identify

SOON = 40.0

GRAPH = """\
apiVersion: baton/v1
kind: Graph
spec:
  deadline: 5m
  tasks:
    - {id: first, argv: [sh, -c, 'sleep SECONDS; echo 3 > "$BATON_RESULT"']}
    - {id: second, argv: [sh, -c, 'cat "$BATON_INPUTS" > "$BATON_RESULT"'], after: [first]}
"""


@dataclass(frozen=True)
class Home:
    """A user's home: state, contexts and work of one test."""

    path: Path

    @property
    def env(self) -> Mapping[str, str]:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("BATON_", "XDG_STATE"))}
        etcd = {"BATON_ETCD": os.environ["BATON_ETCD"]} if "BATON_ETCD" in os.environ else {}
        return {**keep, **etcd, "XDG_STATE_HOME": str(self.path / "state"), "BATON_CONFIG": str(self.path / "contexts")}

    @property
    def layout(self) -> Layout:
        return Layout(self.path / "state" / "baton" / "local")

    def baton(self, *words: str, code: int | None = 0, seconds: float = 55.0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "baton.cli", *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=self.env,
            cwd=self.path,
            check=False,
        )
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.baton("local", "status", "-o", "json").stdout)
        return found

    def part(self, name: str) -> dict[str, Any]:
        found = self.status()
        parts: list[dict[str, Any]] = [found["store"], *found["replicas"], *found["clusters"]]
        return next(each for each in parts if each["name"] == name)

    def cluster(self, name: str) -> dict[str, Any]:
        """As the control plane sees it."""
        clusters: list[dict[str, Any]] = json.loads(self.baton("get", "clusters", "-o", "json").stdout)["clusters"]
        return next(each for each in clusters if each["name"] == f"clusters/{name}")

    def processes(self) -> list[Identity]:
        """Everything that belongs to the federation right now, machines' descendants included."""
        state = self.layout.read_state()
        known = [Identity(*each) for each in state["processes"]]
        below = proctree.everything()
        found = [identify(each.pid) for root in known for each in proctree.descendants(root.pid, below)]
        return [each for each in (*known, *found) if each.alive]

    def graph(self, seconds: float = 0.0) -> str:
        path = self.path / f"graph-{seconds}.yaml"
        path.write_text(GRAPH.replace("SECONDS", str(seconds)))
        return str(path)


def eventually(see: Callable[[], bool], what: str, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not see():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def all_gone(processes: list[Identity]) -> None:
    assert len(processes) >= 4
    eventually(lambda: not any(each.alive for each in processes), "every process to be gone", 20.0)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    found = Home(tmp_path)
    yield found
    found.baton("local", "down", code=None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A federation for the tests that leave it as they found it."""
    found = Home(tmp_path_factory.mktemp("shared"))
    found.baton("local", "up", "--clusters", "eu,us", "--detach")
    yield found
    left = found.processes()
    found.baton("local", "down", "--delete")
    all_gone(left)
    assert not found.layout.directory.exists()


def test_up_tells_where_it_is_and_writes_a_context(shared: Home) -> None:
    again = shared.baton("local", "up")
    assert "already running" in again.stdout
    address = shared.status()["endpoints"][0]
    assert address in again.stdout
    assert str(shared.layout.logs) in again.stdout
    assert again.stdout.count("\n  baton ") == 3
    assert 'current = "local"' in (shared.path / "contexts").read_text()
    assert {each["state"] for each in shared.status()["clusters"]} == {"running"}
    assert shared.layout.directory.stat().st_mode & 0o077 == 0


def test_another_federation_beside_a_live_one_is_refused(shared: Home) -> None:
    done = shared.baton("local", "up", "--replicas", "3", "--detach", code=1)
    assert "already running" in done.stdout
    assert "local down" in done.stderr


def test_a_run_succeeds_through_the_context(shared: Home) -> None:
    shared.baton("run", shared.graph(), "--wait", "--name", "plain")
    assert "plain" in shared.baton("get", "runs").stdout


def test_names_that_are_not_there(shared: Home) -> None:
    assert "eu" in shared.baton("local", "kill", "mars", code=5).stderr
    shared.baton("local", "cut", "etcd", code=5)
    shared.baton("local", "kill", "replica-1", "--agent-only", code=1)


def test_an_agent_that_is_killed_alone_loses_no_work(shared: Home) -> None:
    shared.baton("run", shared.graph(6.0), "--name", "orphan")
    task = "orphan/first"

    def attempts() -> list[dict[str, Any]]:
        found = json.loads(shared.baton("timeline", "orphan", "--json").stdout)["tasks"][0].get("attempts", [])
        return list(found)

    eventually(lambda: any("RUNNING" in each["state"] for each in attempts()), f"{task} to run")
    cluster = attempts()[0]["cluster"]
    shared.baton("local", "kill", cluster, "--agent-only")
    assert shared.part(cluster)["state"] == "agent dead"
    shared.baton("local", "start", cluster)
    assert shared.part(cluster)["state"] == "running"
    eventually(lambda: "SUCCEEDED" in attempts()[0]["state"], f"{task} to end")
    assert len(attempts()) == 1


def test_a_cut_cluster_is_suspected_and_comes_back_as_it_was(shared: Home) -> None:
    before = shared.cluster("us")
    shared.baton("local", "cut", "us")
    assert shared.part("us") == {**shared.part("us"), "state": "running", "network": "cut"}
    eventually(lambda: "SUSPECT" in shared.cluster("us")["health"], "us to be suspected")
    shared.baton("local", "heal", "us")
    eventually(lambda: "READY" in shared.cluster("us")["health"], "us to be ready")
    assert shared.cluster("us")["generation"] == before["generation"]


def test_a_frozen_agent_is_suspected_and_thaws(shared: Home) -> None:
    before = shared.cluster("eu")
    shared.baton("local", "freeze", "eu")
    process = proctree.read(shared.part("eu")["pid"])
    assert process is not None
    assert process.state == "T"
    shared.baton("local", "freeze", "eu", "--all")
    below = proctree.descendants(process.ppid, proctree.everything())
    assert {each.state for each in below} == {"T"}
    eventually(lambda: "SUSPECT" in shared.cluster("eu")["health"], "eu to be suspected")
    shared.baton("local", "thaw", "eu")
    eventually(lambda: "READY" in shared.cluster("eu")["health"], "eu to be ready")
    assert shared.cluster("eu")["generation"] == before["generation"]


def test_a_killed_cluster_leaves_nothing_and_comes_back_rebooted(shared: Home) -> None:
    before, boot = shared.cluster("eu"), shared.layout.boot_id("eu").read_text()
    agent = shared.part("eu")["pid"]
    machine = next(
        each for each in shared.processes() if each.pid == (proctree.read(agent) or pytest.fail("gone")).ppid
    )
    below = [identify(each.pid) for each in proctree.descendants(machine.pid, proctree.everything())]
    assert len(below) >= 2  # an agent and its guard
    shared.baton("local", "kill", "eu")
    assert not any(each.alive for each in (machine, *below))
    assert shared.part("eu")["state"] == "dead"
    shared.baton("local", "start", "eu")
    assert shared.layout.boot_id("eu").read_text() != boot
    eventually(lambda: shared.cluster("eu")["generation"] != before["generation"], "another generation")
    eventually(lambda: "READY" in shared.cluster("eu")["health"], "eu to be ready")


def test_a_killed_replica_is_not_missed_and_comes_back_at_its_address(shared: Home) -> None:
    address = shared.part("replica-1")["address"]
    shared.baton("local", "kill", "replica-1")
    assert shared.part("replica-1")["state"] == "dead"
    shared.baton("run", shared.graph(), "--wait", "--name", "without-one")
    shared.baton("local", "start", "replica-1")
    assert shared.part("replica-1") == {**shared.part("replica-1"), "state": "running", "address": address}


def test_a_cut_replica_is_not_missed_and_comes_back(shared: Home) -> None:
    shared.baton("local", "cut", "replica-2")
    shared.baton("run", shared.graph(), "--wait", "--name", "around")
    shared.baton("local", "heal", "replica-2")
    assert shared.part("replica-2") == {**shared.part("replica-2"), "state": "running", "network": "up"}

    def replicas() -> int:
        return len(json.loads(shared.baton("get", "replicas", "-o", "json").stdout)["replicas"])

    eventually(lambda: replicas() == 2, "replica-2 to be a member again")


def test_etcd_killed_and_started_again_keeps_what_it_had(shared: Home) -> None:
    shared.baton("run", shared.graph(), "--wait", "--name", "kept")
    shared.baton("local", "kill", "etcd")
    assert shared.part("etcd")["state"] == "dead"
    degraded = "degraded: etcd is dead; baton local start etcd"
    assert shared.baton("local", "status").stdout.splitlines()[0] == degraded
    assert shared.baton("local", "up").stdout.splitlines()[0] == degraded
    assert "etcd was dead already" in shared.baton("local", "kill", "etcd").stdout
    eventually(lambda: degraded in shared.layout.log("supervisor").read_text(), "the supervisor to say so")
    shared.baton("local", "start", "etcd")
    shared.baton("run", shared.graph(), "--wait", "--name", "after")
    assert "kept" in shared.baton("get", "runs").stdout


def test_down_keeps_the_state_and_up_resumes_it(home: Home) -> None:
    home.baton("local", "up", "--replicas", "1", "--clusters", "solo", "--detach")
    home.baton("run", home.graph(), "--wait", "--name", "yesterday")
    address, left = home.status()["endpoints"], home.processes()
    home.baton("local", "down")
    all_gone(left)
    assert "local" not in (home.path / "contexts").read_text().partition("\n")[2]
    home.baton("local", "up", "--detach")
    assert home.status()["settings"]["clusters"] == ["solo"]
    assert home.status()["endpoints"] == address
    assert "yesterday" in home.baton("get", "runs").stdout
    home.baton("run", home.graph(), "--wait", "--name", "today")


def test_ctrl_c_ends_all_of_it(home: Home) -> None:
    words = [sys.executable, "-m", "baton.cli", "local", "up", "--replicas", "1", "--clusters", "solo"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=home.env, cwd=home.path) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "ctrl-C" in line:
                break
        left = home.processes()
        running.send_signal(signal.SIGINT)
        assert "stopped" in running.stdout.read()
    assert running.returncode == 0
    all_gone(left)
    home.baton("local", "status", code=6)


def test_a_supervisor_that_is_killed_takes_everything_with_it(home: Home) -> None:
    home.baton("local", "up", "--replicas", "1", "--clusters", "solo", "--detach")
    left = home.processes()
    replica = proctree.read(home.part("replica-1")["pid"])
    assert replica is not None
    os.kill(replica.ppid, signal.SIGKILL)
    all_gone(left)
    home.baton("local", "status", code=6)
    home.baton("local", "up", "--detach")


def test_nothing_runs_and_bad_settings(home: Home) -> None:
    home.baton("local", "kill", "eu", code=6)
    there = home.baton("local", "kill", "eu", "--directory", str(home.path / "none"), code=6)
    assert f"local up --directory {home.path / 'none'}`" in there.stderr  # a hint is pasted
    home.baton("local", "down")
    home.baton("local", "up", "--replicas", "0", code=2)
    assert "twice" in home.baton("local", "up", "--clusters", "eu,eu", code=2).stderr
    assert "another part" in home.baton("local", "up", "--clusters", "etcd", code=2).stderr
    home.baton("local", "up", "--profile", "reckless", code=2)
    (home.path / "contexts").write_text("current = ")
    assert "is not TOML" in home.baton("local", "up", code=2).stderr  # before anything is started
    (home.path / "contexts").unlink()
    for detach in ((), ("--detach",)):
        assert "--directory" in home.baton("local", "up", "--directory", "/proc/x", *detach, code=2).stderr


def test_delete_touches_nothing_that_is_not_ours(home: Home) -> None:
    mine = home.path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not lose")
    home.baton("local", "down", "--delete", "--directory", str(mine), code=1)
    assert (mine / "thesis.txt").exists()
