"""One contract for every object store, and for the gateway over it: visible whole or not at all (PROTOCOL F1; DESIGN 10)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import threading
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from baton.artifacts import CHUNK_BYTES, Chunk, attempt_folder, manifest_of, pack, read_chunks, unpack_listed
from baton.clock import SystemClock, SystemEntropy
from baton.errors import BatonError, Internal, InvalidField, LimitExceeded, NameTaken, StoreUnavailable, WrongState
from baton.time_limits import time_limit
from control_plane.artifacts.address import S3Address
from control_plane.artifacts.base import (
    LIST_LIMIT,
    MAX_OBJECT_BYTES,
    ObjectInfo,
    ObjectStore,
    ObjectStoreDown,
    ObjectStoreFull,
    ObjectStoreRefused,
)
from control_plane.artifacts.directory import THREADS, DirectoryStore
from control_plane.artifacts.gateway import Gateway, _unavailable, code_folder
from control_plane.artifacts.s3 import S3Store
from control_plane.artifacts.sweeper import Sweeper
from tests.contract.artifact_worlds import (
    BUCKET,
    DirectoryWorld,
    S3World,
    StoreWorld,
    moto_server,
    next_prefix,
    set_credentials,
    unanswering_port,
)

T = 30.0
CLOCK = SystemClock()
FOLDER = attempt_folder(namespace="default", run="ab12ab12ab12ab12ab12ab12", task=3, n=1, nonce="00ff", cluster="c1")
FAR_FUTURE = 10 * 365 * 24 * 3600.0


class Later(SystemClock):
    """A clock that is years ahead: to it everything stored is old."""

    def wall(self) -> float:
        return super().wall() + FAR_FUTURE


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["directory", "s3"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreWorld:
    if request.param == "directory":
        return DirectoryWorld(tmp_path / "objects")
    set_credentials(monkeypatch)
    return S3World(request.getfixturevalue("s3"), next_prefix())


@pytest.fixture
async def store(world: StoreWorld) -> AsyncIterator[ObjectStore]:
    client = world.client()
    yield client
    await client.close()


@pytest.fixture
def gateway(store: ObjectStore) -> Gateway:
    return Gateway(store, CLOCK)


def unrestored() -> tuple[int, str]:
    """What a replica has heard of restores where there were none."""
    return 1, ""


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def stream(chunks: Iterable[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def put(gateway: Gateway, data: bytes, name: str = "result", folder: str = FOLDER) -> bytes:
    return (await gateway.put(folder, name, stream(read_chunks(io.BytesIO(data))))).digest()


async def get(gateway: Gateway, digest: bytes = b"", name: str = "result", folder: str = FOLDER) -> bytes | None:
    manifest = await gateway.manifest(folder, name, digest)
    if manifest is None:
        return None
    async with aclosing(gateway.chunks(folder, name, manifest)) as chunks:
        return b"".join([unpack_listed(chunk, manifest) async for chunk in chunks])


# -- the port ----------------------------------------------------------------------------------------------------------


async def test_what_was_put_is_read_by_another_client_until_it_is_deleted(
    store: ObjectStore, world: StoreWorld
) -> None:
    assert await store.get("ns/run/one", timeout=T) is None
    assert await store.put("ns/run/one", b"first", timeout=T)
    assert await store.put("ns/run/one", b"second", timeout=T)
    other = world.client()
    assert await other.get("ns/run/one", timeout=T) == b"second"
    await other.delete(["ns/run/one", "ns/run/never"], timeout=T)
    await other.close()
    assert await store.get("ns/run/one", timeout=T) is None
    assert await store.put("ns/run/empty", b"", timeout=T)
    assert await store.get("ns/run/empty", timeout=T) == b""


async def test_of_many_that_create_one_object_exactly_one_does(store: ObjectStore) -> None:
    tries = [store.put("ns/run/manifest", b"%d" % n, timeout=T, if_absent=True) for n in range(12)]
    made = await asyncio.gather(*tries)
    assert sum(made) == 1
    assert await store.get("ns/run/manifest", timeout=T) == b"%d" % made.index(True)


async def test_lists_are_in_order_and_go_on_after_a_key(store: ObjectStore) -> None:
    keys = ["a/b/c", "a/b/d", "a/b-c/x", "a/b.c/x", "a/bb", "z/1"]
    for key in keys:
        await store.put(key, key.encode(), timeout=T)
    under_a = sorted(key for key in keys if key.startswith("a/"))
    found = await store.page("a/", timeout=T)
    assert [info.key for info in found] == under_a
    assert [info.size for info in found] == [len(key) for key in under_a]
    assert all(abs(info.modified - CLOCK.wall()) < 3600 for info in found)
    for position, key in enumerate(under_a):
        assert [info.key for info in await store.page("a/", timeout=T, after=key)] == under_a[position + 1 :]
    assert await store.page("a/b/", timeout=T, after="a/b/d") == []
    assert list(await store.folders("", timeout=T)) == ["a", "z"]
    assert list(await store.folders("a/", timeout=T)) == ["b", "b-c", "b.c"]
    assert list(await store.folders("nothing/", timeout=T)) == []


async def test_a_long_list_comes_in_pages(store: ObjectStore) -> None:
    keys = [f"ns/many/{number:05d}" for number in range(LIST_LIMIT + 5)]
    for start in range(0, len(keys), 50):
        await asyncio.gather(*(store.put(key, b"x", timeout=T) for key in keys[start : start + 50]))
    first = await store.page("ns/many/", timeout=T)
    rest = await store.page("ns/many/", timeout=T, after=first[-1].key)
    assert [info.key for info in (*first, *rest)] == keys
    await store.delete(keys[:LIST_LIMIT], timeout=T)
    assert [info.key for info in await store.page("ns/many/", timeout=T)] == keys[LIST_LIMIT:]


@pytest.mark.parametrize("key", ["../out", "a/../b", "/abs", "a//b", "a/.hidden", "a/b c", "", "a/\x00", "x" * 1000])
async def test_keys_that_could_lead_elsewhere_are_refused(store: ObjectStore, key: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        await store.put(key or "/", b"x", timeout=T)


# -- the gateway -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 77])
async def test_an_artifact_comes_back_as_it_was_put(gateway: Gateway, size: int) -> None:
    data = content(size)
    digest = await put(gateway, data)
    assert digest == manifest_of(io.BytesIO(data)).digest()
    assert await get(gateway, digest) == data


async def test_the_same_content_may_be_put_again_and_other_content_may_not(gateway: Gateway) -> None:
    data = content(3 * CHUNK_BYTES)
    digest = await put(gateway, data)
    assert await put(gateway, data) == digest
    with pytest.raises(NameTaken, match="other content"):
        await put(gateway, content(3 * CHUNK_BYTES, seed=2))
    assert await get(gateway, digest) == data


async def test_two_uploads_of_one_name_cannot_mix(gateway: Gateway, world: StoreWorld) -> None:
    other = Gateway(world.client(), CLOCK)
    data = {n: content(4 * CHUNK_BYTES + n, seed=n) for n in range(4)}
    tries = [put(gateway if n % 2 else other, data[n]) for n in data]
    ends = await asyncio.gather(*tries, return_exceptions=True)
    winners = [n for n, end in enumerate(ends) if isinstance(end, bytes)]
    assert len(winners) == 1
    assert all(isinstance(end, (bytes, NameTaken)) for end in ends)
    assert await get(gateway) == data[winners[0]]


async def test_a_killed_upload_leaves_nothing_visible_and_is_swept(gateway: Gateway, store: ObjectStore) -> None:
    def dies() -> Iterator[Chunk]:
        yield from list(read_chunks(io.BytesIO(content(6 * CHUNK_BYTES))))[:4]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await gateway.put(FOLDER, "result", stream(dies()))
    assert await store.page(FOLDER, timeout=T), "the story needs remains"
    assert await gateway.manifest(FOLDER, "result") is None

    known = {"ab12ab12ab12ab12ab12ab12"}

    async def runs(uids: object, seconds: float) -> set[str]:
        return known

    sweeper = Sweeper(store, Later(), runs, lambda: True, unrestored)
    assert await sweeper.sweep() == 0, "its run lives"
    assert await Sweeper(store, CLOCK, runs, lambda: True, unrestored).sweep() == 0
    known.clear()
    assert await Sweeper(store, CLOCK, runs, lambda: True, unrestored).sweep() == 0, "it is too young"
    assert await sweeper.sweep() == 1
    async with time_limit(T):
        while await store.page(
            "default/", timeout=T
        ):  # a chunk that was on its way when the upload died: the next round's
            await sweeper.sweep()
    data = content(CHUNK_BYTES)
    assert await get(gateway, await put(gateway, data)) == data, "a swept place can be used again"


async def test_nothing_is_swept_while_somebody_does_not_say_what_lives(gateway: Gateway, store: ObjectStore) -> None:
    digest = await put(gateway, b"kept")

    async def silent(uids: object, seconds: float) -> set[str]:
        raise StoreUnavailable("the history of finished runs does not answer")

    with pytest.raises(StoreUnavailable):
        await Sweeper(store, Later(), silent, lambda: True, unrestored).sweep()
    assert await get(gateway, digest) == b"kept"


async def test_nothing_is_swept_while_a_restore_is_suspected_or_once_one_was_confirmed(
    gateway: Gateway, store: ObjectStore
) -> None:
    """J12: the operator may yet choose a newer backup, which knows the run; the suspicion may come in the middle of a round."""
    digest = await put(gateway, b"kept")
    heard = then = (1, "shard r01: cited with another nonce")

    async def none(uids: object, seconds: float) -> set[str]:
        nonlocal heard
        heard = then
        return set()

    sweeper = Sweeper(store, Later(), none, lambda: True, lambda: heard)
    with pytest.raises(WrongState, match="suspected: shard r01"):
        await sweeper.sweep()
    heard, then = (1, ""), (1, "seen in between")
    with pytest.raises(WrongState, match="suspected: seen in between"):
        await sweeper.sweep()
    heard, then = (1, ""), (2, "")
    with pytest.raises(WrongState, match="the incarnation is now 2"):
        await sweeper.sweep()
    assert await get(gateway, digest) == b"kept"
    assert await sweeper.sweep() == 1, "the story needs that it was garbage but for the restore"


async def test_damaged_chunks_are_refused_and_name_the_uploader(gateway: Gateway, store: ObjectStore) -> None:
    good = list(read_chunks(io.BytesIO(content(3 * CHUNK_BYTES))))
    stories: dict[str, list[Chunk]] = {
        "does not match its hash": [Chunk(0, good[0].sha256, good[1].data, good[1].compression)],
        "came where": [good[0], good[2]],
        "follows one that is not full": [pack(0, b"short"), pack(1, b"more")],
        "packed in no way": [Chunk(0, good[0].sha256, good[0].data, 9)],
        "does not unpack to one chunk": [bomb()],
        "1 to 1048576 are allowed": [pack(0, b"")],
    }
    for words, chunks in stories.items():
        with pytest.raises(InvalidField, match=words):
            await gateway.put(FOLDER, "result", stream(chunks))
        assert await gateway.manifest(FOLDER, "result") is None, words


def bomb() -> Chunk:
    huge = zlib.compress(bytes(64 * CHUNK_BYTES), 9)
    return Chunk(0, hashlib.sha256(b"").digest(), huge, 1)


async def test_too_large_is_the_applications_fault(gateway: Gateway) -> None:
    chunks = stream(read_chunks(io.BytesIO(content(2 * CHUNK_BYTES + 1))))
    with pytest.raises(LimitExceeded, match="artifact result holds more than 2097152 bytes"):
        await gateway.put(FOLDER, "result", chunks, limit=2 * CHUNK_BYTES)
    assert await gateway.manifest(FOLDER, "result") is None


async def test_a_spoilt_store_is_found_out(gateway: Gateway, store: ObjectStore, world: StoreWorld) -> None:
    data = content(2 * CHUNK_BYTES)
    digest = await put(gateway, data)
    keys = [info.key for info in await store.page(FOLDER, timeout=T)]
    manifest, chunk = next(k for k in keys if k.endswith("manifest")), next(k for k in keys if "/000001-" in k)

    world.spoil(chunk, b"\x00" + content(CHUNK_BYTES, seed=9))
    with pytest.raises(ValueError, match="does not match its hash"):
        await get(gateway, digest)
    world.spoil(chunk, b"")
    with pytest.raises(Internal, match="has lost its chunk 1"):
        await get(gateway, digest)
    await put(gateway, data)
    assert await get(gateway, digest) == data, "the same upload, again, mends it"
    world.spoil(manifest, b"BAM1 nonsense")
    with pytest.raises(Internal, match="damaged"):
        await get(gateway, digest)


async def test_old_checkpoints_go_and_newer_ones_stay(gateway: Gateway, store: ObjectStore) -> None:
    for number in (1, 2, 3, 12):
        await put(gateway, b"state %d" % number, f"checkpoint-{number}")
    await put(gateway, b"file", "model")
    await gateway.drop_checkpoints(FOLDER, 3)
    left = {info.key.removeprefix(FOLDER).partition("/")[0] for info in await store.page(FOLDER, timeout=T)}
    assert left == {"checkpoint-3", "checkpoint-12", "model"}


async def test_code_is_kept_while_it_is_used(gateway: Gateway, store: ObjectStore) -> None:
    archive = content(CHUNK_BYTES + 5)
    sha256 = hashlib.sha256(archive).hexdigest()
    assert not await gateway.has_code("default", sha256)
    with pytest.raises(InvalidField, match="is not the hash"):
        await gateway.put_code("default", "0" * 64, stream(read_chunks(io.BytesIO(archive))))
    assert not await gateway.has_code("default", "0" * 64)
    await gateway.put_code("default", sha256, stream(read_chunks(io.BytesIO(archive))))
    assert await gateway.has_code("default", sha256)
    assert not await gateway.has_code("other", sha256)

    async def none(uids: object, seconds: float) -> set[str]:
        return set()

    assert await Sweeper(store, CLOCK, none, lambda: True, unrestored).sweep() == 0
    assert await get(gateway, name="pack", folder=code_folder("default", sha256)) == archive
    assert await Sweeper(store, Later(), none, lambda: True, unrestored).sweep() >= 1
    assert not await Gateway(store, CLOCK).has_code("default", sha256)


async def test_code_over_its_limit_is_refused(gateway: Gateway) -> None:
    archive = content(10 * CHUNK_BYTES + 1)
    with pytest.raises(LimitExceeded, match="10485760"):
        await gateway.put_code("default", hashlib.sha256(archive).hexdigest(), stream(read_chunks(io.BytesIO(archive))))


# -- a store that fails --------------------------------------------------------------------------------------------------


class HttpStore:
    """A server that gives these answers, one a request, then the last for ever; each after `delay` seconds."""

    def __init__(self, *answers: bytes, delay: float = 0.0) -> None:
        self._answers, self._delay = list(answers), delay
        self.asked = 0

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), 0
        )
        await reader.readexactly(length)
        self.asked += 1
        await asyncio.sleep(self._delay)
        writer.write(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])
        await writer.drain()
        writer.close()


def answer(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (answer("507 Insufficient Storage", "XMinioStorageFull"), ObjectStoreFull, "is full"),
        (answer("403 Forbidden", "AccessDenied"), ObjectStoreRefused, "refuses"),
        (answer("404 Not Found", "NoSuchBucket"), ObjectStoreRefused, "refuses"),
        (answer("500 Internal Server Error", "InternalError"), ObjectStoreDown, "does not answer"),
    ],
)
async def test_what_s3_says_is_told_by_whose_fault_it_is(reply: bytes, kind: type[Exception], words: str) -> None:
    async with HttpStore(reply) as endpoint:
        store = S3Store(S3Address(BUCKET, "p", endpoint))
        for call in (store.put("a/b", b"x", timeout=T), store.page("a/", timeout=T)):
            with pytest.raises(kind, match=words) as raised:
                await call
            assert "test" not in str(raised.value), "no credentials in messages"


@pytest.mark.usefixtures("credentials")
async def test_an_s3_that_is_slow_or_stumbles_costs_time_and_nothing_else() -> None:
    stored = b'HTTP/1.1 200 OK\r\netag: "1"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n'
    server = HttpStore(answer("503 Slow Down", "SlowDown"), stored, delay=0.2)
    async with server as endpoint:
        store = S3Store(S3Address(BUCKET, "p", endpoint))
        assert await store.put("a/b", b"x", timeout=T)
    assert server.asked == 2


@pytest.mark.usefixtures("credentials")
async def test_an_s3_that_is_down_or_silent_is_given_up_in_time() -> None:
    with unanswering_port() as port:
        silent = S3Store(S3Address(BUCKET, "", f"http://127.0.0.1:{port}"))
        with pytest.raises(ObjectStoreDown, match=r"did not answer within 0\.5 s"):
            await silent.put("a/b", b"x", timeout=0.5)
    gone = S3Store(S3Address(BUCKET, "", f"http://127.0.0.1:{port}"))
    with pytest.raises(ObjectStoreDown, match="bucket artifacts at"):
        await gone.get("a/b", timeout=T)
    with pytest.raises(BatonError, match="the artifact store does not answer: bucket artifacts") as told:
        await put(Gateway(gone, CLOCK), b"x")
    assert (told.value.reason, told.value.retry_after) == ("STORE_UNAVAILABLE", 1.0)


async def test_a_full_directory_is_told_as_full(tmp_path: Path) -> None:
    store = DirectoryWorld(tmp_path / "objects").client()
    with pytest.raises(ObjectStoreFull, match="is full"):  # a file over the file system's limit, as one without room
        await store.put("ns/run/one", bytes(MAX_OBJECT_BYTES + 1), timeout=T)
    with pytest.raises(BatonError, match=r"the artifact store is full: the directory .* an operator has to make room"):
        raise _unavailable(ObjectStoreFull(f"{store.name} is full: No space left on device"))
    assert await store.page("ns/", timeout=T) == []
    assert list((tmp_path / "objects" / ".drafts").iterdir()) == []
    await store.close()


async def test_a_directory_that_may_not_be_written_names_itself(tmp_path: Path) -> None:
    store = DirectoryWorld(tmp_path / "objects").client()
    (tmp_path / "objects" / "ns").write_text("a file where a folder belongs")
    with pytest.raises(ObjectStoreDown, match="objects does not work: "):
        await store.put("ns/run/one", b"x", timeout=T)
    assert await store.get("ns/run/one", timeout=T) is None
    await store.close()


async def test_calls_on_a_hung_directory_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given up before a thread was free is never done; with the file system everything works again."""
    store = DirectoryWorld(tmp_path / "objects").client()
    hung, begun = threading.Event(), []

    def hangs(_prefix: str, _after: str) -> list[ObjectInfo]:
        begun.append(1)
        assert hung.wait(T)
        return []

    monkeypatch.setattr(store, "_list", hangs)
    try:
        calls = [store.page("ns/", timeout=0.5) for _ in range(3 * THREADS)]
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(end, ObjectStoreDown) for end in ends)
        assert store._threads._work_queue.qsize() == 0
    finally:
        hung.set()
    assert await store.put("ns/run/one", b"x", timeout=T)
    assert len(begun) <= THREADS
    free = await asyncio.gather(*(store.get("ns/run/one", timeout=T) for _ in range(3 * THREADS)))
    assert free == [b"x"] * 3 * THREADS
    await store.close()


