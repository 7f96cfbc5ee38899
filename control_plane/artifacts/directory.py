"""Objects as files below a directory: for the local federation, and for replicas that share a file system.

Theory. An object is written beside its place, synced, then linked or renamed into it, so a reader finds all of it or nothing,
also after a power cut. Files that were never moved into place carry a name no key can have (it begins with a dot) and are
removed once they are old. All calls block, so they run in threads of their own: a slow disk must not take the threads that
others wait for. A call that is given up goes on in its thread, like a request to a remote store; on a file system that hangs
every thread is soon taken so, and further calls wait for one outside the pool, whose queue nothing would bound.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from baton.clock import Clock, Entropy
from baton.time_limits import time_limit
from control_plane.artifacts.base import (
    LIST_LIMIT,
    MAX_OBJECT_BYTES,
    ObjectInfo,
    ObjectStoreDown,
    ObjectStoreError,
    ObjectStoreFull,
    ObjectStoreRefused,
    check_key,
)

THREADS = 8
"""For blocking calls. Fewer: one hanging file system call holds up more; more: they only queue at the disk."""

DRAFTS = ".drafts"
"""Folder of files that are not in place yet; on the same file system, so that a link into place is one step."""

DRAFT_SECONDS = 3600.0
"""Age after which a draft's writer is dead: a put has a time-out of a minute."""

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


class DirectoryStore:
    """See `ObjectStore`."""

    def __init__(self, root: Path, clock: Clock, entropy: Entropy) -> None:
        """Makes the directory. Raises OSError."""
        self._root, self._clock, self._entropy = root.absolute(), clock, entropy
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._root / DRAFTS).mkdir(mode=0o700, exist_ok=True)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="artifacts")
        self._free = asyncio.Semaphore(THREADS)
        self._remove_old_drafts()

    @property
    def name(self) -> str:
        """See `ObjectStore`."""
        return f"the directory {self._root}"

    async def put(self, key: str, data: bytes, *, timeout: float, if_absent: bool = False) -> bool:
        """See `ObjectStore`."""
        draft = self._root / DRAFTS / f".{self._entropy.token(12)}"
        return await self._do(partial(_write, draft, self._path(key), data, if_absent=if_absent), timeout)

    async def get(self, key: str, *, timeout: float) -> bytes | None:
        """See `ObjectStore`."""
        return await self._do(partial(_read, self._path(key)), timeout)

    async def page(self, prefix: str, *, timeout: float, after: str = "") -> Sequence[ObjectInfo]:
        """See `ObjectStore`."""
        return await self._do(partial(self._list, prefix, after), timeout)

    async def folders(self, prefix: str, *, timeout: float) -> Sequence[str]:
        """See `ObjectStore`."""
        return await self._do(partial(_folders, self._path(prefix.rstrip("/"))), timeout)

    async def delete(self, keys: Sequence[str], *, timeout: float) -> None:
        """See `ObjectStore`."""
        await self._do(partial(self._delete, [self._path(key) for key in keys]), timeout)

    async def close(self) -> None:
        """See `ObjectStore`."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key) if key else self._root

    async def _do(self, work: Callable[[], T], timeout: float) -> T:
        """`work` in a thread. Raises ObjectStoreError."""
        try:
            async with time_limit(timeout):
                await self._free.acquire()
                return await asyncio.wrap_future(self._begin(work))
        except TimeoutError:
            raise ObjectStoreDown(f"{self.name} did not answer within {timeout:g} s") from None
        except OSError as error:
            raise self._failure(error) from error

    def _begin(self, work: Callable[[], T]) -> Future[T]:
        """Start in a thread that is free; it is free again when `work` ends, however long nobody has waited for it by then."""
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop ended before a call that hung: nobody waits any more
                loop.call_soon_threadsafe(self._free.release)

        try:
            begun = self._threads.submit(work)
        except RuntimeError:  # closed
            self._free.release()
            raise
        begun.add_done_callback(ended)
        return begun

    def _failure(self, error: OSError) -> ObjectStoreError:
        if error.errno in _FULL:
            return ObjectStoreFull(f"{self.name} is full: {error.strerror}")
        if error.errno in _REFUSED:
            return ObjectStoreRefused(f"{self.name} refuses: {error.strerror}")
        return ObjectStoreDown(f"{self.name} does not work: {error.strerror}")

    def _list(self, prefix: str, after: str) -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        for info in _walk(self._path(prefix.rstrip("/")), prefix, after):
            found.append(info)
            if len(found) == LIST_LIMIT:
                break
        return found

    def _delete(self, paths: Sequence[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            self._remove_empty(folder)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:  # not empty, or another put has made it anew
                return
            folder = folder.parent

    def _remove_old_drafts(self) -> None:
        oldest = self._clock.wall() - DRAFT_SECONDS
        for entry in os.scandir(self._root / DRAFTS):
            try:
                if entry.stat().st_mtime < oldest:
                    Path(entry.path).unlink(missing_ok=True)
            except FileNotFoundError:  # another replica was first
                continue


def _write(draft: Path, target: Path, data: bytes, *, if_absent: bool) -> bool:
    """Blocks. Raises OSError; leaves no draft behind unless the process dies."""
    if len(data) > MAX_OBJECT_BYTES:
        raise OSError(errno.EFBIG, f"an object holds at most {MAX_OBJECT_BYTES} bytes")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return _place(draft, target, if_absent=if_absent)
    finally:
        draft.unlink(missing_ok=True)


def _place(draft: Path, target: Path, *, if_absent: bool) -> bool:
    """Move a draft into place, durably."""
    while True:
        made = _make_folders(target.parent)
        try:
            if if_absent:
                os.link(draft, target)
            else:
                draft.rename(target)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if not draft.exists():
                raise
            continue  # a delete has taken the folder that was empty a moment ago
        for folder in (target.parent, *made):
            _sync_folder(folder)
        return True


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and what is above it; the folders whose entries changed."""
    changed: list[Path] = []
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        changed.append(each.parent)
    return changed


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # deleted meanwhile, and with it what was put: the deleter knew that nobody wants it
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _folders(path: Path) -> list[str]:
    return [name for name, is_folder in _entries(path) if is_folder]


def _walk(folder: Path, prefix: str, after: str) -> Iterator[ObjectInfo]:
    """Files below a folder in order of key. A folder counts as its name and a slash, for that is how keys compare."""
    for name, is_folder in sorted(
        (f"{name}/" if is_folder else name, is_folder) for name, is_folder in _entries(folder)
    ):
        key = prefix + name
        if is_folder:
            if not after.startswith(key) and key <= after:
                continue
            yield from _walk(folder / name, key, after)
        elif key > after:
            try:
                stat = (folder / name).stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(key, stat.st_size, stat.st_mtime)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of what lies in a folder, drafts left out; nothing if it is not there."""
    try:
        with os.scandir(folder) as found:
            return sorted((each.name, each.is_dir(follow_symlinks=False)) for each in found if each.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
