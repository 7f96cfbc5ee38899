"""`baton.Client` against real gRPC servers: the same calls as AsyncClient's without `await`, and results as they come.

The servers live on the clients' own loop, so that one process has one gRPC loop, as a plain script has.
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import baton
from baton import contexts, errors
from baton.client import AsyncClient
from baton.client_sync import _shared, wait
from baton.v1 import graph_pb2, run_pb2
from tests.integration.small_federation import Fault, Replica, State


@pytest.fixture
def replica() -> Iterator[Replica]:
    async def make() -> Replica:
        made = Replica(State())
        await made.start()
        return made

    made = wait(make())
    yield made
    wait(made.stop())


@pytest.fixture
def client(replica: Replica) -> Iterator[baton.Client]:
    with baton.Client(replica.address) as made:
        yield made


def spec(tasks: int = 2) -> graph_pb2.GraphSpec:
    made = graph_pb2.GraphSpec()
    for number in range(tasks):
        made.tasks.add(id=f"t{number}").process.argv.append("true")
    return made


def in_five_minutes() -> float:
    return time.time() + 300


def test_every_method_of_the_asyncio_client_has_its_plain_one() -> None:
    missing = [
        name
        for name, of in vars(AsyncClient).items()
        if not name.startswith("_") and inspect.isfunction(of) and not hasattr(baton.Client, name)
    ]
    assert not missing, f"add `{missing[0]} = _Call(AsyncClient.{missing[0]})` (or _Stream) to baton.client_sync.Client"


def test_calls_streams_and_errors_are_those_of_the_asyncio_client(client: baton.Client) -> None:
    run = client.create_run(spec(), deadline=in_five_minutes(), run_id="nightly")
    assert run.name == "namespaces/default/runs/nightly"
    assert client.wait_run(run.name).state == run_pb2.RUN_STATE_SUCCEEDED
    numbers = [event.number for message in client.watch_run(run.name) for event in message.events]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [task.id for task in client.list_tasks(run.name)] == ["t0", "t1"]
    log = b"".join(piece.data for piece in client.follow_logs(f"{run.name}/tasks/t0"))
    assert log == b"line\n" * 10
    assert [cluster.name for cluster in client.list_clusters()] == ["clusters/eu", "clusters/us"]
    with pytest.raises(errors.NotFound, match="there is no run"):
        client.get_run("namespaces/default/runs/nothing")
    assert client.get_run.__doc__ == AsyncClient.get_run.__doc__


def test_a_stream_that_is_left_early_is_closed(client: baton.Client) -> None:
    run = client.create_run(spec(), deadline=in_five_minutes())
    stream = client.watch_run(run.name)
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert list(stream) == []


def test_a_call_ends_by_its_deadline(replica: Replica) -> None:
    replica.faults["GetRun"] = [Fault(silent=True)]
    with baton.Client(replica.address, timeout=0.5) as client:
        run = client.create_run(spec(), deadline=in_five_minutes())
        with pytest.raises(errors.Unreachable, match=r"no answer within 0\.5 s"):
            client.get_run(run.name)


def test_threads_share_a_client(client: baton.Client) -> None:
    names: list[str] = []

    def create() -> None:
        names.append(client.create_run(spec(), deadline=in_five_minutes()).name)

    threads = [threading.Thread(target=create) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len(set(names)) == 5


def test_waiting_on_the_clients_own_loop_is_refused(client: baton.Client) -> None:
    async def wrong() -> None:
        client.list_shards()

    with pytest.raises(RuntimeError, match="await the method"):
        wait(wrong())


async def test_it_works_beside_a_loop_of_the_callers(client: baton.Client) -> None:
    assert client.list_shards().incarnation == 1


def _in_child(answer: Any) -> None:
    async def ready() -> int:
        return 7

    answer.put(wait(ready()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_child_of_a_fork_has_a_loop_of_its_own() -> None:
    wait(_nothing())
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    child = fork.Process(target=_in_child, args=(answer,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answer.get() == 7


async def _nothing() -> None:
    return


def test_an_interruption_ends_what_is_waited_for() -> None:
    ended = threading.Event()

    async def stuck() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    class Interrupted(BaseException):
        pass

    def raise_at_once(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, raise_at_once)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            wait(stuck())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended.wait(30)


# --- the context, and graphs ------------------------------------------------------------------------------------------


def test_without_an_endpoint_it_is_the_current_context(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CONFIG", str(tmp_path / "contexts.toml"))
    monkeypatch.delenv("BATON_ENDPOINT", raising=False)
    with pytest.raises(errors.InvalidField, match="no federation is named"):
        baton.Client()
    contexts.write_context(
        "here", [replica.address], namespace="team", env={"BATON_CONFIG": str(tmp_path / "contexts.toml")}
    )
    with baton.Client() as client:
        assert client.namespace == client.asyncio.namespace == "team"
        assert [each.id for each in client.list_replicas()] == ["r1"]
        assert client.create_run(spec(), deadline=in_five_minutes(), run_id="r").name == "namespaces/team/runs/r"
        assert client.get_task("r/t0").id == "t0"
    with pytest.raises(errors.InvalidField, match="no endpoint is given"):
        baton.Client([])  # computed, and empty: not the current context by accident


def programs(name: str, count: int) -> baton.Graph:
    graph = baton.Graph(name)
    for number in range(count):
        graph.task(f"t{number}", argv=["true"])
    return graph


def test_a_graph_runs_and_its_results_come_one_by_one(replica: Replica) -> None:
    graph = programs("all", 3)
    assert dict(graph.run(deadline="5m", endpoint=replica.address)) == {f"t{n}": f"result of t{n}" for n in range(3)}
    started = programs("some", 3).start(deadline="5m", endpoint=replica.address)
    assert dict(started.as_completed()) == {f"t{n}": f"result of t{n}" for n in range(3)}
    assert started.results()["t1"] == "result of t1"
    with pytest.raises(errors.WrongState):
        started.cancel("too late")


async def _release(state: State, name: str, index: int, end: str) -> None:
    """The task succeeds; with `end` the run ends, too."""
    task = state.record(name).tasks[index]
    task.state, task.result = run_pb2.TASK_STATE_SUCCEEDED, b"%d" % index
    await state.emit(name, "finished", run_pb2.TaskChange(index=index, id=task.id, state=task.state), state=end)


def _hanging(client: baton.Client, tasks: int) -> run_pb2.Run:
    return client.create_run(spec(tasks), deadline=in_five_minutes(), labels={"outcome": "HANG"})


def test_a_result_is_told_before_the_others_are_there(client: baton.Client, replica: Replica) -> None:
    run = _hanging(client, 3)
    stream = client.as_completed(run.name)
    for index in (2, 0, 1):
        wait(_release(replica.state, run.name, index, "SUCCEEDED" if index == 1 else ""))
        told = next(stream)
        assert (told.index, told.result) == (index, b"%d" % index)
    assert list(stream) == []


def test_many_results_at_once_are_read_by_the_page(client: baton.Client, replica: Replica) -> None:
    run = _hanging(client, 200)
    wait(_release(replica.state, run.name, 0, ""))
    stream = client.as_completed(run.name)
    assert next(stream).index == 0

    async def finish() -> None:
        changes = []
        for task in replica.state.record(run.name).tasks[1:]:
            task.state = run_pb2.TASK_STATE_SUCCEEDED
            changes.append(run_pb2.TaskChange(index=task.index, id=task.id, state=task.state))
        await replica.state.emit(run.name, "finished", *changes, state="SUCCEEDED")

    wait(finish())
    assert sorted(task.index for task in stream) == list(range(1, 200))
    assert replica.calls.count("GetTask") == 0


def test_a_run_that_fails_raises_after_its_results(replica: Replica) -> None:
    started = programs("bad", 2).start(deadline="5m", endpoint=replica.address)

    async def spoil() -> None:
        record = replica.state.record(started.name)
        record.run.state = run_pb2.RUN_STATE_FAILED
        failed = record.tasks[1]
        failed.state, failed.reason, failed.result = run_pb2.TASK_STATE_FAILED, "out of luck", b""

    wait(spoil())
    told: list[tuple[str, object]] = []
    with pytest.raises(baton.RunFailed, match="t1: out of luck") as failure:
        told.extend(started.as_completed())
    assert failure.value.failures == {"t1": "out of luck"}
    with pytest.raises(baton.RunFailed, match="ended as FAILED"):
        started.results()


def test_what_the_readme_shows(
    checkout: Path,
    replica: Replica,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = re.findall(r"```python\n(import baton\n.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_graph.py").write_text(
        "from tests.integration.test_client_sync import programs\ngraph = programs('mine', 2)\n"
    )
    monkeypatch.setenv("BATON_ENDPOINT", replica.address)
    monkeypatch.setenv("BATON_CONFIG", str(tmp_path / "contexts.toml"))
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(block, {})
    assert capsys.readouterr().out == "t0 result of t0\nt1 result of t1\n0\n"


def test_a_script_may_end_with_everything_open(replica: Replica, checkout: Path) -> None:
    script = (
        "import baton\n"
        f"client = baton.Client({replica.address!r})\n"
        "graph = baton.Graph('open')\n"
        "graph.task('a', argv=['true'])\n"
        f"run = graph.start(deadline='1m', endpoint={replica.address!r})\n"
        "results, watch = run.as_completed(), client.watch_run(run.name)\n"
        "print(next(results), next(watch).run.task_count)\n"
    )
    argv = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "('a', 'result of a') 1\n", "")


def test_a_stream_that_the_garbage_collector_closes_while_the_loop_is_looked_up_blocks_nobody() -> None:
    """The collector runs wherever something is allocated: also on the thread that holds the loop's lock."""

    def asks_again() -> None:
        with _shared._lock:
            _shared.running()

    thread = threading.Thread(target=asks_again, daemon=True)
    thread.start()
    thread.join(30.0)
    assert not thread.is_alive()
