"""ClusterService, at the owner of the fleet shard: the one writer of clusters and verdicts (PROTOCOL O6, S3, O8).

What fleet has committed comes from its machine; free room, the serving replica and the last heartbeat come from the view, which
may be a moment late.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

from baton import names
from baton.errors import NotFound
from baton.v1 import cluster_pb2
from control_plane.core import commands
from control_plane.core.fleet import Fleet
from control_plane.core.model import FLEET, Admission, ClusterFacts, FleetTable
from control_plane.services import pages, translate
from control_plane.services.desk import Desk
from control_plane.services.failures import committed, invalid
from control_plane.services.methods import PAGE_BYTES, Asked, check_request_id, page_size

QUESTION = pages.filter_hash("clusters")

Change = cluster_pb2.CordonClusterRequest | cluster_pb2.UncordonClusterRequest | cluster_pb2.DrainClusterRequest


class Clusters:
    """ClusterService."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list_clusters(
        self, request: cluster_pb2.ListClustersRequest, asked: Asked
    ) -> AsyncIterator[cluster_pb2.ListClustersResponse]:
        """ClusterService.ListClusters."""
        size = page_size(request.page_size)
        after = pages.read(request.page_token, QUESTION)
        facts = sorted((await self._table(asked)).clusters.values(), key=lambda each: each.name)
        response = cluster_pb2.ListClustersResponse()
        used, last = 0, ""
        for each in (each for each in facts if each.name > after):
            cluster = self._cluster(each)
            used += cluster.ByteSize()
            if response.clusters and (len(response.clusters) >= size or used > PAGE_BYTES):
                response.next_page_token = pages.write(last, QUESTION)
                break
            response.clusters.append(cluster)
            last = each.name
        yield response

    async def get_cluster(
        self, request: cluster_pb2.GetClusterRequest, asked: Asked
    ) -> AsyncIterator[cluster_pb2.GetClusterResponse]:
        """ClusterService.GetCluster."""
        yield cluster_pb2.GetClusterResponse(cluster=await self._find(request.name, asked))

    async def cordon_cluster(
        self, request: cluster_pb2.CordonClusterRequest, asked: Asked
    ) -> AsyncIterator[cluster_pb2.CordonClusterResponse]:
        """ClusterService.CordonCluster."""
        yield cluster_pb2.CordonClusterResponse(cluster=await self._set(request, Admission.CORDONED, asked))

    async def uncordon_cluster(
        self, request: cluster_pb2.UncordonClusterRequest, asked: Asked
    ) -> AsyncIterator[cluster_pb2.UncordonClusterResponse]:
        """ClusterService.UncordonCluster."""
        yield cluster_pb2.UncordonClusterResponse(cluster=await self._set(request, Admission.OPEN, asked))

    async def drain_cluster(
        self, request: cluster_pb2.DrainClusterRequest, asked: Asked
    ) -> AsyncIterator[cluster_pb2.DrainClusterResponse]:
        """ClusterService.DrainCluster."""
        yield cluster_pb2.DrainClusterResponse(cluster=await self._set(request, Admission.DRAINING, asked))

    async def _set(self, request: Change, admission: Admission, asked: Asked) -> cluster_pb2.Cluster:
        name = names.parse_cluster(request.name).cluster
        digest = hashlib.blake2b(f"{admission.name}\n{name}".encode(), digest_size=16).hexdigest()
        ask = commands.Request(request.request_id, digest)
        await self._desk.submit(FLEET, commands.SetAdmission(ask, name, admission), asked)
        with committed():
            return await self._find(request.name, asked)

    async def _find(self, full_name: str, asked: Asked) -> cluster_pb2.Cluster:
        name = names.parse_cluster(full_name).cluster
        for facts in (await self._table(asked)).clusters.values():
            if facts.name == name:
                return self._cluster(facts)
        raise NotFound(f"there is no cluster {name}")

    async def _table(self, asked: Asked) -> FleetTable:
        def question(machine: Fleet) -> FleetTable:
            return machine.table()

        table: FleetTable = await self._desk.controller.read(FLEET, question, timeout=asked.left())
        return table

    def _cluster(self, facts: ClusterFacts) -> cluster_pb2.Cluster:
        view, clock = self._desk.view, self._desk.clock
        message = cluster_pb2.Cluster(
            name=f"clusters/{facts.name}",
            uid=facts.uid,
            generation=facts.generation,
            health=int(facts.health),  # type: ignore[arg-type]  # equal numbers, by contract of core.model
            admission=int(facts.admission),  # type: ignore[arg-type]  # as above
            labels=dict(facts.labels),
            taints=facts.taints,
            isolation=facts.isolation,
            orphan_killer=facts.orphan_killer,
            profile=facts.profile,
            create_time=translate.timestamp(facts.create_wall),
            agent_version=facts.agent_version,
        )
        session, beat = view.sessions.get(facts.uid), view.beats.get(facts.uid)
        if session is not None and not session.ended:
            message.replica = session.replica
        if beat is not None:
            message.shapes.extend(beat.heartbeat.shapes)
            message.attempts = beat.heartbeat.attempts
            heard = translate.timestamp(clock.wall() - (clock.boot() - beat.seen_boot))
            if heard is not None:
                message.heartbeat_time.CopyFrom(heard)
        return message


def at_fleet(_request: Any) -> str:
    """All of it belongs to fleet."""
    return FLEET


def check_get(request: cluster_pb2.GetClusterRequest, _now: float) -> None:
    """The name of a cluster. Raises InvalidField."""
    _check_name(request.name)


def check_change(request: Change, now: float) -> None:
    """A change of admission. Raises InvalidField, RequestIdAhead."""
    check_request_id(request.request_id, now)
    _check_name(request.name)


def check_list(request: cluster_pb2.ListClustersRequest, _now: float) -> None:
    """A list of clusters. Raises InvalidField."""
    page_size(request.page_size)
    pages.read(request.page_token, QUESTION)


def _check_name(name: str) -> None:
    try:
        names.parse_cluster(name)
    except names.InvalidName as error:
        raise invalid("name", str(error)) from None
