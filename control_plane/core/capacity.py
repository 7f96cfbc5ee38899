"""Free room of one cluster as node shapes, and how many equal tasks fit into it (PROTOCOL C4). Pure.

Theory. Room is a list of (count, free vector): so many nodes with so much free each. 20 free CPUs in two tens are two holes of
10 and never one of 20. Filling is by classes of equal nodes, not node by node and not task by task: how many tasks fit on a
node is one division per resource, so placing 10,000 tasks on 1,000 equal nodes costs the same as placing one.

Nodes with the smallest room that still fits are filled first, so that large holes stay for large tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


Vector = dict[str, int]
"""Amounts by resource name: cpu (millis), memory, disk (bytes), and the extended ones by their own names."""


def need_of(resources: Resources) -> Vector:
    """What one task takes of a node; resources it does not use are left out."""
    need = {"cpu": resources.cpu_millis, "memory": resources.memory_bytes, "disk": resources.disk_bytes}
    need.update((f"extended {name}", amount) for name, amount in resources.extended)
    return {name: amount for name, amount in need.items() if amount > 0}


def size_of(shapes: Iterable[Shape]) -> Vector:
    """All room of a cluster when empty, as far as it is known (else what is free now)."""
    size: Vector = {}
    for shape in shapes:
        size["cpu"] = size.get("cpu", 0) + shape.count * max(shape.total_cpu_millis, shape.cpu_millis, 0)
        size["memory"] = size.get("memory", 0) + shape.count * max(shape.total_memory_bytes, shape.memory_bytes, 0)
        size["disk"] = size.get("disk", 0) + shape.count * max(shape.disk_bytes, 0)
        for name, amount in shape.extended:
            key = f"extended {name}"
            size[key] = size.get(key, 0) + shape.count * max(amount, 0)
    return size


class Room:
    """The free room of one cluster in the making of a plan. Changes with `take` and `give`."""

    def __init__(self, shapes: Iterable[Shape]) -> None:
        self._classes: list[tuple[int, Vector]] = [(s.count, _free(s)) for s in shapes if s.count > 0]
        self._free_slots: list[tuple[int, Vector]] = []

    def fit(self, need: Vector) -> int:
        """How many tasks of this need fit now."""
        return sum(count * _per_node(free, need) for count, free in self._all())

    def take(self, need: Vector, wanted: int) -> int:
        """Take room for up to `wanted` tasks; how many found room."""
        taken = 0
        order = sorted(self._all(), key=lambda entry: (_per_node(entry[1], need), sorted(entry[1].items())))
        kept: list[tuple[int, Vector]] = []
        for count, free in order:
            each = _per_node(free, need)
            left = wanted - taken
            if each == 0 or left == 0:
                kept.append((count, free))
                continue
            full = min(count, left // each)
            rest = min(left - full * each, each) if full < count else 0
            taken += full * each + rest
            kept += [
                (full, _minus(free, need, each)),
                (1 if rest else 0, _minus(free, need, rest)),
                (count - full - (1 if rest else 0), free),
            ]
        self._classes = [(count, free) for count, free in kept if count > 0]
        self._free_slots = []
        return taken

    def charge(self, need: Vector, count: int) -> None:
        """Subtract tasks that were placed since the report (C4). Those that found no node are an over-estimate and are let
        go: the agent has the last word (C3)."""
        self.take(need, count)

    def give(self, need: Vector, count: int) -> None:
        """Add slots that were freed since the report: each is a hole of exactly one such task, on a node of its own, for
        nobody knows which node it is on."""
        if count > 0:
            self._free_slots.append((count, need))

    def largest(self, name: str) -> int:
        """The largest free amount of one resource on one node."""
        return max((free.get(name, 0) for _, free in self._all()), default=0)

    def _all(self) -> Iterator[tuple[int, Vector]]:
        yield from self._classes
        yield from self._free_slots


def _free(shape: Shape) -> Vector:
    free = {"cpu": max(shape.cpu_millis, 0), "memory": max(shape.memory_bytes, 0)}
    free["disk"] = shape.disk_bytes if shape.disk_bytes > 0 else UNACCOUNTED
    free.update((f"extended {name}", max(amount, 0)) for name, amount in shape.extended)
    return free


def _per_node(free: Vector, need: Vector) -> int:
    """How many tasks fit on one node."""
    return min((free.get(name, 0) // amount for name, amount in need.items()), default=UNBOUNDED)


def _minus(free: Vector, need: Vector, times: int) -> Vector:
    return {name: amount - times * need.get(name, 0) for name, amount in free.items()}
