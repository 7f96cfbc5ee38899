"""/metrics of a replica and an agent at work: it parses, says what happened, and docs/metrics.md lists exactly what there is."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.audit import Verdict
from baton.client import AsyncClient
from baton.time_limits import time_limit
from baton.v1 import run_pb2
from baton.webport import WebPort
from cluster_agent.config import AgentConfig, BadConfig, build
from cluster_agent.metrics import AgentPage
from control_plane import archiver, config
from control_plane.config import from_arguments
from control_plane.core.events import AttemptsPlaced
from control_plane.core.model import Outcome, RetryPolicy
from control_plane.meter import NAMESPACES, OTHER, Meter
from control_plane.observing import Observing
from tests.contract.executor_worlds import end_guards, guards_under
from tests.integration import metric_lint
from tests.integration.fake_clusters import CLOCK, FakeCluster, fake_cluster
from tests.integration.replicas import Rig, rig, until
from tests.integration.test_trace import get, graph, receiver
from tests.unit.core.shard_kit import Shard, task
from tests.unit.core.shard_kit import facts as cluster
from tests.unit.core.test_spans import failed_over, report

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "metrics.md"

VERDICTS = tuple(verdict.value for verdict in Verdict)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (type, labels) of every row."""
    rows = re.findall(r"^\| `(baton_\w+)` \| (\w+) \| ([\w, ]*) ?\|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def check_text(text: str) -> Samples:
    """Every sample; promtool finds nothing wrong."""
    metric_lint.check(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_documented(text: str) -> set[str]:
    """Every family is documented as it is; their names."""
    known, seen = documented(), set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        assert known[name][0] == kind, name
        seen.add(name)
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name = re.sub(r"_(bucket|sum|count)$", "", re.match(r"\w+", line)[0])  # type: ignore[index]
        labels = set(re.findall(r"(\w+)=\"", line)) - {"le"}
        assert labels == set(known[name][1]), line
        assert not labels & {"run", "task", "attempt"}
    return seen


async def scrape(port: WebPort) -> str:
    status, body = await get(port, "/metrics")
    assert status == 200
    return body.decode()


@asynccontextmanager
async def observed(*flags: str) -> AsyncIterator[tuple[Rig, Observing, WebPort]]:
    """One replica, seen from outside as the process wires it."""
    given = ["--replica", "r1", "--history", "unused", "--metrics-listen", "127.0.0.1:0", *flags]
    watching = Observing(from_arguments(given))
    try:
        async with rig("r1", meter=watching.meter, archived=watching.archived) as federation:
            node = federation.nodes[0]
            await watching.start(node.replica, node.server)
            port = watching._port
            assert port is not None
            yield federation, watching, port
    finally:
        await watching.close()


@asynccontextmanager
async def agent_page(cluster: FakeCluster) -> AsyncIterator[WebPort]:
    page = AgentPage(cluster.config, cluster.agent, cluster.executor, CLOCK)
    port = WebPort(page.route)
    await port.start("127.0.0.1", 0)
    try:
        yield port
    finally:
        await port.close()


GOOD = "# HELP a_{0} Things.\n# TYPE a_{0} {1}\na_{0} 1\n"

BAD = {
    "no total": GOOD.format("events", "counter"),
    "total": GOOD.format("total", "gauge"),
    "no help": "# TYPE a_total counter\na_total 1\n",
    "milliseconds": GOOD.format("milliseconds", "gauge"),
    "minutes": GOOD.format("minutes", "gauge"),
    "abbreviated": GOOD.format("ms", "gauge"),
    "type": GOOD.format("gauge_b", "gauge"),
    "camel": GOOD.format("someThing", "gauge"),
    "colon": GOOD.format("x:y", "gauge"),
    "camel label": '# HELP a Things.\n# TYPE a gauge\na{runName="x"} 1\n',
    "le": '# HELP a Things.\n# TYPE a gauge\na{le="1"} 1\n',
    "quantile": '# HELP a Things.\n# TYPE a gauge\na{quantile="1"} 1\n',
    "bucket": GOOD.format("bucket", "gauge"),
    "count": GOOD.format("count", "gauge"),
    "two series": GOOD.format("x", "gauge") + "a_x 2\n",
    "two types": GOOD.format("x", "gauge") + "# TYPE a_x gauge\n",
    "garbage": "a b c d\n",
}


@pytest.mark.timeout(360)
@pytest.mark.parametrize("name", BAD)
def test_both_judges_refuse_a_bad_page(name: str) -> None:
    assert metric_lint.problems(BAD[name])
    if (original := metric_lint.original()) is not None:
        said = subprocess.run(original, input=BAD[name].encode(), capture_output=True, timeout=60, check=False)
        assert said.returncode != 0, "our rules are stricter than promtool's"


@pytest.mark.timeout(360)
async def test_metrics_of_a_replica_and_an_agent_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver, "DELAY", 1.5)
    port_file = tmp_path / "web"
    flags = ("--metrics-port-file", str(port_file))
    async with receiver() as collector, observed(*flags, "--otlp-endpoint", f"http://{collector.address}") as seen:
        federation, watching, port = seen
        meter = watching.meter
        assert meter is not None
        assert port_file.read_text() == f"{port.address}\n"
        endpoints = [federation.nodes[0].server.address]
        async with (
            AsyncClient(endpoints) as client,
            fake_cluster("eu", endpoints) as eu,
            agent_page(eu) as agent_port,
        ):
            assert (await get(port, "/healthz"))[0] == 200
            await until(lambda: bool(eu.agent.reconciler and eu.agent.reconciler.machine.link.ready))
            assert (await get(agent_port, "/healthz"))[0] == 200
            made = await client.create_run(graph("a", "b"), deadline=CLOCK.wall() + 60)
            async with time_limit(40):
                assert (await client.wait_run(made.name)).state == run_pb2.RUN_STATE_SUCCEEDED
            waiting = graph("stuck")
            waiting.tasks[0].clusters.append("nowhere")
            await client.create_run(waiting, deadline=CLOCK.wall() + 60)
            await until(lambda: meter.runs_checked == 1)
            spans = await client.get_trace(made.name)
            await until(lambda: len(collector.spans) == len(spans))

            text = await scrape(port)
            found = check_text(text)
            names = check_documented(text)
            here = (("namespace", "default"),)
            won = (*here, ("outcome", "succeeded"))
            assert found["baton_attempts_placed_total", here] == 2
            assert found["baton_attempts_ended_total", won] == found["baton_tasks_ended_total", won] == 2
            assert found["baton_runs_ended_total", won] == found["baton_run_duration_seconds_count", here] == 1
            assert found["baton_queue_tasks", here] == 1
            assert found["baton_queue_oldest_wait_seconds", here] >= 0
            assert found["baton_commit_seconds_count", ()] == found["baton_commit_bytes_count", ()] > 0
            assert found["baton_overlapping_owners_total", ()] == found["baton_inbox_dropped_total", ()] == 0
            assert found["baton_history_runs_checked_total", ()] == 1
            verdicts = {name: found["baton_history_runs_audited_total", (("verdict", name),)] for name in VERDICTS}
            assert verdicts == {"proven": 1, "declared": 0, "unproven": 0, "violated": 0}
            assert found["baton_otlp_spans_sent_total", ()] == len(spans)
            assert found["baton_otlp_runs_failed_total", ()] == found["baton_otlp_runs_dropped_total", ()] == 0
            assert found["baton_lease_margin_seconds", ()] > 0
            assert found["baton_shards_owned", ()] == 33
            assert found["baton_cluster_cpu_cores", (("cluster", "eu"),)] == 2
            assert found["baton_cluster_ready", (("cluster", "eu"),)] == 1

            of_agent = await scrape(agent_port)
            told = check_text(of_agent)
            assert told["baton_agent_session_up", (("cluster", "eu"),)] == 1
            assert 0 < told["baton_agent_lease_margin_seconds", (("cluster", "eu"),)] <= 9
            assert told["baton_agent_heartbeat_seconds", (("cluster", "eu"),)] > 0
            assert told["baton_agent_attempts", (("cluster", "eu"), ("phase", "running"))] == 0
            assert told["baton_agent_journal_errors_total", (("cluster", "eu"),)] == 0
            assert names | check_documented(of_agent) == set(documented())
    assert not port_file.exists()


async def test_an_agent_without_a_session_says_so(tmp_path: Path) -> None:
    port_file = tmp_path / "web"
    command = [sys.executable, "-m", "cluster_agent", "--cluster", "eu", "--endpoint", "127.0.0.1:9", "--cpus", "1"]
    command += ["--directory", str(tmp_path / "eu"), "--metrics-listen", "127.0.0.1:0"]
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, "--metrics-port-file", str(port_file), stderr=log)
    try:
        await until(port_file.exists)
        port = WebPort(nothing)
        port.address = port_file.read_text().strip()
        assert (await get(port, "/healthz"))[0] == 503
    finally:
        process.terminate()
        await process.wait()
        await end_guards(guards_under(tmp_path), CLOCK)


