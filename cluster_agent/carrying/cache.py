"""Content by its digest: what many attempts read is fetched once. Bounded by bytes; what was used longest ago goes first.

Attempts get copies, never the cached file: a workload that writes into its inputs must not change what others read (on file systems
that can, a copy shares the blocks until then). So anything may be evicted at any time: whoever copies has it open. What is
larger than the cache goes straight to its place.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from cluster_agent.carrying.courier import Courier, DiskFull
from cluster_agent.carrying.port import Wanted
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactSource

READ_ONLY = 0o444

AT_ONCE = 16
"""Artifacts brought at one time, copies from the cache included: a join of ten thousand must not open as many files. Fewer would leave
the courier's transfers idle between small ones."""


class Cache:
    """One folder; nobody else's. `room`: bytes."""

    def __init__(self, folder: Path, courier: Courier, tally: Tally, room: int) -> None:
        self._folder, self._courier, self._tally, self._room = folder, courier, tally, room
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._under_way: dict[str, asyncio.Lock] = {}
        self._drafts = 0
        self._at_once = asyncio.Semaphore(AT_ONCE)
        found = []
        for entry in os.scandir(folder):
            if entry.name.endswith(".draft"):
                os.unlink(entry.path)
            else:
                about = entry.stat()
                found.append((about.st_mtime_ns, entry.name, about.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
        self._make_room(0)

    async def bring(self, source: ArtifactSource, place: Path) -> None:
        """Have the artifact at `place`, read-only. Raises Undeliverable, OSError."""
        async with self._at_once:
            await self._bring(source, place)

    async def _bring(self, source: ArtifactSource, place: Path) -> None:
        digest = source.ref.digest.hex()
        if source.ref.size > self._room:
            await self._fetch(source, place)
            return
        lock = self._under_way.setdefault(digest, asyncio.Lock())
        async with lock:
            try:
                if digest in self._sizes:
                    self._tally.cached += 1
                else:
                    await self._fill(source, digest)
            finally:
                self._under_way.pop(digest, None)
        cached = self._folder / digest
        self._sizes.move_to_end(digest)
        try:
            await asyncio.to_thread(_copy, cached, place)
        except FileNotFoundError:  # somebody has tidied up
            self._sizes.pop(digest, None)
            await self._fetch(source, place)

    async def _fill(self, source: ArtifactSource, digest: str) -> None:
        self._drafts += 1
        draft = self._folder / f"{digest}.{self._drafts}.draft"
        self._make_room(source.ref.size)
        try:
            await self._fetch(source, draft)
            draft.replace(self._folder / digest)
        finally:
            draft.unlink(missing_ok=True)
        self._sizes[digest] = source.ref.size

    async def _fetch(self, source: ArtifactSource, place: Path) -> None:
        try:
            await self._download(source, place)
        except DiskFull:
            if not self._sizes:
                raise
            self._make_room(self._room)  # what is cached can be had again; the disk is needed now
            await self._download(source, place)

    async def _download(self, source: ArtifactSource, place: Path) -> None:
        with place.open("wb") as file:
            await self._courier.fetch(Wanted(source), file)
            os.fchmod(file.fileno(), READ_ONLY)

    def _make_room(self, size: int) -> None:
        """For that many bytes more."""
        held = sum(self._sizes.values())
        while self._sizes and held + size > self._room:
            name, gone = self._sizes.popitem(last=False)
            held -= gone
            with suppress(FileNotFoundError):
                (self._folder / name).unlink()


def _copy(source: Path, place: Path) -> None:
    """A copy, which shares blocks where the file system can. Raises OSError."""
    with open(source, "rb", buffering=0) as read, open(place, "wb", buffering=0) as written:
        os.utime(source)  # the order of use, for the next agent
        left = os.fstat(read.fileno()).st_size
        try:
            while left > 0 and (moved := os.copy_file_range(read.fileno(), written.fileno(), left)) > 0:
                left -= moved
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            read.seek(0)  # not on this file system
            written.truncate(0)
            written.seek(0)
            shutil.copyfileobj(read, written, 1 << 20)
    place.chmod(READ_ONLY)
