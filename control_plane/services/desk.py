"""What every service needs of its replica, and the few questions that several of them ask."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from baton.clock import Clock, Entropy
from baton.errors import LimitExceeded, NotFound, StoreUnavailable
from baton.names import RunName
from baton.v1 import run_pb2
from control_plane.controller import Controller
from control_plane.core.commands import Command
from control_plane.core.model import shard_of
from control_plane.core.shard import RunShard
from control_plane.history import History, HistoryDown
from control_plane.router import Router
from control_plane.services.forward import Forwarder
from control_plane.services.methods import Asked
from control_plane.view import View

T = TypeVar("T")

HISTORY_PAUSE = 1.0
"""Seconds after which a caller may ask for history again."""


def _room_for_all(_command: object) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Desk:
    """One replica, as its services see it."""

    controller: Controller
    forwarder: Forwarder
    router: Router
    view: View
    history: History
    clock: Clock
    entropy: Entropy
    refuses: Callable[[Command], str] = _room_for_all
    """Why the store has no room for what a command creates (J9); empty if it has."""

    def cluster_name(self, uid: str) -> str:
        """The name of a cluster, as last heard; its uid if it is not known."""
        facts = self.view.table.clusters.get(uid)
        return facts.name if facts else uid

    def cluster_uid(self, name: str) -> str | None:
        """The uid of a cluster, as last heard."""
        return next((uid for uid, facts in self.view.table.clusters.items() if facts.name == name), None)

    async def read(self, shard: str, question: Callable[[RunShard], T], asked: Asked) -> T:
        """Ask an owned run shard (J8). Raises as `Controller.read`."""
        return await self.controller.read(shard, question, timeout=asked.left())

    async def submit(self, shard: str, command: Command, asked: Asked) -> object:
        """Decide on an owned shard. Raises as `Controller.submit`, and LimitExceeded for a creation while the store is full."""
        if full := self.refuses(command):
            raise LimitExceeded(full)
        reply: object = await self.controller.submit(shard, command, actor=asked.principal, timeout=asked.left())
        return reply

    async def archived(self, name: RunName) -> run_pb2.Run | None:
        """A run in history. Raises StoreUnavailable if history cannot say."""
        return await from_history(self.history.run(name.namespace, name.run))

    async def must_be_archived(self, name: RunName) -> run_pb2.Run:
        """A run that is not live. It left the live state only after it was in history (J10), so absence there, looked at after
        absence here, is absence. Raises NotFound, StoreUnavailable."""
        run = await self.archived(name)
        if run is None:
            raise NotFound(f"there is no run {name}")
        return run


async def from_history(asking: Awaitable[T]) -> T:
    """An answer of history. Raises StoreUnavailable, which says itself when to come again: the call is not parked for it."""
    try:
        return await asking
    except HistoryDown as error:
        raise StoreUnavailable("the history of finished runs does not answer", retry_after=HISTORY_PAUSE) from error


def shard_of_run(name: RunName) -> str:
    """The shard that is the one writer of a run (O6)."""
    return shard_of(name.namespace, name.run)
