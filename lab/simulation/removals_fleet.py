"""Removals of rules about clusters' sessions, and about what owners believe of their attempts (PROTOCOL S, F1, F2, F5).

Each part here is the product's own, less one mechanism; see `lab.simulation.removal`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from baton.clock import Clock
from baton.leases import PROFILES
from baton.v1 import agent_pb2 as pb
from control_plane import guard_wait
from control_plane.controller import Controller, OwnedShard
from control_plane.core import commands, inventory, shard
from control_plane.core.events import AttemptsAdopted, Event
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptId, ClusterFacts, Evidence
from control_plane.core.run import Attempt, Run
from control_plane.core.state import ShardState
from control_plane.dispatcher import Dispatcher
from control_plane.fleet_watch import FleetWatch
from control_plane.heartbeats import Beating, Heartbeats
from control_plane.store.base import RangeResult, Store
from lab.simulation.removal import Removal, Swap
from lab.simulation.workload import Load
from lab.simulation.world import RHO, Shape

SMALL = Shape(clusters=3, runs=12, harm=45.0, swarm=False, sieges=0.0, load=Load(kept=0.3))
"""A small world in which a seed strikes with all of its fault classes."""

LONG = replace(SMALL, runs=3, sieges=0.0, load=Load(kept=0.0, marathons=5, crowds=0))
"""A smaller one, of tasks that outlast L + G."""

# -- S2: acknowledgements ------------------------------------------------------------------------------------------------

_commit = Heartbeats._commit  # noqa: SLF001


async def _acknowledge_first(self: Heartbeats, beats: Sequence[tuple[Beating, pb.Heartbeat]]) -> None:
    """`Heartbeats._commit`, after the acknowledgement instead of before it."""
    wall = int(self._clock.wall() * 1000)
    for session, beat in beats:
        session.stream.send(pb.SessionResponse(heartbeat_ack=pb.HeartbeatAck(seq=beat.seq, server_wall_ms=wall)))
    await _commit(self, beats)


ACKNOWLEDGEMENT = Removal(
    "committed-acknowledgement",
    "S2",
    "a heartbeat is acknowledged when it arrives, not when it is committed",
    (Swap(Heartbeats, "_commit", _acknowledge_first),),
    replace(LONG, faults=("store cut off",), pace=12.0),
    seed=22,
)

# -- S4: losses ----------------------------------------------------------------------------------------------------------

_submit = Controller.submit


async def _submit_unconditionally(
    self: Controller, shard: str, command: commands.Command, *, condition: object = None, **rest: Any
) -> Any:
    """`Controller.submit`, dropping the condition of a loss."""
    del condition
    return await _submit(self, shard, command, **rest)


class _Stale:
    """A store whose ranges are those of some seconds ago: a member that lags behind, asked without a quorum."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._kept: deque[tuple[float, RangeResult]] = deque()

    async def range(self, prefix: str, *, timeout: float) -> RangeResult:
        """See `Store.range`."""
        found = await self._store.range(prefix, timeout=timeout)
        now = self._clock.boot()
        self._kept.append((now, found))
        while len(self._kept) > 1 and self._kept[1][0] <= now - LAG:
            self._kept.popleft()
        return self._kept[0][1]


LAG = 6.0
"""Seconds by which such a member is behind: a few heartbeats."""

_make_watch = FleetWatch.__init__


def _make_watch_stale(self: FleetWatch, store: Store, clock: Clock, controller: Controller) -> None:
    """`FleetWatch.__init__`, with polls that need no quorum."""
    _make_watch(self, _Stale(store, clock), clock, controller)  # type: ignore[arg-type]  # the part of a Store that it uses


CONDITION = Removal(
    "loss-condition",
    "S4",
    "losses are judged by polls that lag behind, and committed though a heartbeat has come since",
    (Swap(Controller, "submit", _submit_unconditionally), Swap(FleetWatch, "__init__", _make_watch_stale)),
    replace(
        LONG,
        clusters=4,
        cpus=3,
        runs=24,
        faults=("glimpse of a cluster",),
        pace=25.0,
        load=Load(stubborn=1.0, kept=0.0, lifetime=(60.0, 90.0), marathons=2, crowds=0),
    ),
    seed=250,
)

# -- S5: generations -----------------------------------------------------------------------------------------------------

_end_of = guard_wait._end_of  # noqa: SLF001


def _end_of_any(facts: ClusterFacts, number: int) -> tuple[Evidence, float]:
    """`guard_wait._end_of`, of the cluster instead of the generation."""
    ended = [generation for generation in facts.generations if generation.ended]
    return _end_of(facts, ended[-1].number if ended else number)


GENERATIONS = Removal(
    "generation-check",
    "S5",
    "the loss of a cluster counts for whatever runs there now, not for the generation that ended",
    (Swap(guard_wait, "_end_of", _end_of_any),),
    replace(SMALL, faults=("partition of a cluster", "agent killed"), outages=(16.0, 18.0, 22.0), pace=4.0),
)

