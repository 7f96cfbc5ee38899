"""CreateRun: from a request, inline or in pieces, to a committed run (PROTOCOL O8, D1; DESIGN 7).

Theory. The replica that is asked judges the request, gives the run its id and uid, both hashes of what the caller sent, and
resolves a stored graph. So a retry through any replica comes to the same shard and the same uid. The digest is of the request
as the caller meant it, not of what it resolved to: "the newest version" of a retry may be another one, and is the same request.
Then the owner decides, in one batch.

Big graphs are judged and translated off the loop (DESIGN 13), and travel between replicas compressed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from baton import names, validate
from baton.errors import BatonError, FieldViolation, InvalidField, LimitExceeded, NameTaken, RequestIdReused
from baton.names import RunName
from baton.v1 import graph_pb2, run_pb2
from control_plane.core import commands
from control_plane.core.model import shard_of
from control_plane.core.span_model import trace_id_of
from control_plane.peers import CallContext, Calls
from control_plane.services import translate
from control_plane.services.desk import Desk, shard_of_run
from control_plane.services.failures import committed, invalid
from control_plane.services.methods import Asked, check_request_id

CREATE = "/baton.internal/CreateRun"
GET_GRAPH = "/baton.v1.GraphService/GetGraph"

OFF_LOOP_TASKS = 2000
"""Tasks from which a graph is judged and translated in a thread: about 20 ms of work. Smaller ones would pay the thread's hop,
larger ones would hold up every heartbeat of this replica."""

MAX_GRAPH_BYTES = 256 << 20
"""Bytes of all pieces of one graph: 1,000,000 tasks with 256 bytes each. They are in memory at one time."""

MAX_FORWARD_BYTES = 12 << 20
"""Bytes of a compressed graph on its way to the owner: the peer stream takes messages of 16 MiB. Graphs compress ten times and
more, since their tasks are alike."""

ZLIB_LEVEL = 1

MissingCodes = Callable[[str, Sequence[str]], Awaitable[Sequence[str]]]

T = TypeVar("T")


class Creation:
    """Makes runs."""

    def __init__(self, desk: Desk, missing_codes: MissingCodes) -> None:
        """`missing_codes`: which stored code archives of a namespace are not there; it keeps the others for a while."""
        self._desk, self._missing_codes = desk, missing_codes

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(CREATE, self._at_owner)

    async def create_run(
        self, request: run_pb2.CreateRunRequest, asked: Asked
    ) -> AsyncIterator[run_pb2.CreateRunResponse]:
        """RunService.CreateRun."""
        yield run_pb2.CreateRunResponse(run=await self._create(request, asked))

    async def create_run_in_pieces(
        self, pieces: AsyncIterator[run_pb2.CreateRunInPiecesRequest], asked: Asked
    ) -> AsyncIterator[run_pb2.CreateRunInPiecesResponse]:
        """RunService.CreateRunInPieces: nothing is created unless all pieces came. The last one says that it is: a connection that
        breaks can look like the end of the stream."""
        whole: run_pb2.CreateRunRequest | None = None
        size, last = 0, False
        async for piece in pieces:
            if last:
                raise invalid("last", "is set in a piece that is followed by another")
            last = piece.last
            size += piece.ByteSize()
            if whole is None:
                if not piece.HasField("request"):
                    raise invalid("request", "is missing in the first piece")
                whole = piece.request
            elif piece.HasField("request"):
                raise invalid("request", "is set in a later piece: only the first one has it")
            if size > MAX_GRAPH_BYTES:
                raise LimitExceeded(f"the graph holds more than {MAX_GRAPH_BYTES} bytes")
            if len(whole.spec.tasks) + len(piece.tasks) > validate.MAX_TASKS:
                raise LimitExceeded(f"the graph has more than {validate.MAX_TASKS} tasks")
            if piece.tasks:
                whole.spec.tasks.extend(piece.tasks)
        if whole is None:
            raise invalid("request", "is missing: the stream was empty")
        if not last:
            raise invalid("last", "is set in no piece: the stream was cut, and nothing is created")
        yield run_pb2.CreateRunInPiecesResponse(run=await self._create(whole, asked))

    async def _create(self, request: run_pb2.CreateRunRequest, asked: Asked) -> run_pb2.Run:
        """At the replica that was asked."""
        now = self._desk.clock.wall()
        check_request_id(request.request_id, now)
        request.namespace = request.namespace or names.DEFAULT_NAMESPACE
        found = await _maybe_off_loop(request.spec, lambda: validate.request_violations(request, now))
        if found:
            raise invalid_fields(found)
        head = _head(request)
        head["digest"] = await _maybe_off_loop(request.spec, lambda: _digest(request))
        spec = request.spec
        if request.graph:
            graph = await self._stored(request, asked)
            head["graph_version"], spec = graph.version, graph.spec
        await self._check_codes(request.namespace, spec)
        body = await _maybe_off_loop(spec, lambda: zlib.compress(spec.SerializeToString(), ZLIB_LEVEL))
        if len(body) > MAX_FORWARD_BYTES:
            raise LimitExceeded(f"the graph holds {len(body)} bytes after compression, more than {MAX_FORWARD_BYTES}")
        payload = json.dumps(head).encode() + b"\n" + body
        shard = shard_of(request.namespace, head["run_id"])
        return run_pb2.Run.FromString(await self._desk.forwarder.one(shard, CREATE, payload, asked))

    async def _stored(self, request: run_pb2.CreateRunRequest, asked: Asked) -> graph_pb2.Graph:
        """The version of a stored graph. Raises InvalidField, NotFound."""
        name = names.parse_graph(request.graph)
        if name.namespace != request.namespace:
            raise invalid("graph", f"lies in namespace {name.namespace}, the run in {request.namespace}: use one")
        ask = graph_pb2.GetGraphRequest(name=request.graph, version=request.graph_version).SerializeToString()
        answer = await self._desk.forwarder.one(shard_of(name.namespace, ""), GET_GRAPH, ask, asked)
        return graph_pb2.GetGraphResponse.FromString(answer).graph

    async def _check_codes(self, namespace: str, spec: graph_pb2.GraphSpec) -> None:
        """Code that is said to be stored is there, and stays for as long as finished runs do. Raises InvalidField, and as the
        store's gateway."""
        stored = [code.sha256 for code in spec.codes if code.stored]
        if stored and (missing := await self._missing_codes(namespace, stored)):
            position = next(at for at, code in enumerate(spec.codes) if code.sha256 == missing[0])
            text = (
                f"{missing[0]} is not stored in namespace {namespace} (any more): put it first, or run the script again"
            )
            raise invalid(f"spec.codes[{position}]", text)

    async def _at_owner(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """At the owner of the run's shard."""
        desk = self._desk
        ends = desk.clock.boot() + context.timeout
        asked = Asked(CREATE, context.principal, ends, desk.clock, context.shard)
        line, _, body = payload.partition(b"\n")
        head: dict[str, Any] = json.loads(line)
        name = RunName(head["namespace"], head["run_id"])
        if head["named"]:
            past = await desk.archived(name)
            if past is not None:
                yield _repeated(past, head).SerializeToString()
                return
        spec = graph_pb2.GraphSpec.FromString(zlib.decompress(body))
        tasks = await _maybe_off_loop(spec, lambda: translate.graph_tasks(spec))
        command = commands.CreateRun(
            request=commands.Request(head["request_id"], head["digest"]),
            namespace=head["namespace"],
            run_id=head["run_id"],
            run_uid=head["uid"],
            deadline=head["deadline"],
            priority=head["priority"],
            tasks=tasks,
            labels=tuple((key, value) for key, value in head["labels"]),
            annotations=tuple((key, value) for key, value in head["annotations"]),
            graph=head["graph"],
            graph_version=head["graph_version"],
            trace_id=head["trace_id"],
            named=head["named"],
        )
        shard = shard_of_run(name)
        uid = str(await desk.submit(shard, command, asked))
        with committed():
            view = await desk.read(shard, lambda machine: machine.run_by_uid(uid), asked)
            run = translate.run(view, shard) if view is not None else await desk.must_be_archived(name)
        yield run.SerializeToString()


async def _maybe_off_loop(spec: graph_pb2.GraphSpec, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if len(spec.tasks) > OFF_LOOP_TASKS else work()


def invalid_fields(found: list[validate.Violation]) -> BatonError:
    """All that is wrong with a request."""
    first, others = found[0], len(found) - 1
    more = f" (and {others} more)" if others else ""
    return InvalidField(
        f"{first.field}: {first.message}{more}",
        field_violations=[FieldViolation(each.field, each.message) for each in found],
    )


def _head(request: run_pb2.CreateRunRequest) -> dict[str, Any]:
    """What the owner needs beside the graph; ids are hashes of what the caller sent (O8)."""
    run_id = request.run_id or "r" + _hash(8, request.namespace, request.request_id)
    uid = _hash(12, request.namespace, run_id, request.request_id)
    return {
        "namespace": request.namespace,
        "run_id": run_id,
        "named": bool(request.run_id),
        "uid": uid,
        "request_id": request.request_id,
        "deadline": translate.wall_of(request.deadline_time),
        "priority": request.priority,
        "labels": translate.pairs(request.labels),
        "annotations": translate.pairs(request.annotations),
        "graph": request.graph,
        "graph_version": 0,
        # Deterministic (DESIGN 11): a trace can be made from events at any time, and is the same over retries.
        "trace_id": trace_id_of(uid),
    }


def _repeated(past: run_pb2.Run, head: dict[str, Any]) -> run_pb2.Run:
    """The archived run that holds the wanted name, if this request made it. Its digest is gone, so what is left of the wish is
    compared. Raises NameTaken, RequestIdReused."""
    if past.uid != head["uid"]:
        raise NameTaken(f"{past.name} is the name of a finished run; choose another run_id")
    wish = (head["deadline"], head["priority"], head["labels"], head["annotations"], head["graph"])
    had = (
        translate.wall_of(past.deadline_time),
        past.priority,
        [list(pair) for pair in translate.pairs(past.labels)],
        [list(pair) for pair in translate.pairs(past.annotations)],
        past.graph,
    )
    if abs(wish[0] - had[0]) > 1e-3 or wish[1:] != had[1:]:
        raise RequestIdReused("this request_id was used before with another request")
    return past


def _digest(request: run_pb2.CreateRunRequest) -> str:
    """Equal for equal wishes: everything but the id of the intent."""
    request_id, request.request_id = request.request_id, ""
    canonical = request.SerializeToString(deterministic=True)
    request.request_id = request_id
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def _hash(size: int, *parts: str) -> str:
    # Ids hold no line feed, so parts cannot run into each other.
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=size).hexdigest()
