"""Carries committed decisions to agents and agents' reports into the journal: the owner's side of a session (PROTOCOL J7, F3, F8).

Theory. Every effect is derived from committed state, per (shard, cluster) *link*. A link exists once the agent's inventory of the
current stream was journaled; then whatever is live there in that generation and not held by the agent is dispatched, and every
outstanding stop is sent. From then on commits only add hints (the outbox), and silence is answered by sending again:

* dispatches are numbered per stream; agents receipt the highest number without a gap, so those without a receipt after RESEND
  seconds are sent again *under their number*, less what is no longer live;
* stops are sent again until they are confirmed; those of runs that are not known here (orphans of an inventory) until the
  agent reports their end, or a new inventory says anew what is there;
* reports are acknowledged after the commit that settled them, whether they were accepted, refused or known.

All of it is idempotent at the agent. Nothing here decides anything. While a shard is closed its machine is ahead of the log, so
whatever is looked up outside `committed` comes from `Controller.read` (J2, J8). A lapsed replica sends nothing (O3), and nobody
does while a restore is suspected (J12).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from baton.clock import Clock
from baton.internal import peer_pb2 as peer
from baton.v1 import agent_pb2 as pb
from control_plane import agent_codec as codec
from control_plane.controller import Controller, OwnedShard
from control_plane.core.commands import Held, InventoryVerdict, Outbox, Refused, TakeInventory
from control_plane.core.model import FLEET, AttemptId
from control_plane.core.shard import RunShard
from control_plane.peers import CallContext, Calls
from control_plane.refusals import NotOwned, OutcomeUnknown, StoreDown
from control_plane.router import Router
from control_plane.session_calls import INVENTORY
from control_plane.view import View

log = logging.getLogger(__name__)

RESEND = 2.0
"""Seconds of silence before a dispatch or stop is sent again. Too small: doubled traffic on slow links; too large: a lost
message costs that much of a task's time."""

DISPATCH_BATCH = 500
"""Attempts per message: about 100 KiB of small tasks, far under the 48 MiB that agents receive even with 6 KiB of arguments each."""

DISPATCH_BYTES = 1 << 18
"""Bytes after which a message is full; a task's arguments, environment and inputs may be 64 + 32 KiB and its parents' results. The
last dispatch may name 10,000 artifacts of parents (`files.RUN_ARTIFACTS`, at most 3.8 MB), and agents receive 48 MiB."""

REPORTS_QUEUE = 1000
"""Report messages of one link waiting for their shard. Beyond it they are dropped and the agent sends them again (J7)."""

MAX_ORPHANS = 10_000
"""Stops of unknown runs kept per link to be sent again: more than a cluster runs at once. Beyond it the oldest are only sent
once, and the next inventory arms them again (F8)."""

TOLD_ORPHANS = 10
"""Unknown runs of one inventory and shard that are logged, so that an operator who restored a backup learns their uids."""

COMMIT_TIMEOUT = 30.0
"""Seconds to wait for reports to be journaled before giving the agent no answer."""


@dataclass(slots=True)
class Link:
    """One shard's tie to one cluster's current stream. `stream` sorts by age: later ones of a cluster are greater."""

    cluster: str
    replica: str
    stream: str
    generation: int
    next_no: int = 1
    received: int = 0
    unreceived: dict[int, tuple[float, tuple[AttemptId, ...]]] = field(default_factory=dict)
    """Dispatch number -> (boot time sent, attempts), in order of number."""
    numbered: dict[AttemptId, int] = field(default_factory=dict)
    """Attempts by the dispatch that carried them, until a capacity report includes it (C4)."""
    stops_sent: dict[AttemptId, float] = field(default_factory=dict)
    orphans: dict[AttemptId, None] = field(default_factory=dict)
    """Attempts to be stopped whose runs are not known: nothing in the machine remembers them (F8)."""
    moved: bool = False
    """The agent is at another replica by now, as far as is known here."""


def _nobody(_uids: Iterable[str], _cluster: str) -> None:
    """Nobody wants to know."""


