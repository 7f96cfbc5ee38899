"""What is left of a run for its judges: the journal as etcd saw it, the processes' true lives, the client's notes.

Nothing in here is asked of a replica or an agent: a program that deceives itself must not deceive its judge.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster_agent.executors.fake_workload import Interval
from control_plane.batches import BatchReader, Stored
from control_plane.core.events import Event
from control_plane.core.model import Stamp
from control_plane.store import keys
from control_plane.store.base import EventKind
from lab.simulation.etcd import Revision
from lab.simulation.workload import Said


@dataclass(frozen=True, slots=True)
class Written:
    """One event of the journal: when and where it became true."""

    at: float
    revision: int
    shard: str
    stamp: Stamp
    event: Event


@dataclass(frozen=True, slots=True)
class Ran:
    """A workload process: on which cluster, in true time."""

    cluster: str
    interval: Interval


@dataclass(slots=True)
class Record:
    """See the module. Times are true seconds since the start."""

    journal: list[Written]
    ran: list[Ran]
    said: Sequence[Said]
    deadlines: dict[str, float]
    """Run id in the client's notes -> true time of its deadline."""
    healed: float
    """From here on nothing is broken."""
    ended: float
    died: Sequence[str]
    living: Sequence[str] = ()
    """Processes that are still there at the end."""
    left: Sequence[str] = ()
    """What did not converge."""
    notes: list[tuple[float, str]] = field(default_factory=list)
    """What the nemesis did."""
    digest: str = ""


def read_journal(record: Sequence[Revision]) -> list[Written]:
    """Decode every batch that took effect, in the order of commits."""
    readers: dict[str, BatchReader] = {}
    found: list[Written] = []
    for revision in record:
        for change in revision.events:
            place = keys.parse_log(change.kv.key)
            if place is None or change.kind is not EventKind.PUT:
                continue
            shard, _seq = place
            stored: Stored | None = readers.setdefault(shard, BatchReader()).take(change.kv.value)
            if stored is not None:
                found.extend(
                    Written(revision.at, revision.number, shard, stamp, event) for event, stamp in stored.stamped()
                )
    return found


def digest(record: Sequence[Revision], ran: Sequence[Ran], said: Sequence[Said]) -> str:
    """Equal for equal runs, bit for bit."""
    total = hashlib.blake2b(digest_size=16)
    for revision in record:
        total.update(f"{revision.at!r} {revision.number}".encode())
        for change in revision.events:
            total.update(f"{change.kind.value} {change.kv.key} ".encode() + change.kv.value)
    for each in ran:
        total.update(f"{each.cluster} {each.interval!r}".encode())
    for answer in said:
        total.update(repr(answer).encode())
    return total.hexdigest()


def tally(journal: Sequence[Written]) -> Counter[str]:
    """How often each event happened."""
    return Counter(type(written.event).__name__ for written in journal)
