"""Free room of one cluster as node shapes, and how many equal tasks fit into it (PROTOCOL C4). Pure.

Theory. Room is a list of (count, free vector): so many nodes with so much free each. 20 free CPUs in two tens are two holes of
10 and never one of 20. Filling is by classes of equal nodes, not node by node and not task by task: how many tasks fit on a
node is one division per resource, so placing 10,000 tasks on 1,000 equal nodes costs the same as placing one.

Nodes with the smallest room that still fits are filled first, so that large holes stay for large tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.core.model import Resources

UNBOUNDED = 1_000_000
"""How many tasks that need nothing fit on a node; any number above what one grant may carry."""

UNACCOUNTED = 1 << 62
"""Free amount of a resource that a cluster does not account for."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`count` nodes with equal free room, and their size when empty (0 if unknown)."""

    count: int
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int = 0
    extended: tuple[tuple[str, int], ...] = ()
    total_cpu_millis: int = 0
    total_memory_bytes: int = 0


Need = tuple[tuple[str, int], ...]
"""What one task takes of a node: (resource, amount > 0) by name: cpu (millis), memory, disk (bytes), and the extended ones."""


def need_of(resources: Resources) -> Need:
    """What one task takes of a node; resources it does not use are left out."""
    amounts = {"cpu": resources.cpu_millis, "memory": resources.memory_bytes, "disk": resources.disk_bytes}
    amounts.update((f"extended {name}", amount) for name, amount in resources.extended)
    return tuple(sorted((name, amount) for name, amount in amounts.items() if amount > 0))


def size_of(shapes: Iterable[Shape]) -> dict[str, int]:
    """All room of a cluster when empty, as far as it is known (else what is free now), by resource."""
    size: dict[str, int] = defaultdict(int)
    for shape in shapes:
        size["cpu"] += shape.count * max(shape.total_cpu_millis, shape.cpu_millis, 0)
        size["memory"] += shape.count * max(shape.total_memory_bytes, shape.memory_bytes, 0)
        size["disk"] += shape.count * max(shape.disk_bytes, 0)
        for name, amount in shape.extended:
            size[f"extended {name}"] += shape.count * max(amount, 0)
    return size


class Room:
    """The free room of one cluster in the making of a plan. Changes with `take` and `give`."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        shapes = tuple(shapes)
        extended = sorted({f"extended {name}" for shape in shapes for name, _ in shape.extended})
        self._index = {name: i for i, name in enumerate(("cpu", "memory", "disk", *extended))}
        self._classes: dict[tuple[int, ...], int] = {}
        """Free vector of a node -> nodes that have it."""
        self._fits: dict[Need, int] = {}
        """Answers of `fit` since the last change."""
        for shape in shapes:
            self._add(self._free(shape), shape.count)

    def fit(self, need: Need) -> int:
        """How many tasks of this need fit now."""
        known = self._fits.get(need)
        if known is None:
            wanted = self._wanted(need)
            known = (
                sum(count * _per_node(free, wanted) for free, count in self._classes.items())
                if wanted is not None
                else 0
            )
            self._fits[need] = known
        return known

    def take(self, need: Need, wanted: int) -> int:
        """Take room for up to `wanted` tasks; how many found room."""
        amounts = self._wanted(need)
        if amounts is None or wanted <= 0:
            return 0
        fitting = [(each, free) for free in self._classes if (each := _per_node(free, amounts)) > 0]
        fitting.sort(key=lambda entry: entry[0])  # stable: equal fits in the order of the report
        left = wanted
        for each, free in fitting:
            if left == 0:
                break
            count = self._classes.pop(free)
            full = min(count, left // each)
            rest = min(left - full * each, each) if full < count else 0
            left -= full * each + rest
            used = full + (1 if rest else 0)
            self._add(_minus(free, amounts, each), full)
            self._add(_minus(free, amounts, rest), used - full)
            self._add(free, count - used)
        self._fits.clear()
        return wanted - left

    def give(self, need: Need, count: int) -> None:
        """Add slots that were freed since the report: each is a hole of exactly one such task, on a node of its own, for
        nobody knows which node it is on."""
        amounts = self._wanted(need)
        if amounts is not None:
            empty = (0,) * len(self._index)
            self._add(_minus(empty, amounts, -1), count)
            self._fits.clear()

    def largest(self, name: str) -> int:
        """The largest free amount of one resource on one node."""
        i = self._index.get(name)
        return max((free[i] for free in self._classes), default=0) if i is not None else 0

    def classes(self) -> list[tuple[int, dict[str, int]]]:
        """(nodes, free amounts by resource), for people and tests."""
        return [(count, dict(zip(self._index, free, strict=True))) for free, count in self._classes.items()]

    def _add(self, free: tuple[int, ...], count: int) -> None:
        if count > 0:
            self._classes[free] = self._classes.get(free, 0) + count

    def _free(self, shape: Shape) -> tuple[int, ...]:
        accounted = shape.memory_bytes > 0 or shape.total_memory_bytes > 0
        amounts = {"cpu": shape.cpu_millis, "memory": shape.memory_bytes if accounted else UNACCOUNTED}
        amounts["disk"] = shape.disk_bytes if shape.disk_bytes > 0 else UNACCOUNTED
        amounts.update((f"extended {name}", amount) for name, amount in shape.extended)
        return tuple(max(amounts.get(name, 0), 0) for name in self._index)

    def _wanted(self, need: Need) -> list[tuple[int, int]] | None:
        """The need by position; None if the cluster does not have one of its resources."""
        try:
            return [(self._index[name], amount) for name, amount in need]
        except KeyError:
            return None


def _per_node(free: tuple[int, ...], wanted: list[tuple[int, int]]) -> int:
    """How many tasks fit on one node."""
    most = UNBOUNDED
    for i, amount in wanted:
        fit = free[i] // amount
        most = min(most, fit)
    return most


def _minus(free: tuple[int, ...], wanted: list[tuple[int, int]], times: int) -> tuple[int, ...]:
    left = list(free)
    for i, amount in wanted:
        left[i] -= times * amount
    return tuple(left)
