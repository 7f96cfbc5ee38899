"""Who outlives whom: agents come and go, work goes on; a guard dies, and all its work with it (PROTOCOL G1, G4, F5)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster_agent.executors.base import AttemptKey, Cause, Phase, Started, Stopped
from cluster_agent.guard import proctree
from cluster_agent.guard.cgroups import RECORD
from tests.contract.executor_worlds import end_guards
from tests.integration.guard_bench import GUARD, Bench, eventually

pytestmark = pytest.mark.timeout(60)


AGENT = """
import asyncio, sys
from pathlib import Path
from baton.clock import SystemClock
from cluster_agent.executors.base import AttemptKey, StartRequest
from cluster_agent.executors.process import ProcessExecutor

async def main():
    directory, seconds, fence = sys.argv[1:]
    clock = SystemClock()
    executor = ProcessExecutor(Path(directory), clock)
    await executor.connect()
    await executor.configure(float(fence), 2.0)
    env = {"PATH": "/usr/bin:/bin", "BATON_TEST": directory}
    key = AttemptKey("agentrun", 0, 1, "beef")
    await executor.renew(1, clock.boot())
    await executor.start([StartRequest(key, 1, ("sleep", seconds), env)])
    print(executor.guard_pid, flush=True)
    while True:
        await executor.renew(1, clock.boot())
        await clock.sleep(0.1)

asyncio.run(main())
"""


async def agent_process(bench: Bench, seconds: float, fence: float) -> asyncio.subprocess.Process:
    """An agent in a process of its own, renewing ten times a second, with one workload that sleeps."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(bench.directory), str(seconds), str(fence), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    bench.guards.add(int(await process.stdout.readline()))
    await eventually(lambda: len(bench.living()) == 1)
    return process


DAEMONIZE = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (0, 1, 2):
            os.close(fd)
        os.execv("/bin/sleep", ["sleep", "300"])
    os._exit(0)
