"""The key layout: every key that Baton keeps in the store, and the way back from a key to its meaning.

Theory: a prefix read or watch is a string comparison, so `/g/1` also finds `/g/10` (reliability.md section 6, pitfall
26). Two habits make that impossible here: numbers have a fixed width, so order of keys is order of numbers; and every
prefix ends in `/`, which no segment may contain.

    owners/{shard}                                 nonce of the taking, under the owner's lease          J4, O1
    shards/{shard}/head                            highest committed seq                                 J4
    shards/{shard}/log/{seq:016}                   one batch of events                                   J1
    shards/{shard}/snapshot/manifest               which snapshot is whole                               J9
    shards/{shard}/snapshot/{seq:016}/{chunk:06}   its pieces                                            J9
    members/{replica}                              one live replica, under its lease                     O1
    sessions/{cluster}/owner, .../beat             an agent's session: generation and renewals           S2
    incarnation, restored_suspected                fence against a restored store                        J12
    feature_level                                  highest event version that may be written             J11
    federation                                     uid and shard count, fixed at creation                O1
    fleet/table                                    ended generations, as fleet publishes them            S5

Shard ids are strings: "00" to "31", and "fleet". Pure.
"""

from __future__ import annotations

import re

from control_plane.core.model import ALL_SHARDS, RUN_SHARDS

RUN_SHARD_COUNT = len(RUN_SHARDS)
"""Fixed at creation (PROTOCOL O1). With `fleet` a transaction over all shards makes 2*33+2 = 68 compares, under etcd's
128; a larger number would not fit one transaction, a smaller one spreads worse over replicas."""

MAX_SEQ = 10**16 - 1
"""Sixteen digits: at 1,000 batches a second they last 300,000 years."""

MAX_CHUNK = 10**6 - 1
"""Six digits of snapshot pieces; at 1 MiB each that is a tebibyte."""

INCARNATION = "incarnation"
RESTORED_SUSPECTED = "restored_suspected"
FEATURE_LEVEL = "feature_level"
FEDERATION = "federation"
FLEET_TABLE = "fleet/table"

OWNERS_PREFIX = "owners/"
SHARDS_PREFIX = "shards/"
MEMBERS_PREFIX = "members/"
SESSIONS_PREFIX = "sessions/"

_SHARD_IDS = frozenset(ALL_SHARDS)
_SEGMENT = re.compile(r"[A-Za-z0-9_.\-]{1,253}")
_OWNER = re.compile(r"owners/([^/]+)")
_HEAD = re.compile(r"shards/([^/]+)/head")
_LOG = re.compile(r"shards/([^/]+)/log/([0-9]{16})")
_MANIFEST = re.compile(r"shards/([^/]+)/snapshot/manifest")
_CHUNK = re.compile(r"shards/([^/]+)/snapshot/([0-9]{16})/([0-9]{6})")
_MEMBER = re.compile(r"members/([^/]+)")
_SESSION = re.compile(r"sessions/([^/]+)/(owner|beat)")


def shard_id(number: int) -> str:
    """The id of run shard `number` (0 to 31). Raises ValueError outside that range."""
    if not 0 <= number < RUN_SHARD_COUNT:
        raise ValueError(f"shard number {number} is not in 0..{RUN_SHARD_COUNT - 1}")
    return f"{number:02}"


def shard_prefix(shard: str) -> str:
    """Everything of one shard."""
    return f"shards/{_shard(shard)}/"


def owner(shard: str) -> str:
    """Who owns the shard (PROTOCOL J4). Beside the shard, not in it: every replica watches all owners and no logs."""
    return f"{OWNERS_PREFIX}{_shard(shard)}"


def head(shard: str) -> str:
    """The highest committed seq of the shard (PROTOCOL J4)."""
    return f"shards/{_shard(shard)}/head"


def log_prefix(shard: str) -> str:
    """All batches of the shard, in order of seq."""
    return f"shards/{_shard(shard)}/log/"


