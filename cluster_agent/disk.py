"""The Disk port: a directory of small files that are appended to or replaced whole.

Contract:

1. `append` hands bytes to the operating system: they survive the end of the process, not a power cut.
2. After `sync` returned, everything appended to that file before survives a power cut.
3. `replace` is atomic and durable: afterwards, whatever happens, the file is wholly the old or wholly the new one.
4. A failed `append` leaves the file as it was; a failed `sync` leaves it in doubt, and only `replace` makes it good
   again.

`RealDisk` is a directory; `MemoryDisk` is the simulator's, with a power cut (`crash`) and a size at which it is full.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

LOCK_FILE = "agent.lock"


class DiskFailure(OSError):
    """The disk did not take it: full, read-only or broken. The text says which."""


class Disk(Protocol):
    """See the module's contract. Names are plain file names."""

    def read(self, name: str) -> bytes | None:
        """The whole file, or None if there is none. Raises DiskFailure."""
        ...

    def append(self, name: str, data: bytes) -> None:
        """Add to the end, making the file if need be. Raises DiskFailure."""
        ...

    async def sync(self, name: str) -> None:
        """Make what was appended durable. Raises DiskFailure."""
        ...

    async def replace(self, name: str, data: bytes) -> None:
        """Make the file be `data`, atomically and durably. Raises DiskFailure."""
        ...

    async def remove(self, name: str) -> None:
        """Drop the file durably; nothing happens if there is none. Raises DiskFailure."""
        ...

    def close(self) -> None:
        """Give back file handles."""
        ...


class RealDisk:
    """A directory of the host, made if need be (mode 0700: reports may hold what tasks returned).

    It is locked: two agents in one directory would tear each other's journal. Raises DiskFailure when another has it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, int] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot make {directory}: {error.strerror}") from error
        try:
            self._lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot use {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DiskFailure(error.errno, f"another agent uses {directory}") from error

    def read(self, name: str) -> bytes | None:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot read {name}: {error.strerror}") from error

    def append(self, name: str, data: bytes) -> None:
        try:
            handle = self._open(name)
            before = os.fstat(handle).st_size
            written = 0
            try:
                while written < len(data):
                    written += os.write(handle, data[written:])
            except OSError:
                os.ftruncate(handle, before)  # a half line in the middle would hide what comes after it
                raise
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot append to {name}: {error.strerror}") from error

    async def sync(self, name: str) -> None:
        try:
            await _to_its_end(partial(os.fdatasync, self._open(name)))
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot sync {name}: {error.strerror}") from error

    async def replace(self, name: str, data: bytes) -> None:
        try:
            await _to_its_end(partial(self._replace, name, data))
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot replace {name}: {error.strerror}") from error

    async def remove(self, name: str) -> None:
        try:
            self._forget(name)
            (self._directory / name).unlink(missing_ok=True)
            await _to_its_end(self._sync_directory)
        except OSError as error:
            raise DiskFailure(error.errno, f"cannot remove {name}: {error.strerror}") from error

    def close(self) -> None:
        for name in list(self._handles):
            self._forget(name)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _open(self, name: str) -> int:
        if name not in self._handles:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._handles[name] = os.open(self._directory / name, flags, 0o600)
            self._sync_directory()  # the name of a new file must survive too
        return self._handles[name]

    def _replace(self, name: str, data: bytes) -> None:
        draft = self._directory / f"{name}.new"
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            written = 0
            while written < len(data):
                written += os.write(handle, data[written:])
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.replace(self._directory / name)
        self._forget(name)
        self._sync_directory()

    def _forget(self, name: str) -> None:
        handle = self._handles.pop(name, None)
        if handle is not None:
            os.close(handle)

    def _sync_directory(self) -> None:
        handle = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


async def _to_its_end(work: Callable[[], None]) -> None:
    """`work` in a thread. Whoever is cancelled still waits for it: a thread cannot be stopped, and one that replaced a
    file after the directory's lock was given back would undo what the next agent wrote there."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled = False
    while not running.done():
        try:
            await asyncio.wait((running,))
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        running.exception()
        raise asyncio.CancelledError
    running.result()


class MemoryDisk:
    """The same contract in memory. `crash` is a power cut; `capacity` is where it is full (None: never)."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.syncs = 0
        """How often something was made durable; what a hop must not do (DESIGN 13)."""
        self._files: dict[str, bytearray] = {}
        self._durable: dict[str, int] = {}

    def read(self, name: str) -> bytes | None:
        return bytes(self._files[name]) if name in self._files else None

    def append(self, name: str, data: bytes) -> None:
        self._room(len(data))
        self._files.setdefault(name, bytearray()).extend(data)

    async def sync(self, name: str) -> None:
        self._room(0)
        self.syncs += 1
        self._durable[name] = len(self._files.setdefault(name, bytearray()))

    async def replace(self, name: str, data: bytes) -> None:
        self._room(len(data) - len(self._files.get(name, b"")))
        self.syncs += 1
        self._files[name] = bytearray(data)
        self._durable[name] = len(data)

    async def remove(self, name: str) -> None:
        self._files.pop(name, None)
        self._durable.pop(name, None)

    def close(self) -> None:
        """Nothing is held."""

    def crash(self, keep: float = 0.0) -> None:
        """Cut the power: of every file's unsynced tail only the share `keep` (0 to 1) is left, torn anywhere."""
        for name in list(self._files):
            durable = self._durable.get(name)
            if durable is None and keep == 0.0:
                del self._files[name]
                continue
            start = durable or 0
            tail = len(self._files[name]) - start
            del self._files[name][start + int(tail * keep) :]

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return sum(len(data) for data in self._files.values())

    def _room(self, more: int) -> None:
        if self.capacity is not None and self.used + max(0, more) > self.capacity:
            raise DiskFailure(28, "the disk is full")
