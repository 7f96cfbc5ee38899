"""The form of artifacts: what is taken apart comes together again, and nothing else does."""

from __future__ import annotations

import hashlib
import io
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import artifacts
from baton.artifact_wire import Incoming, chunk_from, chunk_message, put_chunk, ref_of
from baton.artifacts import (
    CHUNK_BYTES,
    PLAIN,
    ZLIB,
    Chunk,
    CorruptArtifact,
    Manifest,
    ManifestBuilder,
    TooLarge,
    decode_manifest,
    manifest_of,
    pack,
    read_chunks,
    unpack,
)
from baton.v1 import artifact_pb2
from control_plane.core import files


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def download(data: bytes) -> list[artifact_pb2.GetArtifactResponse]:
    """As a gateway sends it."""
    manifest = manifest_of(io.BytesIO(data))
    first = artifact_pb2.GetArtifactResponse(artifact=ref_of("x", manifest), manifest=manifest.encode())
    rest = [artifact_pb2.GetArtifactResponse(chunk=chunk_message(chunk)) for chunk in read_chunks(io.BytesIO(data))]
    return [first, *rest]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_content_comes_together_again(size: int) -> None:
    data = noise(size)
    messages = download(data)
    incoming = Incoming(messages[0].artifact.digest)
    assert b"".join(map(incoming.take, messages)) == data
    assert incoming.complete
    assert incoming.size == size
    assert len(messages) == 1 + -(-size // CHUNK_BYTES)


@given(st.binary(max_size=3000), st.integers(1, 40))
def test_packing_never_enters_a_hash(content: bytes, times: int) -> None:
    content *= times
    chunk = pack(0, content)
    assert chunk.compression == (ZLIB if len(chunk.data) < len(content) else PLAIN)
    assert chunk.sha256 == hashlib.sha256(content).digest()
    assert unpack(chunk) == content
    plain, other = Chunk(0, chunk.sha256, content, PLAIN), Chunk(0, chunk.sha256, zlib.compress(content, 9), ZLIB)
    assert unpack(plain) == unpack(other) == content


def test_what_does_not_shrink_is_not_squeezed_and_what_does_is() -> None:
    assert pack(0, noise(CHUNK_BYTES)).compression == PLAIN
    assert len(pack(0, b"a line of text\n" * 60_000).data) < 20_000
    assert pack(0, noise(CHUNK_BYTES // 2) + bytes(CHUNK_BYTES // 2)).compression == ZLIB


def test_a_manifest_is_proved_by_its_digest_and_its_own_sums() -> None:
    manifest = manifest_of(io.BytesIO(noise(2 * CHUNK_BYTES + 7)))
    data = manifest.encode()
    assert decode_manifest(data, manifest.digest()) == decode_manifest(data) == manifest
    assert [manifest.length(index) for index in range(manifest.count)] == [CHUNK_BYTES, CHUNK_BYTES, 7]
    with pytest.raises(CorruptArtifact, match="digest"):
        decode_manifest(data, b"\0" * 32)
    for wrong in (b"", b"BAM2" + data[4:], data[:-1], data + bytes(32), data[:4] + b"\0" * 4 + data[8:]):
        with pytest.raises(CorruptArtifact):
            decode_manifest(wrong)
    with pytest.raises(CorruptArtifact, match="agree"):
        decode_manifest(Manifest(size=artifacts.MAX_ARTIFACT_BYTES + 1, hashes=b"").encode())


def test_the_largest_manifest_fits_a_message() -> None:
    largest = Manifest(size=artifacts.MAX_ARTIFACT_BYTES, hashes=bytes(32 * artifacts.MAX_CHUNKS))
    assert len(largest.encode()) < 3 << 20
    assert decode_manifest(largest.encode()) == largest


def test_a_builder_takes_full_chunks_and_one_last() -> None:
    builder = ManifestBuilder(limit=2 * CHUNK_BYTES)
    builder.add(bytes(32), CHUNK_BYTES)
    with pytest.raises(CorruptArtifact, match="0 bytes"):
        builder.add(bytes(32), 0)
    builder.add(bytes(32), 5)
    with pytest.raises(CorruptArtifact, match="not full"):
        builder.add(bytes(32), 5)
    over = ManifestBuilder(limit=CHUNK_BYTES)
    over.add(bytes(32), CHUNK_BYTES)
    with pytest.raises(TooLarge, match="1048576"):
        over.add(bytes(32), 1)


def test_a_bomb_is_not_unpacked() -> None:
    huge = bytes(200 * CHUNK_BYTES)
    with pytest.raises(CorruptArtifact, match="one chunk"):
        unpack(Chunk(0, hashlib.sha256(huge).digest(), zlib.compress(huge, 9), ZLIB))
    for data in (zlib.compress(b"x") + b"trailing", zlib.compress(b"x" * 100)[:-3], b"no zlib"):
        with pytest.raises(CorruptArtifact):
            unpack(Chunk(0, hashlib.sha256(b"x").digest(), data, ZLIB))


def test_a_download_refuses_whatever_is_not_next_and_goes_on_after_it() -> None:
    data = noise(3 * CHUNK_BYTES)
    head, first, second, third = download(data)
    digest = head.artifact.digest
    with pytest.raises(CorruptArtifact, match="begin with"):
        Incoming(digest).take(first)
    with pytest.raises(CorruptArtifact, match="not the one that was asked for"):
        Incoming(b"\1" * 32).take(head)
    incoming = Incoming(digest)
    assert incoming.take(head) == b""
    got = incoming.take(first)
    for wrong in (first, third):
        with pytest.raises(CorruptArtifact, match="where 1 belongs"):
            incoming.take(wrong)
    forged = artifact_pb2.GetArtifactResponse(chunk=chunk_message(pack(1, noise(CHUNK_BYTES, seed=5))))
    with pytest.raises(CorruptArtifact, match="manifest lists"):
        incoming.take(forged)
    damaged = artifact_pb2.GetArtifactResponse()
    damaged.CopyFrom(second)
    damaged.chunk.data = b"?" + second.chunk.data[1:]
    with pytest.raises(CorruptArtifact, match="match its hash"):
        incoming.take(damaged)
    assert not incoming.complete
    assert incoming.next_chunk == 1
    got += incoming.take(head) + incoming.take(second) + incoming.take(third)  # a new stream begins with the manifest
    assert got == data
    assert incoming.complete


def test_code_is_proved_by_the_hash_of_the_whole() -> None:
    data = noise(CHUNK_BYTES + 1)
    messages = download(data)
    good = Incoming(code_sha256=hashlib.sha256(data).hexdigest())
    assert b"".join(map(good.take, messages)) == data
    assert good.complete
    bad = Incoming(code_sha256="0" * 64)
    bad.take(messages[0])
    bad.take(messages[1])
    with pytest.raises(CorruptArtifact, match="not the one"):
        bad.take(messages[2])
    assert not bad.complete


def test_messages_hold_what_chunks_hold() -> None:
    chunk = pack(4, b"text " * 100)
    assert chunk_from(put_chunk(chunk).chunk) == chunk


class Dripping(io.BytesIO):
    """A pipe that gives a little at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 100_003))


def test_short_reads_do_not_make_short_chunks() -> None:
    data = noise(2 * CHUNK_BYTES + 3)
    chunks = list(read_chunks(Dripping(data)))
    assert [len(unpack(chunk)) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 3]
    assert manifest_of(Dripping(data)) == manifest_of(io.BytesIO(data))


@pytest.mark.parametrize("name", ["result", "a", "A.b_c-9", "checkpoint-1", "0" * 128])
def test_good_names(name: str) -> None:
    assert artifacts.name_problem(name) is None


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "ä", "a\n", "0" * 129, "_x"])
def test_bad_names(name: str) -> None:
    assert "use 1 to 128 letters" in (artifacts.name_problem(name) or "")


@given(st.text(max_size=140))
def test_the_core_has_the_same_rules(name: str) -> None:
    """The core may not import them, so both are held against each other."""
    assert files.checkpoint_number(name) == artifacts.checkpoint_number(name)
    if not artifacts.checkpoint_number(name):
        assert (files.name_problem(name) is None) == (artifacts.name_problem(name) is None)


def test_checkpoints_are_numbered_from_one() -> None:
    assert [artifacts.checkpoint_number(name) for name in ("checkpoint-1", artifacts.checkpoint_name(40))] == [1, 40]
    for name in ("checkpoint-0", "checkpoint-", "checkpoint-01", "checkpoint-x", "result", "xcheckpoint-1"):
        assert artifacts.checkpoint_number(name) == 0
        assert files.checkpoint_number(name) == 0


def test_the_limits_are_one() -> None:
    assert files.ATTEMPT_ARTIFACTS == artifacts.MAX_ARTIFACTS
    assert files.RESULT == artifacts.RESULT
