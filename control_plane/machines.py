"""Which machine runs which shard (PROTOCOL O6): the one place that knows both kinds."""

from __future__ import annotations

from control_plane.core.fleet import Fleet
from control_plane.core.machine import Machine
from control_plane.core.model import FLEET
from control_plane.core.run_times import RunTimes
from control_plane.core.shard import RunShard


def make_machine(shard: str, run_times: RunTimes | None = None) -> Machine:
    """An empty machine for a shard; `run_times`: what all shards here have learned."""
    return Fleet() if shard == FLEET else RunShard(run_times)
