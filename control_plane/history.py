"""Finished runs: the History port, what it is given, and its form in memory (PROTOCOL J10).

Theory. The outcome of a final run never changes, so it needs no fence: it is inserted under (incarnation, uid), as often as anybody
likes; only evidence may join it (late results, confirmed stops), so of two inserts the one with more events stays. Only after an
insert with all of them is durable does the owner commit `RunArchived` and drop the live state. So at every moment a run is live,
or in history, or both, and then what is live counts; a reader that finds it nowhere live and then not in history may say NOT_FOUND.
If two incarnations bring the same run (a restored store ran it again, J12), the earlier outcome is the one shown.

What is stored is what the public calls answer: `Run`, its `TaskStatus` in pieces, its `RunEvent`s; so live and archived runs
cannot drift apart in meaning, and old records stay readable as long as the public API does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton import names
from baton.v1 import run_pb2

PIECE = 200
"""Tasks of one stored piece: reading one task of an archived run decompresses one piece, about 1 ms; writing takes one row
per piece. Smaller pieces compress worse, larger ones make single reads slow."""


class HistoryDown(Exception):
    """The history store does not answer. For an insert: unknown, and harmless to repeat."""


def attempt_key(task: int, n: int) -> str:
    """Names an attempt in its run."""
    return f"{task}.{n}"


def event_number(run: run_pb2.Run) -> int:
    """The number of a run's last event, from its etag; 0 for a run without one."""
    return int(run.etag.rpartition(".")[2] or 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tasks of a run, in order of index; `response.tasks` are they."""

    start: int
    response: run_pb2.ListTasksResponse
    nonces: Mapping[str, str] = field(default_factory=dict)
    """`attempt_key` -> nonce: with it a cluster still finds the output of an attempt that its agent has forgotten."""

    @property
    def ids(self) -> str:
        """Their ids, each between two line feeds: so that one is found without reading the tasks."""
        return "\n" + "\n".join(task.id for task in self.response.tasks) + "\n"


@dataclass(frozen=True, slots=True)
class Archive:
    """One finished run, whole. `events` are the kept ones: their first number may be above 1."""

    incarnation: int
    run: run_pb2.Run
    pieces: tuple[Piece, ...]
    events: tuple[run_pb2.RunEvent, ...]

    @property
    def number(self) -> int:
        """Of its last event."""
        return event_number(self.run)

    @property
    def name(self) -> names.RunName:
        """Namespace and id of the run."""
        return names.parse_run(self.run.name)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which runs a list wants: states (empty: any), and labels that all must be carried."""

    namespace: str
    states: frozenset[int] = frozenset()
    labels: tuple[tuple[str, str], ...] = ()

    def matches(self, run: run_pb2.Run) -> bool:
        """Whether a run of that namespace is wanted."""
        if self.states and run.state not in self.states:
            return False
        return all(run.labels.get(key) == value for key, value in self.labels)


class History(Protocol):
    """Where finished runs are kept. Every method raises HistoryDown."""

    async def insert(self, archives: Sequence[Archive]) -> None:
        """Keep these runs, durably, unless (incarnation, uid) is kept already with as many events."""
        ...

    async def run(self, namespace: str, run_id: str) -> run_pb2.Run | None:
        """A run by its name."""
        ...

    async def by_uid(self, uid: str) -> run_pb2.Run | None:
        """A run by its uid."""
        ...

    async def runs(self, wanted: Wanted, after: str, limit: int) -> list[run_pb2.Run]:
        """Wanted runs with a uid above `after`, in order of uid, at most `limit`."""
        ...

    async def tasks(self, uid: str, start: int, limit: int, states: Collection[int]) -> list[run_pb2.TaskStatus]:
        """Tasks of a run from index `start`, in order, in one of the states (empty: any), at most `limit`."""
        ...

    async def task(self, uid: str, task_id: str) -> run_pb2.TaskStatus | None:
        """One task of a run."""
        ...

    async def nonce(self, uid: str, task: int, n: int) -> str:
        """The nonce of an attempt (PROTOCOL F1) by its task's index and its number; empty if it is not known."""
        ...

    async def events(self, uid: str) -> list[run_pb2.RunEvent]:
        """The kept events of a run, in order."""
        ...

    async def namespaces(self) -> list[str]:
        """Namespaces that have runs here."""
        ...

    async def forget(self, namespace: str, before: float, limit: int) -> int:
        """Drop at most `limit` runs of a namespace that finished before that wall time; how many were dropped."""
        ...

    async def close(self) -> None:
        """Release threads and files."""
        ...


class MemoryHistory:
    """The port in memory, for tests and the simulator. `down` makes every call fail."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], Archive] = {}
        self.down = False

    async def insert(self, archives: Sequence[Archive]) -> None:
        """See `History`."""
        self._check()
        for archive in archives:
            key = (archive.incarnation, archive.run.uid)
            if key not in self._kept or self._kept[key].number < archive.number:
                self._kept[key] = archive

    async def run(self, namespace: str, run_id: str) -> run_pb2.Run | None:
        """See `History`."""
        name = str(names.RunName(namespace, run_id))
        return next((archive.run for archive in self._shown().values() if archive.run.name == name), None)

    async def by_uid(self, uid: str) -> run_pb2.Run | None:
        """See `History`."""
        archive = self._shown().get(uid)
        return archive.run if archive else None

    async def runs(self, wanted: Wanted, after: str, limit: int) -> list[run_pb2.Run]:
        """See `History`."""
        shown = sorted(self._shown().items())
        of = (a.run for uid, a in shown if uid > after and a.name.namespace == wanted.namespace)
        return [run for run in of if wanted.matches(run)][:limit]

    async def tasks(self, uid: str, start: int, limit: int, states: Collection[int]) -> list[run_pb2.TaskStatus]:
        """See `History`."""
        archive = self._shown().get(uid)
        tasks = [task for piece in archive.pieces for task in piece.response.tasks] if archive else []
        return [task for task in tasks[start:] if not states or task.state in states][:limit]

    async def task(self, uid: str, task_id: str) -> run_pb2.TaskStatus | None:
        """See `History`."""
        archive = self._shown().get(uid)
        pieces = archive.pieces if archive else ()
        return next((task for piece in pieces for task in piece.response.tasks if task.id == task_id), None)

    async def nonce(self, uid: str, task: int, n: int) -> str:
        """See `History`."""
        archive = self._shown().get(uid)
        pieces = archive.pieces if archive else ()
        return next((p.nonces[key] for p in pieces if (key := attempt_key(task, n)) in p.nonces), "")

    async def events(self, uid: str) -> list[run_pb2.RunEvent]:
        """See `History`."""
        archive = self._shown().get(uid)
        return list(archive.events) if archive else []

    async def namespaces(self) -> list[str]:
        """See `History`."""
        return sorted({archive.name.namespace for archive in self._shown().values()})

    async def forget(self, namespace: str, before: float, limit: int) -> int:
        """See `History`."""
        self._check()
        old = [
            key
            for key, archive in self._kept.items()
            if archive.name.namespace == namespace and archive.run.finish_time.seconds < before
        ]
        for key in old[:limit]:
            del self._kept[key]
        return len(old[:limit])

    async def close(self) -> None:
        """See `History`."""

    def _check(self) -> None:
        if self.down:
            raise HistoryDown("history is down")

    def _shown(self) -> Mapping[str, Archive]:
        """Each run as its earliest incarnation tells it."""
        self._check()
        return {uid: self._kept[incarnation, uid] for incarnation, uid in sorted(self._kept, reverse=True)}
