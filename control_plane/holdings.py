"""What an owned shard holds of each cluster, and how that changed since the cluster's last capacity report (PROTOCOL C4).

Theory. A report says what was free when the agent made it; since then attempts were placed and others ended. Only owners know
both. When a report is heard, an owner notes how many attempts of each group that report includes: those it holds, less those
whose dispatch is numbered above what the report names. From then on the difference between what it holds and that base is what
the report does not know: positive is room to subtract, negative is room that came free. So a slot that ends between two
heartbeats is planned again after milliseconds, not after seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from control_plane.core.model import AttemptId, Group
from control_plane.core.shard import RunShard
from control_plane.core.views import DemandLine, NamespaceView
from control_plane.view import View

if TYPE_CHECKING:
    from control_plane.controller import OwnedShard

PendingSource = Callable[[str], Iterable[tuple[str, int, list[AttemptId]]]]
"""Of a shard: (cluster, generation, attempts) that were placed and are in no capacity report yet: `Dispatcher.pending`."""


@dataclass(frozen=True, slots=True)
class Use:
    """Of one group on one cluster: attempts held, and `change` of that since the cluster's last report. `run_seconds`: learned
    run time, 0 if none is known."""

    cluster: str
    key: str
    group: Group
    held: int
    change: int
    run_seconds: float


class Holdings:
    """The uses of one owned shard. Keeps the handle, not the machine: that is rebuilt after a discarded batch (J5)."""

    def __init__(self, shard: OwnedShard, view: View, pending: PendingSource) -> None:
        self._shard = shard
        self._view = view
        self._pending = pending
        self._groups: dict[str, Group] = {}
        self._bases: dict[str, tuple[int, Counter[str]]] = {}
        self.reported()

    @property
    def _machine(self) -> RunShard:
        return cast(RunShard, self._shard.machine)

    def demand(self, wall: float) -> list[DemandLine]:
        """Ready tasks by group, slack as of `wall`; their groups are remembered."""
        lines = self._machine.demand(wall)
        for line in lines:
            self._groups[line.key] = line.group
        return lines

    def wanting(self) -> bool:
        """Whether any task waits for a place."""
        return self._machine.wanting

    def permitted(self) -> bool:
        """Whether permissions are left that found no task."""
        return self._machine.permitted

    def terms(self) -> list[NamespaceView]:
        """Namespaces that this shard keeps (O6)."""
        return self._machine.namespaces()

    def reported(self) -> bool:
        """A capacity report was heard: note what each new one includes. False if nothing lives anywhere, so that until something
        does the next ones are of no concern."""
        if self._machine.bare:
            self._bases.clear()  # as if none had been heard: whatever comes later is in none of them
            return False
        fresh = [
            uid
            for uid, beat in self._view.beats.items()
            if uid not in self._bases or self._bases[uid][0] != beat.mod_revision
        ]
        if not fresh:
            return True
        held = {uid: self._held(uid) for uid in fresh}
        unreported: dict[str, Counter[str]] = {}
        if any(held.values()):
            for cluster, _, attempts in self._pending(self._shard.id):
                keys = (self._machine.group_of(attempt) for attempt in attempts)
                unreported.setdefault(cluster, Counter()).update(key for key in keys if key is not None)
        for uid, base in held.items():
            base.subtract(unreported.get(uid, Counter()))
            self._bases[uid] = (self._view.beats[uid].mod_revision, base)
        return True

    def uses(self) -> list[Use]:
        """What is held, or has changed since the last report, now."""
        if not self._bases and not self._machine.holding:
            self._groups.clear()
            return []
        found: list[Use] = []
        keys: set[str] = set()
        for uid in self._view.table.clusters:
            held = self._held(uid)
            base = self._bases[uid][1] if uid in self._bases else Counter()
            for key in sorted(held.keys() | base.keys()):
                group = self._machine.group(key) or self._groups.get(key)
                change = held[key] - base[key]
                if group is not None and (held[key] or change):
                    keys.add(key)
                    self._groups[key] = group
                    found.append(Use(uid, key, group, held[key], change, self._machine.run_seconds(key)))
        self._groups = {key: group for key, group in self._groups.items() if key in keys}
        return found

    def _held(self, cluster: str) -> Counter[str]:
        """Attempts whose reservation is on the cluster, by group."""
        return Counter(self._machine.held_on(cluster))
