"""The process world with files: a carrier in memory that can be stopped, broken and made to lie."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from baton.artifacts import manifest_of
from cluster_agent.carrying.cache import Cache
from cluster_agent.carrying.courier import Courier
from cluster_agent.carrying.fetching import Fetcher
from cluster_agent.carrying.port import CarrierCorrupt, CarrierError, CarrierLacks, Download, Maker, NameUsed, Wanted
from cluster_agent.carrying.shelf import Shelf
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactRef, ArtifactSource
from cluster_agent.core.model import AttemptKey as CoreKey
from cluster_agent.executors.base import AttemptKey, StartRequest
from cluster_agent.executors.carrying import Carrying
from cluster_agent.executors.process import ProcessExecutor
from tests.contract.executor_worlds import ProcessWorld

RUN = "namespaces/default/runs/story"
CLUSTER = "0193feedbeef"
PATIENCE = 1.0
"""Seconds, instead of a minute."""


@dataclass(slots=True)
class MemoryStore:
    """What the artifact store holds, and what is wrong with it."""

    objects: dict[tuple[Maker, str], bytes] = field(default_factory=dict)
    codes: dict[str, bytes] = field(default_factory=dict)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Unset: every transfer waits."""
    waiting: int = 0
    failures: list[CarrierError] = field(default_factory=list)
    """Raised by the next calls, one each."""
    down: CarrierError | None = None
    """Raised by all calls."""
    damaged: int = 0
    """So many downloads come damaged."""
    puts: list[str] = field(default_factory=list)
    gets: list[str] = field(default_factory=list)

    async def admit(self) -> None:
        self.waiting += 1
        try:
            await self.open.wait()
        finally:
            self.waiting -= 1
        if self.failures:
            raise self.failures.pop(0)
        if self.down is not None:
            raise self.down

    def publish(self, key: AttemptKey, task: str, name: str, content: bytes, cluster: str = CLUSTER) -> ArtifactSource:
        """Content of another attempt, as a dispatch names it."""
        self.objects[Maker("default", key, cluster), name] = content
        return source_of(key, task, ref_of(name, content), cluster)

    def content(self, key: AttemptKey, name: str) -> bytes:
        return self.objects[Maker("default", key, CLUSTER), name]

    def names(self, key: AttemptKey) -> set[str]:
        return {name for maker, name in self.objects if maker.key == key}


def ref_of(name: str, content: bytes) -> ArtifactRef:
    return ArtifactRef(name, len(content), manifest_of(io.BytesIO(content)).digest())


def source_of(key: AttemptKey, task: str, ref: ArtifactRef, cluster: str = CLUSTER) -> ArtifactSource:
    return ArtifactSource("default", CoreKey(key.run_uid, key.task, key.n, key.nonce), cluster, ref, task)


class MemoryCarrier:
    """See Carrier."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def put(self, maker: Maker, name: str, file: BinaryIO) -> ArtifactRef:
        await self._store.admit()
        content = file.read()
        if self._store.objects.get((maker, name), content) != content:
            raise NameUsed("stored already, with other content")
        self._store.objects[maker, name] = content
        self._store.puts.append(name)
        return ref_of(name, content)

    def download(self, wanted: Wanted, into: BinaryIO) -> Download:
        return _Download(self._store, wanted, into)

    async def close(self) -> None:
        pass


class _Download:
    def __init__(self, store: MemoryStore, wanted: Wanted, into: BinaryIO) -> None:
        self._store, self._wanted, self._into = store, wanted, into

    async def run(self) -> None:
        await self._store.admit()
        source = self._wanted.source
        if source is None:
            content = self._store.codes.get(self._wanted.code_sha256)
            whole = content is not None and hashlib.sha256(content).hexdigest() == self._wanted.code_sha256
        else:
            key = source.maker
            maker = Maker(source.namespace, AttemptKey(key.run_uid, key.task, key.n, key.nonce), source.cluster_uid)
            content = self._store.objects.get((maker, source.ref.name))
            whole = content is not None and ref_of(source.ref.name, content) == source.ref
        if content is None:
            raise CarrierLacks("it is not in the store")
        if self._store.damaged or not whole:
            self._store.damaged -= 1
            raise CarrierCorrupt("chunk 0 does not match its hash")
        self._store.gets.append(self._wanted.words)
        self._into.write(content)


@dataclass(slots=True)
class Passage:
    """The way of a start to the guard. Unset events hold it up: before it leaves, or after it has arrived."""

    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    returns: asyncio.Event = field(default_factory=asyncio.Event)
    unclear: int = 0
    """So many calls fail although the guard has the start."""
    asked: list[AttemptKey] = field(default_factory=list)


class UnclearExecutor(ProcessExecutor):
    """The guard's adapter, on a way that can be slow or torn."""

    passage: Passage

    async def start(self, requests: Sequence[StartRequest]) -> None:
        self.passage.asked.extend(request.key for request in requests)
        await self.passage.leaves.wait()
        await super().start(requests)
        await self.passage.returns.wait()
        if self.passage.unclear:
            self.passage.unclear -= 1
            raise ConnectionError("the connection ended while the guard read")


class CarryingWorld(ProcessWorld):
    """A guard, and agents whose files travel."""

    def __init__(self, directory: Path, flags: Sequence[str] = (), *, room: int = 1 << 20) -> None:
        super().__init__(directory, flags)
        self.store = MemoryStore()
        self.store.open.set()
        self.passage = Passage()
        self.passage.leaves.set()
        self.passage.returns.set()
        self._own, self._room = directory / "carried", room

    def executor(self) -> Carrying:  # type: ignore[override]
        """A new agent's end, with the decorator around it."""
        tally, clock, inner = Tally(), self.clock, super().executor()
        shelf = Shelf(self.directory, self._own)
        courier = Courier(MemoryCarrier(self.store), clock, tally, patience=PATIENCE)
        fetcher = Fetcher(shelf, Cache(shelf.cache, courier, tally, self._room), courier)
        return Carrying(inner, shelf, fetcher, courier, clock, tally, cluster_uid=lambda: CLUSTER)

    def adapter(self, guard_argv: Sequence[str]) -> ProcessExecutor:
        made = UnclearExecutor(self.directory, self.clock, guard_argv=guard_argv)
        made.passage = self.passage
        return made

    def shell(self, key: AttemptKey, script: str, **more: object) -> StartRequest:
        """A start of a shell."""
        env = {"PATH": self.path, "BATON_RUN": RUN, "BATON_TASK": "it"}
        return StartRequest(key, 1, ("sh", "-c", script), env, **more)  # type: ignore[arg-type]
