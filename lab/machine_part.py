"""The part of a local federation that is a machine: an agent, its guard and its workloads, behind one power switch.

Theory: a cluster is not one process but whatever its agent and guard started, so nobody here can name what to kill or freeze.
The machine can (machine.py), a process of its own: it takes orders on its stdin, answers each, and tells news on its stdout.
This side keeps what it was told, and waits for each answer with a deadline. The machine ends with its stdin, so closing that is the
power cut, and a supervisor that dies without a word cuts the power too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import suppress

from baton.clock import Entropy
from baton.time_limits import time_limit
from lab import processes
from lab.layout import Layout, Settings
from lab.links import Links
from lab.parts import START_SECONDS, PartFailed
from lab.processes import Identity

ORDER_SECONDS = 5.0
"""For a machine to carry out an order."""

GIB_PER_CPU = 2
"""Memory promised with each CPU; like the CPUs it is shared with whatever else runs here."""


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
            async with time_limit(START_SECONDS), self._heard:
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
            async with time_limit(ORDER_SECONDS), self._heard:
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
            async with time_limit(ORDER_SECONDS), self._heard:
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
