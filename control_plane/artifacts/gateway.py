"""Artifacts over the object store: what is put becomes visible at once or never, what is read is what was put.

Theory. An artifact is a folder of the store: an object for each chunk, named by its place and the hash of its content, and the
manifest, created last and only where there is none. Without a manifest there is nothing, so a killed upload is never seen; two
uploads of one name cannot mix, for equal chunks are equal objects and of two manifests the first wins. The folder is named by
the attempt's fence (PROTOCOL F1), so no attempt writes over another's.

    {namespace}/{run uid}/{task}/{n}-{nonce}-{cluster uid}/{name}/{index}-{sha256}     and .../manifest
    {namespace}/code/{sha256}/pack/...                                                 and .../used, rewritten when it is used

A chunk is stored as it came (a byte for its packing, then its data) after it was proved against its hash. Readers prove it
again; here is only seen to it that the manifest is the one the digest names. Memory: IN_FLIGHT chunks a transfer, TRANSFERS
transfers, whatever their size. Whoever stops, uploader or reader, loses the transfer's place after STALL_SECONDS.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from baton.artifacts import (
    MAX_ARTIFACT_BYTES,
    MAX_CODE_PACK_BYTES,
    Chunk,
    CorruptArtifact,
    Manifest,
    ManifestBuilder,
    TooLarge,
    checkpoint_number,
    decode_manifest,
    unpack,
)
from baton.clock import Clock
from baton.errors import (
    NOT_APPLIED,
    BatonError,
    Internal,
    InvalidField,
    LimitExceeded,
    NameTaken,
    StoreUnavailable,
    TimedOut,
)
from baton.time_limits import time_limit
from control_plane.artifacts import traffic
from control_plane.artifacts.base import (
    ObjectStore,
    ObjectStoreDown,
    ObjectStoreError,
    ObjectStoreFull,
    ObjectStoreRefused,
)
from control_plane.artifacts.traffic import Traffic

log = logging.getLogger(__name__)

MANIFEST, PACK, USED, CODE = "manifest", "pack", "used", "code"
"""Fixed names in the store. No run's uid is `code`: they are hexadecimal."""

IN_FLIGHT = 3
"""Chunks of one transfer between the caller and the store. One would wait for each request in turn; more is memory."""

TRANSFERS = 32
"""Transfers at one time on this replica: about 32 x (3 + 2) MiB. More wait, and are turned away after QUEUE_SECONDS."""

QUEUE_SECONDS = 20.0
STORE_SECONDS = 20.0
"""For one object. Too small: a slow store is taken for a dead one; too large: callers wait long to hear of a dead one."""

STALL_SECONDS = 60.0
"""Without a chunk from an uploader, or with one that its reader does not take, the other side is taken for dead: its place is
others'. A chunk is at most 1 MiB, so a line of 20 kB/s is quick enough. Too small: slow lines never get through, though each try
goes on where the last ended; too large: TRANSFERS stopped readers keep everybody else away for so long."""

TRIES = 3
"""For one object, and for one that is not what it should be."""

PAUSE = 0.2
"""Seconds before the second try; each further one waits twice as long."""

DOWN_AGAIN = 1.0
FULL_AGAIN = 5.0
"""Seconds after which callers should come back."""

TOUCH_SECONDS = 3600.0
"""A code's stamp is rewritten at most so often by one replica: a small part of the days it is kept for."""

FRESH_CODES = 10_000
"""Codes remembered as stamped lately, about 1 MB."""

T = TypeVar("T")


