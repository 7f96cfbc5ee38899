"""What fits here (C3, C4): nodes with free vectors, and a short queue beyond them.

The agent is the last authority on what fits. An attempt lives on one node: twenty free CPUs in two tens are no hole of
twenty. Placement is first fit in node order, which keeps later nodes whole for large demands. Capacity is held until
the executor has confirmed the death, not until it was asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from cluster_agent.core.model import AttemptKey, Demand

QUEUE_FLOOR = 512
"""So many attempts may wait on any cluster, however small; heartbeats say it. Too small: slots idle for a round trip between short
tasks. How much should wait is the scheduler's business, which knows run times; this bounds a mistake of it."""

QUEUE_SHARE = 1.0
"""Beyond the floor, what waits may add up to this share of the cluster: one refill hides the round trip; more is
hoarding."""

PATIENCE_SECONDS = 2.0
"""So long an attempt may wait here without being started; then it goes back. The scheduler queues only what is gone within 0.25 s by
learned run times: after eight times that they are wrong, and another cluster may be free. Smaller: a hiccup of a busy host sends
hundreds of attempts through the journal again; larger: work stands in line here while others idle."""

QUEUE_CEILING = 10_000
"""Never more, whatever they ask for: tasks may demand no CPU at all. Memory of the agent is what it protects."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """`count` equal nodes. 0 bytes of memory or disk means not accounted."""

    cpu_millis: int
    memory_bytes: int = 0
    disk_bytes: int = 0
    extended: tuple[tuple[str, int], ...] = ()
    count: int = 1


@dataclass(frozen=True, slots=True)
class FreeShape:
    """`count` equal nodes with this much free on each; totals are those of the empty node."""

    count: int
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    extended: tuple[tuple[str, int], ...]
    total_cpu_millis: int
    total_memory_bytes: int


@dataclass(slots=True)
class _Node:
    spec: NodeSpec
    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    extended: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def empty(spec: NodeSpec) -> _Node:
        return _Node(spec, spec.cpu_millis, spec.memory_bytes, spec.disk_bytes, dict(spec.extended))

    def lacks(self, demand: Demand) -> str:
        """The first dimension that does not fit, or nothing."""
        if demand.cpu_millis > self.cpu_millis:
            return f"cpu_millis {demand.cpu_millis} > {self.cpu_millis}"
        if self.spec.memory_bytes and demand.memory_bytes > self.memory_bytes:
            return f"memory_bytes {demand.memory_bytes} > {self.memory_bytes}"
        if self.spec.disk_bytes and demand.disk_bytes > self.disk_bytes:
            return f"disk_bytes {demand.disk_bytes} > {self.disk_bytes}"
        for name, amount in demand.extended:
            if amount > self.extended.get(name, 0):
                return f"{name} {amount} > {self.extended.get(name, 0)}"
        return ""

    def take(self, demand: Demand, sign: int = 1) -> None:
        self.cpu_millis -= sign * demand.cpu_millis
        self.memory_bytes -= sign * demand.memory_bytes
        self.disk_bytes -= sign * demand.disk_bytes
        for name, amount in demand.extended:
            self.extended[name] = self.extended.get(name, 0) - sign * amount

    def shape(self, *, closed: bool) -> FreeShape:
        keep = 0 if closed else 1
        return FreeShape(
            1,
            max(0, self.cpu_millis) * keep,
            max(0, self.memory_bytes) * keep,
            max(0, self.disk_bytes) * keep,
            tuple(sorted((name, max(0, amount) * keep) for name, amount in self.extended.items())),
            self.spec.cpu_millis,
            self.spec.memory_bytes,
        )


class Ledger:
    """Who holds what on which node."""

    def __init__(self, specs: Sequence[NodeSpec]) -> None:
        self._nodes = [_Node.empty(spec) for spec in specs for _ in range(spec.count)]
        self._held: dict[AttemptKey, tuple[_Node, Demand]] = {}

    def never_fits(self, demand: Demand) -> str:
        """Why no node could take it even if empty; nothing if one could."""
        reasons = [_Node.empty(node.spec).lacks(demand) for node in self._nodes]
        return "" if not all(reasons) else (reasons[0] if reasons else "no nodes")

    def place(self, key: AttemptKey, demand: Demand) -> bool:
        """Reserve on the first node with room; False if there is none."""
        for node in self._nodes:
            if not node.lacks(demand):
                self._hold(key, node, demand)
                return True
        return False

    def claim(self, key: AttemptKey, demand: Demand) -> None:
        """Reserve for what already runs, room or not; free room may go below nothing and is then reported as
        nothing."""
        if key not in self._held and self._nodes and not self.place(key, demand):
            self._hold(key, max(self._nodes, key=lambda node: node.cpu_millis), demand)

    def release(self, key: AttemptKey) -> None:
        """Give back; nothing happens if nothing was held, so a death told twice frees once."""
        held = self._held.pop(key, None)
        if held is not None:
            held[0].take(held[1], -1)

    def pass_on(self, key: AttemptKey, heir: AttemptKey) -> None:
        """What one held is another's; nothing happens if nothing was held."""
        held = self._held.pop(key, None)
        if held is not None:
            self._held[heir] = held

    def _hold(self, key: AttemptKey, node: _Node, demand: Demand) -> None:
        node.take(demand)
        self._held[key] = (node, demand)

    def totals(self) -> tuple[int, int]:
        """CPU (thousandths) and memory (bytes; 0: not accounted) of all nodes when empty."""
        return sum(n.spec.cpu_millis for n in self._nodes), sum(n.spec.memory_bytes for n in self._nodes)

    def shapes(self, waiting: Iterable[Demand] = (), *, closed: bool = False) -> tuple[FreeShape, ...]:
        """Free room by shape, less what waits (C4: an included dispatch is not free room); nothing free if `closed`."""
        nodes = [
            _Node(node.spec, node.cpu_millis, node.memory_bytes, node.disk_bytes, dict(node.extended))
            for node in self._nodes
        ]
        for demand in waiting:
            roomiest = next((node for node in nodes if not node.lacks(demand)), None)
            if roomiest is None and nodes:
                roomiest = max(nodes, key=lambda node: node.cpu_millis)
            if roomiest is not None:
                roomiest.take(demand)
        counted: dict[FreeShape, int] = {}
        for node in nodes:
            shape = node.shape(closed=closed)
            counted[shape] = counted.get(shape, 0) + 1
        return tuple(replace(shape, count=count) for shape, count in counted.items())


