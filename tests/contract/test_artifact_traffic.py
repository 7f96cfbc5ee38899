"""What the gateway and the sweeper count, over both kinds of stores: bytes and seconds each way, failures by kind, what was swept."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.artifacts import CHUNK_BYTES, Chunk, read_chunks
from baton.errors import BatonError, TimedOut
from control_plane.artifacts import gateway as rules
from control_plane.artifacts import traffic
from control_plane.artifacts.base import (
    ObjectStore,
    ObjectStoreDown,
    ObjectStoreError,
    ObjectStoreFull,
    ObjectStoreRefused,
)
from control_plane.artifacts.gateway import Gateway
from control_plane.artifacts.sweeper import INTERVAL, RESTORE_GRACE, Sweeper
from control_plane.artifacts.traffic import DOWN, UP, Traffic
from lab.virtual_time import VirtualClock, run
from tests.contract.test_artifact_store import (  # noqa: F401 - fixtures
    CLOCK,
    FOLDER,
    Later,
    content,
    get,
    put,
    s3,
    store,
    stream,
    unrestored,
    world,
)


class Memory:
    """As much of a store as one artifact's way through it needs, in virtual time."""

    name = "the store under test"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    async def put(self, key: str, data: bytes, *, timeout: float, if_absent: bool = False) -> bool:
        self._objects[key] = data
        return True

    async def get(self, key: str, *, timeout: float) -> bytes | None:
        return self._objects.get(key)


class Refusing:
    """A store that does nothing but fail, in one way."""

    name = "the store under test"

    def __init__(self, error: ObjectStoreError) -> None:
        self._error = error

    async def put(self, key: str, data: bytes, *, timeout: float, if_absent: bool = False) -> bool:
        raise self._error

    async def get(self, key: str, *, timeout: float) -> bytes | None:
        raise self._error

    async def folders(self, prefix: str, *, timeout: float) -> Sequence[str]:
        raise self._error


def failed(counts: Traffic) -> dict[str, int]:
    return {kind: count for kind, count in counts.failures.items() if count}


async def test_bytes_and_seconds_are_counted_each_way(store: ObjectStore) -> None:  # noqa: F811 - a fixture
    counts = Traffic()
    gateway = Gateway(store, CLOCK, counts)
    data = content(300_000)
    digest = await put(gateway, data)
    assert counts.bytes == {UP: len(data), DOWN: 0}, "random content does not compress"
    assert await get(gateway, digest) == data
    assert counts.bytes == {UP: len(data), DOWN: len(data)}
    assert [sum(counts.seconds[way].counts) for way in (UP, DOWN)] == [1, 1]
    assert failed(counts) == {}


async def test_what_callers_do_wrong_is_counted_by_kind(store: ObjectStore) -> None:  # noqa: F811 - a fixture
    counts = Traffic()
    gateway = Gateway(store, CLOCK, counts)
    await put(gateway, b"one")
    with pytest.raises(BatonError):
        await put(gateway, b"another")
    with pytest.raises(BatonError):
        await gateway.put(FOLDER, "large", stream([chunk(b"12345")]), limit=4)
    with pytest.raises(BatonError):
        await gateway.put(FOLDER, "bad", stream([replace(chunk(b"12345"), sha256=bytes(32))]))
    assert failed(counts) == {traffic.TAKEN: 1, traffic.TOO_LARGE: 1, traffic.DAMAGED: 1}


def chunk(data: bytes) -> Chunk:
    return Chunk(index=0, sha256=hashlib.sha256(data).digest(), data=data, compression=0)


async def test_what_is_swept_is_counted(store: ObjectStore) -> None:  # noqa: F811 - a fixture
    counts = Traffic()
    await put(Gateway(store, CLOCK), b"garbage")

    async def none(uids: Sequence[str], seconds: float) -> set[str]:
        return set()

    assert await Sweeper(store, Later(), none, lambda: True, unrestored, counts).sweep() == 1
    assert counts.swept == 2, "a chunk and its manifest"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ObjectStoreDown("x"), traffic.STORE_DOWN),
        (ObjectStoreFull("x"), traffic.STORE_FULL),
        (ObjectStoreRefused("x"), traffic.STORE_REFUSED),
    ],
)
def test_the_stores_failures_are_counted_once_each_by_kind(error: ObjectStoreError, kind: str) -> None:
    async def main() -> None:
        counts = Traffic()
        gateway = Gateway(Refusing(error), VirtualClock(), counts)  # type: ignore[arg-type]
        with pytest.raises(BatonError):
            await gateway.manifest(FOLDER, "result")
        assert failed(counts) == {kind: 1}, "tries are not failures"

    run(main())