def log(shard: str, seq: int) -> str:
    """Batch `seq` of the shard (PROTOCOL J1)."""
    return f"shards/{_shard(shard)}/log/{_number(seq, MAX_SEQ, 'seq'):016}"


def snapshot_prefix(shard: str) -> str:
    """The manifest and all chunks of all snapshots of the shard."""
    return f"shards/{_shard(shard)}/snapshot/"


def snapshot_manifest(shard: str) -> str:
    """Which snapshot of the shard is whole (PROTOCOL J9)."""
    return f"shards/{_shard(shard)}/snapshot/manifest"


def snapshot_chunk_prefix(shard: str, seq: int) -> str:
    """All chunks of the snapshot at `seq`, in order."""
    return f"shards/{_shard(shard)}/snapshot/{_number(seq, MAX_SEQ, 'seq'):016}/"


def snapshot_chunk(shard: str, seq: int, chunk: int) -> str:
    """Chunk `chunk` of the snapshot at `seq` (PROTOCOL J9)."""
    return f"{snapshot_chunk_prefix(shard, seq)}{_number(chunk, MAX_CHUNK, 'chunk'):06}"


def member(replica: str) -> str:
    """A replica's registration (PROTOCOL O1)."""
    return f"{MEMBERS_PREFIX}{_segment(replica)}"


def session_prefix(cluster_uid: str) -> str:
    """Both keys of one cluster's session."""
    return f"{SESSIONS_PREFIX}{_segment(cluster_uid)}/"


def session_owner(cluster_uid: str) -> str:
    """Generation and serving replica of a cluster's session (PROTOCOL S2)."""
    return f"{session_prefix(cluster_uid)}owner"


def session_beat(cluster_uid: str) -> str:
    """The key whose committed puts are the cluster's renewals (PROTOCOL S2, S4)."""
    return f"{session_prefix(cluster_uid)}beat"


def parse_owner(key: str) -> str | None:
    """The shard of an owner key, None for any other key."""
    match = _OWNER.fullmatch(key)
    return match[1] if match and match[1] in _SHARD_IDS else None


def parse_head(key: str) -> str | None:
    """The shard of a head key, None for any other key."""
    match = _HEAD.fullmatch(key)
    return match[1] if match and match[1] in _SHARD_IDS else None


def parse_log(key: str) -> tuple[str, int] | None:
    """(shard, seq) of a log key, None for any other key."""
    match = _LOG.fullmatch(key)
    return (match[1], int(match[2])) if match and match[1] in _SHARD_IDS else None


def parse_snapshot_manifest(key: str) -> str | None:
    """The shard of a manifest key, None for any other key."""
    match = _MANIFEST.fullmatch(key)
    return match[1] if match and match[1] in _SHARD_IDS else None


def parse_snapshot_chunk(key: str) -> tuple[str, int, int] | None:
    """(shard, seq, chunk) of a chunk key, None for any other key."""
    match = _CHUNK.fullmatch(key)
    return (match[1], int(match[2]), int(match[3])) if match and match[1] in _SHARD_IDS else None


def parse_member(key: str) -> str | None:
    """The replica of a registration, None for any other key."""
    match = _MEMBER.fullmatch(key)
    return match[1] if match and _SEGMENT.fullmatch(match[1]) else None


def parse_session(key: str) -> tuple[str, str] | None:
    """(cluster uid, "owner" or "beat") of a session key, None for any other key."""
    match = _SESSION.fullmatch(key)
    return (match[1], match[2]) if match and _SEGMENT.fullmatch(match[1]) else None


def _shard(shard: str) -> str:
    if shard not in _SHARD_IDS:
        raise ValueError(f"{shard!r} is no shard id")
    return shard


def _number(value: int, most: int, what: str) -> int:
    if not 0 <= value <= most:
        raise ValueError(f"{what} {value} is not in 0..{most}")
    return value


def _segment(name: str) -> str:
    if not _SEGMENT.fullmatch(name):
        raise ValueError(f"{name!r} cannot be part of a key: 1 to 253 of A-Z a-z 0-9 _ . -")
    return name
