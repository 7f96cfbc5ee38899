"""How one replica is seen from outside, wired: its meter, its web port, its exporter of spans.

Part of the composition root. The library of OpenTelemetry is loaded only where spans are exported, that of Prometheus at the
first scrape: together they cost a process 10 MB and the better part of a second. A web port that cannot be had ends the start;
later failures of anything here end nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from baton.clock import SystemClock
from baton.telemetry import COUNTER, Family
from baton.webport import WebPort
from control_plane.config import Config, split_address
from control_plane.history import Archive
from control_plane.meter import Meter
from control_plane.metrics import ReplicaMetrics
from control_plane.replica import Replica
from control_plane.server import GrpcServer
from control_plane.services.trace import record_of, spans_of
from control_plane.web import Web

if TYPE_CHECKING:
    from baton.telemetry.otlp import SpanSender

log = logging.getLogger(__name__)

REMEMBERED = 1024
"""Runs exported lately: an archiving that is repeated is not exported again by this replica."""


def write_port(path: Path, address: str) -> None:
    """Write host:port so that whoever sees the file sees it whole."""
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(f"{address}\n", encoding="ascii")
    whole.replace(path)


class Observing:
    """`meter` and `archived` go into the replica's parts; `start` when it is wired."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.meter = Meter(SystemClock()) if config.metrics_listen else None
        self._export = Exporting(config.otlp_endpoint) if config.otlp_endpoint else None
        self.archived: Callable[[Archive], None] | None = self._export.archived if self._export else None
        self._port: WebPort | None = None

    async def start(self, replica: Replica, server: GrpcServer) -> None:
        """Listen. Raises OSError."""
        config = self._config
        if self.meter is None:
            return
        metrics = ReplicaMetrics(replica, self.meter, partial(self._more, server))
        self._port = WebPort(Web(replica, metrics).route)
        await self._port.start(*split_address(config.metrics_listen, "metrics_listen", port_zero=True))
        log.info("serving metrics", extra={"address": self._port.address})
        if config.metrics_port_file is not None:
            write_port(config.metrics_port_file, self._port.address)

    async def close(self) -> None:
        """End the port and the exporter; what waits to be exported is dropped."""
        if self._port is not None:
            await self._port.close()
        if self._export is not None:
            await asyncio.to_thread(self._export.close)
        if self._config.metrics_port_file is not None:
            self._config.metrics_port_file.unlink(missing_ok=True)

    def _more(self, server: GrpcServer) -> Iterable[Family]:
        dropped = "Messages to other replicas that found their queue full."
        families = [Family("baton_peer_dropped_total", COUNTER, dropped).add(server.dropped_messages)]
        return families + (self._export.families() if self._export is not None else no_export())


class Exporting:
    """Finished runs' spans to a collector."""

    def __init__(self, endpoint: str) -> None:
        from baton.telemetry.otlp import otlp_sender  # noqa: PLC0415 - see the module

        self._sender: SpanSender = otlp_sender(endpoint)
        self._seen: OrderedDict[str, None] = OrderedDict()

    def archived(self, archive: Archive) -> None:
        """A run is in history: its spans leave some time."""
        if archive.run.uid in self._seen:
            return
        self._seen[archive.run.uid] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self._sender.offer(lambda: spans_of(record_of(archive)), archive.run.task_count)

    def close(self) -> None:
        """Blocks a moment."""
        self._sender.close()

    def families(self) -> list[Family]:
        """What became of what was offered."""
        sender = self._sender
        return _export_families(sender.sent_spans, sender.failed_runs, sender.dropped_runs)


def no_export() -> list[Family]:
    """The same families where nothing is exported: a series that is absent cannot be alerted on."""
    return _export_families(0, 0, 0)


def _export_families(sent: int, failed: int, dropped: int) -> list[Family]:
    return [
        Family("baton_otlp_spans_sent_total", COUNTER, "Spans that the collector took.").add(sent),
        Family("baton_otlp_runs_failed_total", COUNTER, "Runs whose spans the collector did not take.").add(failed),
        Family("baton_otlp_runs_dropped_total", COUNTER, "Runs that found the exporter's queue full.").add(dropped),
    ]
