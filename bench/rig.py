"""The smallest whole federation: one etcd with fsync, one replica, one agent with its guard and two slots, nothing between them.

Theory: `lab.federation` puts proxies into every connection, to be able to cut it; here they would be measured. So the processes
are the same and the wires are bare. Everything runs on the bench's machine and dies with the bench.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.client import AsyncClient
from baton.clock import SystemClock, SystemEntropy
from baton.time_limits import time_limit
from baton.v1 import cluster_pb2
from cluster_agent.guard import proctree
from control_plane.store.versions import Support
from lab import processes
from lab.etcd_binary import EtcdBinary, EtcdNotFound, find_etcd
from lab.etcd_server import EtcdServer

SLOTS = 2
"""Tasks of one CPU that run at once: as many workers as the benchmark is defined with."""

READY_SECONDS = 60.0
"""For every part to say that it is there; three here, more on a machine that is busy."""

LOOK_SECONDS = 0.02

CALL_SECONDS = 60.0
"""Of a call of the bench's client: a saturated replica answers late, and that is not a failure of the benchmark."""


@dataclass(frozen=True, slots=True)
class Rig:
    """A federation that serves. `pids`: the roots of each role's processes."""

    client: AsyncClient
    etcd_endpoint: str
    etcd_version: str
    pids: dict[str, int]

    def processes(self) -> dict[str, list[int]]:
        """Living processes by role. The agent's machine holds agent, guard and workers; a worker is what the guard spawned."""
        seen = proctree.everything()
        found = {"etcd": [self.pids["etcd"]], "replica": [self.pids["replica"]], "client": [self.pids["client"]]}
        found["replica"] += [each.pid for each in proctree.descendants(self.pids["replica"], seen)]
        found["agent"], found["guard"], found["workers"] = [self.pids["agent"]], [], []
        for each in proctree.descendants(self.pids["machine"], seen):
            if each.pid != self.pids["agent"]:
                words = _command(each.pid)
                found["guard" if b"cluster_agent.guard" in words else "workers"].append(each.pid)
        return found


def _command(pid: int) -> list[bytes]:
    """The words a process was started with."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def etcd_binary(*, any_etcd: bool) -> EtcdBinary:
    """The etcd to measure with. Raises EtcdNotFound if there is none that loses nothing, unless any will do."""
    binary = find_etcd()
    if binary.support is not Support.SUPPORTED and not any_etcd:
        raise EtcdNotFound(f"etcd {binary.version} is not a supported one: run `scripts/tools etcd`")
    return binary


@asynccontextmanager
async def federation(directory: Path, *, instant: bool = False, any_etcd: bool = False) -> AsyncIterator[Rig]:
    """A rig in an empty directory, until the block is left. `instant`: with an agent that only pretends (`bench.instant`).
    Raises EtcdNotFound, RuntimeError."""
    binary = etcd_binary(any_etcd=any_etcd)
    (directory / "logs").mkdir(parents=True)
    with EtcdServer(directory / "etcd", binary=binary) as etcd:
        replica = _start_replica(directory, etcd.endpoint, unsafe=binary.support is Support.UNSAFE)
        machine: subprocess.Popen[bytes] | None = None
        try:
            address = await _said(directory / "replica.port", replica)
            machine = _start_agent(directory, address, instant=instant)
            pids = {"etcd": etcd.pid, "replica": replica.pid, "machine": machine.pid}
            pids |= {"agent": await _agent_pid(machine), "client": proctree_self()}
            async with AsyncClient([address], timeout=CALL_SECONDS) as client:
                await _ready(client, pids["agent"], directory / "logs" / "agent.log")
                yield Rig(client, etcd.endpoint, binary.version, pids)
        finally:
            if machine is not None:
                await _end_machine(machine)
            replica.send_signal(signal.SIGTERM)
            if not await processes.gone(replica):
                replica.kill()


def proctree_self() -> int:
    """Our own pid: the client's role."""
    return int(Path("/proc/self").readlink().name)


def _start_replica(directory: Path, etcd: str, *, unsafe: bool) -> subprocess.Popen[bytes]:
    command = processes.python(
        "control_plane",
        *("--listen", "127.0.0.1:0", "--port-file", str(directory / "replica.port"), "--replica", "replica-1"),
        *("--etcd", etcd, "--history", str(directory / "history.sqlite")),
        *(["--allow-unsafe-etcd"] if unsafe else []),
    )
    return processes.spawn(command, directory / "logs" / "replica.log")


def _start_agent(directory: Path, replica: str, *, instant: bool) -> subprocess.Popen[bytes]:
    """The agent below a machine of `lab`, which takes guard and workers along when it ends."""
    boot_id = directory / "boot_id"
    boot_id.write_text(SystemEntropy().token(16) + "\n")
    agent = processes.python(
        "cluster_agent",
        *("--cluster", "bench", "--directory", str(directory / "agent"), "--boot-id-file", str(boot_id)),
        *("--profile", "balanced", "--cpus", str(SLOTS), "--memory", f"{4 * SLOTS}Gi"),
        *("--endpoint", replica, "--fixed-endpoints"),
    )
    if instant:
        agent = processes.python("bench.instant", replica, str(directory / "agent"))
    command = processes.bare_python("lab.machine", *agent)
    return processes.spawn(command, directory / "logs" / "agent.log", piped=True)


async def _said(path: Path, process: subprocess.Popen[bytes]) -> str:
    """What a process writes into its port file. Raises RuntimeError with the end of its log."""
    clock = SystemClock()
    deadline = clock.boot() + READY_SECONDS
    while not (said := _read(path)):
        if process.poll() is not None or clock.boot() > deadline:
            log = processes.tail(path.parent / "logs" / f"{path.stem}.log")
            raise RuntimeError(f"{path.stem} did not start:\n{log}")
        await clock.sleep(LOOK_SECONDS)
    return said


def _read(path: Path) -> str:
    """What a file says so far."""
    return path.read_text().strip() if path.exists() else ""


async def _agent_pid(machine: subprocess.Popen[bytes]) -> int:
    """What the machine says of its agent. Raises RuntimeError."""
    if machine.stdout is None:
        raise RuntimeError("the agent's machine has no voice")
    line = await asyncio.wait_for(asyncio.to_thread(machine.stdout.readline), READY_SECONDS)
    word, _, pid = line.decode().partition(" ")
    if word != "agent":
        raise RuntimeError(f"the agent did not start: {line!r}")
    return int(pid)


async def _ready(client: AsyncClient, agent: int, log: Path) -> None:
    """Wait for the cluster to be READY. Raises TimeoutError, RuntimeError with the end of the agent's log."""
    clock = SystemClock()
    async with time_limit(READY_SECONDS):
        while not [c async for c in client.list_clusters() if c.health == cluster_pb2.CLUSTER_HEALTH_READY]:
            process = proctree.read(agent)
            if process is None or not process.alive:
                raise RuntimeError(f"the agent ended:\n{processes.tail(log)}")
            await clock.sleep(LOOK_SECONDS)


async def _end_machine(machine: subprocess.Popen[bytes]) -> None:
    """Power off: closing its stdin is the order."""
    if machine.stdin is not None:
        machine.stdin.close()
    if not await processes.gone(machine):
        machine.kill()
