"""What the guard tells a new connection: who it is and what it knows (PROTOCOL G3)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from cluster_agent.core.lease import Leases
from cluster_agent.executors.base import AttemptKey, CensusEntry, Features, Phase
from cluster_agent.guard import host
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.protocol import VERSION, Message, entry_to_wire, exit_from_wire
from cluster_agent.guard.workload import Workload, run_of

CENSUS_CHUNK = 64
"""Entries per census message: at the result limit such a message has 1.5 MiB."""


def greeting(features: Features, entries: Iterator[CensusEntry], *, lost_before: bool) -> Iterator[Message]:
    """The messages of a hello."""
    yield {
        "ev": "hello",
        "version": VERSION,
        "pid": os.getpid(),
        "at": host.boot(),
        "lost": lost_before,
        "isolation": features.isolation,
        "orphan_killer": features.orphan_killer,
        "detail": features.detail,
    }
    chunk: list[Message] = []
    for entry in entries:
        chunk.append(entry_to_wire(entry))
        if len(chunk) == CENSUS_CHUNK:
            yield {"ev": "census", "entries": chunk}
            chunk = []
    yield {"ev": "census", "entries": chunk}
    yield {"ev": "ready"}


def census(
    live: Mapping[str, Workload],
    waiting: Iterable[AttemptKey],
    leases: Leases[str],
    ledger: Ledger,
    unrecorded: Mapping[str, Message],
) -> Iterator[CensusEntry]:
    """Every attempt the guard knows: running, waiting behind one that runs, ended and not forgotten, tombstoned."""
    for behind in waiting:
        generation = leases.generation(behind.text())
        yield CensusEntry(behind, generation if generation is not None else 0, Phase.STARTING)
    for key, workload in live.items():
        generation = leases.generation(key)
        lease = generation if generation is not None else 0
        yield CensusEntry(workload.request.key, lease, workload.phase, run=run_of(workload.request))
    for generation, wire in ledger.exits.values():
        exited = exit_from_wire(wire)
        yield CensusEntry(exited.key, generation, Phase.EXITED, exited)
    for name, record in unrecorded.items():
        exited = exit_from_wire(record)
        yield CensusEntry(exited.key, ledger.started_keys[name].generation, Phase.EXITED, exited)
    for key in ledger.tombstones:
        if key not in live and key not in ledger.exits and key not in unrecorded:
            yield CensusEntry(AttemptKey.parse(key), 0, Phase.TOMBSTONED)
