"""What `baton doctor` makes of facts, and what `baton diff` calls a difference."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from baton.cli import checks, diff
from baton.cli.checks import FAIL, OK, WARN, Check, Reached
from baton.v1 import admin_pb2, cluster_pb2, run_pb2

NOW = 1_800_000_000.0
READY, LOST = cluster_pb2.CLUSTER_HEALTH_READY, cluster_pb2.CLUSTER_HEALTH_LOST
OPEN, CORDONED = cluster_pb2.CLUSTER_ADMISSION_OPEN, cluster_pb2.CLUSTER_ADMISSION_CORDONED


def cluster(
    name: str,
    health: cluster_pb2.ClusterHealth.ValueType = READY,
    beat: float = NOW - 1,
    admission: cluster_pb2.ClusterAdmission.ValueType = OPEN,
    killer: bool = True,
) -> cluster_pb2.Cluster:
    made = cluster_pb2.Cluster(name=f"clusters/{name}", health=health, admission=admission, orphan_killer=killer)
    made.heartbeat_time.FromNanoseconds(int(beat * 1e9))
    return made


def told(found: Iterable[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in found]


def test_one_endpoint_of_two_is_a_warning_none_a_failure() -> None:
    up, down = Reached("a:1", 0.002), Reached("b:1", None, "refused")
    assert told(checks.reachable([up, up])) == [("reachable", OK)] * 2
    assert told(checks.reachable([up, down])) == [("reachable", OK), ("reachable", WARN)]
    assert told(checks.reachable([down])) == [("reachable", FAIL)]


@pytest.mark.parametrize(
    ("age", "status"), [(1.0, OK), (14.0, OK), (-1.0, OK), (-30.0, WARN), (60.0, WARN), (-900.0, FAIL), (900.0, FAIL)]
)
def test_the_clock_is_judged_by_the_newest_heartbeat(age: float, status: str) -> None:
    found = checks.clocks([cluster("old", beat=NOW - age - 50), cluster("eu", beat=NOW - age)], NOW)
    assert found.status == status
    assert (found.fix != "") == (status != OK)


def test_a_lost_clusters_heartbeat_says_nothing_of_the_clock() -> None:
    assert checks.clocks([cluster("eu", LOST)], NOW).status == WARN


def test_the_level_is_what_all_replicas_read() -> None:
    old, new = admin_pb2.Replica(id="r1", feature_level=1), admin_pb2.Replica(id="r2", feature_level=2)
    assert checks.feature_level([new, new]).status == OK
    held = checks.feature_level([new, old])
    assert held.status == WARN
    assert "r1" in held.detail
    assert "r1" in held.fix


def test_certificates_are_renewed_in_time() -> None:
    assert checks.tls(certificates=False, days=None, problem="").status == OK
    assert checks.tls(certificates=True, days=90, problem="").status == OK
    assert checks.tls(certificates=True, days=3, problem="").status == WARN
    assert checks.tls(certificates=True, days=None, problem="no handshake").status == FAIL


def test_versions() -> None:
    def of(*theirs: str) -> str:
        return checks.versions("1.0", [admin_pb2.Replica(id=each, version=each) for each in theirs]).status

    assert (of("1.0", "1.0"), of("1.0", "1.1"), of("1.1")) == (OK, WARN, WARN)


def test_shards_need_owners_and_a_suspected_restore_stops_all() -> None:
    owned, lone = admin_pb2.Shard(id="00", replica="r1"), admin_pb2.Shard(id="01")
    assert told(checks.shards(admin_pb2.ListShardsResponse(shards=[owned]))) == [("shards", OK)]
    assert told(checks.shards(admin_pb2.ListShardsResponse(shards=[owned, lone]))) == [("shards", FAIL)]
    suspected = admin_pb2.ListShardsResponse(shards=[owned], restore_suspected=True)
    assert told(checks.shards(suspected)) == [("restore", FAIL), ("shards", OK)]
    after = admin_pb2.ListShardsResponse(shards=[owned], restore_detail="run of uid a (work of it on eu)\nrun of uid b")
    (restored, _) = checks.shards(after)
    assert (restored.status, restored.detail[:20]) == (WARN, "2 runs are forgotten")


def test_clusters() -> None:
    three = [cluster("ap"), cluster("eu"), cluster("us")]
    assert told(checks.clusters(three)) == [("clusters", OK)]
    assert told(checks.clusters([])) == [("clusters", FAIL)]
    assert told(checks.clusters([*three, cluster("xx", LOST)])) == [("clusters", WARN)]
    assert told(checks.clusters([cluster("xx", LOST)])) == [("clusters", FAIL)]
    assert told(checks.clusters([*three[1:], cluster("ap", admission=CORDONED)]))[1] == ("admission", WARN)
    assert told(checks.clusters(three[:2])) == [("clusters", OK), ("storm guard", WARN)]
    assert told(checks.clusters([*three[1:], cluster("ap", killer=False)])) == [("clusters", OK), ("guards", WARN)]


def test_the_verdict_is_the_worst() -> None:
    good, odd, bad = (Check("x", status, "") for status in (OK, WARN, FAIL))
    assert [checks.worst([good]), checks.worst([good, odd]), checks.worst([odd, bad, good])] == [OK, WARN, FAIL]


# --- diff -------------------------------------------------------------------------------------------------------------


def ran(
    name: str, seconds: float = 10.0, result: bytes = b"1", clusters: tuple[str, ...] = ("eu",)
) -> run_pb2.TaskStatus:
    task = run_pb2.TaskStatus(id=name, state=run_pb2.TASK_STATE_SUCCEEDED, result=result)
    for number, cluster_name in enumerate(clusters, 1):
        attempt = task.attempts.add(n=number, cluster=cluster_name)
        attempt.start_time.FromNanoseconds(int(NOW * 1e9))
        attempt.finish_time.FromNanoseconds(int((NOW + seconds) * 1e9))
    return task


def test_equal_runs_have_no_difference_and_noise_is_none() -> None:
    assert diff.differences([ran("a", 10.0)], [ran("a", 12.0)], list(diff.FIELDS)) == []
    assert diff.differences([ran("a", 0.1)], [ran("a", 0.9)], list(diff.FIELDS)) == []


def test_each_kind_of_difference_is_named_with_both_values() -> None:
    before = [ran("a"), ran("gone"), ran("slow", 10)]
    after = [ran("a", result=b"2", clusters=("eu", "us")), ran("slow", 30), ran("new")]
    assert diff.differences(before, after, list(diff.FIELDS)) == [
        {"task": "a", "changed": {"result": ["1", "2"], "attempts": [1, 2], "clusters": [["eu"], ["eu", "us"]]}},
        {"task": "gone", "changed": {"state": ["SUCCEEDED", None]}},
        {"task": "slow", "changed": {"duration": [10.0, 30.0]}},
        {"task": "new", "changed": {"state": [None, "SUCCEEDED"]}},
    ]
    assert diff.differences(before[2:], after[1:2], ["state", "result"]) == []