# -- S6: adoption --------------------------------------------------------------------------------------------------------


class _Silent(Batch):
    """A batch that writes down everything but adoptions."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.stamp, batch._apply, batch.level)  # noqa: SLF001
        self._batch, self.events = batch, batch.events

    def emit(self, event: Event) -> None:
        """See `Batch.emit`."""
        if not isinstance(event, AttemptsAdopted):
            self._batch.emit(event)


def _inventory_unjournaled(state: ShardState, command: commands.TakeInventory, batch: Batch) -> object:
    """`inventory.take_inventory`, telling the agent of adoptions that are in no journal."""
    return inventory.take_inventory(state, command, _Silent(batch))


def _write_regardless(owned: OwnedShard, link: Any, writer: Any, attempt: AttemptId) -> None:
    """`Dispatcher._write`, to the stream's generation, whatever the attempt's is."""
    machine = owned.machine
    view, dispatch = machine.attempt(attempt), machine.dispatch(attempt)  # type: ignore[attr-defined]  # a RunShard
    if view is not None and dispatch is not None and view.cluster == link.cluster:
        writer.add(attempt, dispatch)


ADOPTION = Removal(
    "adoption-event",
    "S6",
    "attempts go on in an agent's new generation though the journal has them in the old one",
    (
        Swap(shard._HANDLERS, commands.TakeInventory, _inventory_unjournaled),  # noqa: SLF001
        Swap(Dispatcher, "_write", staticmethod(_write_regardless)),
    ),
    replace(
        SMALL,
        runs=20,
        cpus=2,
        faults=("partition of a cluster", "agent killed"),
        outages=(14.5, 15.0, 16.0, 17.0),
        pace=2.5,
        load=Load(kept=0.0, lifetime=(60.0, 90.0)),
    ),
    seed=19,
)

# -- F1, F2: who may have a result accepted ------------------------------------------------------------------------------

_leave = ShardState.leave


def _is_live_enough(self: Run, attempt: Attempt) -> bool:  # noqa: ARG001 - as the method
    """`Run.is_live`, of whoever has not reported yet."""
    return not attempt.reported


def _leave_if_there(self: ShardState, run: Run, attempt: Attempt) -> None:
    """`ShardState.leave`, of those who may have left before."""
    if attempt in run.live.get(attempt.id.task, ()):
        _leave(self, run, attempt)


LIVE_SET = Removal(
    "live-set",
    "F2",
    "the result of an attempt is accepted though it has left its task's live set",
    (Swap(Run, "is_live", _is_live_enough), Swap(ShardState, "leave", _leave_if_there)),
    replace(SMALL, faults=("partition of a cluster", "one-way cut of a cluster", "agent killed"), pace=3.0),
)


def _find_by_number(self: ShardState, id_: AttemptId) -> Attempt | None:
    """`ShardState.find`, by the attempt's number alone."""
    run = self.runs.get(id_.run)
    return run.attempt(id_.task, id_.n) if run else None


FENCE = Removal(
    "fence-on-accept",
    "F1",
    "a report is settled by the attempt's number, whichever placement it is of",
    (Swap(ShardState, "find", _find_by_number),),
    replace(SMALL, runs=20, faults=("store restored", "partition of a cluster"), pace=5.0),
    seed=34,
)

# -- F5: guard time ------------------------------------------------------------------------------------------------------


def _end_at_once(facts: ClusterFacts, number: int) -> tuple[Evidence, float]:
    """`guard_wait._end_of`, without the waiting."""
    return _end_of(facts, number)[0], 0.0


EARLY = (Swap(PROFILES, "fast", replace(PROFILES["fast"], lost=13.0, guard=7.0)),)
"""As lawful a profile (L + G is what it was) in which a cluster is called lost a second before its work must be dead (F + K, 14 s):
with the profile as it is only a guard that is frozen at that very moment shows the difference, once in hundreds of seeds."""

GUARD_TIME = Removal(
    "guard-time",
    "F5",
    "a copy is placed as soon as the loss is known, without waiting G",
    (Swap(guard_wait, "_end_of", _end_at_once),),
    replace(
        LONG,
        clusters=4,
        runs=16,
        faults=("partition of a cluster", "host frozen"),
        pace=1.2,
        outages=(20.0, 24.0, 30.0),
        rates=(RHO,),
        load=Load(stubborn=1.0, kept=0.0, lifetime=(60.0, 90.0), marathons=2, crowds=0),
    ),
    EARLY,
    seed=176,
)

REMOVALS = (ACKNOWLEDGEMENT, CONDITION, GENERATIONS, ADOPTION, LIVE_SET, FENCE, GUARD_TIME)
