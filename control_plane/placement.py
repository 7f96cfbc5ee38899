"""Placement: every replica asks for its shards, and the owner of fleet answers for all (PROTOCOL C1-C4).

One-commit hops are the same mechanism: a finished task's slot serves the next of its group inside the owner's batch (C2), and
only growth, or a change of group, comes here. The two sides are `placement_owner` and `placement_leader`; this joins them to
the router and the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from baton.clock import Clock
from baton.internal import peer_pb2 as pb
from control_plane.core.model import AttemptId
from control_plane.holdings import PendingSource
from control_plane.placement_leader import GrantSide
from control_plane.placement_owner import DemandSide
from control_plane.view import View

if TYPE_CHECKING:
    from control_plane.controller import Controller, OwnedShard
    from control_plane.core.commands import Outbox


class Routes(Protocol):
    """The part of `Router` that placement uses."""

    def to_owner(self, shard: str, message: pb.PeerMessage) -> object:
        """Send to the owner of a shard; may be lost."""
        ...

    def on_demand(self, handler: Callable[[pb.Demand], None]) -> None:
        """Where each Demand goes."""
        ...

    def on_grants(self, handler: Callable[[pb.Grants], None]) -> None:
        """Where Grants go."""
        ...


def _nothing_pending(shard: str) -> Iterable[tuple[str, int, list[AttemptId]]]:  # noqa: ARG001 - a PendingSource
    return ()


class Placement:
    """Both sides of one replica. A controller `Listener`; `listen` it before the first taking, after the dispatcher."""

    def __init__(
        self,
        clock: Clock,
        controller: Controller,
        view: View,
        routes: Routes,
        *,
        pending: PendingSource = _nothing_pending,
    ) -> None:
        """`pending` is `Dispatcher.pending`; without it attempts in flight when a report is made count as reported."""
        self._owner = DemandSide(clock, controller, view, routes.to_owner, pending)
        self._leader = GrantSide(clock, view, routes.to_owner)
        routes.on_grants(self._owner.on_grants)
        routes.on_demand(self._leader.on_demand)

    def taken(self, shard: OwnedShard) -> None:
        """See `controller.Listener`."""
        self._owner.taken(shard)
        self._leader.taken(shard)

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """See `controller.Listener`."""
        self._owner.committed(shard, outbox)
        self._leader.committed(shard, outbox)

    def dropped(self, shard: str) -> None:
        """See `controller.Listener`."""
        self._owner.dropped(shard)
        self._leader.dropped(shard)

    async def run(self) -> None:
        """Both loops, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._owner.run())
            group.create_task(self._leader.run())
