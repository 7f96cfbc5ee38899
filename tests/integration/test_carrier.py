"""The agent's carrier against real replicas: what is stored comes back, and each failure says whose it is (F1; carrying/port.py)."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import random
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.artifacts import CHUNK_BYTES, manifest_of
from baton.clock import SystemClock
from baton.time_limits import time_limit
from cluster_agent.carrier_grpc import GrpcCarrier
from cluster_agent.carrying.courier import Courier, Undeliverable
from cluster_agent.carrying.port import (
    CarrierCorrupt,
    CarrierDown,
    CarrierLacks,
    Maker,
    NameUsed,
    NotConfigured,
    Wanted,
)
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactRef, ArtifactSource, AttemptKey
from cluster_agent.executors.base import AttemptKey as OuterKey
from cluster_agent.transport_grpc import GrpcTransport
from control_plane.artifacts.directory import DirectoryStore
from tests.integration.replicas import CLOCK, ENTROPY, Node, Rig, client, rig

KEY = OuterKey("ab12cd", 0, 1, "00ff")
MAKER = Maker("default", KEY, "c0ffee")


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@asynccontextmanager
async def federation(tmp_path: Path, *names: str) -> AsyncIterator[Rig]:
    objects = DirectoryStore(tmp_path / "objects", CLOCK, ENTROPY)
    async with rig(*(names or ("r1",)), objects=objects) as made:
        yield made
    await objects.close()


@asynccontextmanager
async def carrier_to(*addresses: str) -> AsyncIterator[GrpcCarrier]:
    made = GrpcCarrier(GrpcTransport(addresses))
    yield made
    await made.close()


def address(node: Node) -> str:
    return node.server.address


def source_of(ref: ArtifactRef) -> ArtifactSource:
    return ArtifactSource("default", AttemptKey(KEY.run_uid, KEY.task, KEY.n, KEY.nonce), "c0ffee", ref, "train")


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
async def test_what_is_stored_comes_back(tmp_path: Path, size: int) -> None:
    data = content(size)
    async with federation(tmp_path) as made, carrier_to(address(made.nodes[0])) as carrier:
        ref = await carrier.put(MAKER, "model", io.BytesIO(data))
        assert ref == ArtifactRef("model", size, manifest_of(io.BytesIO(data)).digest())
        assert await carrier.put(MAKER, "model", io.BytesIO(data)) == ref  # the same again is the same
        into = io.BytesIO()
        await carrier.download(Wanted(source_of(ref)), into).run()
        assert into.getvalue() == data
        with pytest.raises(NameUsed):
            await carrier.put(MAKER, "model", io.BytesIO(data + b"more"))


async def test_code_comes_back_by_its_hash(tmp_path: Path) -> None:
    data = content(100_000)
    sha256 = hashlib.sha256(data).hexdigest()
    async with federation(tmp_path) as made, client(*made.nodes) as user, carrier_to(address(made.nodes[0])) as carrier:
        await user.artifacts.put_code("default", data)
        into = io.BytesIO()
        await carrier.download(Wanted(namespace="default", code_sha256=sha256), into).run()
        assert into.getvalue() == data
        with pytest.raises(CarrierLacks, match="is not stored"):
            await carrier.download(Wanted(namespace="default", code_sha256="0" * 64), io.BytesIO()).run()


async def test_after_a_replica_that_is_gone_the_next_one_is_asked(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{nobody.getsockname()[1]}"
        async with federation(tmp_path) as made, carrier_to(dead, address(made.nodes[0])) as carrier:
            with pytest.raises(CarrierDown):
                await carrier.put(MAKER, "model", io.BytesIO(b"x"))
            tally = Tally()
            ref = await Courier(carrier, SystemClock(), tally).store(MAKER, "model", io.BytesIO(b"x"))
            assert (ref.size, tally.bytes_up) == (1, 1)


@pytest.mark.parametrize("chunks", [1, 5])
async def test_a_store_that_is_away_is_given_up_however_large_the_artifact(tmp_path: Path, chunks: int) -> None:
    """That a chunk was written says nothing: it may lie in a buffer. Counted as progress, it would renew patience with every try."""
    async with federation(tmp_path) as made, carrier_to(address(made.nodes[0])) as carrier:
        shutil.rmtree(tmp_path / "objects")
        (tmp_path / "objects").touch()
        courier = Courier(carrier, SystemClock(), Tally(), patience=1.0)
        async with time_limit(60):
            with pytest.raises(
                Undeliverable, match="artifact model could not be stored: artifact store unreachable for 1 s"
            ):
                await courier.store(MAKER, "model", io.BytesIO(content(chunks * CHUNK_BYTES)))


async def test_a_channel_that_is_given_up_ends_no_other_transfer_for_good(tmp_path: Path) -> None:
    """Closing it cancels what runs on it: to the transfer that is an outage, not an order to end."""
    read, write = os.pipe()  # a file that has no end yet
    async with federation(tmp_path) as made, carrier_to(address(made.nodes[0])) as carrier:
        with os.fdopen(read, "rb") as file:
            upload = asyncio.create_task(carrier.put(MAKER, "model", file))
            await asyncio.to_thread(os.write, write, content(CHUNK_BYTES))
            async with time_limit(20):
                while not list((tmp_path / "objects").rglob("000000-*")):  # noqa: ASYNC110 - of another process, in effect
                    await asyncio.sleep(0.01)
            await carrier.close()
            os.close(write)
            with pytest.raises(CarrierDown):
                await upload


async def test_damage_in_the_store_is_refused_and_told_as_the_stores_fault(tmp_path: Path) -> None:
    data = content(2 * CHUNK_BYTES)
    async with federation(tmp_path) as made, carrier_to(address(made.nodes[0])) as carrier:
        ref = await carrier.put(MAKER, "model", io.BytesIO(data))
        (chunk,) = (tmp_path / "objects").rglob("000001-*")
        good = chunk.read_bytes()
        chunk.write_bytes(b"\x00" + content(CHUNK_BYTES - 1) + b"!")
        into = io.BytesIO()
        download = carrier.download(Wanted(source_of(ref)), into)
        with pytest.raises(CarrierCorrupt, match="chunk 1"):
            await download.run()
        assert into.getvalue() == data[:CHUNK_BYTES]  # nothing unproved was written
        chunk.write_bytes(good)
        await download.run()  # and it goes on where it was
        assert into.getvalue() == data
        chunk.write_bytes(b"\x00nonsense")
        with pytest.raises(Undeliverable, match=r"artifact model of task train could not be fetched.*3 times.*damaged"):
            await Courier(carrier, SystemClock(), Tally()).fetch(Wanted(source_of(ref)), io.BytesIO())


async def test_what_is_not_there_and_what_was_never_set_up(tmp_path: Path) -> None:
    missing = Wanted(source_of(ArtifactRef("model", 1, bytes(32))))
    async with federation(tmp_path) as made, carrier_to(address(made.nodes[0])) as carrier:
        with pytest.raises(CarrierLacks, match="not in the store"):
            await carrier.download(missing, io.BytesIO()).run()
    async with rig("r1") as made, carrier_to(address(made.nodes[0])) as carrier:
        with pytest.raises(Undeliverable, match="--artifacts") as failed:
            await Courier(carrier, SystemClock(), Tally()).store(MAKER, "model", io.BytesIO(b"x"))
        assert failed.value.setup
        with pytest.raises(NotConfigured, match="--artifacts"):
            await carrier.download(missing, io.BytesIO()).run()
