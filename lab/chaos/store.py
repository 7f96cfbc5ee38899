"""The real etcd under chaos: one member or three, each a process that can be killed and frozen by itself."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import processes
from lab.chaos.network import Network
from lab.etcd_binary import EtcdBinary
from lab.etcd_server import EtcdServer, Membership, free_ports
from lab.parts import PartFailed
from lab.processes import Identity


class Member:
    """One etcd process. Its calls block, and it dies with the thread that started it: so it has one. A `lab.parts.Part`."""

    def __init__(self, server: EtcdServer, name: str) -> None:
        self.name, self._server = name, server
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._frozen = False

    @property
    def endpoint(self) -> str:
        """host:port for clients."""
        return self._server.endpoint

    @property
    def pid(self) -> int:
        """See Part."""
        try:
            return self._server.pid
        except RuntimeError:
            return 0

    @property
    def word(self) -> str:
        """See Part."""
        return ("frozen" if self._frozen else "running") if self.pid else "dead"

    def identities(self) -> list[Identity]:
        """See Part."""
        return [processes.identify(self.pid)] if self.pid else []

    async def start(self) -> None:
        """See Part."""
        if not self.pid:
            await self._do(self._server.start)
            self._frozen = False

    async def kill(self, *, agent_only: bool = False) -> None:  # noqa: ARG002 - the Part port's
        """See Part."""
        if self.pid:
            await self._do(self._server.kill)

    async def freeze(self, *, everything: bool = False) -> None:  # noqa: ARG002 - the Part port's
        """See Part."""
        if self.pid:
            await self._do(self._server.pause)
            self._frozen = True

    async def thaw(self) -> None:
        """See Part."""
        if self.pid:
            await self._do(self._server.resume)
            self._frozen = False

    async def stop(self) -> None:
        """See Part."""
        await self._do(self._server.stop)
        self._thread.shutdown()

    async def _do(self, act: Callable[[], None]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, act)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise PartFailed(f"{self.name}: {error}") from error


class StoreCluster:
    """All members, as the one part that a federation knows. A `lab.parts.Part`."""

    def __init__(self, directory: Path, names: Sequence[str], binary: EtcdBinary, network: Network) -> None:
        self._network = network
        ports = {name: free_ports() for name in names}
        peers = {name: port[1] for name, port in ports.items()}
        self.members = {
            name: Member(EtcdServer(directory / name, binary=binary, membership=Membership(name, port, peers)), name)
            for name, port in ports.items()
        }

    @property
    def endpoints(self) -> list[str]:
        """host:port of all members, past the proxies."""
        return [member.endpoint for member in self.members.values()]

    @property
    def pid(self) -> int:
        """See Part: of any that runs."""
        return next((member.pid for member in self.members.values() if member.pid), 0)

    @property
    def word(self) -> str:
        """See Part: how most of them are."""
        running = sum(member.word == "running" for member in self.members.values())
        return "running" if 2 * running > len(self.members) else "dead"

    def identities(self) -> list[Identity]:
        """See Part."""
        return [each for member in self.members.values() for each in member.identities()]

    async def start(self) -> None:
        """See Part. All at once: none serves before most of them run."""
        await asyncio.gather(*(member.start() for member in self.members.values()))
        for name, member in self.members.items():
            self._network.member_ports[name] = int(member.endpoint.rpartition(":")[2])

    async def kill(self, *, agent_only: bool = False) -> None:
        """See Part."""
        await asyncio.gather(*(member.kill(agent_only=agent_only) for member in self.members.values()))

    async def freeze(self, *, everything: bool = False) -> None:
        """See Part."""
        await asyncio.gather(*(member.freeze(everything=everything) for member in self.members.values()))

    async def thaw(self) -> None:
        """See Part."""
        await asyncio.gather(*(member.thaw() for member in self.members.values()))

    async def stop(self) -> None:
        """See Part."""
        await asyncio.gather(*(member.stop() for member in self.members.values()))
