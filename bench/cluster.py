"""One cluster by itself: the real agent, guard and workers under a control plane that is a few lines of memory.

    python -m bench.cluster [--tasks 5000] [--slots 2] [--outstanding 128] [--chain]

Theory: what a task costs below the control plane is the sum of agent, guard and worker, and each is only known apart when
nothing else is in its process. Guard and workers are processes of their own; the agent shares this one with the scripted
control plane, whose own time is measured and taken off. Messages are serialised and parsed as on the wire; only gRPC is left
out. Wide keeps `outstanding` attempts dispatched and unreported; chain has one at a time, and tells the time from its dispatch to its
report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from baton.clock import SystemClock, SystemEntropy
from baton.leases import PROFILES, to_millis
from baton.packing import pack
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, graph_pb2
from bench.shapes import NOTHING, TASKS
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.disk import RealDisk
from cluster_agent.executors.process import ProcessExecutor
from cluster_agent.guard import proctree
from cluster_agent.transport import Stream, TransportClosed

EPOCH = agent_pb2.ShardEpoch(incarnation=1, revision=7)
WARM = 200
"""Tasks before the measured ones: workers are up, their code is imported, run times are learned."""

PATIENCE_SECONDS = 300.0
"""For all tasks; a run that takes longer has lost one."""


class Owner:
    """The scripted control plane: one shard that keeps `outstanding` attempts at the agent."""

    endpoint = "memory"

    def __init__(self, tasks: int, outstanding: int) -> None:
        self.done = asyncio.Event()
        self.latencies: list[float] = []
        self.spent = 0.0
        """CPU seconds of this class."""
        self.batches = 0
        self.failure = ""
        self._down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._left, self._outstanding = tasks, outstanding
        self._task = self._number = self._seq = 0
        self._sent: dict[int, float] = {}
        self._over: list[agent_pb2.AttemptRef] = []
        self._code = pack(TASKS)
        self._flushing = False

    # --- the stream -----------------------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[agent_pb2.SessionRequest]) -> None:
        """See Stream."""
        for message in messages:
            data = message.SerializeToString()  # the agent's cost
            began = time.thread_time()
            self._hear(agent_pb2.SessionRequest.FromString(data))
            self.spent += time.thread_time() - began

    async def receive(self) -> Sequence[agent_pb2.SessionResponse]:
        """See Stream."""
        data = await self._down.get()
        if data is None:
            raise TransportClosed("closed")
        return (agent_pb2.SessionResponse.FromString(data),)

    async def close(self) -> None:
        """See Stream."""
        self._down.put_nowait(None)

    # --- what it decides ------------------------------------------------------------------------------------------------

    def more(self, tasks: int, outstanding: int) -> None:
        """Another round."""
        self.done.clear()
        self.latencies.clear()
        self.spent, self.batches = 0.0, 0
        self._left, self._outstanding = tasks, outstanding
        self._dispatch()

    async def finished(self, agent: asyncio.Task[None]) -> None:
        """All of the round are reported. Raises SystemExit when one was not done, and whatever ended the agent."""
        done = asyncio.create_task(self.done.wait())
        await asyncio.wait((done, agent), return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        if agent.done():
            agent.result()
        if self.failure:
            raise SystemExit(self.failure)

    def _hear(self, message: agent_pb2.SessionRequest) -> None:
        match message.WhichOneof("message"):
            case "hello":
                lease = agent_pb2.LeaseValues(**to_millis(PROFILES["balanced"]))  # type: ignore[arg-type]
                welcome = agent_pb2.Welcome(cluster_uid="cu", generation=1, lease=lease, federation_uid="fu")
                self._say(welcome=welcome)
            case "heartbeat":
                wall = time.time_ns() // 1_000_000
                self._say(heartbeat_ack=agent_pb2.HeartbeatAck(seq=message.heartbeat.seq, server_wall_ms=wall))
                if not self._number:
                    self._dispatch()
            case "reports":
                reports = message.reports
                if reports.rejected:
                    self._fail(f"rejected: {reports.rejected[0].reason}")
                now = time.perf_counter()
                for finished in reports.finished:
                    if finished.outcome != agent_pb2.OUTCOME_SUCCEEDED:
                        self._fail(f"failed: {finished}")
                    self.latencies.append(now - self._sent.pop(finished.attempt.task))
                    self._over.append(finished.attempt)
                if self._over and not self._flushing:
                    self._flushing = True
                    asyncio.get_running_loop().call_soon(self._turn)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        self.done.set()

    def _turn(self) -> None:
        """Acknowledge what was reported, and fill up again: one commit's worth."""
        began = time.thread_time()
        self._flushing = False
        self.batches += 1
        over, self._over = self._over, []
        self._seq += 1
        mark = agent_pb2.ShardMark(shard="s0", incarnation=1, seq=self._seq, nonce="n")
        self._say(report_acks=agent_pb2.ReportAcks(shard="s0", epoch=EPOCH, mark=mark, attempts=over))
        self._dispatch()
        if not self._left and not self._sent:
            self.done.set()
        self.spent += time.thread_time() - began

    def _dispatch(self) -> None:
        count = min(self._left, self._outstanding - len(self._sent))
        if count <= 0:
            return
        self._left -= count
        self._number += 1
        python = graph_pb2.PythonTask(function=NOTHING, args_json="{}", code=self._code.sha256)
        shape = agent_pb2.DispatchTemplate(python=python, resources=graph_pb2.Resources(cpu_millis=1000), grace_ms=3000)
        now, deadline = time.perf_counter(), time.time_ns() // 1_000_000 + 600_000
        work = []
        for _ in range(count):
            self._task += 1
            ref = agent_pb2.AttemptRef(run_uid="0193a1b2c3d4", task=self._task, n=1, nonce="beef")
            run = "namespaces/default/runs/bench"
            work.append(
                agent_pb2.Dispatch(
                    attempt=ref,
                    task_id=f"t-{self._task:05}",
                    run=run,
                    fence="1.1",
                    deadline_wall_ms=deadline,
                    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                )
            )
            self._sent[self._task] = now
        codes = [graph_pb2.Code(sha256=self._code.sha256, zip=self._code.zip)]
        self._say(
            dispatches=agent_pb2.Dispatches(
                shard="s0",
                epoch=EPOCH,
                generation=1,
                dispatch_no=self._number,
                templates=[shape],
                dispatches=work,
                codes=codes,
            )
        )

    def _say(self, **message: object) -> None:
        self._down.put_nowait(agent_pb2.SessionResponse(**message).SerializeToString())  # type: ignore[arg-type]


