"""The agent's journal and its disks: what survives which death (PROTOCOL F3, F4, S6)."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.clock import SystemEntropy
from cluster_agent import journal as module
from cluster_agent.core.model import AgentState, AttemptKey, Demand, Ended, Epoch, Mark, Outcome, Phase
from cluster_agent.core.records import (
    DURABLE,
    Booted,
    EpochRaised,
    Finished,
    Forgotten,
    MarkRaised,
    Moved,
    Record,
    SessionOpened,
    Starting,
    StopConfirmed,
    Tombstoned,
    apply,
    snapshot,
)
from cluster_agent.disk import Disk, DiskFailure, MemoryDisk, RealDisk
from cluster_agent.journal import FILE, Journal, JournalCorrupt
from cluster_agent.journal_codec import CodecError, decode, encode

KEY = AttemptKey("run", 3, 2, "abc")
OTHER = AttemptKey("run", 4, 1, "abc")
KEPT = AttemptKey("run", 5, 1, "abc")
ENDED = Ended(Outcome.FAILED, 3, b"\x00\xff", "why", 10, 20, True)
ALL: list[Record] = [
    Booted("b1"),
    SessionOpened(4, "cu", "fu", 9.0, 5.0),
    EpochRaised("s0", Epoch(1, 2)),
    MarkRaised("s0", Mark(1, 9, "n")),
    Starting(KEY, "s0", 4, Demand(1000, 5, 6, (("gpus", 1),)), 3.0),
    Starting(KEPT, "s0", 4, Demand(1), 0.5, keep_at_fence=True),
    Moved(KEY, 5),
    Finished(KEY, "s0", 5, ENDED),
    Tombstoned(OTHER, "s1", 4, "no room"),
    Tombstoned(KEY, "s0", 5),
    StopConfirmed(KEY),
    Forgotten(OTHER),
]


async def opened(disk: Disk) -> tuple[Journal, AgentState]:
    return await Journal.open(disk, SystemEntropy())


async def put(journal: Journal, state: AgentState, *records: Record) -> None:
    for record in records:
        apply(state, record)
    await journal.write(records, state)


@pytest.mark.parametrize("record", ALL, ids=lambda record: type(record).__name__)
def test_every_record_survives_its_encoding(record: Record) -> None:
    assert decode(encode(record)) == record


@pytest.mark.parametrize(
    "value", [{}, {"t": "new"}, {"t": "moved", "key": "a.b"}, {"t": "epoch", "shard": "s", "epoch": 1}]
)
def test_what_is_not_a_record_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(CodecError):
        decode(value)


@given(st.integers(0, len(ALL)))
def test_a_snapshot_folds_to_the_same_state(length: int) -> None:
    state, again = AgentState("j"), AgentState("j")
    for record in ALL[:length]:
        apply(state, record)
    for record in snapshot(state):
        apply(again, record)
    assert again == state


async def test_uid_is_made_once_and_the_state_comes_back(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "agent")
    journal, state = await opened(disk)
    assert len(journal.uid) == 32
    await put(journal, state, *ALL)
    disk.close()
    again = RealDisk(tmp_path / "agent")
    assert (await opened(again))[1] == state
    again.close()


async def test_another_agent_cannot_use_the_same_directory(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    with pytest.raises(DiskFailure, match="another agent"):
        RealDisk(tmp_path)
    disk.close()
    RealDisk(tmp_path).close()


@given(st.integers(1, 400), st.sampled_from([b"", b"\n", b"\x00" * 40, b"garbage"]))
async def test_a_torn_tail_is_dropped_at_every_length(cut: int, noise: bytes) -> None:
    disk = MemoryDisk()
    journal, state = await opened(disk)
    await put(journal, state, Booted("b1"), Tombstoned(KEY, "s0", 1))
    whole = disk.read(FILE) or b""
    await put(journal, state, Starting(OTHER, "s0", 1, Demand(1), 0.0))
    more = (disk.read(FILE) or b"")[len(whole) :]
    await disk.replace(FILE, whole + more[: min(cut, len(more) - 2)] + noise)
    _, found = await opened(disk)
    assert found.attempts[KEY].phase is Phase.STOPPING
    assert OTHER not in found.attempts
    assert (await opened(disk))[1] == found


@pytest.mark.parametrize(
    "damage",
    [lambda data: data.replace(b"b1", b"b2", 1), lambda _: b"garbage", lambda data: data.replace(b'"version":1', b"")],
)
async def test_damage_before_good_lines_is_refused(damage: Callable[[bytes], bytes]) -> None:
    disk = MemoryDisk()
    journal, state = await opened(disk)
    await put(journal, state, Booted("b1"), Tombstoned(KEY, "s0", 1))
    await disk.replace(FILE, damage(disk.read(FILE) or b""))
    with pytest.raises(JournalCorrupt):
        await opened(disk)


async def test_another_version_is_refused() -> None:
    disk = MemoryDisk()
    await disk.replace(FILE, module._line({"journal": "x", "version": 99}))
    with pytest.raises(JournalCorrupt, match="99"):
        await opened(disk)


@pytest.mark.parametrize("length", range(len(ALL) + 1))
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
async def test_a_power_cut_after_any_record_keeps_tombstones_epochs_and_their_past(length: int, keep: float) -> None:
    disk = MemoryDisk()
    journal, state = await opened(disk)
    for record in ALL[:length]:
        await put(journal, state, record)
    disk.crash(keep)
    _, found = await opened(disk)
    durable = max((i for i in range(length) if isinstance(ALL[i], DURABLE)), default=-1)
    prefixes = []
    for end in range(durable + 1, length + 1):
        folded = AgentState(journal.uid)
        for record in ALL[:end]:
            apply(folded, record)
        prefixes.append(folded)
    assert found in prefixes


async def test_f4_only_what_must_survive_a_power_cut_is_synced() -> None:
    disk = MemoryDisk()
    journal, state = await opened(disk)
    before = disk.syncs
    await put(journal, state, Starting(KEY, "s0", 1, Demand(), 0.0), Finished(KEY, "s0", 1, ENDED), Forgotten(KEY))
    assert disk.syncs == before
    await put(journal, state, Tombstoned(KEY, "s0", 1), Tombstoned(OTHER, "s0", 1), EpochRaised("s0", Epoch(1, 1)))
    assert disk.syncs == before + 1


async def test_it_is_compacted_as_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_BYTES", 2000)
    disk = MemoryDisk()
    journal, state = await opened(disk)
    for _ in range(200):
        await put(journal, state, Starting(KEY, "s0", 1, Demand(), 0.0), Forgotten(KEY))
    assert len(disk.read(FILE) or b"") < 4000


async def test_a_full_disk_is_said_and_a_rewrite_makes_it_good() -> None:
    disk = MemoryDisk()
    journal, state = await opened(disk)
    disk.capacity = 0
    with pytest.raises(DiskFailure, match="full"):
        await put(journal, state, Tombstoned(KEY, "s0", 1))
    disk.capacity = None
    await journal.rewrite(state)
    disk.crash()
    assert (await opened(disk))[1].attempts[KEY].phase is Phase.STOPPING


@pytest.mark.parametrize("kind", ["real", "memory"])
async def test_disk_contract(kind: str, tmp_path: Path) -> None:
    disk: Disk = RealDisk(tmp_path) if kind == "real" else MemoryDisk()
    assert disk.read("a") is None
    disk.append("a", b"one")
    disk.append("a", b"two")
    await disk.sync("a")
    assert disk.read("a") == b"onetwo"
    await disk.replace("a", b"new")
    disk.append("a", b"er")
    assert disk.read("a") == b"newer"
    await disk.remove("a")
    await disk.remove("a")
    assert disk.read("a") is None
    disk.close()


async def test_a_failed_append_leaves_no_half_line(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    disk.append("a", b"good")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # the kernel takes six bytes more, then refuses
    try:
        with pytest.raises(DiskFailure, match="cannot append to a"):
            disk.append("a", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    disk.append("a", b" again")
    assert disk.read("a") == b"good again"
    disk.close()


async def test_a_cancelled_replacement_is_waited_for_so_that_it_cannot_undo_the_next_agents(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    os.mkfifo(tmp_path / "journal.new")  # the thread that opens it is stuck until somebody reads
    writing = asyncio.create_task(disk.replace("journal", b"old"))
    await asyncio.sleep(0.05)
    writing.cancel()
    try:
        await asyncio.sleep(0.05)
        assert not writing.done()
    finally:
        reader = os.open(tmp_path / "journal.new", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(asyncio.CancelledError):
        await writing
    os.close(reader)
    disk.close()
