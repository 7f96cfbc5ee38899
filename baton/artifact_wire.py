"""Artifacts as the messages of ArtifactService: what an uploader sends, and how a downloader proves what it gets.

`Incoming` is the whole judgement of a download, with no stream in it: give it each message in turn, write what it returns. So
agents and clients, which have streams of different make, cannot differ in what they accept. Content is proved before it is
returned; after a CorruptArtifact or a broken stream, ask again with `first_chunk=incoming.next_chunk` and go on.
"""

from __future__ import annotations

import hashlib

from baton.artifacts import RESULT, Chunk, CorruptArtifact, Manifest, decode_manifest, unpack_listed
from baton.v1 import agent_pb2, artifact_pb2, run_pb2


def chunk_message(chunk: Chunk) -> artifact_pb2.ArtifactChunk:
    """A chunk as sent."""
    return artifact_pb2.ArtifactChunk(
        index=chunk.index, sha256=chunk.sha256, data=chunk.data, compression=chunk.compression
    )


def chunk_from(message: artifact_pb2.ArtifactChunk) -> Chunk:
    """A chunk as received; nothing about it is proved yet."""
    return Chunk(index=message.index, sha256=message.sha256, data=message.data, compression=message.compression)


def put_header(header: artifact_pb2.PutArtifactHeader) -> artifact_pb2.PutArtifactRequest:
    """The first message of an upload."""
    return artifact_pb2.PutArtifactRequest(header=header)


def put_chunk(chunk: Chunk) -> artifact_pb2.PutArtifactRequest:
    """A later message of an upload."""
    return artifact_pb2.PutArtifactRequest(chunk=chunk_message(chunk))


def put_end(chunks: int) -> artifact_pb2.PutArtifactRequest:
    """The last message of an upload, after so many chunks: without it nothing is stored."""
    return artifact_pb2.PutArtifactRequest(end=artifact_pb2.PutArtifactEnd(chunks=chunks))


def ref_of(name: str, manifest: Manifest) -> agent_pb2.ArtifactRef:
    """The ref under which content with this manifest is known."""
    return agent_pb2.ArtifactRef(name=name, size=manifest.size, digest=manifest.digest())


def is_large(task: run_pb2.TaskStatus) -> bool:
    """Whether the task's result is an artifact."""
    return not task.result and any(source.artifact.name == RESULT for source in task.artifacts)


class Incoming:
    """One download, across as many streams as it takes.

    `digest` is what a commit said the artifact is; empty trusts the first message (a user who asks by name: the gateway reads
    the digest from the commit). For code give `code_sha256` instead: the hash of the whole archive, in hex.
    """

    def __init__(self, digest: bytes = b"", *, code_sha256: str = "") -> None:
        self.digest = digest
        self.next_chunk = 0
        self.ref: agent_pb2.ArtifactRef | None = None
        self._manifest: Manifest | None = None
        self._code_sha256 = code_sha256
        self._whole = hashlib.sha256()

    def take(self, message: artifact_pb2.GetArtifactResponse) -> bytes:
        """The content that a message adds (empty for the first of a stream). Raises CorruptArtifact."""
        if message.HasField("artifact"):
            self._begin(message)
            return b""
        if self._manifest is None:
            raise CorruptArtifact("the download does not begin with its manifest")
        chunk = chunk_from(message.chunk)
        if chunk.index != self.next_chunk:
            raise CorruptArtifact(f"chunk {chunk.index} came where {self.next_chunk} belongs")
        content = unpack_listed(chunk, self._manifest)
        if self._code_sha256:
            self._whole.update(content)
            if chunk.index == self._manifest.count - 1 and self._whole.hexdigest() != self._code_sha256:
                raise CorruptArtifact("the code that came is not the one that was asked for")
        self.next_chunk += 1
        return content

    @property
    def complete(self) -> bool:
        """Every chunk has come. A stream that ends before was cut off, whatever its status says."""
        return self._manifest is not None and self.next_chunk == self._manifest.count

    @property
    def size(self) -> int:
        """Bytes of the whole content; 0 before the first message."""
        return self._manifest.size if self._manifest else 0

    def _begin(self, message: artifact_pb2.GetArtifactResponse) -> None:
        if self._code_sha256:
            manifest = decode_manifest(message.manifest)
            if self._manifest is not None and manifest != self._manifest:
                raise CorruptArtifact("the code that came is not the one that came before")
        else:
            digest = self.digest or message.artifact.digest
            if message.artifact.digest != digest:
                raise CorruptArtifact("the artifact that came is not the one that was asked for")
            manifest = decode_manifest(message.manifest, digest)
            self.digest = digest
        self._manifest = manifest
        self.ref = message.artifact
