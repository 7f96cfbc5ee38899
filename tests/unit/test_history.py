"""History (PROTOCOL J10): one contract for both forms, and what only a file can do wrong."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.v1 import run_pb2
from control_plane.history import PIECE, Archive, History, HistoryDown, MemoryHistory, Piece, Wanted, attempt_key
from control_plane.history_sqlite import SqliteHistory


@pytest.fixture(params=["memory", "sqlite"])
async def history(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[History]:
    made: History = MemoryHistory() if request.param == "memory" else SqliteHistory(tmp_path / "deep" / "history.db")
    yield made
    await made.close()


def archive(uid: str, *, run_id: str = "", incarnation: int = 1, tasks: int = 2, finished: float = 100.0,
            state: run_pb2.RunState.ValueType = run_pb2.RUN_STATE_SUCCEEDED,
            namespace: str = "default", labels: dict[str, str] | None = None, number: int = 2) -> Archive:  # fmt: skip
    name, etag = f"namespaces/{namespace}/runs/{run_id or uid}", f"{uid}.{number}"
    run = run_pb2.Run(name=name, uid=uid, etag=etag, state=state, labels=labels)
    run.finish_time.FromSeconds(int(finished))
    statuses = [
        run_pb2.TaskStatus(id=f"t{n}", index=n, state=run_pb2.TaskState.ValueType(5 + n % 2)) for n in range(tasks)
    ]
    pieces = tuple(
        Piece(
            start,
            run_pb2.ListTasksResponse(tasks=statuses[start : start + PIECE]),
            {attempt_key(start, 1): f"x{start}"},
        )
        for start in range(0, tasks, PIECE)
    )
    return Archive(incarnation, run, pieces, (run_pb2.RunEvent(number=1), run_pb2.RunEvent(number=2)))


async def test_a_run_is_kept_whole_and_read_by_name(history: History) -> None:
    kept = archive("u1", run_id="nightly", tasks=2 * PIECE + 7)
    await history.insert([kept])
    assert await history.run("default", "nightly") == kept.run
    assert await history.run("other", "nightly") is None
    assert await history.by_uid("u1") == kept.run
    assert await history.by_uid("u2") is None
    assert [event.number for event in await history.events("u1")] == [1, 2]
    tasks = await history.tasks("u1", 0, 10**6, ())
    assert [task.index for task in tasks] == list(range(2 * PIECE + 7))
    middle = await history.tasks("u1", PIECE - 3, 6, ())
    assert [task.index for task in middle] == list(range(PIECE - 3, PIECE + 3))
    odd = await history.tasks("u1", 10, 3, {run_pb2.TASK_STATE_FAILED})
    assert [task.index for task in odd] == [11, 13, 15]
    found = await history.task("u1", f"t{PIECE + 1}")
    assert found is not None
    assert found.index == PIECE + 1
    assert await history.task("u1", "t") is None
    assert await history.nonce("u1", PIECE, 1) == f"x{PIECE}"
    assert await history.nonce("u1", PIECE, 2) == await history.nonce("none", 0, 1) == ""
    assert await history.task("none", "t1") is None
    assert await history.tasks("none", 0, 10, ()) == []
    assert await history.events("none") == []


async def test_of_two_inserts_the_one_with_more_events_stays(history: History) -> None:
    """J8: a client may have read what has come since the first one."""
    later = archive("u1", run_id="r", tasks=3, number=3)
    await history.insert([archive("u1", run_id="r", tasks=2), archive("u1", run_id="r", incarnation=2, number=9)])
    await history.insert([later])
    await history.insert([archive("u1", run_id="r", tasks=2)])
    assert await history.run("default", "r") == later.run, "and it is still the earlier incarnation's that is shown"
    assert len(await history.tasks("u1", 0, 10, ())) == 3


async def test_an_insert_is_idempotent_and_the_first_outcome_stays(history: History) -> None:
    first = archive("u1", run_id="r")
    await history.insert([first])
    await history.insert([first, archive("u1", run_id="r", state=run_pb2.RUN_STATE_FAILED, tasks=5)])
    assert await history.run("default", "r") == first.run
    assert len(await history.tasks("u1", 0, 10, ())) == 2


async def test_j12_of_two_incarnations_the_earlier_outcome_is_shown_once(history: History) -> None:
    await history.insert([archive("u1", run_id="r")])
    await history.insert([archive("u1", run_id="r", incarnation=2, state=run_pb2.RUN_STATE_FAILED, tasks=5)])
    run = await history.run("default", "r")
    assert run is not None
    assert run.state == run_pb2.RUN_STATE_SUCCEEDED
    assert [each.uid for each in await history.runs(Wanted("default"), "", 10)] == ["u1"]
    assert len(await history.tasks("u1", 0, 10, ())) == 2


async def test_lists_go_by_uid_and_filter(history: History) -> None:
    runs = [archive(f"u{n}", labels={"n": str(n % 2)}) for n in (3, 1, 2, 5, 4)]
    failed = archive("u9", state=run_pb2.RUN_STATE_FAILED)
    await history.insert([*runs, failed, archive("u0", namespace="other")])
    assert [run.uid for run in await history.runs(Wanted("default"), "", 3)] == ["u1", "u2", "u3"]
    assert [run.uid for run in await history.runs(Wanted("default"), "u3", 10)] == ["u4", "u5", "u9"]
    odd = Wanted("default", labels=(("n", "1"),))
    assert [run.uid for run in await history.runs(odd, "", 10)] == ["u1", "u3", "u5"]
    lost = Wanted("default", frozenset({int(run_pb2.RUN_STATE_FAILED)}))
    assert [run.uid for run in await history.runs(lost, "", 10)] == ["u9"]
    assert await history.namespaces() == ["default", "other"]


async def test_retention_forgets_old_runs_a_part_at_a_time(history: History) -> None:
    await history.insert([archive(f"u{n}", finished=100 + n) for n in range(5)])
    await history.insert([archive("x", namespace="other", finished=1)])
    assert await history.forget("default", 104, 3) == 3
    assert await history.forget("default", 104, 3) == 1
    assert await history.forget("default", 104, 3) == 0
    assert [run.uid for run in await history.runs(Wanted("default"), "", 10)] == ["u4"]
    assert await history.tasks("u0", 0, 10, ()) == []
    assert await history.run("other", "x") is not None


async def test_two_processes_share_a_file_and_it_outlives_both(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    one, two = SqliteHistory(path), SqliteHistory(path)
    await one.insert([archive("u1")])
    await two.insert([archive("u1"), archive("u2")])
    assert [run.uid for run in await one.runs(Wanted("default"), "", 10)] == ["u1", "u2"]
    await one.close()
    await two.close()
    await two.close()  # closing twice is no fault
    with pytest.raises(HistoryDown):
        await two.run("default", "u1")
    again = SqliteHistory(path)
    assert await again.run("default", "u2") is not None
    await again.close()


async def test_only_we_may_read_it(tmp_path: Path) -> None:
    history = SqliteHistory(tmp_path / "history.db")
    assert (tmp_path / "history.db").stat().st_mode & 0o077 == 0
    await history.close()


async def test_a_file_that_is_none_of_ours_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(HistoryDown, match="garbage"):
        SqliteHistory(garbage)
    later = tmp_path / "later.db"
    connection = sqlite3.connect(later)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HistoryDown, match="later version"):
        SqliteHistory(later)
    with pytest.raises(HistoryDown):
        SqliteHistory(garbage / "below-a-file" / "history.db")


def test_replicas_that_open_a_new_file_together_wait_for_each_other(tmp_path: Path) -> None:
    """Turning a file to WAL does not wait by itself, whatever the connection's busy time. Without our own waiting one opening in 30
    fails here with "database is locked"."""
    with ThreadPoolExecutor(4) as openers:
        for number in range(40):
            path = tmp_path / f"{number}.sqlite"
            for opened in list(openers.map(SqliteHistory, [path] * 4)):
                asyncio.run(opened.close())
