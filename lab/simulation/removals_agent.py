"""Removals of rules that agents, guards and hosts keep (PROTOCOL F3, F4, F5, G).

Each part here is the product's own, less one mechanism; see `lab.simulation.removal`. What the simulated host lacks, its real
guard would lack in the same way: both run `cluster_agent.core.lease`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster_agent.core import capacity
from cluster_agent.core.events import Assignment, WorkEnded
from cluster_agent.core.holdings import ALIVE, Holdings
from cluster_agent.core.lease import Leases, Reason
from cluster_agent.core.link import Link
from cluster_agent.core.model import AttemptKey, Ended, Outcome, Phase
from cluster_agent.executors.fake_host import FakeHost
from control_plane.session import Session
from control_plane.sessions import Sessions
from lab.simulation.nodes import Life
from lab.simulation.processes import ClusterProcess
from lab.simulation.removal import Removal, Swap
from lab.simulation.workload import Load
from lab.simulation.world import Shape

SMALL = Shape(clusters=3, runs=12, harm=45.0, swarm=False, sieges=0.0, load=Load(kept=0.3))
"""A small world in which a seed strikes with all of its fault classes."""

# -- F3: the start rule --------------------------------------------------------------------------------------------------


def _void_nothing(self: Holdings) -> None:
    """`Holdings.void`, trusting what an earlier stream or session brought."""


_start = Holdings.start_what_fits
_tell = Sessions._inventory  # noqa: SLF001 - a part to be slowed down


def _start_at_times(self: Holdings, link: Link, now: float) -> None:
    """`Holdings.start_what_fits` of a machine that is too busy to begin work in two thirds of its time: its queue is seldom empty."""
    if now % 18.0 < 6.0:
        _start(self, link, now)


async def _tell_late(self: Sessions, session: Session, shard: str) -> None:
    """`Sessions._inventory` over a slow way: an owner hears of a new stream, and stops what is left of old ones, seconds later."""
    await self._clock.sleep(8.0)
    await _tell(self, session, shard)


START_RULE = Removal(
    "start-rule",
    "F3",
    "what waits in an agent's queue starts under whatever session comes next",
    (Swap(Holdings, "void", _void_nothing),),
    replace(
        SMALL,
        cpus=6,
        harm=60.0,
        faults=("partition of a cluster", "agent frozen"),
        outages=(24.0, 28.0),
        pace=5.0,
        load=Load(kept=0.0, lifetime=(80.0, 90.0), marathons=8, crowds=0),
    ),
    (
        Swap(Holdings, "start_what_fits", _start_at_times),
        Swap(Sessions, "_inventory", _tell_late),
        Swap(capacity, "PATIENCE_SECONDS", 1000.0),
    ),
    seed=6,
)

# -- F3, F4: tombstones --------------------------------------------------------------------------------------------------

_take = Holdings.take


def _take_again(self: Holdings, shard: str, assignment: Assignment, link: Link, now: float, *, draining: bool) -> None:
    """`Holdings.take`, as if a rejection had left no tombstone: what was rejected is new when it comes again."""
    attempt = self.state.attempts.get(assignment.key)
    if attempt is not None and attempt.rejected and self.outbox.told(assignment.key):
        self.outbox.settle(assignment.key)
        del self.state.attempts[assignment.key]
    _take(self, shard, assignment, link, now, draining=draining)


def _expects_anything(self: Link, shard: str, epoch: object, dispatch_no: int) -> bool:  # noqa: ARG001 - as the method
    """`Link.expects`, of one who acts upon repeated dispatches."""
    return True


REJECTION = Removal(
    "tombstone-before-report",
    "F3",
    "a rejected attempt leaves no tombstone, and a second copy of its dispatch is acted upon",
    (Swap(Holdings, "take", _take_again), Swap(Link, "expects", _expects_anything)),
    replace(SMALL, cpus=2, faults=("message repeated",), pace=4.0, load=Load(longest=8.0, marathons=0)),
    (Swap(capacity, "QUEUE_FLOOR", 2), Swap(capacity, "QUEUE_SHARE", 0.0)),
    seed=331,
)


def _census_unfenced(self: Holdings, running: Mapping[AttemptKey, int], ended: Sequence[WorkEnded]) -> None:
    """`Holdings.census`, calling what has no process lost before the guard has a tombstone of it."""
    exited = {exit_.key for exit_ in ended}
    for attempt in list(self.state.attempts.values()):
        alive = attempt.phase in ALIVE and attempt.phase is not Phase.STOPPING
        if alive and attempt.key not in running and attempt.key not in exited:
            self._ledger.release(attempt.key)
            self._finish(attempt, Ended(Outcome.LOST, message="it has no process"))
    _census(self, running, ended)


_census = Holdings.census


def _thaw_late(self: FakeHost) -> None:
    """`FakeHost.thaw_guard`; what an agent has asked before is read after the census of the next one."""
    unread, self._requests = list(self._requests), []
    _thaw(self)
    if unread:
        asyncio.get_running_loop().call_later(LATE_READ, _read, self, unread)


def _read(self: FakeHost, unread: list[Callable[[float], None]]) -> None:
    self._requests[:0] = unread
    self._step()


def _leave_unread(self: FakeHost, connection: Any) -> None:
    """`FakeHost.leave`, with what was asked still to be read."""
    if self._connection is connection:
        self._connection = None


_thaw = FakeHost.thaw_guard

LATE_READ = 2.0
"""Seconds after which a guard reads what an earlier connection has left in its socket: by then the agent has joined anew."""

LATE_REQUESTS = Removal(
    "late-requests",
    "G3, F4",
    "a guard reads an earlier agent's requests after its census, and nothing of them was tombstoned",
    (
        Swap(Holdings, "census", _census_unfenced),
        Swap(FakeHost, "thaw_guard", _thaw_late),
        Swap(FakeHost, "leave", _leave_unread),
    ),
    replace(SMALL, faults=("guard frozen", "agent killed"), outages=(3.0, 5.0), pace=1.2),
    seed=7,
)

# -- F5, G1: what ends the work of a lost cluster --------------------------------------------------------------------------

_cuts = Leases._cuts  # noqa: SLF001


def _cuts_unfenced(self: Leases[Any], entry: Any) -> list[Any]:
    """`Leases._cuts` without the fence."""
    return [cut for cut in _cuts(self, entry) if cut.reason is not Reason.FENCE]


SELF_FENCE = Removal(
    "self-fence",
    "F5",
    "work goes on though its lease has passed",
    (Swap(Leases, "_cuts", _cuts_unfenced),),
    replace(SMALL, faults=("partition of a cluster",), outages=(24.0, 32.0, 40.0), pace=6.0),
    seed=25,
)

_make = ClusterProcess.__init__


def _make_known(self: ClusterProcess, *arguments: Any, **options: Any) -> None:
    """`ClusterProcess.__init__`; the host knows its agent."""
    _make(self, *arguments, **options)
    self.host.agent_process = self  # type: ignore[attr-defined]  # for `_responsive_with_agent`


def _responsive_with_agent(self: Any) -> bool:
    """`FakeHost.responsive`, of a guard that is a part of the agent's process."""
    node = self.agent_process.node
    return self._guard_alive and not self._frozen and node is not None and node.life is Life.RUNS


GUARD = Removal(
    "guard-process",
    "G1",
    "the killer lives in the agent: when that is dead or stopped, nobody ends the work",
    (Swap(ClusterProcess, "__init__", _make_known), Swap(FakeHost, "responsive", property(_responsive_with_agent))),
    replace(SMALL, faults=("agent killed", "agent frozen"), outages=(24.0, 32.0, 40.0), pace=6.0),
    seed=13,
)

REMOVALS = (START_RULE, REJECTION, LATE_REQUESTS, SELF_FENCE, GUARD)
