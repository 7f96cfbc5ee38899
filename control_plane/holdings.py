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
    """Of one group on one cluster: attempts held, and `change` of that since the cluster's last report."""

    cluster: str
    key: str
    group: Group
    held: int
    change: int


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

    def terms(self) -> list[NamespaceView]:
        """Namespaces that this shard keeps (O6)."""
        return self._machine.namespaces()

    def reported(self) -> None:
        """A capacity report was heard: note what each new one includes."""
        fresh = [
            uid
            for uid, beat in self._view.beats.items()
            if uid not in self._bases or self._bases[uid][0] != beat.mod_revision
        ]
        if not fresh:
            return
        unreported: dict[str, Counter[str]] = {}
        for cluster, _, attempts in self._pending(self._shard.id):
            unreported.setdefault(cluster, Counter()).update(self._keys(attempts))
        for uid in fresh:
            base = self._held(uid)
            base.subtract(unreported.get(uid, Counter()))
            self._bases[uid] = (self._view.beats[uid].mod_revision, base)

    def uses(self) -> list[Use]:
        """What is held, or has changed since the last report, now."""
        found: list[Use] = []
        keys: set[str] = set()
        for uid in self._view.table.clusters:
            held = self._held(uid)
            base = self._bases[uid][1] if uid in self._bases else Counter()
            for key in sorted(held.keys() | base.keys()):
                group = self._groups.get(key)
                change = held[key] - base[key]
                if group is not None and (held[key] or change):
                    keys.add(key)
                    found.append(Use(uid, key, group, held[key], change))
        self._groups = {key: group for key, group in self._groups.items() if key in keys}
        return found

    def _held(self, cluster: str) -> Counter[str]:
        """Attempts whose reservation is on the cluster, by group."""
        attempts = set(self._machine.live_on(cluster)).union(self._machine.stops_on(cluster))
        return Counter(self._keys(attempts))

    def _keys(self, attempts: Iterable[AttemptId]) -> list[str]:
        keys: list[str] = []
        for attempt in attempts:
            view = self._machine.attempt(attempt)
            if view is None:
                continue  # of an archived run: its stop is all that is left
            keys.append(view.group)
            if view.group not in self._groups and (work := self._machine.dispatch(attempt)) is not None:
                # Held since before we owned the shard: all that counts of its group is who and how much.
                self._groups[view.group] = Group(work.namespace, 0, work.spec.resources, False, (), (), ())
        return keys
