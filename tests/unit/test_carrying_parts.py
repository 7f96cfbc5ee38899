"""The agent's cache of artifacts and its courier: what is kept, what is tried again, and when it is given up (carrying/)."""

from __future__ import annotations

import asyncio
import errno
import io
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from baton.clock import SystemClock
from cluster_agent.carrying.cache import Cache
from cluster_agent.carrying.courier import Courier, DiskFull, Undeliverable
from cluster_agent.carrying.port import CarrierDown, CarrierRefused, Download, Maker, Wanted
from cluster_agent.carrying.shelf import Shelf
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactSource
from cluster_agent.executors.base import AttemptKey
from tests.contract.carrying_world import MemoryCarrier, MemoryStore

ROOM = 1000


class Parts:
    """A store, and a cache in front of it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.tally = MemoryStore(), Tally()
        self.store.open.set()
        self.courier = Courier(MemoryCarrier(self.store), SystemClock(), self.tally, patience=0.3)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.cache = Cache(folder, self.courier, self.tally, ROOM)

    def publish(self, name: str, size: int) -> ArtifactSource:
        content = (name.encode() * size)[:size]
        return self.store.publish(AttemptKey("run", 1, 1, "n"), "t", name, content)

    def cached(self) -> int:
        return len(list(self.folder.iterdir()))


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "cache")


async def test_what_was_used_longest_ago_goes_first(parts: Parts, tmp_path: Path) -> None:
    one, two, three = (parts.publish(name, 400) for name in "abc")
    for source in (one, two, one, three, one):
        await parts.cache.bring(source, tmp_path / "place")
    assert parts.store.gets == [f"artifact {name} of task t" for name in "abc"]
    await parts.cache.bring(two, tmp_path / "place")  # it went when c came
    assert len(parts.store.gets) == 4
    assert parts.cached() == 2
    assert parts.tally.cached == 2
    assert parts.tally.bytes_down == 1600


async def test_what_is_larger_than_the_cache_passes_it_by(parts: Parts, tmp_path: Path) -> None:
    large = parts.publish("x", ROOM + 1)
    await parts.cache.bring(large, tmp_path / "place")
    assert (tmp_path / "place").stat().st_size == ROOM + 1
    assert parts.cached() == 0


async def test_the_next_agent_finds_the_cache_and_no_remains(parts: Parts, tmp_path: Path) -> None:
    one = parts.publish("a", 400)
    await parts.cache.bring(one, tmp_path / "place")
    (parts.folder / "1234.7.draft").write_text("half")
    again = Cache(parts.folder, parts.courier, parts.tally, ROOM)
    await again.bring(one, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "place").read_bytes()
    assert len(parts.store.gets) == 1
    assert parts.cached() == 1


async def test_a_smaller_cache_than_before_is_made_so_at_once(parts: Parts, tmp_path: Path) -> None:
    for name in "ab":
        await parts.cache.bring(parts.publish(name, 400), tmp_path / "place")
    Cache(parts.folder, parts.courier, parts.tally, 500)
    assert parts.cached() == 1


async def test_many_who_want_one_artifact_fetch_it_once(parts: Parts, tmp_path: Path) -> None:
    source = parts.publish("a", 400)
    parts.store.failures = [CarrierDown("not now")]
    await asyncio.gather(*(parts.cache.bring(source, tmp_path / f"place-{n}") for n in range(40)))
    assert len(parts.store.gets) == 1
    assert {(tmp_path / f"place-{n}").stat().st_mode & 0o777 for n in range(40)} == {0o444}


class FullDisk(MemoryCarrier):
    """Its downloads meet a disk that is full, so often."""

    times = 1

    def download(self, wanted: Wanted, into: BinaryIO) -> Download:
        inner, outer = super().download(wanted, into), self

        class Meets:
            async def run(self) -> None:
                if outer.times:
                    outer.times -= 1
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                await inner.run()

        return Meets()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_full_disk_costs_the_cache_first_and_is_then_told_with_its_place(
    parts: Parts, tmp_path: Path, times: int
) -> None:
    await parts.cache.bring(parts.publish("a", 400), tmp_path / "place")
    carrier = FullDisk(parts.store)
    carrier.times = times
    courier = Courier(carrier, SystemClock(), parts.tally, patience=0.3)
    cache = Cache(parts.folder, courier, parts.tally, ROOM)
    wanted = parts.publish("b", 400)
    if times == 1:
        await cache.bring(wanted, tmp_path / "other")
        assert (tmp_path / "other").stat().st_size == 400
        assert parts.cached() == 1
        return
    with pytest.raises(
        DiskFull, match=rf"artifact b of task t .*the agent's disk is full, at {parts.folder}.*free room"
    ):
        await cache.bring(wanted, tmp_path / "other")
    assert parts.cached() == 0


async def test_a_refusal_is_not_tried_again(parts: Parts) -> None:
    parts.store.failures = [
        CarrierRefused("agent eu serves no work of namespace default"),
        CarrierDown("never reached"),
    ]
    with pytest.raises(Undeliverable, match=r"artifact a could not be stored: agent eu serves no work") as failed:
        await parts.courier.store(Maker("default", AttemptKey("r", 1, 1, "n"), "cu"), "a", io.BytesIO(b"x"))
    assert not failed.value.setup
    assert len(parts.store.failures) == 1


async def test_patience_counts_from_the_last_progress(parts: Parts) -> None:
    """Five tries, each after the whole patience of the one before would have been over, but content came through each time."""
    parts.store.failures = [CarrierDown("cut off", moved=True) for _ in range(5)]
    ref = await parts.courier.store(Maker("default", AttemptKey("r", 1, 1, "n"), "cu"), "a", io.BytesIO(b"x"))
    assert ref.size == 1
    parts.store.failures = [CarrierDown("cut off") for _ in range(5)]
    with pytest.raises(Undeliverable, match=r"unreachable for 0.3 s: cut off"):
        await parts.courier.store(Maker("default", AttemptKey("r", 1, 1, "n"), "cu"), "b", io.BytesIO(b"x"))


@pytest.mark.parametrize("plant", ["link", "pipe", "latest"])
def test_what_a_workload_plants_in_its_checkpoint_folder_is_not_followed(tmp_path: Path, plant: str) -> None:
    """A link would have the agent write elsewhere, a pipe would hold its thread for ever, and a linked folder fail each start."""
    folder, key = tmp_path / "guard" / "checkpoints" / "run.1", AttemptKey("run", 1, 2, "n")
    folder.mkdir(parents=True)
    shelf = Shelf(tmp_path / "guard", tmp_path / "own")
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"theirs")
    if plant == "link":
        (folder / ".latest.2").symlink_to(theirs)
    elif plant == "pipe":
        os.mkfifo(folder / ".latest.2")
    else:
        (folder / "epoch-5").mkdir()
        (folder / "latest").symlink_to("epoch-5")
    with shelf.draft_checkpoint(key) as draft:
        draft.write(b"committed")
    shelf.place_checkpoint(key, keep=True)
    assert (folder / "latest").read_bytes() == b"committed"
    assert theirs.read_bytes() == b"theirs"