async def nothing(path: str) -> None:
    return None


def test_replicas_stay_on_loopback_unless_told() -> None:
    flags = ["--replica", "r1", "--history", "h", "--metrics-listen"]
    with pytest.raises(config.BadConfig, match="metrics_listen"):
        from_arguments([*flags, "0.0.0.0:0"])
    assert from_arguments([*flags, "0.0.0.0:0", "--metrics-anywhere"]).metrics_anywhere
    assert from_arguments([*flags, "127.0.0.1:0", "--otlp-endpoint", "https://collector:4317"]).otlp_endpoint
    for bad in ("http://collector:4317", "collector:4317", "ftp://127.0.0.1:1", "127.0.0.1"):
        with pytest.raises(config.BadConfig, match="otlp_endpoint"):
            from_arguments([*flags, "127.0.0.1:0", "--otlp-endpoint", bad])


def test_agents_stay_on_loopback_unless_told() -> None:
    values = {"cluster": "eu", "endpoints": ["127.0.0.1:1"], "directory": "d", "cpus": "1"}
    made: AgentConfig = build({**values, "metrics_listen": "127.0.0.1:0"})
    assert made.metrics_listen == "127.0.0.1:0"
    for bad in ("0.0.0.0:0", "nowhere"):
        with pytest.raises(BadConfig, match="metrics_listen"):
            build({**values, "metrics_listen": bad})
    assert build({**values, "metrics_listen": "0.0.0.0:0", "metrics_anywhere": True}).metrics_anywhere