def test_a_silent_uploader_and_a_gateway_without_room_are_counted() -> None:
    async def silent() -> AsyncIterator[Chunk]:
        await asyncio.sleep(10 * rules.STALL_SECONDS)
        yield chunk(b"too late")

    async def main() -> None:
        counts = Traffic()
        gateway = Gateway(Refusing(ObjectStoreDown("x")), VirtualClock(), counts)  # type: ignore[arg-type]
        uploads = [gateway.put(FOLDER, f"a{n}", silent()) for n in range(rules.TRANSFERS + 1)]
        ends = await asyncio.gather(*uploads, return_exceptions=True)
        assert all(isinstance(end, BatonError) for end in ends)
        assert failed(counts) == {traffic.STALLED: rules.TRANSFERS, traffic.BUSY: 1}
        assert sum(counts.seconds[UP].counts) == rules.TRANSFERS

    run(main())


def test_a_sweep_that_does_not_get_through_is_counted() -> None:
    async def main() -> None:
        counts = Traffic()
        store_down = Refusing(ObjectStoreDown("x"))
        sweeper = Sweeper(store_down, VirtualClock(), None, lambda: True, unrestored, counts)  # type: ignore[arg-type]
        sweeping = asyncio.create_task(sweeper.run())
        await asyncio.sleep(RESTORE_GRACE + 2.5 * INTERVAL)
        sweeping.cancel()
        assert counts.sweeps_failed == 3

    run(main())


def test_readers_that_stop_lose_their_places_and_hear_of_it_when_they_come_back() -> None:
    """As many as there are places stop: one that comes then is served, as soon as they are taken for dead."""

    memory: ObjectStore = Memory()  # type: ignore[assignment]
    five = stream(read_chunks(io.BytesIO(content(5 * CHUNK_BYTES))))
    manifest = asyncio.run(
        Gateway(memory, CLOCK).put(FOLDER, "result", five)
    )  # in real time: it proves chunks in threads

    async def main() -> None:
        counts = Traffic()
        gateway = Gateway(memory, VirtualClock(), counts)
        stopped = [gateway.chunks(FOLDER, "result", manifest) for _ in range(rules.TRANSFERS)]
        for reader in stopped:
            assert (await anext(reader)).index == 0
        await asyncio.sleep(rules.STALL_SECONDS - rules.QUEUE_SECONDS / 2)
        assert failed(counts) == {}
        async with aclosing(gateway.chunks(FOLDER, "result", manifest)) as quick:
            assert [each.index async for each in quick] == [0, 1, 2, 3, 4]
        assert failed(counts) == {traffic.STALLED: rules.TRANSFERS}
        for reader in stopped[1:]:
            with pytest.raises(TimedOut, match="nothing was read for 60 s"):
                await anext(reader)
        await stopped[0].aclose()
        slow = [gateway.chunks(FOLDER, "result", manifest) for _ in range(rules.TRANSFERS)]
        assert await asyncio.gather(*map(slowly, slow)) == [5] * rules.TRANSFERS, "each place was given back once"
        with pytest.raises(BatonError, match="transfers are under way"):
            await asyncio.gather(
                *(slowly(gateway.chunks(FOLDER, "result", manifest)) for _ in range(rules.TRANSFERS + 1))
            )

    async def slowly(chunks: AsyncIterator[Chunk]) -> int:
        read = 0
        async for _ in chunks:
            read += 1
            await asyncio.sleep(rules.STALL_SECONDS - 1)
        return read

    run(main())


def test_after_a_restore_was_confirmed_nothing_is_swept_for_an_hour() -> None:
    """J12. A suspicion that stands makes rounds fail; a changed incarnation makes them wait, whoever sweeps then."""

    class Listed(Refusing):
        def __init__(self, clock: VirtualClock) -> None:
            super().__init__(ObjectStoreDown("x"))
            self.clock, self.at = clock, list[float]()

        async def folders(self, prefix: str, *, timeout: float) -> Sequence[str]:
            self.at.append(self.clock.boot() - began)
            return []

    began = 0.0

    async def main() -> None:
        nonlocal began
        clock, counts = VirtualClock(), Traffic()
        listed, heard, began = Listed(clock), (1, ""), clock.boot()
        sweeper = Sweeper(listed, clock, None, lambda: True, lambda: heard, counts)  # type: ignore[arg-type]
        sweeping = asyncio.create_task(sweeper.run())
        await asyncio.sleep(RESTORE_GRACE + 0.5 * INTERVAL)
        assert (listed.at, counts.sweeps_failed) == ([RESTORE_GRACE], 0)
        heard = (1, "suspected")
        await asyncio.sleep(INTERVAL)
        assert (len(listed.at), counts.sweeps_failed) == (1, 1)
        heard, confirmed = (2, ""), clock.boot() - began
        await asyncio.sleep(RESTORE_GRACE + 2 * INTERVAL)
        sweeping.cancel()
        assert min(listed.at[1:]) >= confirmed + RESTORE_GRACE
        assert counts.sweeps_failed == 1

    run(main())
