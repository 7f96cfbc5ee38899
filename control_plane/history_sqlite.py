"""History in one SQLite file, which all replicas of a host may share (PROTOCOL J10).

Theory. Inserts are idempotent and reads never meet half a run, so plain transactions are all it takes: write-ahead log, one
writer thread and one reader thread per process, never the event loop. `synchronous=FULL` because the live state goes once
an insert is reported; a file system that loses an acknowledged fsync loses history.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from baton.time_limits import time_limit
from baton.v1 import run_pb2
from control_plane.history import Archive, HistoryDown, Piece, Wanted, attempt_key, event_number

FORMAT = 1
"""`user_version` of the file. A higher one was written by a later version: refused, not guessed (PROTOCOL J11)."""

BUSY_SECONDS = 10.0
"""Wait for another process's write: a run of 100,000 tasks takes about 1 s. Shorter: inserts fail under load and are repeated;
longer: a stuck process is noticed late."""

CALL_SECONDS = 30.0
"""Longest call, waiting for the thread included; then it counts as down. Longer than BUSY_SECONDS by what a big run takes."""

WAL_TRIES, WAL_PAUSE = 100, 0.05
"""Tries to turn a file to WAL, and seconds between them: 5 s for what takes the other replica milliseconds. Fewer would end a start
for nothing; more would hide a file that somebody else has locked for good."""

LEVEL = 6
"""zlib's: history is written once, off the loop, and kept for a month."""

SCAN = 500
"""Rows looked at per step of a list with labels, which have no index of their own."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    incarnation INTEGER NOT NULL, uid TEXT NOT NULL, namespace TEXT NOT NULL, run_id TEXT NOT NULL,
    state INTEGER NOT NULL, finished REAL NOT NULL, shadowed INTEGER NOT NULL,
    run BLOB NOT NULL, events BLOB NOT NULL, PRIMARY KEY (incarnation, uid)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS runs_by_name ON runs (namespace, run_id, shadowed);
CREATE INDEX IF NOT EXISTS runs_by_uid ON runs (namespace, shadowed, uid);
CREATE INDEX IF NOT EXISTS runs_uid ON runs (uid, shadowed);
CREATE INDEX IF NOT EXISTS runs_by_finish ON runs (namespace, finished);
CREATE TABLE IF NOT EXISTS pieces (
    incarnation INTEGER NOT NULL, uid TEXT NOT NULL, start INTEGER NOT NULL, ids TEXT NOT NULL,
    tasks BLOB NOT NULL, nonces BLOB NOT NULL, PRIMARY KEY (incarnation, uid, start));
"""

T = TypeVar("T")


