"""GraphService: versions of graphs, kept by the shard of their namespace (PROTOCOL O6, O8)."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import cast

from baton import names, validate
from baton.errors import NotFound
from baton.v1 import graph_pb2
from control_plane.core import commands
from control_plane.core.model import shard_of
from control_plane.core.shard import RunShard
from control_plane.core.views import GraphView
from control_plane.services import pages, translate
from control_plane.services.create import invalid_fields
from control_plane.services.desk import Desk
from control_plane.services.failures import committed, invalid
from control_plane.services.methods import PAGE_BYTES, Asked, check_request_id, page_size


class Graphs:
    """GraphService, at the owner of the namespace's shard."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def put_graph(
        self, request: graph_pb2.PutGraphRequest, asked: Asked
    ) -> AsyncIterator[graph_pb2.PutGraphResponse]:
        """GraphService.PutGraph."""
        request.namespace = request.namespace or names.DEFAULT_NAMESPACE
        shard = shard_of(request.namespace, "")
        command = commands.PutGraph(
            request=commands.Request(request.request_id, _digest(request)),
            namespace=request.namespace,
            graph_id=request.graph_id,
            uid=_uid(request),
            tasks=translate.graph_tasks(request.spec),
            labels=translate.pairs(request.labels),
            annotations=translate.pairs(request.annotations),
            etag=request.etag,
        )
        reply = await self._desk.submit(shard, command, asked)
        _, version = cast(tuple[str, int], reply)
        with committed():
            view = await self._desk.read(
                shard, lambda machine: machine.graph(request.namespace, request.graph_id, version), asked
            )
        if view is None:
            raise NotFound(f"version {version} of graph {request.graph_id} is no longer kept")
        yield graph_pb2.PutGraphResponse(graph=translate.graph(view, with_spec=True))

    async def get_graph(
        self, request: graph_pb2.GetGraphRequest, asked: Asked
    ) -> AsyncIterator[graph_pb2.GetGraphResponse]:
        """GraphService.GetGraph."""
        name = names.parse_graph(request.name)
        view = await self._desk.read(
            shard_of(name.namespace, ""),
            lambda machine: machine.graph(name.namespace, name.graph, request.version),
            asked,
        )
        if view is None:
            raise NotFound(f"there is no {_version(request)} of {name}")
        yield graph_pb2.GetGraphResponse(graph=translate.graph(view, with_spec=True))

    async def list_graphs(
        self, request: graph_pb2.ListGraphsRequest, asked: Asked
    ) -> AsyncIterator[graph_pb2.ListGraphsResponse]:
        """GraphService.ListGraphs."""
        namespace = request.namespace or names.DEFAULT_NAMESPACE
        size = page_size(request.page_size)
        question = pages.filter_hash("graphs", namespace)
        after = pages.read(request.page_token, question)

        def read(machine: RunShard) -> list[GraphView]:
            return [view for view in machine.graphs(namespace) if view.graph_id > after][: size + 1]

        views = await self._desk.read(shard_of(namespace, ""), read, asked)
        response = graph_pb2.ListGraphsResponse()
        used = 0
        last = ""
        for place, view in enumerate(views):
            graph = translate.graph(view, with_spec=False)
            used += graph.ByteSize()
            if place >= size or (place and used > PAGE_BYTES):
                response.next_page_token = pages.write(last, question)
                break
            response.graphs.append(graph)
            last = view.graph_id
        yield response


def shard_of_request(request: graph_pb2.PutGraphRequest | graph_pb2.ListGraphsRequest) -> str:
    """The shard of the namespace (O6)."""
    return shard_of(request.namespace or names.DEFAULT_NAMESPACE, "")


def shard_of_name(request: graph_pb2.GetGraphRequest) -> str:
    """The shard of the namespace in a name (O6)."""
    return shard_of(names.parse_graph(request.name).namespace, "")


def check_put(request: graph_pb2.PutGraphRequest, now: float) -> None:
    """A graph to be stored. Raises InvalidField, RequestIdAhead."""
    check_request_id(request.request_id, now)
    if request.namespace and (problem := names.id_problem(request.namespace)):
        raise invalid("namespace", problem)
    if problem := names.id_problem(request.graph_id):
        raise invalid("graph_id", problem)
    if found := names.labels_problem(dict(request.labels)):
        raise invalid(f'labels["{found[0]}"]' if found[0] else "labels", found[1])
    if found := names.annotations_problem(dict(request.annotations)):
        raise invalid(f'annotations["{found[0]}"]' if found[0] else "annotations", found[1])
    if faults := validate.violations(request.spec):
        raise invalid_fields(faults)


def check_get(request: graph_pb2.GetGraphRequest, _now: float) -> None:
    """The name of a graph. Raises InvalidField."""
    try:
        names.parse_graph(request.name)
    except names.InvalidName as error:
        raise invalid("name", str(error)) from None
    if request.version < 0:
        raise invalid("version", "is negative: use 0 for the newest")


def check_list(request: graph_pb2.ListGraphsRequest, _now: float) -> None:
    """A list of graphs. Raises InvalidField."""
    if request.namespace and (problem := names.id_problem(request.namespace)):
        raise invalid("namespace", problem)
    page_size(request.page_size)
    pages.read(request.page_token, pages.filter_hash("graphs", request.namespace or names.DEFAULT_NAMESPACE))


def _version(request: graph_pb2.GetGraphRequest) -> str:
    return f"version {request.version}" if request.version else "version"


def _uid(request: graph_pb2.PutGraphRequest) -> str:
    """Used if the graph is new; a retry comes to the same (O8)."""
    text = f"{request.namespace}\n{request.graph_id}\n{request.request_id}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _digest(request: graph_pb2.PutGraphRequest) -> str:
    request_id, request.request_id = request.request_id, ""
    canonical = request.SerializeToString(deterministic=True)
    request.request_id = request_id
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()
