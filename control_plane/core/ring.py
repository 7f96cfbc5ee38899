"""Who should own what: weighted rendezvous hashing (PROTOCOL O1). Pure and deterministic across processes.

Theory. Every member gets a score for every shard from a hash of both; the highest wins. A member that leaves gives up
only its own shards, and one that joins takes only what it now wins, about its share: nothing else moves. With scores
of `-weight / ln(h)`, h uniform in (0, 1), a member wins in proportion to its weight. Replicas that disagree about the
members only lose time: the owner key decides, not this (O1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

_SPAN = 1 << 64


def owner_of(shard: str, members: Mapping[str, float]) -> str | None:
    """The member that should own `shard`; None if there is no member with a weight above 0."""
    able = [(name, weight) for name, weight in members.items() if weight > 0]
    if not able:
        return None
    return max(able, key=lambda member: (_score(shard, *member), member[0]))[0]


def owners(shards: Iterable[str], members: Mapping[str, float]) -> dict[str, str]:
    """The owner that each shard should have; empty if nobody can."""
    found = {shard: owner_of(shard, members) for shard in shards}
    return {shard: owner for shard, owner in found.items() if owner is not None}


def _score(shard: str, member: str, weight: float) -> float:
    digest = hashlib.blake2b(f"{member}/{shard}".encode(), digest_size=8).digest()
    # Half a step from either end: neither 0 (no logarithm) nor 1 (no quotient).
    return -weight / math.log((int.from_bytes(digest, "big") + 0.5) / _SPAN)
