"""One replica: every loop, wired once, owned by one task group (DESIGN 2).

Theory. `Replica` knows ports, not adapters: the process gives it etcd, gRPC peers and SQLite (`control_plane.__main__`), the
simulator a store and a network in memory; everything between is the same code. The order of a life is: join the federation,
run all loops, become ready once the small keys were listed and the registration stands; at the end turn callers and agents away,
hand over the shards, and only then stop (PROTOCOL O4). A loop that fails ends the replica: half a replica would hold leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from baton.clock import Clock, Entropy
from baton.internal import peer_pb2
from baton.leases import PROFILES, LeaseValues
from baton.time_limits import time_limit
from baton.v1 import agent_pb2
from control_plane.aftermath import Aftermath
from control_plane.archiver import Archiver, Translator
from control_plane.artifacts.base import ObjectStore
from control_plane.artifacts.gateway import Gateway
from control_plane.artifacts.sweeper import Sweeper
from control_plane.artifacts.traffic import Traffic
from control_plane.codec import FEATURE_LEVEL
from control_plane.confirmation import Confirmation
from control_plane.controller import Controller
from control_plane.core.fleet import Fleet
from control_plane.core.machine import Machine
from control_plane.core.model import FLEET
from control_plane.core.run_times import RunTimes
from control_plane.core.shard import RunShard
from control_plane.dispatcher import Dispatcher
from control_plane.fleet_keys import side_puts
from control_plane.fleet_watch import FleetWatch
from control_plane.forgotten import Forgotten
from control_plane.guard_wait import GuardWait
from control_plane.history import Archive, History
from control_plane.meter import Meter
from control_plane.ownership import Ownership, OwnershipConfig
from control_plane.peers import Calls, Peers
from control_plane.placement import Placement
from control_plane.registration import Federation, join_federation
from control_plane.router import Router
from control_plane.services import translate
from control_plane.services.admin import Snapshot
from control_plane.services.desk import Desk
from control_plane.services.failures import peer_failure
from control_plane.services.fleet_calls import FleetCalls
from control_plane.services.forward import Forwarder
from control_plane.services.table import Services
from control_plane.sessions import Refuse, Sessions, SessionsConfig
from control_plane.snapshots import Snapshots, SnapshotsConfig, Snapshotter
from control_plane.store.base import Store, StoreError
from control_plane.store.keeper import LeaseKeeper
from control_plane.store_room import StoreRoom
from control_plane.survivors import Survivors
from control_plane.upgrading import Upgrading
from control_plane.view import MemberInfo, View

log = logging.getLogger(__name__)

JOIN_PAUSE = 0.5
"""Seconds between tries to join while the store does not answer."""

SURVEY_POLL = 4.0
"""Seconds between two surveys of owners while the view is silent. Larger: a lost nudge delays balance by as much; smaller: load
on an idle store."""

SURVEY_EAGER = 0.5
"""The same while a shard is on its way."""

LEAVE_SECONDS = 10.0
"""Seconds for handing over all shards; after it the lease is left to expire, which takes about as long."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What others shall know of a replica."""

    replica: str
    address: str
    lease_ttl: float = 5.0
    version: str = ""


@dataclass(frozen=True, slots=True)
class Parts:
    """The adapters of one replica."""

    store: Store
    make_keeper: Callable[[], LeaseKeeper]
    make_peers: Callable[[View], Peers]
    clock: Clock
    entropy: Entropy
    history: History
    snapshotter: Snapshotter | None = None
    """Without one logs grow: for short lives only."""
    snapshots: SnapshotsConfig = SnapshotsConfig()  # noqa: RUF009 - a frozen value
    """When snapshots are due (J9)."""
    backup: Snapshot | None = None
    """A consistent backup of the store, if the adapter offers one."""
    quota_bytes: int = 0
    """Quota of a store that does not tell its own (J9); 0: etcd's default."""
    meter: Meter | None = None
    """What is counted for /metrics, if anybody asks."""
    archived: Callable[[Archive], None] | None = None
    """Told of every run that came into history through this replica."""
    objects: ObjectStore | None = None
    """Where artifacts lie; without one, what needs it is refused."""


def make_machine(shard: str, run_times: RunTimes | None = None) -> Machine:
    """An empty machine of the right kind; `run_times`: what all shards here have learned."""
    return Fleet() if shard == FLEET else RunShard(run_times)


