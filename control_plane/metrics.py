"""A replica's metrics, made when they are asked for: docs/metrics.md says what each one means.

Theory. Nothing is kept in the metrics library: what the meter counted and what the loops know is read at scrape time, and becomes
samples. Labels are namespaces, clusters and outcomes, never runs, so the number of series has a bound. What a shard knows is read
as committed state (J8), with a short patience: a scrape must not wait for a store that is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from baton.telemetry import COUNTER, GAUGE, HISTOGRAM, Family
from control_plane.core.commands import Refused
from control_plane.core.model import FLEET, Health
from control_plane.core.views import DemandLine
from control_plane.meter import Counts, Meter
from control_plane.refusals import NotOwned, StoreDown
from control_plane.replica import Replica
from control_plane.view import Beat

SHARD_SECONDS = 1.0
"""For the queue of one shard; without an answer in that time it is left out of this scrape."""


class ReplicaMetrics:
    """All families of one replica. `more` are those of the composition root: exporters, peer queues."""

    def __init__(self, replica: Replica, meter: Meter, more: Callable[[], Iterable[Family]] = lambda: ()) -> None:
        self._replica, self._meter, self._more = replica, meter, more

    async def families(self) -> list[Family]:
        """What there is now."""
        await self._meter.count()
        lines = await self._demand()
        return [
            *self._queues(lines),
            *self._work(),
            *self._commits(),
            *self._ownership(),
            *self._clusters(),
            *self._replica.traffic.families(),
            *self._more(),
        ]

    # -- by namespace ------------------------------------------------------------------------------------------------------

    async def _demand(self) -> list[DemandLine]:
        controller, now = self._replica.controller, self._replica.parts.clock.wall()
        shards = [shard for shard in controller.owned() if shard != FLEET]

        async def of(shard: str) -> list[DemandLine]:
            try:
                lines: list[DemandLine] = await controller.read(
                    shard, lambda machine: machine.demand(now), timeout=SHARD_SECONDS
                )
            except (NotOwned, StoreDown, Refused):
                return []
            return lines

        return [line for lines in await asyncio.gather(*map(of, shards)) for line in lines]

    def _queues(self, lines: Iterable[DemandLine]) -> list[Family]:
        now = self._replica.parts.clock.wall()
        # Namespaces that were busy once show a zero, not a hole.
        length = dict.fromkeys(self._meter.by_namespace, 0)
        since: dict[str, float] = {}
        for line in lines:
            name = self._meter.label(line.group.namespace)
            length[name] = length.get(name, 0) + line.count
            if line.count and line.since_wall:
                since[name] = min(since.get(name, now), line.since_wall)
        tasks = Family("baton_queue_tasks", GAUGE, "Ready tasks that wait for a place.", ("namespace",))
        wait = Family(
            "baton_queue_oldest_wait_seconds", GAUGE, "How long the oldest ready task has waited.", ("namespace",)
        )
        for name, count in sorted(length.items()):
            tasks.add(count, name)
            wait.add(max(0.0, now - since.get(name, now)), name)
        return [tasks, wait]

    def _work(self) -> list[Family]:
        by = sorted(self._meter.by_namespace.items())

        def counter(name: str, help_: str, of: Callable[[Counts], int]) -> Family:
            family = Family(name, COUNTER, help_, ("namespace",))
            for namespace, counts in by:
                family.add(of(counts), namespace)
            return family

        def outcomes(name: str, help_: str, of: Callable[[Counts], dict[str, int]]) -> Family:
            family = Family(name, COUNTER, help_, ("namespace", "outcome"))
            for namespace, counts in by:
                for outcome, count in sorted(of(counts).items()):
                    family.add(count, namespace, outcome)
            return family

        seconds = Family("baton_run_duration_seconds", HISTOGRAM, "From creation to the end of a run.", ("namespace",))
        for namespace, counts in by:
            seconds.add(counts.seconds, namespace)
        return [
            counter("baton_attempts_placed_total", "Attempts placed on a cluster.", lambda of: of.placed),
            counter("baton_attempts_hedged_total", "Attempts placed as a second copy.", lambda of: of.hedged),
            outcomes("baton_attempts_ended_total", "Attempts that ended, by outcome.", lambda of: of.attempts),
            outcomes("baton_tasks_ended_total", "Tasks that became final, by outcome.", lambda of: of.tasks),
            outcomes("baton_runs_ended_total", "Runs that became final, by outcome.", lambda of: of.runs),
            counter("baton_results_refused_total", "Results whose fence was no longer good.", lambda of: of.refused),
            seconds,
        ]

    # -- of this replica ---------------------------------------------------------------------------------------------------

    def _commits(self) -> list[Family]:
        meter, controller = self._meter, self._replica.controller
        audited = Family(
            "baton_history_runs_audited_total", COUNTER, "Runs in history, by what is proven.", ("verdict",)
        )
        for verdict, count in meter.verdicts.items():
            audited.add(count, verdict.value)
        return [
            audited,
            Family("baton_commit_seconds", HISTOGRAM, "Time of a transaction of the journal.").add(
                meter.commit_seconds
            ),
            Family("baton_commit_bytes", HISTOGRAM, "Bytes of events in a transaction.").add(meter.commit_bytes),
            Family("baton_commit_shards", HISTOGRAM, "Shards in a transaction.").add(meter.commit_shards),
            Family("baton_inbox_dropped_total", COUNTER, "Messages that found a shard's inbox full.").add(
                controller.dropped
            ),
            Family("baton_meter_events_missed_total", COUNTER, "Run events that could not be counted any more.").add(
                meter.events_missed
            ),
            Family("baton_history_runs_checked_total", COUNTER, "Runs that the history checker looked at.").add(
                meter.runs_checked
            ),
            Family("baton_history_runs_unchecked_total", COUNTER, "Runs that the history checker had no time for.").add(
                meter.runs_unchecked
            ),
            Family("baton_overlapping_owners_total", COUNTER, "Placements of a task that had an owner. Must be 0.").add(
                meter.overlapping_owners
            ),
        ]

    def _ownership(self) -> list[Family]:
        replica = self._replica
        return [
            Family("baton_lease_margin_seconds", GAUGE, "How long this replica's lease is still surely good.").add(
                max(0.0, replica.ownership.lease_margin())
            ),
            Family("baton_shards_owned", GAUGE, "Shards this replica owns.").add(len(replica.controller.owned())),
            Family("baton_sessions_served", GAUGE, "Agents that are connected to this replica.").add(
                len(replica.sessions.serving())
            ),
            Family("baton_feature_level", GAUGE, "The federation's feature level, as this replica last read it.").add(
                replica.controller.feature_level
            ),
            Family("baton_restore_suspected", GAUGE, "1 while nothing may be written (restored store).").add(
                int(bool(replica.view.restore_suspected))
            ),
        ]

    # -- by cluster, as last heard -----------------------------------------------------------------------------------------

    def _clusters(self) -> list[Family]:
        view, now = self._replica.view, self._replica.parts.clock.boot()
        label = ("cluster",)
        age = Family(
            "baton_cluster_heartbeat_age_seconds", GAUGE, "Since the last committed heartbeat was heard.", label
        )
        ready = Family("baton_cluster_ready", GAUGE, "1 if the cluster may get work.", label)
        attempts = Family("baton_cluster_attempts", GAUGE, "Attempts queued or running there.", label)
        cpu = Family("baton_cluster_cpu_cores", GAUGE, "CPUs that work may use.", label)
        cpu_used = Family("baton_cluster_cpu_used_cores", GAUGE, "CPUs that attempts hold.", label)
        memory = Family("baton_cluster_memory_bytes", GAUGE, "Memory that work may use.", label)
        memory_used = Family("baton_cluster_memory_used_bytes", GAUGE, "Memory that attempts hold.", label)
        for uid, facts in sorted(view.table.clusters.items(), key=lambda each: each[1].name):
            ready.add(int(facts.health is Health.READY), facts.name)
            beat = view.beats.get(uid)
            if beat is None:
                continue
            age.add(max(0.0, now - beat.seen_boot), facts.name)
            attempts.add(beat.heartbeat.attempts, facts.name)
            cores, cores_free, bytes_, bytes_free = _room(beat)
            cpu.add(cores, facts.name)
            cpu_used.add(max(0.0, cores - cores_free), facts.name)
            memory.add(bytes_, facts.name)
            memory_used.add(max(0, bytes_ - bytes_free), facts.name)
        return [age, ready, attempts, cpu, cpu_used, memory, memory_used]


def _room(beat: Beat) -> tuple[float, float, int, int]:
    """CPUs, free CPUs, memory, free memory of a cluster."""
    shapes = beat.heartbeat.shapes
    return (
        sum(shape.count * shape.total_cpu_millis for shape in shapes) / 1000,
        sum(shape.count * shape.cpu_millis for shape in shapes) / 1000,
        sum(shape.count * shape.total_memory_bytes for shape in shapes),
        sum(shape.count * shape.memory_bytes for shape in shapes),
    )
