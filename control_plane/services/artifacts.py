"""ArtifactService: content through the control plane (PROTOCOL F1, F2, O5; DESIGN 10).

Theory. Every replica reaches the same object store, so content is never forwarded: the replica that is asked carries it. What is
asked elsewhere is truth. A user reads what a commit published, so the owner of the run says whether and under which digest it
was. An agent reads what a dispatch told it, and proves it by the digest that came with it; here only the namespace is judged.
An agent writes under the uid of its own cluster only, and the path it writes to holds its attempt's number and nonce, so what it
writes is nobody else's, and means nothing until a commit names it.

The sweeper asks here which runs exist: live ones first, then history, so that none is missed on its way (J10).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from baton import names
from baton.artifact_wire import chunk_from, chunk_message, ref_of
from baton.artifacts import RESULT, Chunk, attempt_folder, checkpoint_number, name_problem
from baton.errors import BatonError, Denied, NotFound, NotOwned, TimedOut, WrongState
from baton.v1 import agent_pb2, artifact_pb2, run_pb2
from control_plane.agent_codec import artifact_source
from control_plane.artifacts.gateway import PACK, Gateway, code_folder
from control_plane.core.model import RUN_SHARDS, ClusterFacts
from control_plane.core.shard import RunShard
from control_plane.peers import CallContext, Calls
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import invalid
from control_plane.services.identity import Role
from control_plane.services.methods import Asked, decode

log = logging.getLogger(__name__)

LIVE = "/baton.internal/LiveRuns"
CHECKPOINT = "/baton.internal/Checkpoint"
GET_TASK = "/baton.v1.RunService/GetTask"

FOUND_RUNS = 10_000
"""Runs whose shard is remembered, about 1 MB; a forgotten one costs a question to every shard."""

UNKNOWN_CLUSTER_AGAIN = 0.5
"""Seconds after which the agent of a cluster that this replica has not heard of should come back."""

_UID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Artifacts:
    """The service. `gateway` is None where the operator gave no object store."""

    def __init__(self, desk: Desk, gateway: Gateway | None) -> None:
        self._desk, self._gateway = desk, gateway
        self._shards: OrderedDict[str, str] = OrderedDict()
        """Uid of a run -> its shard."""

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(LIVE, self._live_here)
        calls.register(CHECKPOINT, self._checkpoint_here)

    # -- putting -----------------------------------------------------------------------------------------------------------

    async def put_artifact(
        self, pieces: AsyncIterator[artifact_pb2.PutArtifactRequest], asked: Asked
    ) -> AsyncIterator[artifact_pb2.PutArtifactResponse]:
        """ArtifactService.PutArtifact, at the replica that was asked."""
        first = await anext(pieces, None)
        gateway = self._configured()
        if first is None or not first.HasField("header"):
            raise invalid("header", "is missing: the first message says what is put")
        header = first.header
        if problem := names.id_problem(header.namespace):
            raise invalid("header.namespace", problem)
        chunks = _chunks(pieces, asked)
        if header.code_sha256:
            _check_sha256(header.code_sha256, "header.code_sha256")
            if asked.caller.role is Role.AGENT:
                raise Denied(f"{asked.principal} may not store code: it fetches what a dispatch names")
            manifest = await gateway.put_code(header.namespace, header.code_sha256, chunks)
            ref = agent_pb2.ArtifactRef(
                name=header.code_sha256, size=manifest.size, digest=bytes.fromhex(header.code_sha256)
            )
            yield artifact_pb2.PutArtifactResponse(artifact=ref)
            return
        if problem := name_problem(header.name):
            raise invalid("header.name", problem)
        self._check_writer(header, asked)
        folder = _folder(header.namespace, header.attempt, header.cluster_uid, "header")
        manifest = await gateway.put(folder, header.name, chunks)
        if checkpoint_number(header.name) > 2:
            await self._drop_old(gateway, folder, header.attempt, asked)
        yield artifact_pb2.PutArtifactResponse(artifact=ref_of(header.name, manifest))

    def _check_writer(self, header: artifact_pb2.PutArtifactHeader, asked: Asked) -> None:
        """Only the agent of the attempt's own cluster (F1). On loopback there is nobody to tell apart. Raises Denied, NotOwned."""
        if asked.caller.role is Role.LOCAL:
            return
        if asked.caller.role is not Role.AGENT or self._cluster_of(asked).uid != header.cluster_uid:
            raise Denied(
                f"{asked.principal} may not write artifacts of cluster {header.cluster_uid}: it is not its agent"
            )
        self._check_serves(header.namespace, asked)

    def _check_serves(self, namespace: str, asked: Asked) -> None:
        """A cluster touches only namespaces that it may serve. Raises Denied, NotOwned."""
        allowed = self._cluster_of(asked).namespaces if asked.caller.role is Role.AGENT else ("",)
        if allowed and namespace not in allowed:
            raise Denied(f"{asked.principal} serves no work of namespace {namespace}")

    def _cluster_of(self, asked: Asked) -> ClusterFacts:
        """The cluster of an agent. Raises NotOwned while this replica has not heard of it: a view may be late, so that is no
        denial."""
        uid = self._desk.cluster_uid(asked.caller.name)
        if uid is None:
            raise NotOwned(f"cluster {asked.caller.name} is not known here yet", retry_after=UNKNOWN_CLUSTER_AGAIN)
        return self._desk.view.table.clusters[uid]

    async def _drop_old(self, gateway: Gateway, folder: str, attempt: agent_pb2.AttemptRef, asked: Asked) -> None:
        """Delete what the attempt's last committed checkpoint has replaced. The commit decides, not the order of uploads: a
        checkpoint that comes late from an attempt which is not live any more replaces nothing. One older is kept, for whoever
        reads it right now."""
        try:
            shard = await self._shard_of(attempt.run_uid, asked)
            if shard is None:
                return
            payload = attempt.SerializeToString()
            answer = await self._desk.forwarder.one(shard, CHECKPOINT, payload, asked)
            committed = agent_pb2.ArtifactSource.FromString(answer)
            if committed.attempt == attempt:
                await gateway.drop_checkpoints(folder, checkpoint_number(committed.artifact.name) - 1)
        except BatonError as error:
            log.info("old checkpoints stay for now", extra={"run": attempt.run_uid, "error": error.message})

    # -- getting -----------------------------------------------------------------------------------------------------------

    async def get_artifact(
        self, request: artifact_pb2.GetArtifactRequest, asked: Asked
    ) -> AsyncIterator[artifact_pb2.GetArtifactResponse]:
        """ArtifactService.GetArtifact, at the replica that was asked."""
        gateway = self._configured()
        match request.WhichOneof("which"):
            case "published":
                if asked.caller.role is Role.AGENT:
                    raise Denied(f"{asked.principal} reads artifacts by the source that a dispatch told it")
                source = await self._published(request.published, asked)
            case "source":
                source = request.source
                if asked.caller.role is not Role.LOCAL:
                    self._check_serves(source.namespace, asked)
            case _:
                async with aclosing(self._code(gateway, request, asked)) as answers:  # type: ignore[type-var]
                    async for answer in answers:
                        yield answer
                return
        folder = _folder(source.namespace, source.attempt, source.cluster_uid, "source")
        ref = source.artifact
        manifest = await gateway.manifest(folder, ref.name, ref.digest)
        if manifest is None:
            raise NotFound(f"artifact {ref.name} is not in the store of this federation (any more)")
        yield artifact_pb2.GetArtifactResponse(artifact=ref, manifest=manifest.encode())
        async with aclosing(gateway.chunks(folder, ref.name, manifest, request.first_chunk)) as chunks:
            async for chunk in chunks:
                _check_time(asked)
                yield artifact_pb2.GetArtifactResponse(chunk=chunk_message(chunk))

    async def _code(
        self, gateway: Gateway, request: artifact_pb2.GetArtifactRequest, asked: Asked
    ) -> AsyncIterator[artifact_pb2.GetArtifactResponse]:
        namespace, sha256 = request.code.namespace, request.code.sha256
        if asked.caller.role is Role.AGENT:
            self._check_serves(namespace, asked)
        folder = code_folder(namespace, sha256)
        manifest = await gateway.manifest(folder, PACK) if await gateway.has_code(namespace, sha256) else None
        if manifest is None:
            raise NotFound(f"code {sha256} is not stored in namespace {namespace} (any more): run the script again")
        ref = agent_pb2.ArtifactRef(name=sha256, size=manifest.size, digest=bytes.fromhex(sha256))
        yield artifact_pb2.GetArtifactResponse(artifact=ref, manifest=manifest.encode())
        async with aclosing(gateway.chunks(folder, PACK, manifest, request.first_chunk)) as chunks:
            async for chunk in chunks:
                _check_time(asked)
                yield artifact_pb2.GetArtifactResponse(chunk=chunk_message(chunk))

    async def has_code(
        self, request: artifact_pb2.HasCodeRequest, _asked: Asked
    ) -> AsyncIterator[artifact_pb2.HasCodeResponse]:
        """ArtifactService.HasCode, at the replica that was asked."""
        stored = await self._configured().has_code(request.namespace, request.sha256)
        yield artifact_pb2.HasCodeResponse(stored=stored)

    async def _published(self, wanted: artifact_pb2.PublishedArtifact, asked: Asked) -> agent_pb2.ArtifactSource:
        """What the owner of the run, or history, says was published under that name. Raises NotFound."""
        run = names.parse_run(wanted.run)
        task = names.TaskName(run.namespace, run.run, wanted.task)
        ask = run_pb2.GetTaskRequest(name=str(task)).SerializeToString()
        answer = await self._desk.forwarder.one(shard_of_run(run), GET_TASK, ask, asked)
        status = run_pb2.GetTaskResponse.FromString(answer).task
        for source in status.artifacts:
            if source.artifact.name == wanted.name:
                return source
        known = ", ".join(source.artifact.name for source in status.artifacts) or "none"
        inline = "; its result is inline: read it with the task" if wanted.name == RESULT and status.result else ""
        raise NotFound(f"{task} has published no artifact {wanted.name} (published: {known}){inline}")

    # -- what creating a run wants to know ---------------------------------------------------------------------------------

    async def missing_codes(self, namespace: str, hashes: Sequence[str]) -> list[str]:
        """Those code archives that are not stored; the others are kept for another while. Raises BatonError."""
        gateway = self._configured()
        return [sha256 for sha256 in hashes if not await gateway.has_code(namespace, sha256)]

    # -- which runs exist --------------------------------------------------------------------------------------------------

    async def known(self, uids: Sequence[str], seconds: float) -> set[str]:
        """Those of `uids` that are runs, live or finished. Raises BatonError if any shard, or history, does not say."""
        clock = self._desk.clock
        asked = Asked(LIVE, "sweeper", clock.boot() + seconds, clock)
        payload = json.dumps(list(uids)).encode()
        answers = await asyncio.gather(
            *(self._desk.forwarder.one(shard, LIVE, payload, asked) for shard in RUN_SHARDS), return_exceptions=True
        )
        found: set[str] = set()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            found.update(json.loads(answer))
        for uid in uids:
            if uid not in found and await from_history(self._desk.history.by_uid(uid)) is not None:
                found.add(uid)
        return found

    async def _shard_of(self, uid: str, asked: Asked) -> str | None:
        """The shard of a live run; None if no shard that answers has it."""
        if (shard := self._shards.get(uid)) is not None:
            self._shards.move_to_end(uid)
            return shard
        payload = json.dumps([uid]).encode()
        answers = await asyncio.gather(
            *(self._desk.forwarder.one(shard, LIVE, payload, asked) for shard in RUN_SHARDS), return_exceptions=True
        )
        for shard, answer in zip(RUN_SHARDS, answers, strict=True):
            if isinstance(answer, bytes) and json.loads(answer):
                self._shards[uid] = shard
                while len(self._shards) > FOUND_RUNS:
                    self._shards.popitem(last=False)
                return shard
        return None

    async def _live_here(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """At the owner of a shard: which of these runs it holds."""
        uids: list[str] = json.loads(payload)

        def question(machine: RunShard) -> list[str]:
            return [uid for uid in uids if machine.run_by_uid(uid) is not None]

        yield json.dumps(await self._desk.read(context.shard, question, self._internal(LIVE, context))).encode()

    async def _checkpoint_here(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """At the owner of a run's shard: the last committed checkpoint of a task; empty if it has none."""
        attempt = decode(agent_pb2.AttemptRef, payload)
        asked = self._internal(CHECKPOINT, context)
        task = await self._desk.read(context.shard, lambda m: m.task_at(attempt.run_uid, attempt.task), asked)
        last = artifact_source(task.checkpoint) if task is not None and task.checkpoint is not None else None
        yield (last or agent_pb2.ArtifactSource()).SerializeToString()

    def _internal(self, method: str, context: CallContext) -> Asked:
        clock = self._desk.clock
        return Asked(method, context.principal, clock.boot() + context.timeout, clock, context.shard)

    def _configured(self) -> Gateway:
        """Raises WrongState."""
        if self._gateway is None:
            raise WrongState(
                "this federation has no artifact store: its operator has to start the replicas with --artifacts"
            )
        return self._gateway


async def _chunks(pieces: AsyncIterator[artifact_pb2.PutArtifactRequest], asked: Asked) -> AsyncIterator[Chunk]:
    """The chunks of an upload, up to the message that ends it: a connection that breaks can look like the end of the stream, and half
    an artifact would be stored as a whole one. Raises InvalidField, TimedOut."""
    count = 0
    async for piece in pieces:
        if piece.HasField("end"):
            if piece.end.chunks != count:
                raise invalid("end.chunks", f"is {piece.end.chunks}, but {count} came")
            return
        if not piece.HasField("chunk"):
            raise invalid("chunk", "is missing: only the first message is the header")
        _check_time(asked)
        yield chunk_from(piece.chunk)
        count += 1
    raise invalid("end", f"is missing after {count} chunks: the stream was cut, and nothing is stored")


def _check_time(asked: Asked) -> None:
    if asked.over:
        raise TimedOut("the call's time ran out during the transfer; what is missing can be asked for again")


def _check_sha256(text: str, field: str) -> None:
    if not _SHA256.fullmatch(text):
        raise invalid(field, "is not a sha-256 in lower-case hex")


def _folder(namespace: str, attempt: agent_pb2.AttemptRef, cluster: str, field: str) -> str:
    """An attempt's folder, of parts that cannot name another (F1). Raises InvalidField."""
    for part, text in (
        ("attempt.run_uid", attempt.run_uid),
        ("attempt.nonce", attempt.nonce),
        ("cluster_uid", cluster),
    ):
        if not _UID.fullmatch(text):
            raise invalid(f"{field}.{part}", "is no id of this federation")
    if attempt.task < 0 or attempt.n < 1:
        raise invalid(f"{field}.attempt", "names no attempt: tasks count from 0, attempts from 1")
    return attempt_folder(
        namespace=namespace, run=attempt.run_uid, task=attempt.task, n=attempt.n, nonce=attempt.nonce, cluster=cluster
    )


def check_get(request: artifact_pb2.GetArtifactRequest, _now: float) -> None:
    """A request for content. Raises InvalidField."""
    if request.first_chunk < 0:
        raise invalid("first_chunk", f"is {request.first_chunk}: use 0 for the beginning")
    match request.WhichOneof("which"):
        case "published":
            _check_run(request.published.run, "published.run")
            if problem := names.task_id_problem(request.published.task):
                raise invalid("published.task", problem)
            if problem := name_problem(request.published.name):
                raise invalid("published.name", problem)
        case "source":
            source = request.source
            if problem := names.id_problem(source.namespace):
                raise invalid("source.namespace", problem)
            if problem := name_problem(source.artifact.name):
                raise invalid("source.artifact.name", problem)
            if len(source.artifact.digest) != 32:
                raise invalid("source.artifact.digest", "is no sha-256: without it nothing can be proved")
        case "code":
            _check_code(request.code.namespace, request.code.sha256)
        case _:
            raise invalid("which", "is missing: say what is wanted")


def check_has_code(request: artifact_pb2.HasCodeRequest, _now: float) -> None:
    """A question for a code archive. Raises InvalidField."""
    _check_code(request.namespace, request.sha256)


def _check_run(name: str, field: str) -> None:
    """The name of a run. Raises InvalidField."""
    try:
        names.parse_run(name)
    except names.InvalidName as error:
        raise invalid(field, str(error)) from None


def _check_code(namespace: str, sha256: str) -> None:
    if problem := names.id_problem(namespace):
        raise invalid("namespace", problem)
    _check_sha256(sha256, "sha256")
