"""Artifacts from a client: listing, downloading with proof and resumption, and storing code.

Theory: a download trusts nobody on the way. The gateway says under which digest the artifact was published; every byte is proved
against it before it reaches the caller (`baton.artifact_wire`). What arrived is kept: after a broken stream, a silent replica or
a damaged chunk the next try asks for the chunk that is missing, at the next replica. If the same chunk comes damaged three times,
that is told as what it is, a fault of the store, not of the caller or the task.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

import grpc

from baton import names
from baton.artifact_wire import Incoming, put_chunk, put_end, put_header
from baton.artifacts import MAX_CODE_PACK_BYTES, CorruptArtifact, read_chunks
from baton.client_call import Caller, error_of, full_name, may_retry
from baton.client_streams import STREAM_SECONDS, Patience, next_message
from baton.errors import BatonError, Internal, InvalidField, LimitExceeded, Unreachable
from baton.pythontask import MAX_CODE_BYTES
from baton.v1 import agent_pb2, artifact_pb2, graph_pb2

__all__ = ["Artifacts"]

PATIENCE_SECONDS = 60.0
"""How long a transfer looks for a replica, or waits for a store that is down, before it gives up."""

CODE_SECONDS = 120.0
CODE_TRY_SECONDS = 60.0
"""For 10 MiB of code, and for one try of it."""

ASK_SECONDS = 30.0
ASK_TRY_SECONDS = 15.0
"""For a question, and for one try: longer than others have, since an object store may answer slowly."""

MAX_DAMAGED = 3
"""Times that the same chunk may come damaged: once is a transmission, three times is what is stored."""

MEMORY_BYTES = 1 << 30
"""Largest artifact that is read into memory, as large as a result may be."""

PAGE = 1000

Take = Callable[[bytes], object]


class Artifacts:
    """The artifacts of a federation. A run is named in full, or by its id in the client's namespace; all failures are BatonError."""

    def __init__(self, caller: Caller, namespace: str = names.DEFAULT_NAMESPACE) -> None:
        self._caller = caller
        self._namespace = namespace

    async def list(self, run: str, task: str = "") -> AsyncIterator[agent_pb2.ArtifactSource]:
        """What the tasks of a run, or one of them (id), have published; page by page. Raises NotFound."""
        request = artifact_pb2.ListArtifactsRequest(run=self._run(run), task=task, page_size=PAGE)
        while True:
            page = await self._caller.call(
                lambda to, s: to.artifacts.ListArtifacts(request, timeout=s), timeout=ASK_SECONDS
            )
            for source in page.artifacts:
                yield source
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def download(
        self, run: str, task: str, name: str, into: BinaryIO, *, patience: float = PATIENCE_SECONDS
    ) -> agent_pb2.ArtifactRef:
        """Writes a published artifact into an open file, proved chunk by chunk; flat memory. Raises NotFound, Internal for what the
        store has damaged or lost, Unreachable after `patience` seconds without progress."""
        published = artifact_pb2.PublishedArtifact(run=self._run(run), task=task, name=name)
        request = artifact_pb2.GetArtifactRequest(published=published)
        return await self._fetch(request, Incoming(), into.write, patience)

    async def save(
        self, run: str, task: str, name: str, path: Path, *, patience: float = PATIENCE_SECONDS
    ) -> agent_pb2.ArtifactRef:
        """`download`, into a file that has its name only once it is whole. Raises OSError too."""
        draft = path.with_name(f".{path.name}.{self._caller.entropy.token(6)}.part")
        try:
            with draft.open("xb") as file:
                ref = await self.download(run, task, name, file, patience=patience)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return ref

    async def read(
        self, run: str, task: str, name: str, *, limit: int = MEMORY_BYTES, patience: float = PATIENCE_SECONDS
    ) -> bytes:
        """A published artifact's content, in memory. Raises LimitExceeded above `limit` bytes, and as `download`."""
        held = io.BytesIO()

        def take(content: bytes) -> None:
            if held.tell() + len(content) > limit:
                raise LimitExceeded(f"artifact {name} of {task} holds more than {limit} bytes: download it to a file")
            held.write(content)

        published = artifact_pb2.PublishedArtifact(run=self._run(run), task=task, name=name)
        await self._fetch(artifact_pb2.GetArtifactRequest(published=published), Incoming(), take, patience)
        return held.getvalue()

    async def has_code(self, namespace: str, sha256: str) -> bool:
        """Whether a code archive is stored; if so, it is kept for another while."""
        request = artifact_pb2.HasCodeRequest(namespace=namespace, sha256=sha256)
        answer = await self._caller.call(
            lambda to, s: to.artifacts.HasCode(request, timeout=s), timeout=ASK_SECONDS, try_seconds=ASK_TRY_SECONDS
        )
        return answer.stored

    async def put_code(self, namespace: str, archive: bytes) -> str:
        """Stores a code archive of at most 10 MiB, unless it is there; its sha-256 in hex. Raises LimitExceeded."""
        if len(archive) > MAX_CODE_PACK_BYTES:
            raise LimitExceeded(f"the code holds {len(archive)} bytes packed: at most {MAX_CODE_PACK_BYTES} are stored")
        sha256 = hashlib.sha256(archive).hexdigest()
        if await self.has_code(namespace, sha256):
            return sha256
        header = artifact_pb2.PutArtifactHeader(namespace=namespace, code_sha256=sha256)

        async def messages() -> AsyncIterator[artifact_pb2.PutArtifactRequest]:
            yield put_header(header)
            sent = 0
            for chunk in read_chunks(io.BytesIO(archive)):
                yield put_chunk(chunk)
                sent += 1
            yield put_end(sent)

        await self._caller.call(
            lambda to, s: to.artifacts.PutArtifact(messages(), timeout=s),
            timeout=CODE_SECONDS,
            try_seconds=CODE_TRY_SECONDS,
        )
        return sha256

    async def store_codes(self, namespace: str, spec: graph_pb2.GraphSpec) -> graph_pb2.GraphSpec:
        """The graph as the server takes it: code over 64 KiB is stored first, and the graph names it by its hash. The graph itself
        if it has none. Raises as `put_code`."""
        if all(len(code.zip) <= MAX_CODE_BYTES for code in spec.codes):
            return spec
        changed = graph_pb2.GraphSpec()
        changed.CopyFrom(spec)
        for code in changed.codes:
            if len(code.zip) > MAX_CODE_BYTES:
                sha256 = await self.put_code(namespace, code.zip)
                if sha256 != code.sha256:
                    raise InvalidField(f"codes: {code.sha256} is not the hash of the zip beside it")
                code.ClearField("zip")
                code.stored = True
        return changed

    def _run(self, name: str) -> str:
        return full_name("run", name, self._namespace)

    # -- one download ------------------------------------------------------------------------------------------------------

    async def _fetch(
        self, request: artifact_pb2.GetArtifactRequest, incoming: Incoming, take: Take, patience: float
    ) -> agent_pb2.ArtifactRef:
        """Every chunk once, in order, over as many streams as it takes. Raises BatonError, and what `take` raises."""
        waiting = Patience(self._caller, patience)
        damaged = 0
        while True:
            endpoint = self._caller.endpoint
            request.first_chunk = before = incoming.next_chunk
            stream = endpoint.artifacts.GetArtifact(request, timeout=STREAM_SECONDS)
            try:
                while (message := await next_message(stream)) is not None:
                    self._caller.answered = True
                    content = await asyncio.to_thread(incoming.take, message)
                    if content:  # a manifest alone is no progress: it comes with every try
                        waiting.renew()
                        await asyncio.to_thread(take, content)
                if incoming.complete and incoming.ref is not None:
                    return incoming.ref
                error: BatonError = Unreachable("the download was cut off")
            except CorruptArtifact as mismatch:
                damaged = damaged + 1 if incoming.next_chunk == before else 1
                if damaged >= MAX_DAMAGED:
                    raise Internal(
                        f"{mismatch}, {damaged} times: what the artifact store holds is damaged, or a proxy changes it"
                    ) from mismatch
                error = Unreachable(str(mismatch))
            except TimeoutError:
                error = Unreachable("the replica is silent")
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                waiting.refusals.see(endpoint, failure)
                if not may_retry(failure):
                    raise error from None
            finally:
                stream.cancel()
            await waiting.fail(endpoint, error)
