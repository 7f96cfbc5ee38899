"""The calls that serving replicas make to shard owners, and their encoding (internal; JSON, or protobuf where it is columns)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from control_plane.core.commands import LoseCluster, OpenSession, SessionGrant
from control_plane.core.model import Evidence

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


def encode_lose(cluster: str, generation: int) -> bytes:
    """A goodbye: the agent says that all its work is dead (PROTOCOL S5)."""
    return json.dumps({"cluster": cluster, "generation": generation}).encode()


def decode_lose(payload: bytes) -> LoseCluster:
    """The loss a goodbye means: evidence REPORTED."""
    fields = json.loads(payload)
    return LoseCluster(str(fields["cluster"]), int(fields["generation"]), Evidence.REPORTED, "the agent said goodbye")
