"""The worlds a store is tested in: one interface for what a test does to the server, one class per adapter."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from baton.clock import SystemClock
from control_plane.store.base import Store
from control_plane.store.etcd import EtcdStore
from control_plane.store.memory import MemoryEtcd, MemorySnapshot, MemoryStore
from lab.etcd_server import EtcdServer

_numbers = itertools.count()


def next_prefix() -> str:
    """A key prefix that no other test of this process uses."""
    return f"test{next(_numbers)}/"


class StoreWorld(Protocol):
    """A server and the means to hurt it."""

    def client(self) -> Store:
        """A new client of the same keys; closed when the test ends."""
        ...

    def freeze(self) -> None:
        """From now on nothing is answered."""
        ...

    def thaw(self) -> None:
        """Undo `freeze`."""
        ...

    def bounce(self) -> None:
        """Kill the server and start it again on its data."""
        ...

    def set_nospace(self, active: bool) -> None:
        """Exhaust the quota, or free it."""
        ...

    def back_up(self) -> None:
        """Remember the data of this moment."""
        ...

    def restore(self, *, bump_revision: int = 0) -> None:
        """Go back to it."""
        ...

    async def close(self) -> None:
        """Close every client."""
        ...


class MemoryWorld:
    def __init__(self) -> None:
        self._server = MemoryEtcd(SystemClock())
        self._clients: list[MemoryStore] = []
        self._backup: MemorySnapshot | None = None

    def client(self) -> Store:
        self._clients.append(MemoryStore(self._server))
        return self._clients[-1]

    def freeze(self) -> None:
        self._server.lose_quorum()

    def thaw(self) -> None:
        self._server.regain_quorum()

    def bounce(self) -> None:
        self._server.change_leader()

    def set_nospace(self, active: bool) -> None:
        self._server.nospace = active

    def back_up(self) -> None:
        self._backup = self._server.snapshot()

    def restore(self, *, bump_revision: int = 0) -> None:
        assert self._backup is not None
        self._server.restore(self._backup, bump_revision=bump_revision)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        await self._server.close()


class EtcdWorld:
    def __init__(self, server: EtcdServer, backup: Path) -> None:
        self._server = server
        self._backup = backup
        self._prefix = next_prefix()
        self._clients: list[EtcdStore] = []

    def client(self) -> Store:
        self._clients.append(EtcdStore([self._server.endpoint], key_prefix=self._prefix, clock=SystemClock()))
        return self._clients[-1]

    def freeze(self) -> None:
        self._server.pause()

    def thaw(self) -> None:
        self._server.resume()

    def bounce(self) -> None:
        self._server.kill()
        self._server.restart()

    def set_nospace(self, active: bool) -> None:
        self._server.set_nospace(active)

    def back_up(self) -> None:
        self._server.snapshot(self._backup)

    def restore(self, *, bump_revision: int = 0) -> None:
        self._server.restore(self._backup, bump_revision=bump_revision)

    async def close(self) -> None:
        self._server.resume()
        for client in self._clients:
            await client.close()


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One real etcd for all tests of a session; each test has a key prefix of its own."""
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as server:
        yield server


@pytest.fixture(params=["memory", "etcd"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreWorld]:
    """Each test runs in both."""
    chosen: StoreWorld
    if request.param == "memory":
        chosen = MemoryWorld()
    else:
        chosen = EtcdWorld(request.getfixturevalue("etcd_server"), tmp_path / "backup")
    yield chosen
    await chosen.close()


@pytest.fixture
def store(world: StoreWorld) -> Store:
    """The first client."""
    return world.client()
