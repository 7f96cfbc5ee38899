"""What the end-to-end tests share: a whole federation of real processes, a client, and a witness outside Baton.

Theory: Baton's own records cannot prove Baton right. So every workload started here writes what happens to it into an
append-only file that the control plane knows nothing of: one line when it starts, one every TICK while it lives, one
when it ends by itself, each with its pid and the time of the host's boot clock. A copy lived at least from its first
line to its last; two copies of a task whose lives overlap are what Baton promises never to have (PROTOCOL F5), and two
starts under one fence are what F4 forbids. Workloads wait for gates (files) and not for times, so that a test decides
when work ends, however busy the machine is.

    async with federation(tmp_path) as fed:
        run = await fed.run("story", [fed.gated("one", "go"), fed.quick("two", after=["one"])])
        await fed.eventually(lambda: fed.effects.living("one"), "one to run")
        await fed.lab.kill("replica-1")
        fed.open_gate("go")
        assert (await fed.client.wait_run(run.name)).state == SUCCEEDED
        fed.effects.check()
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.time_limits import time_limit
from baton.v1 import cluster_pb2, graph_pb2, run_pb2
from cluster_agent.guard import proctree
from control_plane.store.versions import Support
from lab import processes
from lab.federation import Federation
from lab.layout import ETCD, Layout, Settings
from lab.parts import Part
from lab.processes import Identity

SUCCEEDED = run_pb2.RUN_STATE_SUCCEEDED
WAIT = graph_pb2.ON_CLUSTER_LOST_WAIT
RERUN = graph_pb2.ON_CLUSTER_LOST_RERUN_AFTER_FENCE
NEVER = graph_pb2.ON_CLUSTER_LOST_NEVER_RERUN

SOON = 60.0
"""Bound of waits for things without a promised bound, seconds: generous, since two other test processes may run beside."""

LOOK = 0.05
"""Between looks, seconds."""

RUN_SECONDS = 900.0
"""Deadline of runs: far away, unless the deadline is what a test is about."""

Key = tuple[str, str, str, int]
"""Run, task, fence, own pid: one copy."""

Found = TypeVar("Found")

CLOCK = SystemClock()

# Shell built-ins only, except for `sleep`: a workload must cost next to nothing. /proc/uptime counts suspend, as the
# leases do; one short `echo >>` is one write with O_APPEND, so lines of many writers never mix.
_WITNESS = """\
note() { read up rest < /proc/uptime; echo "$1 $BATON_RUN $BATON_TASK $BATON_FENCE $BATON_CLUSTER $$ $up" >> "$EFFECTS"; }
note start
"""
_GATED = """\
while [ ! -e "$GATE" ]; do sleep 0.2; note tick; done
"""
_END = """\
printf %s "$BATON_TASK" > "$BATON_RESULT"
note end
"""


@dataclass(slots=True)
class Copy:
    """One process that did the work of a task, as it was seen from outside."""

    run: str
    task: str
    fence: str
    cluster: str
    own_pid: int
    """Its pid in its own eyes: it may live in a PID namespace (G4)."""
    first: float
    """Boot clock, seconds: its first line."""
    last: float
    """Its last line: it lived at least so long."""
    ended: bool = False
    """It came to its own end; otherwise it lives or was killed."""
    process: Identity | None = None
    """The living process as this host knows it; only in what `living` returns."""

    @property
    def key(self) -> Key:
        """What no two copies share, unless a fence was started twice."""
        return self.run, self.task, self.fence, self.own_pid


class Effects:
    """The witness: the file that workloads write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def copies(self, task: str | None = None, *, run: str | None = None) -> list[Copy]:
        """All copies seen so far in order of their starts; of one task id, of one run (its full name)."""
        found: list[Copy] = []
        newest: dict[Key, Copy] = {}
        for line in self.path.read_text().splitlines():
            word, run_name, task_id, fence, cluster, pid, up = line.split(" ")
            copy = Copy(run_name, task_id, fence, cluster, int(pid), float(up), float(up))
            if word == "start":
                newest[copy.key] = copy
                found.append(copy)
            else:
                newest[copy.key].last = copy.last
                newest[copy.key].ended |= word == "end"
        wanted = [each for each in found if task in (None, each.task) and run in (None, each.run)]
        return sorted(wanted, key=lambda each: each.first)

    def living(self, task: str | None = None, *, run: str | None = None) -> list[Copy]:
        """Copies whose process runs now, each with its `process`."""
        here = self._processes()
        return [replace(each, process=here[each.key]) for each in self.copies(task, run=run) if each.key in here]

    def _processes(self) -> dict[Key, Identity]:
        """The living workloads of this file. They are told from others by their environment, and from their own children
        by the pid that they know of themselves."""
        mine = b"EFFECTS=" + os.fsencode(self.path)
        found: dict[Key, Identity] = {}
        for pid in proctree.everything():
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mine not in words:
                    continue
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue  # gone, or another user's
            env = dict(os.fsdecode(word).partition("=")[::2] for word in words)
            own_pid = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
            identity = processes.identify(pid)
            if identity.alive:
                found[env["BATON_RUN"], env["BATON_TASK"], env["BATON_FENCE"], int(own_pid)] = identity
        return found

    def check(self, hedged: Sequence[str] = ()) -> None:
        """No fence was started twice (F4), no two copies of a task lived at once (F5), and later copies had larger
        fences (F1). `hedged`: tasks that may live twice, since they asked for it."""
        by_task: dict[tuple[str, str], list[Copy]] = {}
        for copy in self.copies():
            by_task.setdefault((copy.run, copy.task), []).append(copy)
        for task, copies in by_task.items():
            fences = [tuple(map(int, each.fence.split("."))) for each in copies]
            assert fences == sorted(set(fences)), f"{task}: a fence was used twice or went back: {copies}"
            for earlier, later in pairwise(copies):
                assert task[1] in hedged or earlier.last < later.first, f"{task}: two at once: {earlier} and {later}"


