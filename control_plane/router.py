"""Where a message goes: to the owner of a shard, to the replica that serves a cluster, to this replica itself.

Any replica serves any client and any agent (PROTOCOL O5); this is the one place that knows who owns what *as far as we have
heard*. Being wrong costs latency, never correctness: the receiver checks ownership by its fenced writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from baton.internal import peer_pb2 as pb
from baton.v1 import agent_pb2
from control_plane.controller import Controller
from control_plane.peers import CallContext, CallHandler, CallLost, Calls, Peers
from control_plane.refusals import NotOwned
from control_plane.view import View

DemandHandler = Callable[[pb.Demand], None]
GrantsHandler = Callable[[pb.Grants], None]
UpHandler = Callable[[str, pb.FromCluster], None]
DownHandler = Callable[[pb.ToCluster], None]

_ONLY_QUEUED = ("from_cluster", "to_cluster")
"""Messages between an agent and owners. Their handlers put them into a queue and send nothing, so on this replica they may be handed
over inside the sender's call: four turns of the loop less in every hop of a chain."""


class Router:
    """Routes messages and calls of one replica."""

    def __init__(self, replica: str, peers: Peers, calls: Calls, view: View, controller: Controller) -> None:
        self.replica = replica
        self._peers = peers
        self._calls = calls
        self._view = view
        self._controller = controller
        self._demand: DemandHandler | None = None
        self._grants: GrantsHandler | None = None
        self._up: UpHandler | None = None
        self._down: DownHandler | None = None
        peers.on_message(self._receive)
        peers.on_break(calls.broken)

    def on_demand(self, handler: DemandHandler) -> None:
        """Where each Demand goes (the scheduler leader's side)."""
        self._demand = handler

    def on_grants(self, handler: GrantsHandler) -> None:
        """Where Grants go (the shard owner's side)."""
        self._grants = handler

    def on_from_cluster(self, handler: UpHandler) -> None:
        """Where an agent's messages go: `handler(serving replica, message)` at a shard's owner."""
        self._up = handler

    def on_to_cluster(self, handler: DownHandler) -> None:
        """Where messages for an agent go (the serving replica's side)."""
        self._down = handler

    def owner(self, shard: str) -> str | None:
        """The replica we believe owns `shard`."""
        if shard in self._controller.owned():
            return self.replica
        info = self._view.owners.get(shard)
        # A key that still names us although we do not hold the shard is a leftover of an earlier life.
        return info.replica if info is not None and info.replica != self.replica else None

    def to_owner(self, shard: str, message: pb.PeerMessage) -> bool:
        """Send to the owner of `shard`; False if it is not known or not reachable (the sender will send again)."""
        owner = self.owner(shard)
        return owner is not None and self.to_replica(owner, message)

    def to_replica(self, replica: str, message: pb.PeerMessage) -> bool:
        """Send to one replica, this one included."""
        if replica != self.replica:
            return self._peers.send(replica, message)
        if message.WhichOneof("message") in _ONLY_QUEUED:
            self._receive(replica, message)
        else:
            # Through the loop, so that a local message behaves as a remote one: never inside the sender's call.
            asyncio.get_running_loop().call_soon(self._receive, replica, message)
        return True

    def to_cluster(self, replica: str, cluster: str, stream: str, message: agent_pb2.SessionResponse) -> bool:
        """Send to an agent through the replica that serves it; on `stream` only, unless it is empty."""
        envelope = pb.ToCluster(cluster_uid=cluster, message=message, stream=stream)
        return self.to_replica(replica, pb.PeerMessage(to_cluster=envelope))

    async def call(
        self, shard: str, method: str, payload: bytes, *, timeout: float, principal: str = ""
    ) -> AsyncIterator[bytes]:
        """Call `method` at the owner of `shard`, wherever it is. Raises NotOwned (nothing was sent), CallFailed, CallLost, and
        for a local handler whatever it raises."""
        owner = self.owner(shard)
        if owner is None:
            raise NotOwned(shard, None)
        context = CallContext(method, timeout, principal, shard)
        if owner != self.replica:
            async for answer in self._calls.call(owner, payload, context):
                yield answer
            return
        handler = self._calls.handler(method)
        if handler is None:
            raise CallLost(f"no such method: {method}")
        async for answer in handler(payload, context):
            yield answer

    def serve(self, method: str, handler: CallHandler) -> None:
        """Answer calls of `method` here, from this replica and others."""
        self._calls.register(method, handler)

    def ask(self, replica: str, method: str, payload: bytes, *, timeout: float) -> AsyncIterator[bytes]:
        """Call `method` at another replica, whatever it owns. Raises CallFailed, CallLost."""
        return self._calls.call(replica, payload, CallContext(method, timeout, "", ""))

    def _receive(self, replica: str, message: pb.PeerMessage) -> None:
        if self._calls.receive(replica, message):
            return
        kind = message.WhichOneof("message")
        if kind == "from_cluster" and self._up is not None:
            self._up(replica, message.from_cluster)
        elif kind == "to_cluster" and self._down is not None:
            self._down(message.to_cluster)
        elif kind == "demands" and self._demand is not None:
            for demand in message.demands.shards:
                self._demand(demand)
        elif kind == "grants" and self._grants is not None:
            self._grants(message.grants)
