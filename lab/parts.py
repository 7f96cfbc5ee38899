"""The parts of a local federation that can be killed, frozen and started: what is common to all, etcd, and replicas.

Theory: each part owns its processes and says in one word how it is (`running`, `frozen`, `agent dead`, `dead`); nobody
else touches them. A part that died by itself is not started again: here a person watches, and wants to see it. All run
in the supervisor's main thread, whose end is the children's end (processes.py). A cluster is more than one process, so
it has a module of its own (machine_part.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from baton.time_limits import time_limit
from lab import processes
from lab.etcd_binary import EtcdBinary
from lab.etcd_server import EtcdServer
from lab.layout import ETCD, Layout
from lab.links import Links
from lab.processes import Identity

START_SECONDS = 30.0
"""For a replica to say its port, or a machine to have an agent: one or two here, ten on a machine that is busy."""

LEAVE_SECONDS = 10.0
"""For a replica to give its shards away and end; then it is killed. It needs a second; an etcd that is gone may cost all."""


class PartFailed(Exception):
    """A part did not start or did not obey; the text has the end of its log."""


class Part(Protocol):
    """What can be done to any part. All raise PartFailed."""

    @property
    def word(self) -> str:
        """How it is."""
        ...

    @property
    def pid(self) -> int:
        """The process that a person would look for; 0 when there is none."""
        ...

    def identities(self) -> list[Identity]:
        """What to look for if the supervisor dies without a word."""
        ...

    async def start(self) -> None:
        """Start it, or whatever of it is dead."""
        ...

    async def kill(self, *, agent_only: bool = False) -> None:
        """SIGKILL: everything of it at once, or only a cluster's agent."""
        ...

    async def freeze(self, *, everything: bool = False) -> None:
        """SIGSTOP."""
        ...

    async def thaw(self) -> None:
        """SIGCONT."""
        ...

    async def stop(self) -> None:
        """End it as it would be ended in order."""
        ...


class Store:
    """The embedded etcd. Its calls block, and its process dies with the thread that started it: so it has one."""

    def __init__(self, layout: Layout, links: Links, binary: EtcdBinary) -> None:
        self.name = ETCD
        self._links = links
        self._server = EtcdServer(layout.etcd, binary=binary)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="etcd")
        self._frozen = False

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
            host, _, port = self._server.endpoint.rpartition(":")
            self._links.store = (host, int(port))
            self._frozen = False

    async def kill(self, *, agent_only: bool = False) -> None:
        """See Part."""
        if agent_only:
            raise PartFailed("etcd has no agent; leave --agent-only out")
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
            raise PartFailed(f"etcd: {error}") from error


class Replica:
    """One control-plane process."""

    def __init__(self, name: str, layout: Layout, links: Links, *, unsafe_etcd: bool, collector: str = "") -> None:
        self.name = name
        self._layout = layout
        self._links = links
        self._unsafe_etcd = unsafe_etcd
        self._collector = collector
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    @property
    def pid(self) -> int:
        """See Part."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    @property
    def word(self) -> str:
        """See Part."""
        return ("frozen" if self._frozen else "running") if self.pid else "dead"

    def identities(self) -> list[Identity]:
        """See Part."""
        return [processes.identify(self.pid)] if self.pid else []

    async def start(self) -> None:
        """See Part."""
        if self.pid:
            return
        port_file = self._layout.port_file(self.name)
        port_file.unlink(missing_ok=True)
        self._frozen = False
        self._process = processes.spawn(self._command(), self._layout.log(self.name))
        try:
            async with time_limit(START_SECONDS):
                while not (said := port_file.read_text().strip() if port_file.exists() else ""):
                    if self._process.poll() is not None:
                        raise self._failure("ended at start")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            await self.kill()
            raise self._failure(f"did not listen within {START_SECONDS:.0f} s") from None
        self._links.replica_ports[self.name] = int(said.rpartition(":")[2])

    def _command(self) -> list[str]:
        unsafe = ["--allow-unsafe-etcd"] if self._unsafe_etcd else []
        export = ["--otlp-endpoint", self._collector] if self._collector else []
        return processes.python(
            "control_plane",
            *("--listen", "127.0.0.1:0", "--port-file", str(self._layout.port_file(self.name))),
            *("--replica", self.name, "--advertise", self._links.front(self.name)),
            *("--etcd", self._links.shelf(self.name), "--history", str(self._layout.history), *unsafe),
            *("--metrics-listen", "127.0.0.1:0", "--metrics-port-file", str(self._layout.metrics_file(self.name))),
            *("--artifacts", f"dir:{self._layout.artifacts}"),
            *export,
        )

    def _failure(self, what: str) -> PartFailed:
        return PartFailed(f"{self.name} {what}; the end of its log:\n{processes.tail(self._layout.log(self.name))}")

    async def kill(self, *, agent_only: bool = False) -> None:
        """See Part."""
        if agent_only:
            raise PartFailed(f"{self.name} has no agent; leave --agent-only out")
        self._signal(signal.SIGKILL)
        if self._process is not None and not await processes.gone(self._process):
            raise self._failure("could not be killed")
        self._links.replica_ports.pop(self.name, None)

    async def freeze(self, *, everything: bool = False) -> None:  # noqa: ARG002 - the Part port's
        """See Part."""
        self._signal(signal.SIGSTOP)
        self._frozen = bool(self.pid)

    async def thaw(self) -> None:
        """See Part."""
        self._signal(signal.SIGCONT)
        self._frozen = False

    async def stop(self) -> None:
        """See Part."""
        if self._process is not None and self.pid:
            self._signal(signal.SIGCONT)
            self._process.terminate()
            await processes.gone(self._process, LEAVE_SECONDS)
        await self.kill()

    def _signal(self, number: int) -> None:
        """To the process and what it started: it leads its session."""
        if self.pid:
            os.killpg(self.pid, number)


def part_status(part: Part, links: Links, name: str) -> dict[str, Any]:
    """A part as `local status` shows it."""
    return {"name": name, "state": part.word, "network": "cut" if links.is_cut(name) else "up", "pid": part.pid}
