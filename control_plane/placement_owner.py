"""The owner's side of placement: demand up, grants down (PROTOCOL C1-C3).

Theory. Demand and grants are levels with a conversation of one: an owner has **at most one unanswered Demand** per shard, and
takes permissions at most once for each, after which it says anew what it wants. So the leader always knows whether a
permission is still open (no later Demand came) or spent and returned (one came); nothing is permitted twice because two
messages crossed. An answer that never comes is not waited for: every half second what is wanted is said again. A shard that
wants nothing is not answered. What it holds it says when that changes, and seldom otherwise; that it holds nothing it says
to every new leader and then ever more slowly: quotas over all shards (O7) can be kept only by a leader that has heard all of
them. With it go the terms of the namespaces that the shard keeps.

A permission is bound by the shard's own commit (`TakeGrants`), and the next Demand is made only after that commit, so that it
counts what was bound. What is left unbound then is void for the leader, and is replaced by its next answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.clock import Clock
from baton.internal import peer_pb2 as pb
from control_plane.bell import Bell
from control_plane.core.commands import DropGrants, Refused, TakeGrants
from control_plane.core.model import FLEET
from control_plane.demand_wire import decode_grants, encode_group
from control_plane.holdings import Holdings, PendingSource
from control_plane.refusals import NotOwned, OutcomeUnknown, StoreDown
from control_plane.view import OwnerInfo, View

if TYPE_CHECKING:
    from control_plane.controller import Controller, OwnedShard
    from control_plane.core.commands import Outbox

log = logging.getLogger(__name__)

LEVEL = 0.5
"""Seconds after which what is wanted or held is said again. Larger: a lost message delays work by as much; smaller: chatter of
all shards with work."""

HELD_LEVEL = 1.4
"""Seconds after which a shard that wants nothing says again what it holds: two fit into the leader's DEMAND_TTL (3 s), after which
it would only remember what was held. Larger: one lost word is too many; smaller: chatter of shards with long work."""

QUIET_LEVEL = 0.8
"""Seconds after which a shard says again that it wants and holds nothing; then after twice as long, and so on. Two fit into a new
leader's silence (GRANT_TTL), so that it has heard everybody when it opens. Larger: namespaces with a quota wait longer after a
change of the leader; smaller: chatter of idle shards."""

QUIET_MOST = 5.0
"""Longest pause between two such words to the same leader, which remembers them: they only heal what was lost. Two fit into a new
leader's silence and hearing (12 s), after which it believes that a namespace it has not heard of has no quota. Larger: one lost
word is too many."""

MIN_GAP = 0.004
"""Seconds between two Demands of a shard. Larger: slower hops between groups; smaller: a busy shard, which changes its demand
with every commit, would fill its loop with demands."""

SHARE = 20
"""A round of Demands is followed by so many times its own length before the same shards speak again, at most QUIET_GAP: many busy
shards must not fill their replica's loop with demands. Larger: slower growth under load; smaller: less time for the work itself."""

QUIET_GAP = 0.05
"""Seconds until a change of what is *held* alone is said. It only helps others, so it may wait for company."""

COMPANY = 0.5
"""Share of its pause by which a shard that has nothing to say speaks early when another such one speaks: from then on they speak
together. Larger: more words than are needed; smaller: two that are half a pause apart never meet, and an idle replica sends a
message for each of its shards."""

MOST_GROUPS = 1_000
"""Groups and uses that one message carries before the next shard gets another: some 300 KiB, far below what gRPC takes. Smaller:
more messages; larger: a big shard's word delays the others'."""

BIND_TIMEOUT = 5.0
"""Seconds for the commit that binds tasks to grants; after that the shard says anew what it wants."""

Send = Callable[[str, pb.PeerMessage], object]
"""`Router.to_owner(shard, message)`."""


