"""A replica's web port: metrics, health, and traces for people and for Grafana.

| path | answer |
|---|---|
| `/metrics` | Prometheus text |
| `/healthz` | 200 while the replica takes part and its lease is good, else 503 |
| `/api/traces/{trace id or run uid}` | the shape of Jaeger's query API |
| `/trace/{namespace}/{run}` | a waterfall, one file, nothing loaded from anywhere |

It knows no callers, so whoever reaches it may read runs' names and times: it is for loopback, or for a network that is trusted.
"""

from __future__ import annotations

import asyncio
import json

from baton import traces
from baton.errors import BatonError
from baton.names import InvalidName, RunName, parse_run
from baton.telemetry import exposition
from baton.v1 import trace_pb2
from baton.webport import HTML, JSON, Answer
from control_plane.metrics import ReplicaMetrics
from control_plane.replica import Replica
from control_plane.services.failures import explain
from control_plane.services.methods import Asked
from control_plane.trace_page import page

ASK_SECONDS = 20.0
"""For a trace, wherever it has to be fetched from."""


class Web:
    """The routes of one replica."""

    def __init__(self, replica: Replica, metrics: ReplicaMetrics) -> None:
        self._replica, self._metrics = replica, metrics

    async def route(self, path: str) -> Answer | None:
        """See `webport.Route`."""
        if path == "/healthz":
            good = self._replica.running and self._replica.ownership.lease_good()
            return Answer(b"ok\n" if good else b"the lease is not good\n", status=200 if good else 503)
        if not self._replica.running:
            return Answer(b"the replica has not joined the federation yet\n", status=503)
        if path == "/metrics":
            families = await self._metrics.families()
            return Answer(*await asyncio.to_thread(exposition, families))
        if path.startswith("/api/traces/"):
            return await self._jaeger(path.removeprefix("/api/traces/"))
        if path.startswith("/trace/"):
            return await self._page(path.removeprefix("/trace/"))
        return None

    async def _jaeger(self, id_: str) -> Answer:
        asked = self._asked()
        try:
            found = self._replica.services.traces
            spans = await found.trace(await found.find(id_, asked), asked)
        except BatonError as error:
            return _failed(error, jaeger=True)
        return Answer(await asyncio.to_thread(_jaeger_json, spans), JSON)

    async def _page(self, rest: str) -> Answer | None:
        namespace, _, run = rest.partition("/")
        try:
            name: RunName = parse_run(f"namespaces/{namespace}/runs/{run}")
        except InvalidName:
            return None
        try:
            spans = await self._replica.services.traces.trace(name, self._asked())
        except BatonError as error:
            return _failed(error, jaeger=False)
        return Answer(await asyncio.to_thread(page, str(name), spans), HTML)

    def _asked(self) -> Asked:
        clock = self._replica.parts.clock
        return Asked("web", "web", clock.boot() + ASK_SECONDS, clock)


def _jaeger_json(spans: list[trace_pb2.Span]) -> bytes:
    return json.dumps(traces.jaeger(spans), separators=(",", ":")).encode()


def _failed(error: BatonError, *, jaeger: bool) -> Answer:
    told = explain(error, lambda: "web")
    status = 404 if told.reason == "NOT_FOUND" else 400 if told.reason == "INVALID_FIELD" else 503
    if not jaeger:
        return Answer(f"{told}\n".encode(), status=status)
    body = {"data": None, "total": 0, "limit": 0, "offset": 0, "errors": [{"code": status, "msg": str(told)}]}
    return Answer(json.dumps(body).encode(), JSON, status)