@dataclass(slots=True)
class Fed:
    """A federation that runs."""

    lab: Federation
    client: AsyncClient
    directory: Path
    effects: Effects
    _watchers: list[Watcher] = field(default_factory=list)

    # -- work ----------------------------------------------------------------------------------------------------------

    def task(
        self,
        task_id: str,
        script: str,
        *,
        after: Sequence[str] = (),
        gate: str = "",
        on_cluster_lost: graph_pb2.OnClusterLost.ValueType = graph_pb2.ON_CLUSTER_LOST_UNSPECIFIED,
        clusters: Sequence[str] = (),
        max_attempts: int = 1,
        max_losses: int = 10,
        cpu_millis: int = 100,
    ) -> graph_pb2.Task:
        """A task that runs `script` in a shell with the witness in it; the result is the task's own id."""
        env = {"EFFECTS": str(self.effects.path), "GATE": str(self.directory / f"gate-{gate}")}
        return graph_pb2.Task(
            id=task_id,
            parents=after,
            clusters=clusters,
            on_cluster_lost=on_cluster_lost,
            resources=graph_pb2.Resources(cpu_millis=cpu_millis, memory_bytes=16 << 20),
            retry=graph_pb2.RetryPolicy(max_attempts=max_attempts, max_infrastructure_losses=max_losses),
            process=graph_pb2.ProcessTask(argv=["sh", "-c", f"{_WITNESS}{script}{_END}"], env=env),
        )

    def quick(self, task_id: str, **words: object) -> graph_pb2.Task:
        """A task that ends at once. Words as for `task`."""
        return self.task(task_id, "", **words)  # type: ignore[arg-type]

    def gated(self, task_id: str, gate: str, **words: object) -> graph_pb2.Task:
        """A task that lives until `open_gate(gate)`. Words as for `task`."""
        return self.task(task_id, _GATED, gate=gate, **words)  # type: ignore[arg-type]

    def open_gate(self, gate: str) -> None:
        """Let the tasks of this gate end, and later ones pass."""
        (self.directory / f"gate-{gate}").touch()

    async def run(self, run_id: str, tasks: Sequence[graph_pb2.Task], *, seconds: float = RUN_SECONDS) -> run_pb2.Run:
        """Create a run with a deadline `seconds` away."""
        spec = graph_pb2.GraphSpec(tasks=tasks)
        return await self.client.create_run(spec, deadline=CLOCK.wall() + seconds, run_id=run_id)

    async def tasks(self, run: str) -> dict[str, run_pb2.TaskStatus]:
        """The tasks of a run by id."""
        return {task.id: task async for task in self.client.list_tasks(run)}

    async def accepted_once(self, run: str, *, patience: float = SOON) -> dict[str, run_pb2.TaskStatus]:
        """Wait for the end of a run; it must be a success with exactly one accepted result for each task, which is the
        task's own. Returns the tasks."""
        async with time_limit(patience):
            ended = await self.client.wait_run(run, patience=patience)
        assert ended.state == SUCCEEDED, ended
        tasks = await self.tasks(run)
        assert len(tasks) == ended.task_count == ended.accepted_results, ended
        for task in tasks.values():
            assert task.accepted_results == 1, task
            assert task.result == task.id.encode(), task
        return tasks

    def watch(self, run: str) -> Watcher:
        """A client of its own that watches a run from now on; `Watcher.ended` checks what it saw."""
        watcher = Watcher(self.lab.endpoints, run)
        self._watchers.append(watcher)
        return watcher

    async def running(self, run: str, *tasks: str, attempt: int = 1, patience: float = SOON) -> dict[str, Identity]:
        """The processes of the tasks' attempts of that number, once they run and the control plane has heard of it."""

        async def heard() -> bool:
            found = await self.tasks(run)
            newest = [(each.n, each.state) for task in tasks for each in found[task].attempts[-1:]]
            return newest == [(attempt, run_pb2.ATTEMPT_STATE_RUNNING)] * len(tasks)

        await self.eventually(heard, f"attempt {attempt} of {', '.join(tasks)} to be known to run", patience)
        living = {copy.task: copy.process for copy in self.effects.living(run=run)}
        return {task: process for task in tasks if (process := living[task]) is not None}

    # -- looking -------------------------------------------------------------------------------------------------------

    @overload
    async def eventually(self, see: Callable[[], Awaitable[Found]], what: str, seconds: float = SOON) -> Found: ...

    @overload
    async def eventually(self, see: Callable[[], Found], what: str, seconds: float = SOON) -> Found: ...

    async def eventually(self, see: Callable[[], Any], what: str, seconds: float = SOON) -> Any:
        """Wait until `see` (plain or async) gives something true, and return it."""
        deadline = CLOCK.boot() + seconds
        while True:
            found = see()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            assert CLOCK.boot() < deadline, f"waited {seconds:g} s for {what}"
            await asyncio.sleep(LOOK)

    async def all_ready(self) -> bool:
        """Whether every cluster is READY."""
        clusters = [each async for each in self.client.list_clusters()]
        return all(each.health == cluster_pb2.CLUSTER_HEALTH_READY for each in clusters)

    async def owners(self) -> dict[str, str]:
        """Which replica owns which shard."""
        return {each.id: each.replica for each in (await self.client.list_shards()).shards}

    async def balanced(self) -> bool:
        """Whether every shard is where the ring wants it, and every replica has some."""
        shards = (await self.client.list_shards()).shards
        serving = {each.replica for each in shards if each.replica == each.preferred}
        return serving == set(self.lab.settings.replica_names) and all(s.replica == s.preferred for s in shards)

    def log_of(self, name: str) -> str:
        """The log of a part."""
        if name == ETCD:
            return self.lab.layout.etcd.with_name("data.log").read_text(errors="replace")
        return self.lab.layout.log(name).read_text(errors="replace")

    def baton(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command line, against this federation. Blocks: not while the proxies have to work, use `cli`."""
        flags = [word for endpoint in self.lab.endpoints for word in ("--endpoint", endpoint)]
        return subprocess.run(
            [sys.executable, "-m", "baton.cli", *flags, *words],
            capture_output=True,
            text=True,
            timeout=SOON,
            check=False,
            env={**processes.environment(), "BATON_CONFIG": str(self.directory / "contexts")},
        )

    async def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command line, against this federation."""
        return await asyncio.to_thread(self.baton, *words)


class Watcher:
    """Somebody who watches a run from a client of his own, whatever happens to replicas."""

    def __init__(self, endpoints: Sequence[str], run: str) -> None:
        self.run = run
        self.numbers: list[int] = []
        self.kinds: list[str] = []
        self._task = asyncio.get_running_loop().create_task(self._watch(list(endpoints)))

    async def _watch(self, endpoints: list[str]) -> run_pb2.Run | None:
        last: run_pb2.Run | None = None
        async with AsyncClient(endpoints) as client:
            async for message in client.watch_run(self.run, patience=RUN_SECONDS):
                self.numbers += [event.number for event in message.events]
                self.kinds += [event.kind for event in message.events]
                if message.HasField("run"):
                    last = message.run
        return last

    async def ended(self, seconds: float = SOON) -> run_pb2.Run:
        """Wait until the watch ends with the run; its events must be all, once, in order. Returns the final run."""
        async with time_limit(seconds):
            last = await self._task
        assert last is not None
        assert self.numbers == list(range(1, last.event_number + 1)), f"a gap or a repeat: {self.numbers}"
        return last

    async def stop(self) -> None:
        """Give up."""
        self._task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._task


@asynccontextmanager
async def federation(
    directory: Path,
    *,
    replicas: int = 2,
    clusters: Sequence[str] = ("eu", "us", "ap"),
    profile: str = "fast",
    cpus: int = 4,
    timeout: float = 10.0,
    collector: str = "",
) -> AsyncIterator[Fed]:
    """A federation in `directory`, up and ready; afterwards nothing of it is left. `timeout` is that of the client; `collector` an
    OTLP endpoint that replicas export to."""
    home = directory / "fed"
    settings = Settings(replicas, tuple(clusters), profile, cpus, otlp_endpoint=collector)
    lab = Federation(Layout(home), settings.checked())
    print(f"etcd {lab.binary.version} ({lab.binary.support.value})")
    if lab.binary.support is not Support.SUPPORTED:
        print(lab.warning)
    await lab.start()
    fed: Fed | None = None
    born = [identity for part in _parts(lab) for identity in part.identities()]
    try:
        async with AsyncClient(lab.endpoints, timeout=timeout) as client:
            fed = Fed(lab, client, directory, Effects(directory / "effects.log"))
            yield fed
    except BaseException:
        _tell(lab)
        raise
    finally:
        for watcher in fed._watchers if fed is not None else ():
            await watcher.stop()
        await lab.stop()
        left = [each for each in born if each.alive]
        assert not left, f"still running after the end: {left}"
        if fed is not None:
            assert not fed.effects.living(), "a workload outlived its federation"


def _parts(lab: Federation) -> list[Part]:
    return [lab.part(name) for name in (ETCD, *lab.settings.replica_names, *lab.settings.clusters)]


def _tell(lab: Federation) -> None:
    """The end of every log, for whoever has to find out why a test failed."""
    for path in sorted(lab.layout.logs.glob("*.log")):
        print(f"--- {path.name}\n{processes.tail(path, 4_000)}")
