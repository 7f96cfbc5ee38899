"""Namespaces and graph versions of a shard (PROTOCOL O6: their one writer is the shard of hash(namespace))."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.core.events import GraphPut, NamespacePut

KEPT_VERSIONS = 100
"""Versions kept per graph. Runs carry their own copy of the tasks, so an old version only serves rollback and reading."""


@dataclass(slots=True, eq=False)
class GraphHistory:
    """A graph's kept versions, oldest first, each with the wall time it was put."""

    created: float
    versions: list[tuple[GraphPut, float]]

    @property
    def newest(self) -> GraphPut:
        """The last version."""
        return self.versions[-1][0]


class Catalog:
    """What the shard holds beside runs."""

    __slots__ = ("graphs", "namespaces")

    def __init__(self) -> None:
        self.namespaces: dict[str, NamespacePut] = {}
        self.graphs: dict[tuple[str, str], GraphHistory] = {}

    def quota(self, namespace: str) -> int:
        """Most live attempts of a namespace on this shard; 0 means no bound."""
        known = self.namespaces.get(namespace)
        return known.live_task_quota if known else 0

    def find(self, namespace: str, graph_id: str) -> GraphHistory | None:
        """A graph with its versions."""
        return self.graphs.get((namespace, graph_id))

    def apply_namespace(self, event: NamespacePut) -> None:
        """Create or replace."""
        self.namespaces[event.name] = event

    def apply_graph(self, event: GraphPut, wall: float) -> None:
        """Add a version."""
        history = self.graphs.setdefault((event.namespace, event.graph_id), GraphHistory(wall, []))
        history.versions.append((event, wall))
        del history.versions[:-KEPT_VERSIONS]

    def dump(self) -> Iterable[NamespacePut | GraphPut]:
        """Events that rebuild this, but for the times (`times`)."""
        for name in sorted(self.namespaces):
            yield self.namespaces[name]
        for key in sorted(self.graphs):
            for event, _ in self.graphs[key].versions:
                yield event

    def times(self) -> list[tuple[str, str, float, list[float]]]:
        """(namespace, graph, created, put times) of every graph: what `dump` cannot say in events."""
        return [(*key, g.created, [wall for _, wall in g.versions]) for key, g in sorted(self.graphs.items())]

    def restore_times(self, rows: Iterable[tuple[str, str, float, list[float]]]) -> None:
        """Inverse of `times`, after the events of `dump`."""
        for namespace, graph_id, created, walls in rows:
            history = self.graphs[namespace, graph_id]
            history.created = created
            history.versions = [(event, wall) for (event, _), wall in zip(history.versions, walls, strict=True)]
