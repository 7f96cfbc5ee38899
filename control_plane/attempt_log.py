"""Lines about single attempts, from committed run events: what an operator searches for when a run went another way than planned.

Theory. Every event is in the journal and every attempt in a trace; the log has those few that tell of trouble: attempts lost with
their cluster, and late results that were refused. Losing a large cluster is one event of ten thousand attempts, so an event is told by
its first ones and their number. It is the meter that reads committed events, once each, by the owner of the shard
(`control_plane/meter.py`): lines come at most its interval later, and only where metrics are served.
"""

from __future__ import annotations

import logging
from typing import Any

from baton.telemetry.logs import about
from control_plane.core.shard import RunShard
from control_plane.core.views import RunEventView

log = logging.getLogger(__name__)

TOLD = 10
"""Attempts of one event that have a line each. More fill disks when a cluster dies; the last one says how many are not told."""

_SENTENCES = {
    "lost": "an attempt was lost with its cluster",
    "refused": "a late result was refused",
}
"""Kind of run event -> the sentence. Others are no trouble."""


def tell(uid: str, event: RunEventView, machine: RunShard) -> None:
    """A line for each attempt of an event, if its kind is one to be told."""
    sentence = _SENTENCES.get(event.kind)
    if sentence is None:
        return
    for place, (task, n) in enumerate(zip(event.tasks[:TOLD], event.ns[:TOLD], strict=True)):
        found = machine.task_at(uid, task)
        fence = next((each.fence for each in found.attempts if each.id.n == n), "") if found is not None else ""
        left = len(event.tasks) - TOLD if place == TOLD - 1 else 0
        more: dict[str, Any] = {"not_told": left} if left > 0 else {}
        log.warning(
            sentence,
            extra=about(
                uid,
                task=found.id if found is not None else task,
                attempt=n,
                fence=fence,
                cluster_uid=event.clusters[place],
                reason=event.reasons[place],
                **more,
            ),
        )
