"""The guard's memory on disk: which keys were ever started, refused or tombstoned, and how they ended (PROTOCOL F4,
F8).

Theory: *at most one spawn per key, for the life of this directory*. A start is appended before the spawn, so after a
crash of the guard every key with a start and no exit is known as LOST and is never started again. It is not fsynced:
the page cache outlives the guard, and what kills the page cache (another boot) kills every process too. Tombstones are
fsynced before anybody hears of them.

`ledger` holds what is still of interest, one record a line: `crc32 kind json`. A torn last line is cut off; a bad line
before it means that the file was damaged, and then nothing may be started: LedgerCorrupt. Forgotten keys shrink to
8-byte digests in `ledger.old`; a chance collision of digests refuses a start, it never permits one. When SEGMENT of
them have gathered, the live file is written anew, so both files and the time to read them stay bounded by the work of
interest plus 8 bytes a key.
"""

from __future__ import annotations

import errno
import json
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

SEGMENT = 65_536
"""Forgotten keys per sorted block. Smaller: the ledger is rewritten more often; larger: a longer pause to sort (here
~10 ms)."""

MAX_TOMBSTONES = 65_536
"""Tombstones listed in the census; the oldest beyond it shrink to digests. They stay unstartable, only the list forgets
them."""

RESERVE_BYTES = 1 << 20
"""Given back to a full disk so that tombstones still fit (about 10,000 of them); smaller would only cover a moment."""


class LedgerCorrupt(Exception):
    """A record before the last one is unreadable: the disk lies, so nothing may be started from this directory."""


@dataclass(slots=True)
class StartRecord:
    """A key that was started and has no exit yet."""

    generation: int
    wall: float
    keeper_pid: int = 0
    keeper_ticks: int = 0


