"""Records of the journal as JSON objects and back. Kinds and field names here are a stored format: add, never
change."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from cluster_agent.core.model import ArtifactRef, AttemptKey, Demand, Ended, Epoch, Mark, Outcome
from cluster_agent.core.records import (
    Booted,
    EpochRaised,
    Finished,
    Forgotten,
    MarkRaised,
    Moved,
    Record,
    SessionOpened,
    Starting,
    StopConfirmed,
    Tombstoned,
)


class CodecError(ValueError):
    """Not a record of this version."""


Value = dict[str, Any]


def encode(record: Record) -> Value:  # noqa: PLR0911 - one return per kind, nothing nested
    """The JSON object of a record."""
    match record:
        case Booted(boot_id):
            return {"t": "booted", "boot": boot_id}
        case SessionOpened():
            return {
                "t": "session",
                "gen": record.generation,
                "cluster": record.cluster_uid,
                "federation": record.federation_uid,
                "f": record.fence_seconds,
                "k": record.kill_seconds,
            }
        case EpochRaised(shard, epoch):
            return {"t": "epoch", "shard": shard, "epoch": [epoch.incarnation, epoch.revision]}
        case MarkRaised(shard, mark):
            return {"t": "mark", "shard": shard, "mark": [mark.incarnation, mark.seq, mark.nonce]}
        case Starting():
            need = record.demand
            extended = [list(item) for item in need.extended]
            return {
                **_attempt("starting", record.key, record.shard, record.generation),
                "demand": [need.cpu_millis, need.memory_bytes, need.disk_bytes, extended],
                "grace": record.grace_seconds,
                **({"keep": True} if record.keep_at_fence else {}),
            }
        case Moved(key, generation):
            return {"t": "moved", "key": key.text(), "gen": generation}
        case Finished():
            return {**_attempt("finished", record.key, record.shard, record.generation), "ended": _ended(record.ended)}
        case Tombstoned():
            base = _attempt("tombstoned", record.key, record.shard, record.generation)
            return {**base, "rejected": record.rejected} if record.rejected else base
        case StopConfirmed(key):
            return {"t": "stopped", "key": key.text()}
        case Forgotten(key):
            return {"t": "forgotten", "key": key.text()}


def _attempt(kind: str, key: AttemptKey, shard: str, generation: int) -> Value:
    return {"t": kind, "key": key.text(), "shard": shard, "gen": generation}


def _ended(ended: Ended) -> Value:
    value: Value = {"as": ended.outcome.value, "from": ended.start_wall_ms, "to": ended.end_wall_ms}
    if ended.exit_code is not None:
        value["exit"] = ended.exit_code
    if ended.result:
        value["result"] = base64.b64encode(ended.result).decode()
    if ended.message:
        value["why"] = ended.message
    if ended.late:
        value["late"] = True
    if ended.artifacts:
        value["made"] = [[ref.name, ref.size, ref.digest.hex()] for ref in ended.artifacts]
    return value


def _read_ended(value: Value) -> Ended:
    return Ended(
        Outcome(value["as"]),
        value.get("exit"),
        base64.b64decode(value.get("result", "")),
        value.get("why", ""),
        value["from"],
        value["to"],
        value.get("late", False),
        tuple(ArtifactRef(name, size, bytes.fromhex(digest)) for name, size, digest in value.get("made", ())),
    )


def _read_starting(value: Value) -> Starting:
    cpu, memory, disk, extended = value["demand"]
    demand = Demand(cpu, memory, disk, tuple((name, amount) for name, amount in extended))
    key, keep = AttemptKey.parse(value["key"]), value.get("keep", False)
    return Starting(key, value["shard"], value["gen"], demand, value["grace"], keep)


def _read_tombstoned(value: Value) -> Tombstoned:
    return Tombstoned(AttemptKey.parse(value["key"]), value["shard"], value["gen"], value.get("rejected", ""))


def _read_finished(value: Value) -> Finished:
    return Finished(AttemptKey.parse(value["key"]), value["shard"], value["gen"], _read_ended(value["ended"]))


_READERS: dict[str, Callable[[Value], Record]] = {
    "booted": lambda v: Booted(v["boot"]),
    "session": lambda v: SessionOpened(v["gen"], v["cluster"], v["federation"], v["f"], v["k"]),
    "epoch": lambda v: EpochRaised(v["shard"], Epoch(*v["epoch"])),
    "mark": lambda v: MarkRaised(v["shard"], Mark(*v["mark"])),
    "starting": _read_starting,
    "moved": lambda v: Moved(AttemptKey.parse(v["key"]), v["gen"]),
    "finished": _read_finished,
    "tombstoned": _read_tombstoned,
    "stopped": lambda v: StopConfirmed(AttemptKey.parse(v["key"])),
    "forgotten": lambda v: Forgotten(AttemptKey.parse(v["key"])),
}


def decode(value: Value) -> Record:
    """Inverse of `encode`. Raises CodecError."""
    try:
        return _READERS[value["t"]](value)
    except (KeyError, TypeError, ValueError) as error:
        raise CodecError(f"{value!r}: {error}") from error
