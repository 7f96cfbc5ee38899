"""What a replica counts for its metrics, beside the work and never in its way (DESIGN 11, 13).

Theory. A run's numbered events (J10) are columns already, and kept for watchers; so counting means reading those above the last
number seen, once a second, a whole column at a time. A commit costs a set of run uids here, nothing per task. Counters are of
what this replica's shards committed while it owned them: a shard that is taken starts at its present, so sums over replicas
count nothing twice, and what a replica saw in its last second before it died is missing.

The history checker: of every run that goes into history, the order of the journal must show one owner of a task at a time (F2),
and `baton.audit` says of its attempts what `baton audit RUN` says: proven, declared, unproven or violated.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from baton.audit import Audit, Verdict, audit
from baton.clock import Clock
from baton.telemetry import Histogram
from control_plane import attempt_log
from control_plane.controller import Controller
from control_plane.core.commands import Outbox, Refused
from control_plane.core.model import AttemptState, RunState, TaskState
from control_plane.core.shard import RunShard
from control_plane.core.span_times import overlapping_owners
from control_plane.core.views import RunEventView, RunView
from control_plane.history import Archive
from control_plane.refusals import NotOwned, StoreDown
from control_plane.services.trace import changes, gently
from control_plane.slots import OwnedShard

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two counts. Longer: a busy run may drop events before they are counted; shorter: work for nobody."""

READ_TIMEOUT = 5.0
"""Seconds for one read of a shard; then it is tried again at the next count."""

RUNS_A_READ = 100
"""Runs counted between two turns of the loop: about 2 ms."""

FAILURES_A_READ = 500
"""Failed attempts looked at for their class in one run and count; more are counted as failed."""

CHECKED_RUNS = 64
"""Archived runs that may wait for the history checker; of more, the oldest go unchecked, and are counted as such."""

CHECKED_TASKS = 200_000
"""Tasks of the archived runs that wait; a run that would be above goes unchecked, unless it is the only one: about 200 MB."""

REMEMBERED = 1024
"""Runs archived lately that are not checked again when their archiving is repeated."""

SEEN_RUNS = 1000
"""Runs that are gone and still remembered in a shard before that is looked into: 100 KB."""

NAMESPACES = 200
"""Namespaces with counters of their own; more share the label `other`, so that the number of series has a bound."""

OTHER = "other"

COMMIT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
COMMIT_BYTES = (256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0)
COMMIT_SHARDS = (1.0, 2.0, 4.0, 8.0, 16.0, 33.0)
RUN_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0)
"""Upper bounds of the histograms' buckets."""


@dataclass(slots=True)
class Counts:
    """Of one namespace."""

    placed: int = 0
    hedged: int = 0
    refused: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    """Outcome -> attempts."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Outcome -> tasks."""
    runs: dict[str, int] = field(default_factory=dict)
    """Outcome -> runs."""
    seconds: Histogram = field(default_factory=lambda: Histogram(RUN_SECONDS))


def _add(to: dict[str, int], what: str, count: int = 1) -> None:
    if count:
        to[what] = to.get(what, 0) + count