async def test_drafts_of_dead_writers_are_removed(tmp_path: Path) -> None:
    world = DirectoryWorld(tmp_path / "objects")
    await world.client().close()
    for name in (".old", ".young"):
        (world.root / ".drafts" / name).write_bytes(b"half")
    world.age(".drafts/.old", 2 * 3600)
    store = world.client()
    assert [path.name for path in (world.root / ".drafts").iterdir()] == [".young"]
    assert list(await store.folders("", timeout=T)) == []
    await store.close()


async def test_what_was_not_ours_is_never_swept_nor_stops_the_sweep(tmp_path: Path) -> None:
    """The folder that an operator gave holds more: what every new disk has, and somebody's own files."""
    store = DirectoryStore(tmp_path, CLOCK, SystemEntropy())
    (tmp_path / "lost+found").mkdir()
    theirs = [tmp_path / "photos" / "2019" / "one.jpg", tmp_path / "photos" / "code" / "main" / "used"]
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"theirs")
    await put(Gateway(store, CLOCK), b"garbage")

    async def none(uids: object, seconds: float) -> set[str]:
        return set()

    try:
        assert await Sweeper(store, Later(), none, lambda: True, unrestored).sweep() == 1, "our own garbage"
        assert all(path.exists() for path in theirs)
    finally:
        await store.close()
