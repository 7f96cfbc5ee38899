"""The agent's journal: what must outlive the process, as records in one append-only file (PROTOCOL F3, F4, S6).

A line is `crc32 json`, and the first line names the journal's uid, made once: another uid means a reinstalled agent.
State is the fold of the lines (`core.records`). Only tombstones, epochs, sessions and boots are synced; the rest may
lose its tail in a power cut, after which everything is dead anyway and the boot id says so.

* A **torn tail** is what an append met when the power went: bytes at the end that are no whole line. It is dropped.
* A bad line *before* good ones is something else; the journal then refuses to open rather than forget a tombstone.
* The file is rewritten as a snapshot when it has grown, on every opening, and after any failure of the disk: a
  rewrite is atomic and holds the whole state, so nothing that failed to be written needs to be remembered apart.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from baton.clock import Entropy
from cluster_agent.core.model import AgentState
from cluster_agent.core.records import DURABLE, Record, apply, snapshot
from cluster_agent.disk import Disk
from cluster_agent.journal_codec import CodecError, decode, encode

FILE = "journal"
VERSION = 1

COMPACT_BYTES = 4 << 20
"""Growth since the last snapshot at which the file is rewritten. Smaller: rewrites under load; larger: slow openings
(a line is about 10 us to read, so 4 MiB is about 0.2 s)."""


class JournalCorrupt(Exception):
    """The journal is damaged in the middle, or of another version. An operator must look (removing it makes a new
    agent)."""


class Journal:
    """One agent's journal. `write` before effects."""

    def __init__(self, disk: Disk, uid: str) -> None:
        self.uid = uid
        self._disk = disk
        self._grown = 0
        self._snapshot_bytes = 0

    @staticmethod
    async def open(disk: Disk, entropy: Entropy) -> tuple[Journal, AgentState]:
        """Read or make the journal; the state it holds. Raises JournalCorrupt, DiskFailure."""
        data = disk.read(FILE)
        uid, records = _parse(data) if data else ("", [])
        state = AgentState(journal_uid=uid or entropy.token())
        for record in records:
            apply(state, record)
        journal = Journal(disk, state.journal_uid)
        await journal.rewrite(state)
        return journal, state

    async def write(self, records: Sequence[Record], state: AgentState) -> None:
        """Append; durable when it returns if one of them must be. `state` already holds them. Raises DiskFailure.

        After a failure call `rewrite` until it succeeds, before anything is written again.
        """
        if not records:
            return
        data = b"".join(_line(encode(record)) for record in records)
        if self._grown + len(data) > COMPACT_BYTES + self._snapshot_bytes:
            await self.rewrite(state)
            return
        self._disk.append(FILE, data)
        self._grown += len(data)
        if any(isinstance(record, DURABLE) for record in records):
            await self._disk.sync(FILE)

    async def rewrite(self, state: AgentState) -> None:
        """Make the file a snapshot of `state`, atomically and durably. Raises DiskFailure."""
        data = b"".join((_line(_header(self.uid)), *(_line(encode(record)) for record in snapshot(state))))
        await self._disk.replace(FILE, data)
        self._grown, self._snapshot_bytes = 0, len(data)


def _header(uid: str) -> dict[str, Any]:
    return {"journal": uid, "version": VERSION}


_encode_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode
"""Made once: `json.dumps` with separators makes an encoder a call."""


def _line(value: dict[str, Any]) -> bytes:
    text = _encode_json(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(data: bytes) -> tuple[str, list[Record]]:
    """Uid and records. Raises JournalCorrupt."""
    values: list[dict[str, Any]] = []
    torn = -1
    for number, line in enumerate(data.split(b"\n")):
        value = _value(line)
        if value is None:
            torn = number if torn < 0 else torn
        elif torn >= 0:
            raise JournalCorrupt(f"line {torn + 1} of the agent's journal is damaged, and good ones follow it")
        else:
            values.append(value)
    if not values:
        raise JournalCorrupt(
            "the agent's journal has no whole line; its first one is written atomically, so this is damage"
        )
    header = values[0]
    if header.get("version") != VERSION or not isinstance(header.get("journal"), str):
        raise JournalCorrupt(f"the agent's journal begins with {header!r}; this agent reads version {VERSION}")
    return header["journal"], list(_records(values[1:]))


def _records(values: Iterable[dict[str, Any]]) -> Iterable[Record]:
    for value in values:
        try:
            yield decode(value)
        except CodecError as error:
            raise JournalCorrupt(f"the agent's journal holds what this agent cannot read: {error}") from error


def _value(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line, else None."""
    crc, _, text = line.partition(b" ")
    try:
        if int(crc, 16) != zlib.crc32(text):
            return None
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
