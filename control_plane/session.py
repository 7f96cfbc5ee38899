"""One agent's stream and the session it serves, as values (PROTOCOL S1, S2). What is done with them: `sessions.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from baton.leases import LeaseValues, to_millis
from baton.v1 import agent_pb2 as pb
from control_plane.agent_rules import Problem, heartbeat_problem, hello_problem
from control_plane.core.commands import SessionGrant
from control_plane.core.events import ARTIFACTS_LEVEL

log = logging.getLogger(__name__)


class StreamClosed(Exception):
    """The agent's stream ended."""


class AgentStream(Protocol):
    """One agent's stream, as its adapter offers it."""

    peer_cluster: str | None
    """Cluster name in the peer's certificate; None on plain loopback."""

    async def receive(self) -> pb.SessionRequest:
        """The next message. Raises StreamClosed."""
        ...

    def send(self, message: pb.SessionResponse) -> bool:
        """Queue a message; False if the queue is full (the caller ends the stream)."""
        ...


@dataclass(slots=True)
class Session:
    """A live stream of a generation."""

    cluster: str
    name: str
    generation: int
    stream_id: str
    """Sorts by age among the streams of its cluster."""
    stream: AgentStream
    hello: pb.Hello
    owner_value: bytes
    claimed: int
    """mod_revision of the session's owner key since this stream claimed it."""
    incarnation: int
    """Of the store, when the Hello came (J12)."""
    inventories: dict[str, pb.ShardInventory]
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    telling: set[str] = field(default_factory=set)
    """Shards whose owner is being told the inventory."""

    def readable(self, message: pb.SessionResponse) -> pb.SessionResponse:
        """What this stream's agent may be told of a message. An older agent would not see that an attempt starts from artifacts, a
        checkpoint or stored code, and would start it without (J11): such attempts are left out. None is placed there knowingly;
        one that is, because the agent was put back to an older version, waits for a newer one (the owner re-sends, J7)."""
        if self.hello.feature_level >= ARTIFACTS_LEVEL or not message.HasField("dispatches"):
            return message
        of = message.dispatches
        stored = {code.sha256 for code in of.codes if code.stored}
        kept = [each for each in of.dispatches if not _needs_files(each, of.templates[each.template], stored)]
        if len(kept) == len(of.dispatches):
            return message
        log.warning(
            "the agent is too old for attempts that were placed on it: upgrade it",
            extra={"cluster": self.name, "attempts": len(of.dispatches) - len(kept)},
        )
        less = pb.SessionResponse()
        less.CopyFrom(message)
        del less.dispatches.dispatches[:], less.dispatches.codes[:]
        less.dispatches.dispatches.extend(kept)
        less.dispatches.codes.extend(code for code in of.codes if not code.stored)
        return less

    def renewed_by(self, beat: pb.Heartbeat) -> bool:
        """Whether a heartbeat is of this generation: an older one would renew what fleet has ended (S5). Raises Refuse for one
        that others must not read (S2, C4)."""
        _well_formed(heartbeat_problem(beat))
        return beat.generation == self.generation


class Refuse(Exception):
    """The session cannot go on."""

    def __init__(self, reason: str, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after = reason, message, retry_after


@dataclass(frozen=True, slots=True)
class SessionsConfig:
    """What the composition root tells."""

    federation_uid: str
    leases: Callable[[str], LeaseValues]
    """Profile name -> values; raises KeyError."""
    check_marks: Callable[[list[pb.ShardMark], str], Awaitable[bool]]
    """PROTOCOL J12: True if the marks show that the store was restored (and it is said so in the store)."""


def _needs_files(dispatch: pb.Dispatch, of: pb.DispatchTemplate, stored: Container[str]) -> bool:
    """Whether an attempt starts from stored content."""
    return bool(dispatch.artifacts) or dispatch.HasField("checkpoint") or of.python.code in stored


def check_hello(stream: AgentStream, hello: pb.Hello, federation_uid: str) -> None:
    """Whether a Hello is whole, and may speak for its cluster in this federation (S1). Raises Refuse."""
    _well_formed(hello_problem(hello))
    if stream.peer_cluster is not None and stream.peer_cluster != hello.cluster:
        raise Refuse(
            "DENIED", f"the certificate is for cluster {stream.peer_cluster}, hello says {hello.cluster}", 30.0
        )
    if hello.federation_uid and hello.federation_uid != federation_uid:
        raise Refuse("DENIED", "this agent's journal belongs to another federation", 30.0)
    if hello.marks and not hello.federation_uid:
        # Nothing could be compared with them, and a restore would go unseen (J12).
        raise Refuse("INVALID_ARGUMENT", "hello cites marks without the federation they are of", 30.0)


def _well_formed(problem: Problem | None) -> None:
    if problem is not None:
        raise Refuse("INVALID_ARGUMENT", f"{problem[0]}: {problem[1]}", 10.0)


def welcome(
    grant: SessionGrant, lease: LeaseValues, wall: float, federation_uid: str, replica: str, replicas: Iterable[str]
) -> pb.Welcome:
    """The answer to a Hello. `wall`: this replica's wall clock, seconds; `replicas`: addresses where agents may dial."""
    return pb.Welcome(
        cluster_uid=grant.cluster,
        generation=grant.generation,
        resumed=grant.resumed,
        lease=pb.LeaseValues(**to_millis(lease)),  # type: ignore[arg-type]
        server_wall_ms=int(wall * 1000),
        federation_uid=federation_uid,
        replica=replica,
        replicas=sorted(replicas),
    )
