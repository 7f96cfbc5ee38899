"""Programs one version behind, among new ones (PROTOCOL J11): a replica or an agent that knows the feature level before this one.

Theory. An older program differs in what it says it reads, and in what it may therefore be given. A replica says so where it
registers: it may not come in above its level, nobody may write above it while it is there. An agent says so in its Hello. What the
programs of a mixed federation did is judged from the store (`lab.checking.versions`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from baton.clock import Entropy
from cluster_agent.agent import Agent
from cluster_agent.conversation import Parts
from cluster_agent.reconciler import Reconciler
from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import RUN_SHARDS
from control_plane.refusals import IncompatibleFederation
from control_plane.registration import Federation
from control_plane.replica import Replica
from control_plane.store import keys
from control_plane.store.base import EventKind, Put, Txn
from control_plane.store.memory import MemoryEtcd
from lab.checking.history import Levelled
from lab.simulation.etcd import Revision

BEFORE = FEATURE_LEVEL - 1
"""What a program one version behind reads."""


class OlderAgent(Agent):
    """An agent one version behind."""

    def _parts(self, reconciler: Reconciler, journal_uid: str) -> Parts:
        parts = super()._parts(reconciler, journal_uid)
        return replace(parts, facts=replace(parts.facts, feature_level=BEFORE))


def make_older(replica: Replica) -> None:
    """Let a replica that has not registered yet be one version behind."""
    ownership = replica.ownership
    ownership._member = replace(ownership._member, feature_level=BEFORE)  # noqa: SLF001 - the product has no such switch


def found(etcd: MemoryEtcd, entropy: Entropy) -> None:
    """A federation that the older program made."""
    federation = Federation(entropy.token(16), len(RUN_SHARDS))
    puts = (
        Put(keys.FEDERATION, json.dumps(asdict(federation)).encode()),
        Put(keys.INCARNATION, b"1"),
        Put(keys.FEATURE_LEVEL, str(BEFORE).encode()),
    )
    etcd.txn(Txn((), puts))


def is_refusal(error: Exception) -> bool:
    """Whether a program ended because its version may not take part."""
    if isinstance(error, ExceptionGroup):
        return error.split(IncompatibleFederation)[1] is None
    return isinstance(error, IncompatibleFederation)


def read_levels(record: Sequence[Revision]) -> list[Levelled]:
    """Registrations, their ends, and changes of the level; what is written is in the journal."""
    told: list[Levelled] = []
    for revision in record:
        for change in revision.events:
            gone = change.kind is not EventKind.PUT
            member = keys.parse_member(change.kv.key)
            if member is not None:
                level = 0 if gone else int(json.loads(change.kv.value)["feature_level"])
                told.append(Levelled(revision.at, revision.number, member, level))
            elif change.kv.key == keys.FEATURE_LEVEL and not gone:
                told.append(Levelled(revision.at, revision.number, "", int(change.kv.value)))
    return told