class _Place:
    """One of the places for transfers, held until it is given back."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self.held = True

    def give_back(self) -> None:
        """Once; again is nothing."""
        if self.held:
            self.held = False
            self._places.release()


class Gateway:
    """One replica's way to the object store. All methods raise BatonError."""

    def __init__(self, store: ObjectStore, clock: Clock, counts: Traffic | None = None) -> None:
        self._store, self._clock = store, clock
        self.traffic = counts or Traffic()
        self._transfers = asyncio.Semaphore(TRANSFERS)
        self._fresh: OrderedDict[str, float] = OrderedDict()
        """Folder of a code -> boot clock when its stamp was rewritten here."""

    # -- putting -----------------------------------------------------------------------------------------------------------

    async def put(
        self, folder: str, name: str, chunks: AsyncIterator[Chunk], *, limit: int = MAX_ARTIFACT_BYTES
    ) -> Manifest:
        """Store an artifact; durable and visible when this returns. Raises InvalidField for content that does not match its
        hashes, LimitExceeded, NameTaken if the name has other content, StoreUnavailable, TimedOut for a dead uploader."""
        async with self._transfer(traffic.UP):
            base = f"{folder}{name}/"
            builder = ManifestBuilder(limit)
            try:
                await self._put_chunks(base, chunks, builder)
            except CorruptArtifact as error:
                self.traffic.failed(traffic.DAMAGED)
                raise InvalidField(f"{name}: {error}; what was sent is damaged: send it again") from error
            except TooLarge as error:
                self.traffic.failed(traffic.TOO_LARGE)
                raise LimitExceeded(f"artifact {name} holds {error}") from error
            manifest = builder.manifest()
            data = manifest.encode()
            if await self._ask(lambda: self._store.put(base + MANIFEST, data, timeout=STORE_SECONDS, if_absent=True)):
                return manifest
            there = await self._ask(lambda: self._store.get(base + MANIFEST, timeout=STORE_SECONDS))
            if there != data:
                self.traffic.failed(traffic.TAKEN)
                raise NameTaken(f"artifact {name} of this attempt is stored already, with other content")
            return manifest

    async def _put_chunks(self, base: str, chunks: AsyncIterator[Chunk], builder: ManifestBuilder) -> None:
        """Raises BatonError, CorruptArtifact, TooLarge."""
        pending: deque[asyncio.Task[tuple[bytes, int]]] = deque()
        index = 0
        try:
            while (chunk := await self._next(chunks)) is not None:
                if chunk.index != index:
                    raise CorruptArtifact(f"chunk {chunk.index} came where {index} belongs")
                index += 1
                pending.append(asyncio.get_running_loop().create_task(self._put_chunk(base, chunk)))
                if len(pending) >= IN_FLIGHT:
                    builder.add(*await pending.popleft())
            while pending:
                builder.add(*await pending.popleft())
        finally:
            await _drop(pending)

    async def _put_chunk(self, base: str, chunk: Chunk) -> tuple[bytes, int]:
        """Prove and store one chunk; its hash and length."""
        content = await asyncio.to_thread(unpack, chunk)
        key, data = base + _object(chunk.index, chunk.sha256), bytes([chunk.compression]) + chunk.data
        await self._ask(lambda: self._store.put(key, data, timeout=STORE_SECONDS))
        self.traffic.bytes[traffic.UP] += len(chunk.data)
        return chunk.sha256, len(content)

    async def drop_checkpoints(self, folder: str, before: int) -> None:
        """Delete an attempt's checkpoints with numbers below `before`."""
        keys: list[str] = []
        after = ""
        while infos := await self._ask(lambda: self._store.page(folder, timeout=STORE_SECONDS, after=after)):  # noqa: B023
            after = infos[-1].key
            keys += [each.key for each in infos if 0 < checkpoint_number(_artifact(each.key, folder)) < before]
        keys.sort(key=lambda key: not key.endswith("/" + MANIFEST))  # without its manifest it is gone for readers
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            await self._ask(lambda: self._store.delete(part, timeout=STORE_SECONDS))  # noqa: B023

    # -- getting -----------------------------------------------------------------------------------------------------------

    async def manifest(self, folder: str, name: str, digest: bytes = b"") -> Manifest | None:
        """An artifact's manifest, proved against `digest` if that is known; None if there is none. Raises Internal if the store
        gives another."""
        damage = ""
        for tried in range(TRIES):
            data = await self._ask(lambda: self._store.get(f"{folder}{name}/{MANIFEST}", timeout=STORE_SECONDS))
            if data is None:
                return None
            try:
                return decode_manifest(data, digest)
            except CorruptArtifact as error:
                self.traffic.failed(traffic.DAMAGED)
                log.error("a stored manifest is not what it should be", extra={"folder": folder, "error": str(error)})
                damage = str(error)
            await self._clock.sleep(PAUSE * 2**tried)
        raise Internal(f"artifact {name} is damaged in {self._store.name}: {damage}", applied=NOT_APPLIED)

    async def chunks(self, folder: str, name: str, manifest: Manifest, first: int = 0) -> AsyncGenerator[Chunk, None]:
        """The chunks from `first` on, in order, as they are stored: whoever reads proves them. Raises TimedOut when a reader comes
        back that took nothing for STALL_SECONDS; its place was others' from then on."""
        async with self._transfer(traffic.DOWN) as place:
            base = f"{folder}{name}/"
            pending: deque[asyncio.Task[Chunk]] = deque()
            index = first
            try:
                while index < manifest.count or pending:
                    while index < manifest.count and len(pending) < IN_FLIGHT:
                        fetch = self._chunk(base, name, index, manifest.sha256(index))
                        pending.append(asyncio.get_running_loop().create_task(fetch))
                        index += 1
                    chunk = await pending.popleft()
                    with self._reading(place, pending):
                        yield chunk
            finally:
                await _drop(pending)

    @contextmanager
    def _reading(self, place: _Place, pending: deque[asyncio.Task[Chunk]]) -> Iterator[None]:
        """While a reader has a chunk and does not ask for the next. A timer, for a generator that nobody asks cannot look at a
        clock; the error waits for the reader, which takes nothing else either. Raises TimedOut."""

        def stalled() -> None:
            self.traffic.failed(traffic.STALLED)
            for fetch in pending:
                fetch.cancel()
            place.give_back()

        alarm = self._clock.later(STALL_SECONDS, stalled)
        try:
            yield
        finally:
            alarm.cancel()
        if not place.held:
            raise TimedOut(f"nothing was read for {STALL_SECONDS:g} s; what is missing can be asked for again")

    async def _chunk(self, base: str, name: str, index: int, sha256: bytes) -> Chunk:
        data = await self._ask(lambda: self._store.get(base + _object(index, sha256), timeout=STORE_SECONDS))
        if not data:
            self.traffic.failed(traffic.DAMAGED)
            raise Internal(
                f"artifact {name} is damaged: {self._store.name} has lost its chunk {index}", applied=NOT_APPLIED
            )
        self.traffic.bytes[traffic.DOWN] += len(data) - 1
        return Chunk(index=index, sha256=sha256, data=data[1:], compression=data[0])

    # -- code --------------------------------------------------------------------------------------------------------------

    async def put_code(self, namespace: str, sha256: str, chunks: AsyncIterator[Chunk]) -> Manifest:
        """Store a code archive whose bytes have that hash. Raises as `put`."""
        whole = hashlib.sha256()

        async def counted() -> AsyncIterator[Chunk]:
            async for chunk in chunks:
                try:
                    whole.update(await asyncio.to_thread(unpack, chunk))
                except CorruptArtifact as error:
                    self.traffic.failed(traffic.DAMAGED)
                    raise InvalidField(f"code: {error}; what was sent is damaged: send it again") from error
                yield chunk
            if whole.hexdigest() != sha256:
                raise InvalidField("code_sha256: is not the hash of what was sent")

        folder = code_folder(namespace, sha256)
        manifest = await self.put(folder, PACK, counted(), limit=MAX_CODE_PACK_BYTES)
        await self._touch(folder)
        return manifest

    async def has_code(self, namespace: str, sha256: str) -> bool:
        """Whether a code archive is stored; if it is, it is kept for another while."""
        folder = code_folder(namespace, sha256)
        if self._touched(folder):
            return True
        if await self.manifest(folder, PACK) is None:
            return False
        await self._touch(folder)
        return True

    def _touched(self, folder: str) -> bool:
        at = self._fresh.get(folder)
        return at is not None and self._clock.boot() - at < TOUCH_SECONDS

    async def _touch(self, folder: str) -> None:
        await self._ask(lambda: self._store.put(folder + USED, b"", timeout=STORE_SECONDS))
        self._fresh[folder] = self._clock.boot()
        self._fresh.move_to_end(folder)
        while len(self._fresh) > FRESH_CODES:
            self._fresh.popitem(last=False)

    # -- the store ---------------------------------------------------------------------------------------------------------

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        """One request, tried again while the store is down: each may be repeated (see `base`)."""
        for tried in range(1, TRIES + 1):
            try:
                return await request()
            except ObjectStoreDown as error:
                if tried == TRIES:
                    raise self._failure(error) from error
                await self._clock.sleep(PAUSE * 2 ** (tried - 1))
            except ObjectStoreError as error:
                raise self._failure(error) from error
        raise AssertionError("the last try raises")

    @asynccontextmanager
    async def _transfer(self, way: str) -> AsyncGenerator[_Place, None]:
        """A place among the transfers under way."""
        try:
            async with time_limit(QUEUE_SECONDS):
                await self._transfers.acquire()
        except TimeoutError:
            self.traffic.failed(traffic.BUSY)
            raise StoreUnavailable(
                f"{TRANSFERS} transfers are under way on this replica", retry_after=DOWN_AGAIN
            ) from None
        place = _Place(self._transfers)
        try:
            with self.traffic.timed(way, self._clock):
                yield place
        finally:
            place.give_back()

    def _failure(self, error: ObjectStoreError) -> BatonError:
        """What callers are told of the store's failure; counted."""
        kinds = {ObjectStoreFull: traffic.STORE_FULL, ObjectStoreRefused: traffic.STORE_REFUSED}
        self.traffic.failed(kinds.get(type(error), traffic.STORE_DOWN))
        return _unavailable(error)

    async def _next(self, chunks: AsyncIterator[Chunk]) -> Chunk | None:
        """The next chunk of an uploader; None at the end. Raises TimedOut."""
        try:
            async with time_limit(STALL_SECONDS):
                return await anext(chunks, None)
        except TimeoutError:
            self.traffic.failed(traffic.STALLED)
            raise TimedOut(f"no chunk came for {STALL_SECONDS:g} s") from None


def code_folder(namespace: str, sha256: str) -> str:
    """Where a code archive lies; ends with a slash."""
    return f"{namespace}/{CODE}/{sha256}/"


def _object(index: int, sha256: bytes) -> str:
    return f"{index:06d}-{sha256.hex()}"


def _artifact(key: str, folder: str) -> str:
    """Name of the artifact that an object of an attempt's folder belongs to."""
    return key.removeprefix(folder).partition("/")[0]


def _unavailable(error: ObjectStoreError) -> BatonError:
    """The infrastructure's fault, or the operator's; a repetition may find it mended. Never "not applied": it may have been."""
    if isinstance(error, ObjectStoreFull):
        return StoreUnavailable(
            f"the artifact store is full: {error}; an operator has to make room", retry_after=FULL_AGAIN
        )
    if isinstance(error, ObjectStoreRefused):
        text = f"the artifact store refuses this replica: {error}; an operator has to mend its credentials or address"
        return StoreUnavailable(text, retry_after=FULL_AGAIN)
    return StoreUnavailable(f"the artifact store does not answer: {error}", retry_after=DOWN_AGAIN)


async def _drop(tasks: deque[asyncio.Task[T]]) -> None:
    """Nobody wants their answers any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