class Meter:
    """A controller `Listener` with a loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._controller: Controller | None = None
        self._dirty: dict[str, set[str]] = {}
        self._seen: dict[str, dict[str, int]] = {}
        """Shard -> run uid -> number of the last event counted."""
        self._most_seen: dict[str, int] = {}
        """Shard -> runs beyond which archived ones are looked for among those seen."""
        self._unchecked: deque[Archive] = deque()
        self._unchecked_tasks = 0
        self._checked: dict[str, None] = {}
        self.by_namespace: dict[str, Counts] = {}
        self.commit_seconds = Histogram(COMMIT_SECONDS)
        self.commit_bytes = Histogram(COMMIT_BYTES)
        self.commit_shards = Histogram(COMMIT_SHARDS)
        self.events_missed = 0
        """Run events that were no longer kept when they should have been counted."""
        self.overlapping_owners = 0
        self.runs_checked = 0
        self.runs_unchecked = 0
        self.verdicts: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
        """Verdict of the audit -> runs."""

    def bind(self, controller: Controller) -> None:
        """From now on count that controller's work."""
        self._controller = controller
        controller.measure(self._on_commit)

    # -- what is told ------------------------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """See `controller.Listener`: what was before is another's to count."""
        if isinstance(shard.machine, RunShard):
            self._seen[shard.id] = shard.machine.event_numbers()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """See `controller.Listener`."""
        if outbox.runs:
            self._dirty.setdefault(shard.id, set()).update(outbox.runs)

    def dropped(self, shard: str) -> None:
        """See `controller.Listener`."""
        self._dirty.pop(shard, None)
        self._seen.pop(shard, None)
        self._most_seen.pop(shard, None)

    def archived(self, archive: Archive) -> None:
        """A run is in history."""
        if archive.run.uid in self._checked:
            return
        self._checked[archive.run.uid] = None
        if len(self._checked) > REMEMBERED:
            del self._checked[next(iter(self._checked))]
        self._unchecked.append(archive)
        self._unchecked_tasks += archive.run.task_count
        while len(self._unchecked) > 1 and (
            len(self._unchecked) > CHECKED_RUNS or self._unchecked_tasks > CHECKED_TASKS
        ):
            self._next_unchecked()
            self.runs_unchecked += 1

    def _next_unchecked(self) -> Archive:
        archive = self._unchecked.popleft()
        self._unchecked_tasks -= archive.run.task_count
        return archive

    def _on_commit(self, shards: int, size: int, seconds: float) -> None:
        self.commit_seconds.observe(seconds)
        self.commit_bytes.observe(size)
        self.commit_shards.observe(shards)

    # -- counting ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(INTERVAL)
            await self.count()

    async def count(self) -> None:
        """Bring all counters up to now."""
        dirty, self._dirty = self._dirty, {}
        for shard, uids in dirty.items():
            left = sorted(uids)
            while left:
                part, left = left[:RUNS_A_READ], left[RUNS_A_READ:]
                if not await self._count_shard(shard, part):
                    break
                await self._clock.sleep(0)
        while self._unchecked:
            archive = self._next_unchecked()
            found, audited = await asyncio.to_thread(_check, archive, self._clock.wall())
            self.runs_checked += 1
            self.overlapping_owners += found
            self.verdicts[audited.verdict] += 1
            if found:
                log.error("two owners of a task at once", extra={"run": archive.run.name, "placements": found})
            if audited.verdict is Verdict.VIOLATED:
                broken = [each.text for each in audited.findings if each.verdict is Verdict.VIOLATED]
                log.error("a promise was broken", extra={"run": archive.run.name, "reason": broken[0]})

    async def _count_shard(self, shard: str, uids: list[str]) -> bool:
        """Count some runs; False if the shard is not to be asked now."""
        if self._controller is None:
            return False
        try:
            await self._controller.read(shard, partial(self._count_runs, shard, uids), timeout=READ_TIMEOUT)
        except NotOwned:
            return False
        except (StoreDown, Refused):
            self._dirty.setdefault(shard, set()).update(uids)
            return False
        return True

    def _count_runs(self, shard: str, uids: list[str], machine: RunShard) -> None:
        """A question to committed state."""
        seen = self._seen.setdefault(shard, {})
        for uid in uids:
            view = machine.run_by_uid(uid)
            if view is None:
                seen.pop(uid, None)
                continue
            after = seen.get(uid, 0)
            events: Iterable[RunEventView] | None = machine.run_events(uid, after)
            if events is None:
                kept = machine.kept_events(uid)
                self.events_missed += kept[0].number - after - 1
                events = kept
            seen[uid] = view.event_number
            counts = self._of(view.namespace)
            for event in events:
                _count_event(counts, view, event, machine)
                attempt_log.tell(uid, event, machine)
        if len(seen) > self._most_seen.get(shard, 0) + SEEN_RUNS:
            live = machine.event_numbers()
            self._seen[shard] = {uid: number for uid, number in seen.items() if uid in live}
            self._most_seen[shard] = 2 * len(live)

    def label(self, namespace: str) -> str:
        """Under which name a namespace is counted."""
        return namespace if namespace in self.by_namespace or len(self.by_namespace) < NAMESPACES else OTHER

    def _of(self, namespace: str) -> Counts:
        return self.by_namespace.setdefault(self.label(namespace), Counts())


_ENDINGS = {"failed", "skipped", "cancelled", "deadline"}


def _count_event(counts: Counts, view: RunView, event: RunEventView, machine: RunShard) -> None:
    """One run event, by whole columns."""
    kind, size = event.kind, len(event.tasks)
    if kind == "placed":
        counts.placed += size
    elif kind == "hedged":
        counts.placed += size
        counts.hedged += size
    elif kind == "finished":
        won = event.states.count(TaskState.SUCCEEDED)
        _add(counts.attempts, "succeeded", won)
        _add(counts.tasks, "succeeded", won)
        if size - event.ns.count(0) > won:
            _count_failures(counts, view, event, machine)
    elif kind in ("lost", "rejected"):
        _add(counts.attempts, kind, size)
    elif kind == "refused":
        counts.refused += size
    elif kind in _ENDINGS:
        _add(counts.tasks, "deadline_exceeded" if kind == "deadline" else kind, sum(map(_is_final, event.states)))
    elif kind == "run_finished":
        _add(counts.runs, RunState(event.run_state).name.lower())
        counts.seconds.observe(max(0.0, view.finished - view.created))


def _is_final(state: TaskState) -> bool:
    return state.final


def _count_failures(counts: Counts, view: RunView, event: RunEventView, machine: RunShard) -> None:
    """Attempts that ended by their own report without success."""
    rows = zip(event.tasks, event.ns, event.states, strict=True)
    failures = [(task, n) for task, n, state in rows if n and state is not TaskState.SUCCEEDED]
    for task, n in failures[:FAILURES_A_READ]:
        found = machine.task_at(view.uid, task)
        ends = [each.state for each in found.attempts if each.id.n == n] if found is not None else []
        _add(counts.attempts, (ends[0] if ends else AttemptState.FAILED).name.lower())
    _add(counts.attempts, "failed", len(failures[FAILURES_A_READ:]))


def _check(archive: Archive, now: float) -> tuple[int, Audit]:
    """Placements of a task that had an owner, and the audit. In a thread: the run may be large."""
    tasks = gently(task for piece in archive.pieces for task in piece.response.tasks)
    found = audit(archive.run, tasks, now, gently(archive.events))
    return overlapping_owners(changes(archive.events)), found