class SqliteHistory:
    """The `History` port on a file. The file and its directory are made if they are missing; only we may read them."""

    def __init__(self, path: Path) -> None:
        """Raises HistoryDown if the file cannot be used."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600, exist_ok=True)
            self._writes = _connect(path)
            _prepare(self._writes)
            self._reads = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise HistoryDown(f"history file {path}: {error}") from error
        self._writer = ThreadPoolExecutor(1, "history-writer")
        self._reader = ThreadPoolExecutor(1, "history-reader")
        self._closed = False

    async def insert(self, archives: Sequence[Archive]) -> None:
        """See `History`."""
        await self._in(self._writer, lambda: _insert(self._writes, archives))

    async def run(self, namespace: str, run_id: str) -> run_pb2.Run | None:
        """See `History`."""
        return await self._one(
            "SELECT run FROM runs WHERE namespace = ? AND run_id = ? AND shadowed = 0", namespace, run_id
        )

    async def by_uid(self, uid: str) -> run_pb2.Run | None:
        """See `History`."""
        return await self._one("SELECT run FROM runs WHERE uid = ? AND shadowed = 0", uid)

    async def runs(self, wanted: Wanted, after: str, limit: int) -> list[run_pb2.Run]:
        """See `History`."""
        return await self._in(self._reader, lambda: _runs(self._reads, wanted, after, limit))

    async def tasks(self, uid: str, start: int, limit: int, states: Collection[int]) -> list[run_pb2.TaskStatus]:
        """See `History`."""

        def read() -> list[run_pb2.TaskStatus]:
            found: list[run_pb2.TaskStatus] = []
            for piece in _pieces(self._reads, uid, start):
                found += [task for task in piece if task.index >= start and (not states or task.state in states)]
                if len(found) >= limit:
                    break
            return found[:limit]

        return await self._in(self._reader, read)

    async def task(self, uid: str, task_id: str) -> run_pb2.TaskStatus | None:
        """See `History`."""

        def read() -> run_pb2.TaskStatus | None:
            query = "SELECT tasks FROM pieces WHERE incarnation = ? AND uid = ? AND instr(ids, ?) LIMIT 1"
            row = self._reads.execute(query, (_incarnation(self._reads, uid), uid, f"\n{task_id}\n")).fetchone()
            return next((task for task in _unpack(row[0]) if task.id == task_id), None) if row else None

        return await self._in(self._reader, read)

    async def nonce(self, uid: str, task: int, n: int) -> str:
        """See `History`."""

        def read() -> str:
            query = (
                "SELECT nonces FROM pieces WHERE incarnation = ? AND uid = ? AND start <= ? ORDER BY start DESC LIMIT 1"
            )
            row = self._reads.execute(query, (_incarnation(self._reads, uid), uid, task)).fetchone()
            nonces: dict[str, str] = json.loads(zlib.decompress(row[0])) if row else {}
            return nonces.get(attempt_key(task, n), "")

        return await self._in(self._reader, read)

    async def events(self, uid: str) -> list[run_pb2.RunEvent]:
        """See `History`."""

        def read() -> list[run_pb2.RunEvent]:
            row = self._reads.execute("SELECT events FROM runs WHERE uid = ? AND shadowed = 0", (uid,)).fetchone()
            return list(run_pb2.WatchRunResponse.FromString(zlib.decompress(row[0])).events) if row else []

        return await self._in(self._reader, read)

    async def namespaces(self) -> list[str]:
        """See `History`."""

        def read() -> list[str]:
            rows = self._reads.execute("SELECT DISTINCT namespace FROM runs ORDER BY namespace")
            return [namespace for (namespace,) in rows]

        return await self._in(self._reader, read)

    async def forget(self, namespace: str, before: float, limit: int) -> int:
        """See `History`."""

        def write() -> int:
            with self._writes:
                query = (
                    "SELECT incarnation, uid FROM runs WHERE namespace = ? AND finished < ? ORDER BY finished LIMIT ?"
                )
                old = self._writes.execute(query, (namespace, before, limit)).fetchall()
                self._writes.executemany("DELETE FROM pieces WHERE incarnation = ? AND uid = ?", old)
                self._writes.executemany("DELETE FROM runs WHERE incarnation = ? AND uid = ?", old)
            return len(old)

        return await self._in(self._writer, write)

    async def close(self) -> None:
        """See `History`. Waits for what is under way."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        for thread, connection in ((self._writer, self._writes), (self._reader, self._reads)):
            await loop.run_in_executor(thread, connection.close)
            thread.shutdown(wait=False)

    async def _one(self, query: str, *key: str) -> run_pb2.Run | None:
        def read() -> run_pb2.Run | None:
            row = self._reads.execute(query, key).fetchone()
            return run_pb2.Run.FromString(row[0]) if row else None

        return await self._in(self._reader, read)

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._closed:
            raise HistoryDown("history is closed")
        try:
            async with time_limit(CALL_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(thread, work)
        except (sqlite3.Error, TimeoutError, zlib.error) as error:
            raise HistoryDown(f"history file {self._path}: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    # Made here, used in one thread only from then on.
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    _turn_to_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _turn_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for others here, whatever its busy time: replicas that start together on a new file would end with
    "database is locked". Raises sqlite3.Error."""
    pause = threading.Event()
    for tries_left in reversed(range(WAL_TRIES)):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or not tries_left:
                raise
        pause.wait(WAL_PAUSE)


def _prepare(connection: sqlite3.Connection) -> None:
    with closing(connection.execute("PRAGMA user_version")) as cursor:
        (version,) = cursor.fetchone()
    if version > FORMAT:
        raise sqlite3.DatabaseError(f"is of format {version}, this version reads {FORMAT}: run a later version")
    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")


def _insert(connection: sqlite3.Connection, archives: Sequence[Archive]) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for archive in archives:
            run, name = archive.run, archive.name
            key = (archive.incarnation, run.uid)
            kept = connection.execute(
                "SELECT run, shadowed FROM runs WHERE incarnation = ? AND uid = ?", key
            ).fetchone()
            if kept is None:
                shadowed = connection.execute("SELECT 1 FROM runs WHERE uid = ?", (run.uid,)).fetchone() is not None
            elif event_number(run_pb2.Run.FromString(kept[0])) >= archive.number:
                continue
            else:
                shadowed = bool(kept[1])
                connection.execute("DELETE FROM runs WHERE incarnation = ? AND uid = ?", key)
                connection.execute("DELETE FROM pieces WHERE incarnation = ? AND uid = ?", key)
            finished = run.finish_time.seconds + run.finish_time.nanos / 1e9
            events = zlib.compress(run_pb2.WatchRunResponse(events=archive.events).SerializeToString(), LEVEL)
            row = (*key, name.namespace, name.run, run.state, finished, shadowed, run.SerializeToString(), events)
            connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            connection.executemany(
                "INSERT INTO pieces VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (*key, piece.start, piece.ids, _pack(piece.response.SerializeToString()), _pack_nonces(piece))
                    for piece in archive.pieces
                ),
            )


def _runs(connection: sqlite3.Connection, wanted: Wanted, after: str, limit: int) -> list[run_pb2.Run]:
    found: list[run_pb2.Run] = []
    query = "SELECT uid, run FROM runs WHERE namespace = ? AND shadowed = 0 AND uid > ? ORDER BY uid LIMIT ?"
    while len(found) < limit:
        rows = connection.execute(query, (wanted.namespace, after, SCAN)).fetchall()
        runs = (run_pb2.Run.FromString(blob) for _, blob in rows)
        found += [run for run in runs if wanted.matches(run)]
        if len(rows) < SCAN:
            break
        after = rows[-1][0]
    return found[:limit]


def _incarnation(connection: sqlite3.Connection, uid: str) -> int:
    """The incarnation whose outcome is shown."""
    row = connection.execute("SELECT incarnation FROM runs WHERE uid = ? AND shadowed = 0", (uid,)).fetchone()
    return int(row[0]) if row else 0


def _pieces(connection: sqlite3.Connection, uid: str, start: int) -> Iterator[Sequence[run_pb2.TaskStatus]]:
    """Pieces from the one that holds index `start`."""
    key = (_incarnation(connection, uid), uid)
    first = "SELECT max(start) FROM pieces WHERE incarnation = ? AND uid = ? AND start <= ?"
    (begin,) = connection.execute(first, (*key, start)).fetchone()
    query = "SELECT tasks FROM pieces WHERE incarnation = ? AND uid = ? AND start >= ? ORDER BY start"
    for (blob,) in connection.execute(query, (*key, begin or 0)):
        yield _unpack(blob)


def _pack(content: bytes) -> bytes:
    return zlib.compress(content, LEVEL)


def _pack_nonces(piece: Piece) -> bytes:
    return _pack(json.dumps(dict(piece.nonces)).encode())


def _unpack(blob: bytes) -> Sequence[run_pb2.TaskStatus]:
    return run_pb2.ListTasksResponse.FromString(zlib.decompress(blob)).tasks