os.wait()
os.execv("/bin/sleep", ["sleep", "300"])
"""
"""A process, and a grandchild that left its session, its parent and its output."""


async def test_work_goes_on_when_its_agent_is_killed_and_the_next_one_adopts_it(bench: Bench) -> None:
    process = await agent_process(bench, 300, 30.0)
    process.kill()
    await process.wait()
    executor = await bench.agent()
    key = AttemptKey("agentrun", 0, 1, "beef")
    assert bench.census[key].phase is Phase.RUNNING
    assert {executor.guard_pid} == bench.guards
    assert len(bench.living()) == 1
    await executor.adopt([key], 1)
    await executor.stop([key], grace_seconds=5.0)
    await bench.until(executor, Stopped, key)
    assert bench.living() == set()


async def test_when_the_agent_is_stopped_beyond_f_the_guard_kills_by_itself(bench: Bench) -> None:
    """F5: SIGSTOP of the agent; the guard needs nobody to tell it."""
    process = await agent_process(bench, 300, 1.5)
    process.send_signal(signal.SIGSTOP)
    await eventually(lambda: not bench.living())
    process.kill()
    await process.wait()
    await bench.agent()
    exited = bench.census[AttemptKey("agentrun", 0, 1, "beef")].exited
    assert exited is not None
    assert (exited.cause, exited.late) == (Cause.FENCE, False)  # dead by F + K, says the guard's own clock


@pytest.mark.parametrize("flags", [(), ("--killer", "scan")])
async def test_a_killed_guard_takes_double_forks_and_setsid_with_it(bench: Bench, flags: tuple[str, ...]) -> None:
    """G4, with and without namespaces."""
    executor = await bench.agent(*flags)
    requests = [bench.request(sys.executable, "-S", "-c", DAEMONIZE) for _ in range(3)]
    await executor.start(requests)
    await eventually(lambda: len(bench.living()) == 6)
    os.kill(executor.guard_pid, signal.SIGKILL)
    await eventually(lambda: not bench.living())
    await bench.agent(*flags)
    for request in requests:
        exited = bench.census[request.key].exited
        assert exited is not None
        assert exited.cause is Cause.LOST


@pytest.mark.parametrize("flags", [(), ("--killer", "scan")])
async def test_a_stop_and_an_exit_leave_no_descendant(bench: Bench, flags: tuple[str, ...]) -> None:
    """Contract 7: a stopped workload's escapees are dead when `Stopped` is told, an exited one's when `Exited` is."""
    executor = await bench.agent(*flags)
    stopped = bench.request(sys.executable, "-S", "-c", DAEMONIZE)
    await executor.start([stopped])
    await eventually(lambda: len(bench.living()) == 2)
    await executor.stop([stopped.key], grace_seconds=5.0)
    await bench.until(executor, Stopped, stopped.key)
    assert bench.living() == set()
    exited, _ = await bench.run(executor, "sh", "-c", "setsid sleep 300 & sleep 0.2; exit 3")
    assert exited.exit_code == 3
    assert bench.living() == set()


async def test_a_guard_told_to_end_stops_its_work_in_order_and_tells_it(bench: Bench) -> None:
    executor = await bench.agent()
    request = bench.request("sleep", "300")
    await executor.start([request])
    await bench.until(executor, Started, request.key)
    os.kill(executor.guard_pid, signal.SIGTERM)
    exited = await bench.exit_of(executor, request.key)
    assert (exited.cause, exited.signal) == (Cause.STOP, signal.SIGTERM)
    await bench.agent()
    assert bench.census[request.key].exited == exited


async def test_one_guard_a_directory(bench: Bench) -> None:
    await bench.agent()
    second = await asyncio.create_subprocess_exec(*GUARD, "--dir", str(bench.directory), stderr=asyncio.subprocess.PIPE)
    _, words = await second.communicate()
    assert second.returncode == 3
    assert b"another guard lives on" in words


async def test_g4_work_dies_with_its_guard_though_its_keeper_is_stopped(bench: Bench) -> None:
    """What makes `orphan_killer` a promise: the kernel does it, no process of ours has to run for it."""
    executor = await bench.agent()
    assert executor.features().orphan_killer == ("PID namespaces" in executor.features().detail)
    request = bench.request("sleep", "60")
    await executor.start([request])
    await bench.until(executor, Started, request.key)
    if executor.features().orphan_killer:
        [workload] = bench.living()
        process = proctree.read(workload)
        assert process is not None
        os.kill(process.ppid, signal.SIGSTOP)
    os.kill(executor.guard_pid, signal.SIGKILL)
    await eventually(lambda: not bench.living())


def groups_of(directory: Path) -> list[Path]:
    """Control groups that the guard of this directory wrote down, as far as they exist."""
    record = directory / RECORD
    paths = map(Path, record.read_text().splitlines()) if record.exists() else []
    return [path for path in paths if path.exists()]


async def test_a_guard_takes_its_control_groups_with_it_or_the_next_one_does(bench: Bench) -> None:
    executor = await bench.agent()
    made = groups_of(bench.directory)
    assert len(made) >= len(set(made)) >= int(executor.features().isolation)
    await executor.close()
    os.kill(executor.guard_pid, signal.SIGKILL)
    elsewhere = bench.directory / "baton-elsewhere"  # an earlier guard may have been in another service's group
    elsewhere.mkdir()
    (bench.directory / RECORD).write_text("".join(f"{path}\n" for path in [*made, elsewhere, bench.directory]))
    again = await bench.agent()
    assert not elsewhere.exists()
    assert bench.directory.exists()
    assert groups_of(bench.directory) == made
    await again.close()
    await end_guards({again.guard_pid}, bench.clock)
    assert [path for path in made if path.exists()] == []


def ordinary_python() -> str:
    """An interpreter that any user may run: ours, or the system's."""
    probe = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-S", "-c", ""]
    if os.getuid() != 0 or subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return sys.executable
    found = shutil.which("python3", path="/usr/bin")
    assert found is not None, "no interpreter that an ordinary user may run"
    return found


async def test_an_ordinary_user_can_be_the_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Same promises without root; what the host does not permit is said in Features."""
    directory = tmp_path_factory.mktemp("ordinary")
    guard: list[str] = [ordinary_python(), "-S", "-m", "cluster_agent.guard"]
    if os.getuid() == 0:
        for parent in (directory, *directory.parents):
            # pytest's folders are private, under xdist one deeper; what is above the temporary folder is not ours.
            if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
                parent.chmod(0o711)
        os.chown(directory, 65534, 65534)
        guard = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *guard]
    bench = Bench(directory)
    executor = await bench.agent(guard=guard)
    exited, output = await bench.run(executor, "id", "-u")
    assert (exited.succeeded, output.strip()) == (True, str(os.getuid() or 65534).encode())
    daemon = bench.request("sh", "-c", "setsid sleep 300 & sleep 300")
    await executor.start([daemon])
    await eventually(lambda: len(bench.living()) == 3)
    os.kill(executor.guard_pid, signal.SIGKILL)
    await eventually(lambda: not bench.living())
    await bench.agent(guard=guard)
    lost = bench.census[daemon.key].exited
    assert lost is not None
    assert lost.cause is Cause.LOST
    await bench.close()