def digest(key: str) -> int:
    """64 bits that stand for a forgotten key."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


class Ledger:
    """See the module. Every method that writes raises OSError (ENOSPC among them) and then has changed nothing."""

    def __init__(self, directory: Path, boot_id: str) -> None:
        self._directory = directory
        self._path = directory / "ledger"
        self._old_path = directory / "ledger.old"
        self._reserve_path = directory / "reserve"
        self.started_keys: dict[str, StartRecord] = {}
        self.exits: dict[str, tuple[int, dict[str, Any]]] = {}
        self.tombstones: dict[str, None] = {}
        self._segments: list[array[int]] = []
        self._recent: set[int] = set()
        self._boot_id = ""
        self._size = self._load()
        self.same_boot = self._boot_id == boot_id
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self._size)
        if not self.same_boot:
            self._boot_id = boot_id
            self._append([("boot", {"id": boot_id})], durable=True)
        self.keep_reserve()

    def knows(self, key: str) -> bool:
        """Whether the key may never be started (again)."""
        if key in self.started_keys or key in self.exits or key in self.tombstones:
            return True
        mark = digest(key)
        return mark in self._recent or any(_contains(segment, mark) for segment in self._segments)

    def started(self, key: str, generation: int, wall: float) -> None:
        """Before the spawn."""
        self._append([("start", {"k": key, "g": generation, "w": wall})])
        self.started_keys[key] = StartRecord(generation, wall)

    def started_together(self, keys: Sequence[str], generation: int, wall: float) -> None:
        """Before the first of them is handed over; one record for all, which is there whole or not at all."""
        self._append([("starts", {"ks": keys, "g": generation, "w": wall})])
        for key in keys:
            self.started_keys[key] = StartRecord(generation, wall)

    def kept(self, key: str, pid: int, ticks: int) -> None:
        """Right after the spawn: who has to be dead before the key is called LOST."""
        self._append([("keeper", {"k": key, "p": pid, "t": ticks})])
        record = self.started_keys[key]
        record.keeper_pid, record.keeper_ticks = pid, ticks

    def adopted(self, keys: Iterable[str], generation: int) -> None:
        """The generation these keys now live under."""
        moved = [key for key in keys if key in self.started_keys]
        self._append([("adopt", {"k": key, "g": generation}) for key in moved])
        for key in moved:
            self.started_keys[key].generation = generation

    def exited(self, key: str, wire: dict[str, Any]) -> None:
        """After the last process of the key is gone."""
        self.exited_together({key: wire})

    def exited_together(self, wires: Mapping[str, dict[str, Any]]) -> None:
        """After the last process of each key is gone."""
        ended = [(key, self.started_keys[key].generation, wire) for key, wire in wires.items()]
        records = [("exit", {"k": key, "g": generation, "e": wire}) for key, generation, wire in ended]
        self._append_at_any_price(records, durable=False)
        for key, generation, wire in ended:
            del self.started_keys[key]
            self.exits[key] = (generation, wire)

    def tombstone(self, keys: Iterable[str]) -> None:
        """Durable on return: none of these keys will ever be started."""
        fresh = [key for key in dict.fromkeys(keys) if key not in self.tombstones]
        if not fresh:
            return
        self._append_at_any_price([("tomb", {"k": key}) for key in fresh], durable=True)
        self.tombstones.update(dict.fromkeys(fresh))
        while len(self.tombstones) > MAX_TOMBSTONES:
            oldest = next(iter(self.tombstones))
            del self.tombstones[oldest]
            self._recent.add(digest(oldest))

    def forget(self, keys: Iterable[str]) -> None:
        """Shrink ended or tombstoned keys to digests; running ones are left alone."""
        known = [key for key in keys if key not in self.started_keys and (key in self.exits or key in self.tombstones)]
        if known:
            self._append_at_any_price([("forgets", {"ks": known})], durable=False)
        for key in known:
            self._forget_one(key)
        if len(self._recent) >= SEGMENT:
            with suppress(OSError):  # a full disk: the records above are enough, and the next forget tries again
                self._rotate()

    def keep_reserve(self) -> None:
        """Have the reserve in place if the disk has room for it."""
        if self._reserve_path.exists():
            return
        fd = os.open(self._reserve_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            self._reserve_path.unlink()
        finally:
            os.close(fd)

    def close(self) -> None:
        """Everything on disk, file closed."""
        os.fsync(self._fd)
        os.close(self._fd)

    def _forget_one(self, key: str) -> None:
        self.exits.pop(key, None)
        self.tombstones.pop(key, None)
        self._recent.add(digest(key))

    def _append_at_any_price(self, records: list[tuple[str, dict[str, Any]]], *, durable: bool) -> None:
        """Like `_append`; a full disk first gets the reserve back."""
        try:
            self._append(records, durable=durable)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve_path.exists():
                raise
            self._reserve_path.unlink()
            self._append(records, durable=durable)

    def _append(self, records: list[tuple[str, dict[str, Any]]], *, durable: bool = False) -> None:
        data = b"".join(_line(kind, body) for kind, body in records)
        try:
            written = os.write(self._fd, data) if data else 0
            if written != len(data):
                raise OSError(errno.ENOSPC, "the disk of the ledger is full")
            if durable:
                os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _load(self) -> int:
        """Fold both files; returns the length of the good part of the live one."""
        if self._old_path.exists():
            marks = array("Q")
            marks.frombytes(self._old_path.read_bytes()[: self._old_path.stat().st_size // 8 * 8])
            for start in range(0, len(marks), SEGMENT):
                self._segments.append(array("Q", sorted(marks[start : start + SEGMENT])))
        data = self._path.read_bytes() if self._path.exists() else b""
        good = 0
        while good < len(data):
            end = data.find(b"\n", good)
            record = _parse(data[good:end]) if end >= 0 else None
            if record is None:
                if 0 <= end < len(data.rstrip(b"\0")) - 1:
                    raise LedgerCorrupt(f"{self._path}: unreadable record at byte {good}, and more records after it")
                return good
            self._apply(*record)
            good = end + 1
        return good

    def _apply(self, kind: str, body: dict[str, Any]) -> None:
        key = body.get("k", "")
        match kind:
            case "boot":
                self._boot_id = body["id"]
            case "start":
                self.started_keys[key] = StartRecord(body["g"], body["w"])
            case "keeper" if key in self.started_keys:
                self.started_keys[key].keeper_pid, self.started_keys[key].keeper_ticks = body["p"], body["t"]
            case "starts":
                for each in body["ks"]:
                    self.started_keys[each] = StartRecord(body["g"], body["w"])
            case "adopt" if key in self.started_keys:
                self.started_keys[key].generation = body["g"]
            case "exit":
                self.started_keys.pop(key, None)
                self.exits[key] = (body["g"], body["e"])
            case "tomb":
                self.tombstones[key] = None
            case "forget":  # as guards before version 2 wrote it
                self._forget_one(key)
            case "forgets":
                for each in body["ks"]:
                    self._forget_one(each)

    def _rotate(self) -> None:
        """Archive the digests first, then replace the live file: a crash between the two only repeats digests."""
        block = array("Q", sorted(self._recent))
        with open(self._old_path, "ab") as old:
            old.truncate(old.tell() // 8 * 8)
            old.write(block.tobytes())
            old.flush()
            os.fsync(old.fileno())
        fresh = self._path.with_suffix(".new")
        with open(fresh, "wb") as out:
            out.writelines(self._snapshot())
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        fd = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.rename(fresh, self._path)
        os.close(self._fd)
        self._fd, self._size = fd, size
        self._segments.append(block)
        self._recent = set()
        directory = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(directory)
        os.close(directory)

    def _snapshot(self) -> Iterable[bytes]:
        yield _line("boot", {"id": self._boot_id})
        for key, record in self.started_keys.items():
            yield _line("start", {"k": key, "g": record.generation, "w": record.wall})
            yield _line("keeper", {"k": key, "p": record.keeper_pid, "t": record.keeper_ticks})
        for key, (generation, wire) in self.exits.items():
            yield _line("exit", {"k": key, "g": generation, "e": wire})
        for key in self.tombstones:
            yield _line("tomb", {"k": key})


_encode = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: `json.dumps` with separators makes an encoder a call."""


def _line(kind: str, body: dict[str, Any]) -> bytes:
    text = f"{kind} {_encode(body)}".encode()
    return b"%08x %s\n" % (crc32(text), text)


def _parse(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """The record in a line without its newline; None when it is not one."""
    if len(line) < 10 or line[:8] != b"%08x" % crc32(line[9:]):
        return None
    kind, _, body = line[9:].decode().partition(" ")
    return kind, json.loads(body)


def _contains(segment: array[int], mark: int) -> bool:
    at = bisect_left(segment, mark)
    return at < len(segment) and segment[at] == mark
