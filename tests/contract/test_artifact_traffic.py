"""What the gateway and the sweeper count, over both kinds of stores: bytes and seconds each way, failures by kind, what was swept."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from baton.artifacts import Chunk
from baton.errors import BatonError
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
from control_plane.artifacts.sweeper import Sweeper
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
    world,
)


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

    assert await Sweeper(store, Later(), none, lambda: True, counts).sweep() == 1
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
        sweeper = Sweeper(store_down, VirtualClock(), None, lambda: True, counts)  # type: ignore[arg-type]
        sweeping = asyncio.create_task(sweeper.run())
        await asyncio.sleep(2000)
        sweeping.cancel()
        assert counts.sweeps_failed == 3

    run(main())
