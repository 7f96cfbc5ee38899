"""Watchers: users who follow a run's events through whatever happens, and write down what they received (I16).

Theory. A watch goes on after the last number that was received, at any replica; so what a watcher has in the end is the run's stream,
without gap or repeat, or it was told COMPACTED. It may give up only when the run is final or its replicas are gone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from baton.errors import BatonError
from baton.v1 import run_pb2
from control_plane.core.commands import Refused
from lab.checking.history import Watched
from lab.simulation.processes import ReplicaProcess

WATCH_SECONDS = 15.0
"""Of one stream; then the watcher comes again, as after a broken connection."""

SHARE = 0.3
"""Of runs that somebody watches. More cost simulation time and show the same."""


class Watchers:
    """All of them. Each has a run of its own."""

    def __init__(self, rng: random.Random, replicas: Sequence[ReplicaProcess]) -> None:
        self._rng, self._replicas = rng, replicas
        self.watched: list[Watched] = []
        self.restored = False
        """The store has forgotten something: a number may be ahead of the run's now (J12)."""

    def wanted(self) -> bool:
        """Whether the next run is watched."""
        return self._rng.random() < SHARE

    async def follow(self, run: run_pb2.Run) -> None:
        """Until the run's last event was received, or it cannot be followed any more."""
        after, fresh, over = 0, False, False
        while not over:
            request = run_pb2.WatchRunRequest(name=run.name, after_event=after)
            try:
                async for payload in self._rng.choice(self._replicas).stream("WatchRun", request, WATCH_SECONDS):
                    response = run_pb2.WatchRunResponse.FromString(payload)
                    for event in response.events:
                        self._note(run, event, fresh)
                        after, fresh = event.number, False
                    over = response.run.state >= run_pb2.RUN_STATE_SUCCEEDED and after >= _newest(response.run)
            except (ConnectionError, TimeoutError):
                pass  # the next replica goes on
            except (BatonError, Refused) as error:
                if error.reason == "WATCH_COMPACTED" or (self.restored and error.reason in LOST):
                    return
            if not over:
                await asyncio.sleep(self._rng.uniform(0.2, 2.0))

    def _note(self, run: run_pb2.Run, event: run_pb2.RunEvent, fresh: bool) -> None:
        rows = ", ".join(f"{change.index} {change.state} {change.attempt}" for change in event.changes)
        now = asyncio.get_running_loop().time()
        self.watched.append(
            Watched(now, f"watcher of {run.name}", run.uid, event.number, f"{event.kind}: {rows}", fresh)
        )


LOST = ("NOT_FOUND", "INVALID_FIELD")
"""What a watcher is told of events that a restore has undone."""


def _newest(run: run_pb2.Run) -> int:
    return int(run.etag.rpartition(".")[2] or 0)
