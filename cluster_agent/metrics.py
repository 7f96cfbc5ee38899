"""An agent's metrics and health, made when they are asked for: docs/metrics.md says what each one means.

Nothing is counted per task: attempts, lease and link are read from the machine's state at scrape time. The library of Prometheus
is loaded at the first scrape.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter

from baton.clock import Clock
from baton.telemetry import COUNTER, GAUGE, Family, exposition
from baton.webport import Answer, WebPort, check_address
from cluster_agent.agent import Agent
from cluster_agent.carrying.tally import Tally
from cluster_agent.config import AgentConfig
from cluster_agent.core.model import Phase
from cluster_agent.executors.base import Executor
from cluster_agent.reconciler import Reconciler

log = logging.getLogger("baton.agent")


def families(cluster: str, reconciler: Reconciler, executor: Executor, now: float) -> list[Family]:
    """What there is at boot time `now`; every sample carries the cluster's name."""
    machine, label = reconciler.machine, ("cluster",)
    link = machine.link
    margin = max(0.0, link.renewed_at + link.fence_seconds - now) if link.renewed_at is not None else 0.0

    def gauge(name: str, help_: str, value: float) -> Family:
        return Family(name, GAUGE, help_, label).add(value, cluster)

    attempts = Family("baton_agent_attempts", GAUGE, "Attempts held here, by phase.", ("cluster", "phase"))
    phases = Counter(attempt.phase for attempt in machine.state.attempts.values())
    for phase in Phase:
        attempts.add(phases[phase], cluster, phase.value)
    found = [
        attempts,
        gauge("baton_agent_session_up", "1 while owners' messages count and reports may leave.", int(link.ready)),
        gauge(
            "baton_agent_lease_margin_seconds", "How long work may go on if no heartbeat is answered any more.", margin
        ),
        gauge(
            "baton_agent_heartbeat_seconds", "Round trip of the last answered heartbeat.", reconciler.heartbeat_seconds
        ),
        Family("baton_agent_journal_errors_total", COUNTER, "Writes that the disk refused.", label).add(
            reconciler.journal_errors, cluster
        ),
        Family(
            "baton_agent_handed_back_total", COUNTER, "Attempts that waited here too long and went back.", label
        ).add(machine.handed_back, cluster),
    ]
    ticked = executor.ticked_at()
    if ticked > 0:
        found.append(gauge("baton_agent_guard_tick_age_seconds", "Since the guard's last sign of life.", now - ticked))
    return found


def carried(cluster: str, tally: Tally) -> list[Family]:
    """What files cost: content that went to the artifact store and came from it."""

    def counter(name: str, help_: str, *values: tuple[float, str]) -> Family:
        family = Family(name, COUNTER, help_, ("cluster", "way"))
        for value, way in values:
            family.add(value, cluster, way)
        return family

    moved = ((tally.bytes_up, "up"), (tally.bytes_down, "down"))
    failed = ((tally.failures_up, "up"), (tally.failures_down, "down"))
    return [
        counter(
            "baton_agent_artifact_bytes_total", "Content of artifacts, checkpoints and code that was moved.", *moved
        ),
        counter("baton_agent_artifact_failures_total", "Attempts whose files could not be moved.", *failed),
        Family("baton_agent_artifact_cache_hits_total", COUNTER, "Artifacts that were here already.", ("cluster",)).add(
            tally.cached, cluster
        ),
    ]


class AgentPage:
    """The web port of one agent."""

    def __init__(
        self, config: AgentConfig, agent: Agent, executor: Executor, clock: Clock, tally: Tally | None = None
    ) -> None:
        self._config, self._agent, self._executor, self._clock = config, agent, executor, clock
        self._tally = tally or Tally()
        self._port: WebPort | None = None

    async def start(self) -> None:
        """Listen, if the configuration says so. Raises OSError."""
        config = self._config
        if not config.metrics_listen:
            return
        self._port = WebPort(self.route)
        await self._port.start(*check_address(config.metrics_listen, anywhere=config.metrics_anywhere))
        log.info("Metrics are served.", extra={"address": self._port.address})
        if config.metrics_port_file is not None:
            whole = config.metrics_port_file.with_name(f"{config.metrics_port_file.name}.{os.getpid()}")
            whole.write_text(f"{self._port.address}\n", encoding="ascii")
            whole.replace(config.metrics_port_file)

    async def close(self) -> None:
        """End."""
        if self._port is not None:
            await self._port.close()

    async def route(self, path: str) -> Answer | None:
        """See `webport.Route`. Healthy: owners' messages count."""
        reconciler = self._agent.reconciler
        if path == "/healthz":
            good = reconciler is not None and reconciler.machine.link.ready
            return Answer(b"ok\n" if good else b"there is no session\n", status=200 if good else 503)
        if path != "/metrics":
            return None
        if reconciler is None:
            return Answer(b"the agent starts\n", status=503)
        found = families(self._config.cluster, reconciler, self._executor, self._clock.boot())
        found += carried(self._config.cluster, self._tally)
        return Answer(*await asyncio.to_thread(exposition, found))