class Replica:
    """One replica. `start` once; then `services` and `sessions` serve the edges until `stop`."""

    def __init__(self, identity: Identity, parts: Parts) -> None:
        self.identity, self.parts = identity, parts
        self.federation: Federation
        self.view: View
        self.controller: Controller
        self.router: Router
        self.calls: Calls
        self.forwarder: Forwarder
        self.ownership: Ownership
        self.sessions: Sessions
        self.dispatcher: Dispatcher
        self.services: Services
        self._loops: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Join the federation, waiting for the store as long as it takes, and start all loops. Raises IncompatibleFederation,
        Corrupt."""
        parts = self.parts
        while True:
            try:
                self.federation = await join_federation(parts.store, parts.clock, parts.entropy)
                break
            except StoreError as error:
                log.warning("waiting for the store", extra={"error": str(error)})
                await parts.clock.sleep(JOIN_PAUSE)
        self._wire()
        self._loops = asyncio.get_running_loop().create_task(self._run())

    async def ready(self) -> None:
        """Wait until it takes part: the small keys are listed, the registration stands. Ends too when a loop has failed; `run`
        tells."""
        loops = self._started()

        async def takes_part() -> None:
            await self.view.ready()
            await self.ownership.joined.wait()

        waiting = asyncio.get_running_loop().create_task(takes_part())
        try:
            await asyncio.wait({waiting, loops}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    @property
    def running(self) -> bool:
        """All loops run."""
        return self._loops is not None and not self._loops.done()

    async def run(self) -> None:
        """Wait until a loop fails, and raise what it raised; or until `stop`."""
        loops = self._started()
        try:
            await asyncio.shield(loops)
        except asyncio.CancelledError:
            if not loops.cancelled():
                raise

    async def stop(self) -> None:
        """Leave in order: agents are sent elsewhere, shards are handed over, then everything ends (O4)."""
        if self._loops is not None and not self._loops.done():
            self.sessions.drain()
            try:
                async with time_limit(LEAVE_SECONDS):
                    await self.ownership.leave()
            except TimeoutError:
                log.warning("shards could not be handed over in time; the lease is left to expire")
        await self.kill()

    async def kill(self) -> None:
        """End all loops at once, handing over nothing."""
        if self._loops is not None:
            self._loops.cancel()
            await asyncio.wait({self._loops})

    def _started(self) -> asyncio.Task[None]:
        if self._loops is None:
            raise RuntimeError("the replica has not been started")
        return self._loops

    # -- wiring ------------------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        """Make every part, lower ones first. Listeners hear of a batch in the order in which they are named here: what is sent to
        agents comes before what is asked of the leader."""
        parts, me = self.parts, self.identity
        store, clock, entropy = parts.store, parts.clock, parts.entropy
        self.view = view = View(store, clock)
        self.controller = controller = Controller(
            store=store,
            clock=clock,
            entropy=entropy,
            replica=me.replica,
            make_machine=partial(make_machine, run_times=RunTimes()),
            side_puts=side_puts,
        )
        controller.restore.federation_uid = self.federation.uid
        peers = parts.make_peers(view)
        self.calls = calls = Calls(peers, entropy, peer_failure(entropy))
        self.router = router = Router(me.replica, peers, calls, view, controller)
        self.forwarder = Forwarder(router, clock, entropy, lambda: view.restore_suspected)
        self.ownership = Ownership(
            store=store,
            make_keeper=parts.make_keeper,
            clock=clock,
            entropy=entropy,
            controller=controller,
            member=MemberInfo(me.replica, me.address, me.version, FEATURE_LEVEL, clock.wall()),
            config=OwnershipConfig(lease_ttl=me.lease_ttl, poll=SURVEY_POLL, eager_poll=SURVEY_EAGER),
        )
        view.subscribe(self._nudge_ownership)
        sessions = SessionsConfig(self.federation.uid, _leases, self._check_marks)
        self.sessions = Sessions(store, clock, entropy, router, view, sessions)
        self.dispatcher = Dispatcher(controller, router, calls, view, clock)
        self._placement = Placement(clock, controller, view, router, pending=self.dispatcher.pending)
        self._fleet_watch = FleetWatch(store, clock, controller)
        self._guard_wait = GuardWait(clock, controller, view)
        FleetCalls(controller, calls)
        self._room = StoreRoom(store, clock, parts.quota_bytes)
        desk = Desk(controller, self.forwarder, router, view, parts.history, clock, entropy, self._room.refuses)
        self.traffic = Traffic()
        survivors, forgotten = self._remember()
        self.services = self._make_services(desk, forgotten)
        self._sweeper = self._make_sweeper()
        leads, level = lambda: FLEET in controller.owned(), lambda: controller.feature_level
        self._upgrading = Upgrading(store, clock, view, leads=leads, level=level)
        self._aftermath = Aftermath(parts.history, controller, clock)
        self._archiver = self._make_archiver(desk, survivors)
        snapshotter = parts.snapshotter
        self._snapshots = Snapshots(store, clock, controller, snapshotter, parts.snapshots) if snapshotter else None
        router.on_from_cluster(self._from_cluster)
        for listener in (
            self.dispatcher,
            self._placement,
            self._fleet_watch,
            self._guard_wait,
            self._aftermath,
            survivors,
            self.services.bells,
        ):
            controller.listen(listener)
        if parts.meter is not None:
            parts.meter.bind(controller)
            controller.listen(parts.meter)

    def _remember(self) -> tuple[Survivors, Forgotten]:
        """What is known here of runs that a restored store has lost (J12)."""
        survivors = Survivors(self.parts.clock)
        forgotten = Forgotten(self.router, self.view, self.parts.history, survivors, self._knows_run)
        forgotten.serve_peers(self.calls)
        self.dispatcher.on_orphans = forgotten.held
        return survivors, forgotten

    def _make_services(self, desk: Desk, forgotten: Forgotten) -> Services:
        parts = self.parts
        services = Services(
            desk,
            confirm_restored=Confirmation(self.controller.restore, self.view, parts.clock).confirm,
            snapshot=parts.backup,
            gateway=Gateway(parts.objects, parts.clock, self.traffic) if parts.objects else None,
            forgotten=forgotten.lines,
        )
        services.serve_peers(self.calls)
        return services

    def _make_archiver(self, desk: Desk, survivors: Survivors) -> Archiver:
        view, parts = self.view, self.parts
        return Archiver(
            parts.history,
            self.controller,
            parts.clock,
            _translator(desk),
            self._note_archived,
            survivors=survivors,
            suspected=lambda: (view.incarnation, bool(view.restore_suspected)),
        )

    async def _run(self) -> None:
        """All loops, until cancelled or until one fails."""
        loops: Sequence[object] = (
            self.view,
            self.controller,
            self.ownership,
            self.sessions,
            self.dispatcher,
            self._placement,
            self._fleet_watch,
            self._guard_wait,
            self._archiver,
            self._aftermath,
            self._room,
            self._upgrading,
            *((self._snapshots,) if self._snapshots else ()),
            *((self._sweeper,) if self._sweeper else ()),
            *((self.parts.meter,) if self.parts.meter else ()),
        )
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(loop.run(), name=type(loop).__name__)  # type: ignore[attr-defined]

    def _from_cluster(self, replica: str, message: peer_pb2.FromCluster) -> None:
        """Output goes to its reader, everything else to the dispatcher."""
        if message.HasField("log"):
            self.services.logs.receive(message.log)
        else:
            self.dispatcher.receive(replica, message)

    def _make_sweeper(self) -> Sweeper | None:
        """The sweeper of artifacts, where there are any: one replica's work, that of fleet's owner."""
        objects, clock, view = self.parts.objects, self.parts.clock, self.view
        if objects is None:
            return None
        mine, heard = lambda: FLEET in self.controller.owned(), lambda: (view.incarnation, view.restore_suspected)
        return Sweeper(objects, clock, self.services.artifacts.known, mine, heard, self.traffic)

    def _nudge_ownership(self, topic: str) -> None:
        """The view heard of members, owners or an incarnation: what the ring says may be another thing now."""
        if topic == "owners":
            self.ownership.heard(self.view.owners)
        elif topic in ("members", "restore"):
            self.ownership.nudge()

    def _note_archived(self, archive: Archive) -> None:
        if self.parts.meter is not None:
            self.parts.meter.archived(archive)
        if self.parts.archived is not None:
            self.parts.archived(archive)

    def _knows_run(self, uid: str) -> bool:
        """Whether a shard that is owned here has a run of that uid."""
        machines = (shard.machine for shard in self.controller.owned().values())
        return any(isinstance(machine, RunShard) and machine.run_by_uid(uid) is not None for machine in machines)

    async def _check_marks(self, marks: list[agent_pb2.ShardMark], federation_uid: str) -> bool:
        """An agent's marks (J12). A store that does not answer proves nothing: the agent comes again."""
        try:
            return await self.controller.restore.check_marks(marks, federation_uid)
        except StoreError as error:
            raise Refuse("UNAVAILABLE", "the store does not answer", 1.0) from error


def _leases(profile: str) -> LeaseValues:
    """Raises KeyError."""
    return PROFILES[profile]


def _translator(desk: Desk) -> Translator:
    """How the archiver makes public messages."""
    return Translator(
        run=translate.run,
        task=lambda view: translate.task(view, desk.cluster_name),
        event=lambda view, task_id: translate.run_event(view, task_id, desk.cluster_name),
    )
