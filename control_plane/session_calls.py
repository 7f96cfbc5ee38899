"""The calls that serving replicas make to shard owners, and their encoding (internal; JSON, or protobuf where it is columns)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from control_plane.core.commands import LoseCluster, OpenSession, SessionGrant
from control_plane.core.model import Evidence
from control_plane.store import keys
from control_plane.store.base import Compare

OPEN = "/baton.internal/OpenSession"
LOSE = "/baton.internal/Goodbye"
INVENTORY = "/baton.internal/TakeInventory"
ALIVE = "/baton.internal/AliveInstance"


def encode_open(command: OpenSession) -> bytes:
    """An OpenSession as JSON."""
    return json.dumps(dataclasses.asdict(command)).encode()


def decode_open(payload: bytes) -> OpenSession:
    """Inverse of `encode_open`. Raises ValueError, TypeError."""
    fields: dict[str, Any] = json.loads(payload)
    fields["labels"] = tuple((k, v) for k, v in fields["labels"])
    fields["taints"] = tuple(fields["taints"])
    fields["namespaces"] = tuple(fields["namespaces"])
    return OpenSession(**fields)


def encode_grant(grant: SessionGrant) -> bytes:
    """The answer to an OpenSession as JSON."""
    return json.dumps(dataclasses.asdict(grant)).encode()


def decode_grant(payload: bytes) -> SessionGrant:
    """Inverse of `encode_grant`. Raises ValueError, TypeError."""
    return SessionGrant(**json.loads(payload))


def encode_lose(cluster: str, generation: int, claimed: int) -> bytes:
    """A goodbye: the agent says that all its work is dead (PROTOCOL S5), on the stream that claimed the session at that revision."""
    return json.dumps({"cluster": cluster, "generation": generation, "claimed": claimed}).encode()


def decode_lose(payload: bytes) -> tuple[LoseCluster, Compare]:
    """The loss a goodbye means: evidence REPORTED. It holds only while no later stream has claimed the session (J5): an agent that
    came back into the generation may have been given work since."""
    fields = json.loads(payload)
    cluster = str(fields["cluster"])
    lost = LoseCluster(cluster, int(fields["generation"]), Evidence.REPORTED, "the agent said goodbye")
    return lost, Compare.unchanged(keys.session_owner(cluster), int(fields["claimed"]))
