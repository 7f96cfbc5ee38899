"""The parts of a local federation that can be killed, frozen and started: etcd, replicas, clusters.

Theory: each part owns its processes and says in one word how it is (`running`, `frozen`, `agent dead`, `dead`); nobody
else touches them. A part that died by itself is not started again: here a person watches, and wants to see it. All run
in the supervisor's main thread, whose end is the children's end (processes.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from baton.clock import Entropy
from lab import processes
from lab.etcd_binary import EtcdBinary
from lab.etcd_server import EtcdServer
from lab.layout import ETCD, Layout, Settings
from lab.links import Links
from lab.processes import Identity

START_SECONDS = 30.0
"""For a replica to say its port, or a machine to have an agent: one or two here, ten on a machine that is busy."""

LEAVE_SECONDS = 10.0
"""For a replica to give its shards away and end; then it is killed. It needs a second; an etcd that is gone may cost all."""

ORDER_SECONDS = 5.0
"""For a machine to carry out an order."""

GIB_PER_CPU = 2
"""Memory promised with each CPU; like the CPUs it is shared with whatever else runs here."""


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
            async with asyncio.timeout(START_SECONDS):
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


class Cluster:
    """One machine (machine.py): an agent, its guard, its workloads."""

    def __init__(self, name: str, layout: Layout, links: Links, settings: Settings, entropy: Entropy) -> None:
        self.name = name
        self._layout = layout
        self._links = links
        self._settings = settings
        self._entropy = entropy
        self._machine: subprocess.Popen[bytes] | None = None
        self._agent = 0
        self._frozen = False
        self._news = b""
        self._heard = asyncio.Condition()
        self._obeyed = 0
        self._ordered = 0

    @property
    def powered(self) -> bool:
        """Whether the machine is on."""
        return self._machine is not None and self._machine.poll() is None

    @property
    def pid(self) -> int:
        """See Part: the agent's."""
        return self._agent if self.powered else 0

    @property
    def word(self) -> str:
        """See Part."""
        if not self.powered:
            return "dead"
        return "frozen" if self._frozen else "running" if self._agent else "agent dead"

    def identities(self) -> list[Identity]:
        """See Part."""
        return [processes.identify(self._machine.pid)] if self._machine is not None and self.powered else []

    async def start(self) -> None:
        """See Part. A machine that was off comes back as another boot of the same host (PROTOCOL S6)."""
        if self.powered:
            await self._order("start")
            self._frozen = self._frozen and bool(self._agent)
            return
        self._layout.boot_id(self.name).write_text(self._entropy.token(16) + "\n")
        self._frozen, self._news, self._obeyed, self._ordered = False, b"", 0, 0
        machine = processes.bare_python("lab.machine", *self._hidden(), *self._command())
        self._machine = processes.spawn(machine, self._layout.log(self.name), piped=True)
        self._listen(self._machine)
        try:
            async with asyncio.timeout(START_SECONDS), self._heard:
                await self._heard.wait_for(lambda: self._agent or not self.powered)
        except TimeoutError:
            pass
        if not self._agent:
            raise PartFailed(f"{self.name} did not start:\n{processes.tail(self._layout.log(self.name))}")

    def _hidden(self) -> list[str]:
        """Flags of the machine for what its cluster shall not see."""
        if not self._settings.apart:
            return []
        beyond = self._layout.beyond(self.name, self._settings.clusters)
        for path in beyond:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return [word for path in beyond for word in ("--hide", str(path))]

    def _command(self) -> list[str]:
        endpoints = [word for way in self._links.ways(self.name) for word in ("--endpoint", way)]
        return processes.python(
            "cluster_agent",
            *("--cluster", self.name, "--directory", str(self._layout.cluster(self.name))),
            *("--boot-id-file", str(self._layout.boot_id(self.name)), "--profile", self._settings.profile),
            *("--cpus", str(self._settings.cpus), "--memory", f"{self._settings.cpus * GIB_PER_CPU}Gi"),
            *("--label", f"region={self.name}"),
            *("--metrics-listen", "127.0.0.1:0", "--metrics-port-file", str(self._layout.metrics_file(self.name))),
            *(*endpoints, "--fixed-endpoints"),
        )

    async def kill(self, *, agent_only: bool = False) -> None:
        """See Part."""
        if not self.powered:
            return
        if agent_only:
            await self._order("kill")
            async with asyncio.timeout(ORDER_SECONDS), self._heard:
                await self._heard.wait_for(lambda: not self._agent)
            self._frozen = False
            return
        await self.stop()

    async def freeze(self, *, everything: bool = False) -> None:
        """See Part: the agent, or guard and workloads too."""
        if self.powered:
            await self._order("freeze-all" if everything else "freeze")
            self._frozen = True

    async def thaw(self) -> None:
        """See Part."""
        if self.powered:
            await self._order("thaw")
            self._frozen = False

    async def stop(self) -> None:
        """See Part: a power cut. There is no gentler end that leaves the work of the others alone."""
        machine = self._machine
        if machine is None or not self.powered:
            return
        identity = processes.identify(machine.pid)
        if machine.stdin is not None:
            machine.stdin.close()
        if not await processes.gone(machine):
            processes.kill_remains(identity)
            raise PartFailed(f"{self.name}: something of it could not be killed")

    async def _order(self, word: str) -> None:
        machine = self._machine
        if machine is None or machine.stdin is None:
            raise PartFailed(f"{self.name} is off")
        self._ordered += 1
        number = self._ordered
        try:
            machine.stdin.write(f"{word}\n".encode())
            async with asyncio.timeout(ORDER_SECONDS), self._heard:
                await self._heard.wait_for(lambda: self._obeyed >= number)
        except (OSError, TimeoutError) as error:
            raise PartFailed(f"{self.name} does not obey: {word}") from error

    def _listen(self, machine: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        out = machine.stdout
        if out is None:
            return
        os.set_blocking(out.fileno(), False)

        def read() -> None:
            data = b""
            with suppress(OSError):
                data = out.read() or b""
            if not data:
                loop.remove_reader(out.fileno())
                out.close()
                self._agent = 0
            self._take(data)
            self._telling = loop.create_task(self._tell())

        loop.add_reader(out.fileno(), read)

    def _take(self, data: bytes) -> None:
        self._news += data
        while b"\n" in self._news:
            line, self._news = self._news.split(b"\n", 1)
            word, _, rest = line.decode().partition(" ")
            if word == "agent":
                self._agent = int(rest)
            elif word == "ended":
                self._agent = 0
            elif word == "ok":
                self._obeyed += 1

    async def _tell(self) -> None:
        async with self._heard:
            self._heard.notify_all()


def part_status(part: Part, links: Links, name: str) -> dict[str, Any]:
    """A part as `local status` shows it."""
    return {"name": name, "state": part.word, "network": "cut" if links.is_cut(name) else "up", "pid": part.pid}