class Dispatcher:
    """Links of all run shards this replica owns. A `controller.Listener`."""

    def __init__(self, controller: Controller, router: Router, calls: Calls, view: View, clock: Clock) -> None:
        self._controller, self._router, self._view, self._clock = controller, router, view, clock
        self._links: dict[tuple[str, str], Link] = {}
        self._homes: dict[str, str] = {}
        """Where each agent was when `moved` was last reckoned; empty if it has to be reckoned anew."""
        self._reports: dict[tuple[str, str], asyncio.Queue[peer.FromCluster]] = {}
        self._workers: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.on_orphans: Callable[[Iterable[str], str], None] = _nobody
        """Told of the uids of runs that no owner knows, and the name of the cluster that has work of them."""
        calls.register(INVENTORY, self._inventory)

    # -- controller.Listener -----------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """Nothing is known of any stream yet: the serving replicas will send inventories (J7)."""
        self.dropped(shard.id)

    def dropped(self, shard: str) -> None:
        """Forget everything about a shard."""
        for key in [key for key in self._links if key[0] == shard]:
            del self._links[key]
        for key in [key for key in self._workers if key[0] == shard]:
            self._workers.pop(key).cancel()
            self._reports.pop(key, None)

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """Send what this batch placed and stopped."""
        if shard.id == FLEET:
            return
        placed: dict[str, list[AttemptId]] = {}
        for attempt in outbox.placed:
            place = _machine(shard).place_of(attempt)
            if place is not None:
                placed.setdefault(place[0], []).append(attempt)
        for cluster, attempts in placed.items():
            link = self._links.get((shard.id, cluster))
            if link is not None:
                self._dispatch(shard, link, attempts)
        stops: dict[str, list[AttemptId]] = {}
        for cluster, attempt in outbox.stops:
            stops.setdefault(cluster, []).append(attempt)
        for cluster, attempts in stops.items():
            link = self._links.get((shard.id, cluster))
            if link is not None:
                self._stop(shard, link, attempts)

    # -- from agents ---------------------------------------------------------------------------------------------------

    def receive(self, replica: str, message: peer.FromCluster) -> None:
        """Reports and receipts of an agent, through its serving replica."""
        key = (message.shard, message.cluster_uid)
        link = self._links.get(key)
        if message.HasField("receipt"):
            if link is not None and link.stream == message.stream:
                self._receipt(message.shard, link, message.receipt)
        elif message.HasField("reports") and message.shard != FLEET and message.shard in self._controller.owned():
            queue = self._reports.get(key)
            if queue is None:
                queue = self._reports[key] = asyncio.Queue(REPORTS_QUEUE)
                work = self._settle_reports(message.shard, message.cluster_uid, queue)
                self._workers[key] = asyncio.get_running_loop().create_task(work)
            with contextlib.suppress(asyncio.QueueFull):
                message.stream = f"{replica}\n{message.stream}"
                queue.put_nowait(message)

    def _cluster_name(self, uid: str) -> str:
        facts = self._view.table.clusters.get(uid)
        return facts.name if facts else uid

    async def _settle_reports(self, shard: str, cluster: str, queue: asyncio.Queue[peer.FromCluster]) -> None:
        """Journal reports, all that wait as one command, then acknowledge them (J7)."""
        while True:
            waiting = [await queue.get()]
            while not queue.empty():
                waiting.append(queue.get_nowait())
            for generation in sorted({message.generation for message in waiting}):
                messages = [message for message in waiting if message.generation == generation]
                command = codec.reports_command(cluster, generation, [m.reports for m in messages])
                try:
                    settled = await self._controller.submit(shard, command, timeout=COMMIT_TIMEOUT)
                except (Refused, NotOwned, OutcomeUnknown, StoreDown):
                    continue  # not acknowledged: the agent sends them again (J7)
                except Exception:
                    # The machine failed on it, and said so in the log; the link must live on for the reports after it.
                    log.exception("reports could not be handled", extra={"shard": shard, "cluster": cluster})
                    continue
                self._forget_orphans(shard, cluster, settled)
                owned = self._controller.owned().get(shard)
                # Taken, known or refused: every checkpoint that was told is settled by now.
                saved = [said for m in messages for said in m.reports.checkpoints]
                if owned is not None and (settled or saved) and not self._view.restore_suspected:
                    replica, _, stream = messages[-1].stream.partition("\n")
                    attempts = [codec.ref(a) for a in settled]
                    acks = pb.ReportAcks(**codec.header(owned), attempts=attempts, checkpoints=saved)
                    self._router.to_cluster(replica, cluster, stream, pb.SessionResponse(report_acks=acks))

    def _forget_orphans(self, shard: str, cluster: str, settled: Iterable[AttemptId]) -> None:
        """The agent has told their end."""
        link = self._links.get((shard, cluster))
        if link is not None and link.orphans:
            for attempt in settled:
                link.orphans.pop(attempt, None)

    def _receipt(self, shard: str, link: Link, receipt: pb.DispatchReceipt) -> None:
        owned = self._controller.owned().get(shard)
        if owned is None or receipt.epoch != codec.epoch(owned):
            return
        link.received = max(link.received, receipt.dispatch_no)
        for number in [number for number in link.unreceived if number <= link.received]:
            del link.unreceived[number]

    async def _inventory(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """A new stream's inventory (S6): journal what follows, then link, confirm, adopt, dispatch, stop - in that order."""
        source, _, rest = payload.partition(b"\n")
        message = peer.FromCluster.FromString(rest)
        shard, cluster = message.shard, message.cluster_uid
        held = codec.held(message.inventory)
        command = TakeInventory(
            cluster,
            message.generation,
            message.boot_id,
            message.journal_uid,
            held,
            self._view.table,
            incarnation=message.incarnation,
        )
        verdict = await self._controller.submit(shard, command, timeout=context.timeout)
        owned = self._controller.owned().get(shard)
        if owned is None or not isinstance(verdict, InventoryVerdict):
            raise NotOwned(shard, None)
        link = self._linked(source.decode(), message)
        if link is not None:
            if verdict.adopted:
                adoptions = pb.Adoptions(
                    **codec.header(owned),
                    generation=message.generation,
                    attempts=[codec.ref(a) for a in verdict.adopted],
                )
                self._send(link, pb.SessionResponse(adoptions=adoptions))
            listed = {h.attempt: h for h in held}
            # By now the next batch may be decided but not committed. What is committed after this is sent by `committed`.
            missing, stops = await self._controller.read(
                shard,
                lambda machine: (_missing(machine, link, listed), list(machine.stops_on(cluster))),
                timeout=context.timeout,
            )
            if self._controller.owned().get(shard) is not owned:
                raise NotOwned(shard, None)
            if self._links.get((shard, cluster)) is link:
                self._dispatch(owned, link, missing)
                link.orphans = dict.fromkeys(verdict.orphans[-MAX_ORPHANS:])
                self._stop(owned, link, [*stops, *verdict.orphans])
            unknown = list(dict.fromkeys(orphan.run for orphan in verdict.orphans))
            self.on_orphans(unknown, self._cluster_name(cluster))
            for uid in unknown[:TOLD_ORPHANS]:
                log.warning("work of an unknown run is stopped", extra={"run": uid, "shard": shard, "cluster": cluster})
        yield owned.owner_value

    def _linked(self, replica: str, message: peer.FromCluster) -> Link | None:
        """The shard's link to that stream; None if a later stream of the cluster is linked already (calls crossed)."""
        key = (message.shard, message.cluster_uid)
        known = self._links.get(key)
        if known is not None and known.stream >= message.stream:
            return known if known.stream == message.stream else None  # told twice: its numbers go on
        link = self._links[key] = Link(message.cluster_uid, replica, message.stream, message.generation)
        self._homes = {}
        return link

    # -- to agents -----------------------------------------------------------------------------------------------------

    def _send(self, link: Link, message: pb.SessionResponse, *, any_stream: bool = False) -> None:
        if not self._view.restore_suspected:
            self._router.to_cluster(link.replica, link.cluster, "" if any_stream else link.stream, message)

    def _dispatch(self, owned: OwnedShard, link: Link, attempts: Iterable[AttemptId]) -> None:
        """Send live attempts of the link's generation, in messages of bounded size."""
        writer = codec.DispatchWriter(owned, link.generation)
        for attempt in attempts:
            self._write(owned, link, writer, attempt)
            if writer.count >= DISPATCH_BATCH or writer.bytes >= DISPATCH_BYTES:
                self._number(link, writer)
                writer = codec.DispatchWriter(owned, link.generation)
        if writer.count:
            self._number(link, writer)

    @staticmethod
    def _write(owned: OwnedShard, link: Link, writer: codec.DispatchWriter, attempt: AttemptId) -> None:
        machine = _machine(owned)
        if machine.place_of(attempt) == (link.cluster, link.generation):
            dispatch = machine.dispatch(attempt)
            if dispatch is not None:
                writer.add(attempt, dispatch)

    def _number(self, link: Link, writer: codec.DispatchWriter) -> None:
        number = link.next_no
        link.next_no += 1
        for attempt in writer.attempts:
            link.numbered[attempt] = number
        self._flush(link, writer, number)

    def _flush(self, link: Link, writer: codec.DispatchWriter, number: int) -> None:
        link.unreceived[number] = (self._clock.boot(), tuple(writer.attempts))
        self._send(link, pb.SessionResponse(dispatches=writer.message(number)))

    def _stop(self, owned: OwnedShard, link: Link, attempts: Iterable[AttemptId]) -> None:
        now = self._clock.boot()
        batch = list(attempts)
        for start in range(0, len(batch), DISPATCH_BATCH):
            part = batch[start : start + DISPATCH_BATCH]
            for attempt in part:
                link.stops_sent[attempt] = now
            stops = pb.Stops(**codec.header(owned), attempts=[codec.ref(a) for a in part])
            self._send(link, pb.SessionResponse(stops=stops), any_stream=True)

    async def run(self) -> None:
        """Send again what met silence (J7). The work grows with what is unanswered, not with what lives."""
        while True:
            await self._clock.sleep(RESEND / 4)
            if self._view.restore_suspected or not self._controller.acting:
                continue
            shown = self._controller.owned()
            self._look_for_moved()
            unanswered = [
                (shard, cluster, link)
                for (shard, cluster), link in self._links.items()
                if link.unreceived or link.stops_sent or link.moved
            ]
            for shard, cluster, link in unanswered:
                owned = shown.get(shard)
                session = self._view.sessions.get(cluster)
                if owned is None or owned.lost:
                    continue
                if session is not None and session.ended and session.generation >= link.generation:
                    continue  # nobody listens; a new session brings an inventory
                self._again(owned, link)

    def _look_for_moved(self) -> None:
        """Mark links to where their agent is not any more; only if agents or links have changed since the last look."""
        homes = {uid: info.replica for uid, info in self._view.sessions.items() if not info.ended}
        if homes != self._homes:
            self._homes = homes
            for link in self._links.values():
                link.moved = homes.get(link.cluster, link.replica) != link.replica

    def _again(self, owned: OwnedShard, link: Link) -> None:
        now = self._clock.boot()
        session = self._view.sessions.get(link.cluster)
        if session is not None and session.replica != link.replica and not session.ended:
            # The agent moved and its inventory has not come through yet: this makes its new replica tell it again.
            poke = pb.SessionResponse(dispatches=pb.Dispatches(shard=owned.id))
            self._router.to_cluster(session.replica, link.cluster, link.stream, poke)
        for number, (sent, attempts) in list(link.unreceived.items()):
            if now - sent >= RESEND:
                # The same number, were nothing left under it: a gap would keep all later ones without a receipt.
                writer = codec.DispatchWriter(owned, link.generation)
                for attempt in attempts:
                    self._write(owned, link, writer, attempt)
                self._flush(link, writer, number)
        machine = _machine(owned)
        outstanding = {*machine.stops_on(link.cluster), *link.orphans} if link.stops_sent else set()
        for attempt in [a for a in link.stops_sent if a not in outstanding]:
            del link.stops_sent[attempt]
        self._stop(owned, link, [a for a, sent in link.stops_sent.items() if now - sent >= RESEND])

    # -- capacity (C4) -------------------------------------------------------------------------------------------------

    def pending(self, shard: str) -> list[tuple[str, int, list[AttemptId]]]:
        """Placed attempts that no capacity report includes yet: (cluster, generation, attempts)."""
        owned = self._controller.owned().get(shard)
        found: list[tuple[str, int, list[AttemptId]]] = []
        if owned is None or shard == FLEET:
            return found
        for (of, cluster), link in self._links.items():
            if of != shard or not link.numbered:
                continue
            included = self._included(owned, cluster)
            machine = _machine(owned)
            for attempt in [
                a for a, number in link.numbered.items() if number <= included or machine.place_of(a) is None
            ]:
                del link.numbered[attempt]
            if link.numbered:
                found.append((cluster, link.generation, list(link.numbered)))
        return found

    def _included(self, owned: OwnedShard, cluster: str) -> int:
        beat = self._view.beats.get(cluster)
        if beat is None:
            return 0
        wanted = codec.epoch(owned)
        return max(
            (i.dispatch_no for i in beat.heartbeat.included if i.shard == owned.id and i.epoch == wanted), default=0
        )


def _machine(shard: OwnedShard) -> RunShard:
    return cast(RunShard, shard.machine)


def _missing(machine: RunShard, link: Link, listed: Mapping[AttemptId, Held]) -> list[AttemptId]:
    """Live attempts of the link's generation that its agent does not hold, holds only in a queue, which this stream must confirm
    (F3), or holds under an older generation: to it a dispatch of what runs says that it was adopted (S6)."""
    waiting = (pb.ATTEMPT_PHASE_QUEUED, pb.ATTEMPT_PHASE_VOID)
    found: list[AttemptId] = []
    for attempt in machine.live_on(link.cluster):
        held = listed.get(attempt)
        unaware = held is not None and held.phase == pb.ATTEMPT_PHASE_RUNNING and held.generation < link.generation
        if held is None or held.phase in waiting or unaware:
            found.append(attempt)
    return found