@dataclass(slots=True)
class _Line:
    """The conversation of one owned shard. Times on the own boot clock."""

    shard: OwnedShard
    holdings: Holdings
    seq: int = 0
    sent: float = float("-inf")
    due: float = 0.0
    """When to speak next."""
    quiet: float = QUIET_LEVEL
    """Pause after the next word that nothing is wanted or held."""
    asked: bool = False
    """Something was wanted in the last word."""
    nothing: bool = False
    """Neither wanted nor held."""
    waiting: bool = False
    put_off: float = float("inf")
    """Something changed while an answer is awaited: so long after the answer it is said. Infinity: nothing did."""
    spent: bool = False
    """A permission was taken for the current seq."""
    expires: float = float("inf")
    term: int = 0
    advice: TakeGrants | None = None
    """The last answer without permissions: reasons, and groups that give slots back."""
    binding: asyncio.Task[None] | None = field(default=None, repr=False)


class DemandSide:
    """Speaks for all run shards this replica owns. A controller `Listener`."""

    def __init__(self, clock: Clock, controller: Controller, view: View, send: Send, pending: PendingSource) -> None:
        self._clock = clock
        self._controller = controller
        self._view = view
        self._send = send
        self._pending = pending
        self._lines: dict[str, _Line] = {}
        self._loaded: dict[str, _Line] = {}
        """Those in which something may live: all that committed since they were seen empty."""
        self._bell = Bell(clock)
        self._led_by: OwnerInfo | None = None
        self._gap = MIN_GAP
        view.subscribe(self._heard)

    # -- Listener -----------------------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """A new owner says at once what it wants."""
        if shard.id != FLEET:
            self.dropped(shard.id)
            holdings = Holdings(shard, self._view, self._pending)
            self._lines[shard.id] = self._loaded[shard.id] = _Line(shard, holdings)
            self._bell.ring()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """Ready counts changed: say so soon. Else only what is held may have changed."""
        line = self._lines.get(shard.id)
        if line is not None:
            self._loaded[shard.id] = line
            # What became ready and was placed in one batch (C2) leaves nothing to ask for.
            soon = outbox.demand and (line.asked or line.holdings.wanting())
            after = 0.0 if soon else QUIET_GAP
            if line.waiting:
                line.put_off = min(line.put_off, after)
            else:
                self._speak(line, after)

    def dropped(self, shard: str) -> None:
        """Its new owner speaks for it."""
        line = self._lines.pop(shard, None)
        self._loaded.pop(shard, None)
        if line is not None and line.binding is not None:
            line.binding.cancel()

    def _heard(self, topic: str) -> None:
        if topic == "beats":
            self._loaded = {shard: line for shard, line in self._loaded.items() if line.holdings.reported()}
        elif topic == "owners" and self._view.owners.get(FLEET) != self._led_by:
            self._led_by = self._view.owners.get(FLEET)
            for line in self._lines.values():
                line.quiet = QUIET_LEVEL
                self._speak(line, 0.0)

    # -- speaking -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Say what is due, until cancelled."""
        try:
            while True:
                now = self._clock.boot()
                for line in list(self._lines.values()):
                    if line.expires <= now:
                        line.expires = float("inf")
                        self._controller.post(line.shard.id, DropGrants(line.term))
                self._say_all(now)
                self._gap = min(max(MIN_GAP, SHARE * (self._clock.boot() - now)), QUIET_GAP)
                await self._bell.wait(self._sleep(self._clock.boot()))
        finally:
            for shard in list(self._lines):
                self.dropped(shard)

    def _say_all(self, now: float) -> None:
        """Every word that is due, in as few messages as may be."""
        due = [line for line in self._lines.values() if line.binding is None and line.due <= now]
        if not due:
            return
        quiet = any(line.nothing for line in due)
        message, size = pb.Demands(), 0
        for line in self._lines.values() if quiet else due:
            early = COMPANY * (line.due - line.sent) if line.nothing else 0.0
            if line.binding is None and line.due - early <= now:
                demand = self._word(line, now)
                more = len(demand.groups) + len(demand.pending)
                if size and size + more > MOST_GROUPS:
                    self._send(FLEET, pb.PeerMessage(demands=message))
                    message, size = pb.Demands(), 0
                message.shards.append(demand)
                size += more
        self._send(FLEET, pb.PeerMessage(demands=message))

    def _sleep(self, now: float) -> float:
        """Seconds until something is due."""
        times = [line.due for line in self._lines.values() if line.binding is None]
        times += [line.expires for line in self._lines.values()]
        return min(max(min(times, default=now + QUIET_MOST) - now, 0.001), QUIET_MOST)

    def _speak(self, line: _Line, after: float) -> None:
        """Say the shard's demand in `after` seconds at the latest."""
        due = max(self._clock.boot() + after, line.sent + self._gap)
        if due < line.due:
            line.due = due
            self._bell.ring()

    def _word(self, line: _Line, now: float) -> pb.Demand:
        """What the shard wants and holds now; it is being said."""
        rested = line.due <= now
        if line.holdings.permitted():
            # By saying anew what is wanted they are returned (C2): the next ready task must not find them.
            self._controller.post(line.shard.id, DropGrants(line.term))
            line.expires = float("inf")
        lines = [entry for entry in line.holdings.demand(self._clock.wall()) if entry.count > 0]
        uses = line.holdings.uses()
        line.nothing = not lines and not uses
        if uses:
            self._loaded[line.shard.id] = line  # though nothing was committed: its machine may have been rebuilt
        line.due = now + (LEVEL if lines else line.quiet if line.nothing else HELD_LEVEL)
        if not line.nothing:
            line.quiet = QUIET_LEVEL
        elif rested:
            line.quiet = min(2 * line.quiet, QUIET_MOST)
        line.seq += 1
        line.sent, line.waiting, line.spent, line.asked = now, bool(lines), False, bool(lines)
        line.put_off = float("inf")
        return pb.Demand(
            shard=line.shard.id,
            epoch=line.shard.epoch_revision,
            seq=line.seq,
            groups=[
                pb.DemandGroup(
                    key=entry.key,
                    group=encode_group(entry.group),
                    count=entry.count,
                    slack_ms=int(entry.slack_seconds * 1000),
                    since_ms=int(entry.since_wall * 1000),
                    run_seconds=entry.run_seconds,
                )
                for entry in lines
            ],
            pending=[
                pb.PendingUse(
                    cluster_uid=use.cluster,
                    key=use.key,
                    group=encode_group(use.group),
                    count=use.change,
                    held=use.held,
                    run_seconds=use.run_seconds,
                )
                for use in uses
            ],
            namespaces=[
                pb.NamespaceTerms(name=view.name, weight=view.weight, live_task_quota=view.live_task_quota)
                for view in line.holdings.terms()
            ],
        )

    # -- taking -------------------------------------------------------------------------------------------------------

    def on_grants(self, message: pb.Grants) -> None:
        """The leader's answer, or permissions it found later for the same Demand."""
        line = self._lines.get(message.shard)
        if line is None or message.demand_seq != line.seq or message.term < line.term or line.spent:
            return
        grants = decode_grants(message)
        line.waiting, line.term = False, message.term
        if grants.grants:
            line.spent = True
            line.advice = None
            line.expires = self._clock.boot() + message.ttl_ms / 1000
            line.binding = asyncio.get_running_loop().create_task(self._bind(line, grants))
            return
        if grants != line.advice:
            line.advice = grants
            self._controller.post(line.shard.id, grants)
        if line.put_off < float("inf"):
            self._speak(line, line.put_off)

    async def _bind(self, line: _Line, grants: TakeGrants) -> None:
        """Commit what the grants permit, then say what is still wanted."""
        try:
            await self._controller.submit(line.shard.id, grants, timeout=BIND_TIMEOUT)
        except (NotOwned, StoreDown, OutcomeUnknown, Refused) as error:
            log.debug("grants were not bound", extra={"shard": line.shard.id, "error": str(error)})
        finally:
            line.binding = None
        line.due = min(line.due, max(self._clock.boot(), line.sent + MIN_GAP))
        self._bell.ring()