class LocalQueue:
    """Attempts that wait for room, first in first out: the next one starts without a round trip (DESIGN 8)."""

    def __init__(self, cpu_millis: int, memory_bytes: int) -> None:
        """The cluster's totals, which bound what may wait."""
        self._cpu_bound = cpu_millis * QUEUE_SHARE
        self._memory_bound = memory_bytes * QUEUE_SHARE
        self._waiting: dict[AttemptKey, Demand] = {}
        self._since: dict[AttemptKey, float] = {}
        """When each began to wait, boot clock, in the same order."""
        self._cpu = 0
        self._memory = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def demands(self) -> Iterable[Demand]:
        """What waits, in order."""
        return self._waiting.values()

    def first(self) -> tuple[AttemptKey, Demand] | None:
        """Who is next. Strictly in order: a large demand is not overtaken for ever by small ones."""
        return next(iter(self._waiting.items()), None)

    def offer(self, key: AttemptKey, demand: Demand, now: float) -> bool:
        """Take it if there is room to wait; False if the queue is full. `now`: boot clock, seconds."""
        cpu, memory = self._cpu + demand.cpu_millis, self._memory + demand.memory_bytes
        full = cpu > self._cpu_bound or (self._memory_bound > 0 and memory > self._memory_bound)
        if len(self._waiting) >= QUEUE_FLOOR and (full or len(self._waiting) >= QUEUE_CEILING):
            return False
        self._waiting[key] = demand
        self._since[key] = now
        self._cpu, self._memory = cpu, memory
        return True

    def remove(self, key: AttemptKey) -> None:
        """Take it out; nothing happens if it does not wait."""
        demand = self._waiting.pop(key, None)
        if demand is not None:
            del self._since[key]
            self._cpu -= demand.cpu_millis
            self._memory -= demand.memory_bytes

    def stale(self, now: float) -> tuple[AttemptKey, ...]:
        """Who has waited for longer than they may, in order; they stay."""
        if not self._since:
            return ()
        late = itertools.takewhile(lambda item: item[1] <= now - PATIENCE_SECONDS, self._since.items())
        return tuple(key for key, _ in late)

    def wait_anew(self, now: float) -> None:
        """The time until now does not count as waiting."""
        self._since = dict.fromkeys(self._since, now)

    def clear(self) -> tuple[AttemptKey, ...]:
        """Empty it; who waited."""
        keys = tuple(self._waiting)
        self._waiting.clear()
        self._since.clear()
        self._cpu = self._memory = 0
        return keys
