"""Groups, shapes, demand and grants on the wire between replicas (PROTOCOL C1, C4)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from baton.internal import peer_pb2 as pb
from baton.v1 import agent_pb2
from control_plane.core import commands
from control_plane.core.capacity import Shape
from control_plane.core.model import Group, Resources
from control_plane.core.offers import Granted

MAX_GROUPS = 1024
"""Encoded groups kept: they are said again with every demand. More groups than this in use at once are only encoded again."""


@lru_cache(MAX_GROUPS)
def encode_group(group: Group) -> str:
    """A group as JSON; the inverse is `decode_group`."""
    need = group.resources
    fields = [
        group.namespace,
        group.priority,
        [need.cpu_millis, need.memory_bytes, need.disk_bytes, need.processes, need.extended],
        group.require_isolation,
        group.selector,
        group.clusters,
        group.tolerations,
        *([group.level] if group.level else []),  # a replica that knows no levels has no such groups (J11)
    ]
    return json.dumps(fields, separators=(",", ":"))


def decode_group(text: str) -> Group:
    """Inverse of `encode_group`. Raises ValueError."""
    try:
        namespace, priority, need, isolation, selector, clusters, tolerations, *level = json.loads(text)
        cpu, memory, disk, processes, extended = need
        resources = Resources(cpu, memory, disk, processes, tuple((name, amount) for name, amount in extended))
        return Group(
            namespace,
            priority,
            resources,
            isolation,
            tuple((key, value) for key, value in selector),
            tuple(clusters),
            tuple(tolerations),
            *level,
        )
    except TypeError as error:
        raise ValueError(f"not a group: {text[:100]}") from error


def shapes_of(beat: agent_pb2.Heartbeat) -> tuple[Shape, ...]:
    """The free room that a heartbeat reports."""
    return tuple(
        Shape(
            count=shape.count,
            cpu_millis=shape.cpu_millis,
            memory_bytes=shape.memory_bytes,
            disk_bytes=shape.disk_bytes,
            extended=tuple(sorted(shape.extended.items())),
            total_cpu_millis=shape.total_cpu_millis,
            total_memory_bytes=shape.total_memory_bytes,
        )
        for shape in beat.shapes
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What the leader says to one shard: permissions, why groups wait, and which groups give freed slots back."""

    grants: tuple[Granted, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()
    returning: frozenset[str] = frozenset()


def encode_grants(shard: str, term: int, demand_seq: int, ttl: float, answer: Answer) -> pb.PeerMessage:
    """An answer to the Demand `demand_seq` of a shard; `ttl` in seconds."""
    message = pb.Grants(
        shard=shard,
        term=term,
        demand_seq=demand_seq,
        ttl_ms=int(ttl * 1000),
        grants=[
            pb.Grant(cluster_uid=grant.cluster, generation=grant.generation, key=grant.key, count=grant.count)
            for grant in answer.grants
        ],
        reasons=[pb.WaitReason(key=key, reason=reason) for key, reason in answer.reasons],
        returning=sorted(answer.returning),
    )
    return pb.PeerMessage(grants=message)


def decode_grants(message: pb.Grants) -> commands.TakeGrants:
    """What an owner is permitted."""
    grants = tuple(commands.Grant(g.cluster_uid, g.generation, g.key, g.count) for g in message.grants)
    reasons = tuple((reason.key, reason.reason) for reason in message.reasons)
    return commands.TakeGrants(message.term, grants, reasons, frozenset(message.returning))