class OneOwner:
    """A transport that leads to it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def connect(self) -> Stream:
        """See Transport."""
        return self._owner

    def learn(self, endpoints: Sequence[str]) -> None:
        """There is no other."""

    async def close(self) -> None:
        """Nothing is held."""


def nanoseconds(pid: int) -> int:
    """CPU time of a living process."""
    return sum(
        int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
        for thread in os.listdir(f"/proc/{pid}/task")
    )


def by_role(guard: int) -> dict[str, float]:
    """CPU seconds so far."""
    below = proctree.descendants(guard, proctree.everything())
    return {"guard": nanoseconds(guard) / 1e9, "workers": sum(nanoseconds(each.pid) for each in below) / 1e9}


async def measure(given: argparse.Namespace, directory: Path) -> dict[str, object]:
    """One run."""
    clock = SystemClock()
    owner = Owner(WARM, given.outstanding)
    executor = ProcessExecutor(directory / "executor", clock)
    config = AgentConfig(
        cluster="bench", endpoints=("unused:1",), directory=directory, nodes=(NodeSpec(1000 * given.slots, 4 << 30),)
    )
    agent = Agent(
        config, clock, SystemEntropy(), OneOwner(owner), executor, RealDisk(directory / "agent"), boot_id="boot"
    )
    running = asyncio.create_task(agent.run())
    try:
        async with time_limit(PATIENCE_SECONDS):
            await owner.finished(running)
            before, cpu, wall = by_role(executor.guard_pid), time.thread_time(), time.perf_counter()
            owner.more(given.tasks, 1 if given.chain else given.outstanding)
            await owner.finished(running)
            took, spent = time.perf_counter() - wall, time.thread_time() - cpu - owner.spent
            after = by_role(executor.guard_pid)
    finally:
        agent.stop()
        await running
        os.kill(executor.guard_pid, signal.SIGTERM)
    times = sorted(owner.latencies)
    each = {role: round((after[role] - before[role]) / given.tasks * 1e6, 1) for role in before}
    return {
        "tasks_per_second": round(given.tasks / took),
        "agent_us": round(spent / given.tasks * 1e6, 1),
        **{f"{role}_us": value for role, value in each.items()},
        "hop_ms_p50": round(statistics.median(times) * 1e3, 3),
        "hop_ms_p99": round(times[int(len(times) * 0.99)] * 1e3, 3),
        "batches": owner.batches,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="bench.cluster", description=__doc__)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--outstanding", type=int, default=128)
    parser.add_argument("--chain", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-", ignore_cleanup_errors=True) as directory:
        print(json.dumps(asyncio.run(measure(given, Path(directory)))))


if __name__ == "__main__":
    main()
