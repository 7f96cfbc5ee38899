"""Removals of rules about the journal, its owners, and what is read of the store (PROTOCOL J, O).

Each part here is the product's own, less one mechanism; see `lab.simulation.removal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from baton.clock import Clock
from cluster_agent.core import outbox as agent_outbox
from control_plane import journal, snapshots, view
from control_plane.core import requests
from control_plane.core.commands import Request
from control_plane.core.machine import Machine
from control_plane.cycle import Cycle
from control_plane.dispatcher import Dispatcher
from control_plane.journal import COMMIT_TIMEOUT, Entry, Journal, Resolved, Verdict
from control_plane.ownership import Ownership
from control_plane.recovery import Recovered, recover
from control_plane.restore import MarkLike, RestoreDetector
from control_plane.slots import Slot
from control_plane.store import keys
from control_plane.store.base import Compacted, Compare, Store, StoreError, Txn
from control_plane.view import View
from lab.simulation.removal import Removal, Swap
from lab.simulation.workload import Load
from lab.simulation.world import Shape

SMALL = Shape(clusters=3, runs=12, harm=40.0, swarm=False, sieges=0.0)
"""A small world in which a seed strikes with all of its fault classes."""

# -- J4: the fence of the log --------------------------------------------------------------------------------------------

_transaction = journal.transaction


def _transaction_unfenced(entries: Sequence[Entry], condition: Compare | None = None) -> Txn:
    """`journal.transaction` without the compare of the owner keys."""
    txn = _transaction(entries, condition)
    owners = {keys.owner(entry.shard) for entry in entries}
    return replace(txn, compares=tuple(compare for compare in txn.compares if compare.key not in owners))


OWNER_COMPARE = Removal(
    "owner-compare",
    "J4",
    "a transaction compares the head of each log, but not who owns the shard",
    (Swap(journal, "transaction", _transaction_unfenced),),
    replace(SMALL, faults=("replica frozen", "lease expired", "store storm", "store cut off"), pace=3.0),
    seed=1,
)

# -- J6: unclear answers -------------------------------------------------------------------------------------------------


async def _commit_guessing(
    self: Journal, entries: Sequence[Entry], condition: Compare | None, resolved: Resolved
) -> None:
    """`Journal.commit`, taking a missing answer for a refusal."""
    left = list(entries)

    def told(entry: Entry, verdict: Verdict) -> None:
        left.remove(entry)
        resolved(entry, verdict)

    while left:
        try:
            result = await self._store.txn(_transaction(left, condition), timeout=COMMIT_TIMEOUT)
        except StoreError:
            for entry in list(left):
                told(entry, Verdict.NOT_APPLIED)
            return
        if result.succeeded:
            for entry in list(left):
                told(entry, Verdict.COMMITTED)
            return
        if self._resolve(list(left), journal.readings(result, left), condition, told):
            await self._clock.sleep(journal.MAX_PAUSE)


UNCLEAR_ANSWERS = Removal(
    "unclear-answers",
    "J6",
    "a commit without an answer is taken, and said, to have failed",
    (Swap(Journal, "commit", _commit_guessing),),
    replace(SMALL, runs=20, faults=("store storm", "store sluggish"), pace=2.0),
    seed=4,
)

# -- J7: effects ---------------------------------------------------------------------------------------------------------

_decide = Cycle._decide  # noqa: SLF001


def _decide_and_publish(self: Cycle, slot: Slot) -> None:
    """`Cycle._decide`, which lets effects leave at once."""
    _decide(self, slot)
    if slot.decision is not None:
        self._publish_outbox(slot)


EFFECTS_FIRST = Removal(
    "effects-after-commit",
    "J7",
    "dispatches and stops leave when they are decided, not when they are committed",
    (Swap(Cycle, "_decide", _decide_and_publish),),
    replace(SMALL, faults=("store storm", "store without quorum"), pace=3.0),
    seed=1,
)


def _never_again(self: Dispatcher, owned: object, link: object) -> None:
    """`Dispatcher._again`, for one who trusts that what was sent has arrived."""


RESEND = Removal(
    "re-send",
    "J7",
    "dispatches and stops are sent once; silence is not answered by sending again",
    (Swap(Dispatcher, "_again", _never_again), Swap(agent_outbox, "RESEND_SECONDS", 1e9)),
    replace(
        SMALL,
        faults=("partition of replicas", "partition of a cluster", "replica frozen"),
        pace=2.0,
        load=Load(lifetime=(600.0, 700.0), hurried=0.0, longest=6.0, kept=0.0, marathons=0),
        patience=150.0,
    ),
    seed=15,
)

# -- J8: reads -----------------------------------------------------------------------------------------------------------


def _lease_believed(self: Ownership) -> bool:
    """`Ownership.lease_good`, for one who believes that what was his is his."""
    return self._tenure is not None


READS = Removal(
    "lease-of-reads",
    "J8",
    "an owner answers reads without looking whether its lease is still good",
    (Swap(Ownership, "lease_good", _lease_believed),),
    replace(SMALL, runs=20, faults=("replica frozen", "store cut off", "lease expired"), pace=3.0),
    seed=9,
)

# -- J9: snapshots -------------------------------------------------------------------------------------------------------

FUZZ = 1.0
"""Seconds by which the state in a fuzzy snapshot is newer than its seq."""


async def _recover_fuzzily(
    store: Store, clock: Clock, shard: str, make_machine: Callable[[str], Machine], *, timeout: float
) -> Recovered:
    """`recover`, as if it had looked at state that moves: seq and nonces of one moment, state of a later one."""
    found = await recover(store, clock, shard, make_machine, timeout=timeout)
    await clock.sleep(FUZZ)
    later = await recover(store, clock, shard, make_machine, timeout=timeout)
    return replace(found, machine=later.machine)


SNAPSHOTS = Removal(
    "exact-snapshot",
    "J9",
    "a snapshot is made from state that moves on while it is made",
    (Swap(snapshots, "recover", _recover_fuzzily),),
    replace(SMALL, runs=20, faults=("replica killed", "lease expired"), pace=3.0, snapshots=4.0),
)

# -- J12: restore detection ----------------------------------------------------------------------------------------------


async def _no_marks(self: RestoreDetector, marks: Sequence[MarkLike], federation_uid: str) -> bool:  # noqa: ARG001 - as the method
    """`RestoreDetector.check_marks`, believing the store."""
    return False


async def _no_suspicion(self: RestoreDetector, incarnation: int, problem: str) -> None:
    """`RestoreDetector.suspect`, keeping it to itself."""


def _resolve_believing(self: Journal, left: list[Entry], found: list[Any], condition: Any, resolved: Resolved) -> Any:
    """`Journal._resolve`; a head that is behind its own commits makes it read the log again."""
    rest = _resolve(self, left, found, condition, resolved)
    by_shard = dict(zip([entry.shard for entry in left], found, strict=True))
    behind = [entry for entry in rest if journal.rewound(entry, by_shard[entry.shard])]
    for entry in behind:
        resolved(entry, Verdict.LOST)
    return [entry for entry in rest if entry not in behind]


_resolve = Journal._resolve  # noqa: SLF001

RESTORES = Removal(
    "restore-detection",
    "J12",
    "nobody compares what he remembers of a log with what the store says of it",
    (
        Swap(RestoreDetector, "check_marks", _no_marks),
        Swap(RestoreDetector, "suspect", _no_suspicion),
        Swap(Journal, "_resolve", _resolve_believing),
    ),
    replace(SMALL, faults=("store restored", "partition of a cluster"), pace=5.0),
)

# -- O8: request ids -----------------------------------------------------------------------------------------------------

_known = requests.Requests.known


def _known_never(self: requests.Requests, request: Request, now: float) -> str | None:  # noqa: ARG001 - as the method
    """`Requests.known`, remembering nothing."""
    return None


def _known_unfloored(self: requests.Requests, request: Request, now: float) -> str | None:
    """`Requests.known`, taking every id it does not remember for a new one."""
    return _known(self, request, now) if request.id in self.records else None


DEDUPE = Removal(
    "request-dedupe",
    "O8",
    "a request id that was decided before is decided again",
    (Swap(requests.Requests, "known", _known_never),),
    replace(SMALL, runs=20, faults=("replica killed", "replica frozen", "request repeated"), pace=2.0),
    seed=14,
)

SHORT_MEMORY = (Swap(requests, "KEEP", 4.0), Swap(requests, "PRUNE_EVERY", 1.0))
"""Of requests: the floor rises within a seed's time."""

