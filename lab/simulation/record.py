"""From a simulation to a history (`lab.checking.history`): the journal and the owner keys as etcd saw them, and a digest of it all.

Nothing in here is asked of a replica or an agent: a program that deceives itself must not deceive its judge.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from control_plane.batches import BatchReader, Stored
from control_plane.core import events as ev
from control_plane.core.model import Evidence
from control_plane.store import keys
from control_plane.store.base import EventKind
from lab.checking.history import Owned, Ran, Said, Watched, Written
from lab.simulation.etcd import Revision


def read_journal(record: Sequence[Revision]) -> list[Written]:
    """Decode every batch that took effect, in the order of commits. A batch in parts counts with its last one; what a restore cut off
    is dropped."""
    readers: dict[str, BatchReader] = {}
    found: list[Written] = []
    before = 0
    for revision in record:
        if revision.number <= before:
            readers.clear()  # the store was restored: parts of unfinished batches are gone
        before = revision.number
        for change in revision.events:
            place = keys.parse_log(change.kv.key)
            if place is None or change.kind is not EventKind.PUT:
                continue
            shard, _seq = place
            stored: Stored | None = readers.setdefault(shard, BatchReader()).take(change.kv.value)
            if stored is not None:
                found.extend(
                    Written(revision.at, revision.number, shard, stamp, event, revision.writer, stored.feature_level)
                    for event, stamp in stored.stamped()
                )
    return found


def read_owners(record: Sequence[Revision]) -> list[Owned]:
    """Every change of an owner key."""
    found: list[Owned] = []
    for revision in record:
        for change in revision.events:
            shard = keys.parse_owner(change.kv.key)
            if shard is not None:
                value = change.kv.value if change.kind is EventKind.PUT else b""
                found.append(Owned.of(revision.at, revision.number, shard, value))
    return found


def digest(
    record: Sequence[Revision], ran: Sequence[Ran], said: Sequence[Said], watched: Sequence[Watched] = ()
) -> str:
    """Equal for equal runs, bit for bit."""
    total = hashlib.blake2b(digest_size=16)
    for revision in record:
        total.update(f"{revision.at!r} {revision.number}".encode())
        for change in revision.events:
            total.update(f"{change.kind.value} {change.kv.key} ".encode() + change.kv.value)
    for each in ran:
        total.update(f"{each.cluster} {each.interval!r}".encode())
    for answer in (*said, *watched):
        total.update(repr(answer).encode())
    return total.hexdigest()


def tally(journal: Sequence[Written]) -> Counter[str]:
    """How often each event happened."""
    return Counter(type(written.event).__name__ for written in journal)


def stale_returns(journal: Sequence[Written]) -> int:
    """How many sessions began with stale work: a cluster that was lost came back, and told of attempts that were lost with it."""
    where: dict[tuple[str, int, int], str] = {}
    lost: set[tuple[str, int, int]] = set()
    session: dict[str, int] = {}
    returns: set[tuple[str, int]] = set()
    for written in journal:
        event = written.event
        if isinstance(event, ev.SessionOpened):
            session[event.cluster] = event.generation
        elif isinstance(event, ev.AttemptsPlaced):
            where.update((key, event.cluster) for key in _attempts(event))
        elif isinstance(event, ev.AttemptsLost) and event.evidence is not Evidence.REPORTED:
            lost.update(_attempts(event))
        elif isinstance(event, ev.ResultsRefused | ev.StopsConfirmed):
            told = [where[key] for key in _attempts(event) if key in lost and key in where]
            returns.update((cluster, session[cluster]) for cluster in told if cluster in session)
    return len(returns)


def _attempts(
    event: ev.AttemptsPlaced | ev.AttemptsLost | ev.ResultsRefused | ev.StopsConfirmed,
) -> list[tuple[str, int, int]]:
    return [(event.run, task, n) for task, n in zip(event.tasks, event.ns, strict=True)]