def count(meter: Meter, shard: Shard) -> None:
    meter._count_runs("00", ["r1"], shard.machine)


def test_the_meter_counts_each_event_once() -> None:
    shard, meter = failed_over(), Meter(CLOCK)
    for _ in range(2):
        count(meter, shard)
    counts = meter.by_namespace["ns"]
    placed = [event for event in shard.events(AttemptsPlaced) if isinstance(event, AttemptsPlaced)]
    assert counts.placed == sum(len(event.tasks) for event in placed) == 3
    assert counts.attempts == {"lost": 1, "succeeded": 2}
    assert (counts.tasks, counts.runs) == ({"succeeded": 2}, {"succeeded": 1})
    assert meter.events_missed == 0


def test_failures_are_told_by_their_class() -> None:
    shard, meter = Shard(cluster("x")), Meter(CLOCK)
    shard.create(task("a", retry=RetryPolicy(max_attempts=2)))
    for _ in range(2):
        shard.grant("x")
        report(shard, shard.only(), 1, Outcome.FAILED)
        shard.later(30)
    count(meter, shard)
    counts = meter.by_namespace["ns"]
    assert (counts.attempts, counts.tasks, counts.runs) == ({"failed": 2}, {"failed": 1}, {"failed": 1})


def test_runs_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.meter.SEEN_RUNS", 1)
    shard, meter = failed_over(), Meter(CLOCK)
    meter._seen["00"] = {"gone1": 1, "gone2": 1}
    count(meter, shard)
    assert set(meter._seen["00"]) == {"r1"}


def test_a_taken_shard_starts_at_its_present() -> None:
    shard = failed_over()
    meter = Meter(CLOCK)
    meter._seen["00"] = shard.machine.event_numbers()
    count(meter, shard)
    assert meter.by_namespace["ns"].placed == 0


def test_namespaces_have_a_bound() -> None:
    meter = Meter(CLOCK)
    for number in range(NAMESPACES + 50):
        meter._of(f"ns{number}").placed += 1
    assert len(meter.by_namespace) == NAMESPACES + 1
    assert meter.by_namespace[OTHER].placed == 50