FLOOR = Removal(
    "request-floor",
    "O8",
    "an id below the floor, whose record is forgotten, is executed",
    (Swap(requests.Requests, "known", _known_unfloored),),
    replace(SMALL, runs=20, faults=("request repeated",), pace=1.5, load=Load(longest=1.0)),
    SHORT_MEMORY,
)

# -- watches -------------------------------------------------------------------------------------------------------------


async def _follow_on(self: View, feed: Any) -> None:
    """`View._follow`; what a compaction took is not listed again, and nothing is listed without need."""
    while not feed.listed.is_set():
        try:
            await self._list(feed)
        except StoreError:
            await self._clock.sleep(view.RETRY_PAUSE)
    while True:
        try:
            await self._watch(feed)
        except Compacted as error:
            feed.revision = max(feed.revision, error.revision)
        except StoreError:
            pass
        await self._clock.sleep(view.RETRY_PAUSE)


RELIST = Removal(
    "watch-relist",
    "watches",
    "a watch that was compacted goes on from there without listing what it missed",
    (Swap(View, "_follow", _follow_on),),
    replace(SMALL, faults=("watch trouble", "replica killed", "partition of a cluster", "store compacted"), pace=2.0),
    seed=26,
)

REMOVALS = (
    OWNER_COMPARE,
    UNCLEAR_ANSWERS,
    EFFECTS_FIRST,
    RESEND,
    READS,
    SNAPSHOTS,
    RESTORES,
    DEDUPE,
    FLOOR,
    RELIST,
)
