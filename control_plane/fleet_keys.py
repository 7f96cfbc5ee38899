"""What fleet publishes outside its log, and how it is written: the table, and the owner keys of sessions (PROTOCOL S2, S5).

Theory. Both are carried by the very transaction that commits the verdict (`side_puts`), so they can never disagree with the
log for longer than a watch is late. The owner key is the lock of S2: a serving replica puts heartbeats under a compare of its
value. Opening a generation replaces the value, ending one marks it, so no heartbeat of an ended generation can ever be
acknowledged.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from control_plane.core.events import (
    AdmissionSet,
    ClusterAdded,
    ClusterLost,
    Event,
    HealthChanged,
    SessionOpened,
    StormHeld,
)
from control_plane.core.fleet import Fleet
from control_plane.core.fleet_image import facts_from_json, facts_to_json
from control_plane.core.model import FLEET, FleetTable
from control_plane.store import keys
from control_plane.store.base import Put

if TYPE_CHECKING:
    from control_plane.controller import OwnedShard

TABLE_FORMAT = 1
"""Format of `fleet/table`. A replica that reads a higher one must not guess (PROTOCOL J11)."""

_SEEN = (ClusterAdded, SessionOpened, ClusterLost, HealthChanged, AdmissionSet, StormHeld)
"""Events that change the published table."""


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Value of `sessions/{uid}/owner`: the generation, the replica that serves it ("" if none), whether it has ended. `level`: the
    feature level that the agent said on its current stream (J11), 0 until a stream has claimed the session."""

    generation: int
    replica: str
    ended: bool
    nonce: str = ""
    level: int = 0


def encode_session(info: SessionInfo) -> bytes:
    """JSON with sorted keys: the same session is the same bytes, for compares."""
    value = {
        "generation": info.generation,
        "replica": info.replica,
        "nonce": info.nonce,
        "ended": info.ended,
        "level": info.level,
    }
    return json.dumps(value, sort_keys=True).encode()


def decode_session(value: bytes) -> SessionInfo:
    """Inverse of `encode_session`. Raises ValueError."""
    try:
        fields = json.loads(value)
        return SessionInfo(
            int(fields["generation"]),
            str(fields["replica"]),
            bool(fields["ended"]),
            str(fields["nonce"]),
            int(fields.get("level", 0)),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a session: {value[:100]!r}") from error


def encode_table(table: FleetTable) -> bytes:
    """Compressed JSON: 100 clusters with 32 generations each stay far below a shard's share of a transaction (J2)."""
    fields = {
        "format": TABLE_FORMAT,
        "seq": table.seq,
        "storm_until": table.storm_until,
        "clusters": [facts_to_json(facts) for facts in table.clusters.values()],
    }
    return zlib.compress(json.dumps(fields, separators=(",", ":")).encode(), level=1)


def decode_table(value: bytes) -> FleetTable:
    """Inverse of `encode_table`. Raises ValueError, also for a format that is too new."""
    try:
        fields = json.loads(zlib.decompress(value))
        if fields["format"] != TABLE_FORMAT:
            raise ValueError(f"fleet/table has format {fields['format']}; this replica reads {TABLE_FORMAT}")
        clusters = [facts_from_json(row) for row in fields["clusters"]]
        return FleetTable(int(fields["seq"]), {facts.uid: facts for facts in clusters}, float(fields["storm_until"]))
    except (zlib.error, KeyError, TypeError) as error:
        raise ValueError("fleet/table cannot be read") from error


def side_puts(shard: OwnedShard, events: Sequence[Event]) -> list[Put]:
    """Puts that go with a batch of fleet; none for another shard, and none for a batch that leaves the table as it is.

    Of a cluster that ends one generation and opens the next in one batch only the last word is written (a transaction may
    put a key once; S5 needs no more).
    """
    if shard.id != FLEET or not isinstance(shard.machine, Fleet) or not any(isinstance(e, _SEEN) for e in events):
        return []
    sessions: dict[str, SessionInfo] = {}
    for event in events:
        if isinstance(event, ClusterLost):
            sessions[event.cluster] = SessionInfo(event.generation, "", ended=True)
        elif isinstance(event, SessionOpened):
            sessions[event.cluster] = SessionInfo(event.generation, event.replica, ended=False)
    puts = [Put(keys.session_owner(uid), encode_session(info)) for uid, info in sessions.items()]
    return [*puts, Put(keys.FLEET_TABLE, encode_table(shard.machine.table()))]
