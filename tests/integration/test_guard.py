"""The guard with real processes, real signals and real limits (PROTOCOL G1-G4, F3-F5, F8).

Every test ends with a census of this machine: no process may be left that carries the test's directory in its
environment.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from baton.clock import SystemClock
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    CensusEntry,
    ExecutorEvent,
    Exited,
    Limits,
    Phase,
    Refused,
    Started,
    StartRequest,
    Stopped,
)
from cluster_agent.executors.process import ProcessExecutor
from cluster_agent.guard import proctree
from cluster_agent.guard.cgroups import RECORD
from cluster_agent.guard.ledger import SEGMENT, Ledger, LedgerCorrupt
from cluster_agent.guard.protocol import encode
from tests.contract.executor_worlds import end_guards

pytestmark = pytest.mark.timeout(60)

PATH = "/usr/local/bin:/usr/bin:/bin"
GUARD = (sys.executable, "-S", "-m", "cluster_agent.guard")

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


def processes_with(mark: str) -> set[int]:
    """Living processes (no zombies) that carry `mark` in their environment: everything a workload of the test
    became."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environment = Path(f"/proc/{name}/environ").read_bytes()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in environment and state not in "ZX":
                found.add(int(name))
    return found


async def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        clock = SystemClock()
        while not condition():
            await clock.sleep(0.02)


class Bench:
    """A directory, its guards and the agents of one test."""

    def __init__(self, directory: Path) -> None:
        self.clock = SystemClock()
        self.directory = directory
        self.executors: list[ProcessExecutor] = []
        self.guards: set[int] = set()
        self.told: list[ExecutorEvent] = []
        self.census: dict[AttemptKey, CensusEntry] = {}
        self._tasks = 0

    async def agent(
        self, *flags: str, fence: float = 30.0, kill: float = 4.0, guard: Sequence[str] = GUARD
    ) -> ProcessExecutor:
        """A connected executor with lease 1 renewed now."""
        executor = ProcessExecutor(self.directory, self.clock, guard_argv=[*guard, *flags])
        self.executors.append(executor)
        self.census = {entry.key: entry for entry in await executor.connect()}
        self.guards.add(executor.guard_pid)
        await executor.configure(fence, kill)
        await executor.renew(1, self.clock.boot())
        return executor

    def key(self) -> AttemptKey:
        """A fresh one."""
        self._tasks += 1
        return AttemptKey("0193a1b2c3d4", self._tasks, 1, "beef")

    def request(self, *argv: str, **more: object) -> StartRequest:
        """A start of `argv` in generation 1, marked for the census."""
        return StartRequest(self.key(), 1, argv, {"PATH": PATH, **self.mark}, **more)  # type: ignore[arg-type]

    @property
    def mark(self) -> dict[str, str]:
        """Environment that `living` looks for."""
        return {"BATON_TEST": f"{self.directory}"}

    def living(self) -> set[int]:
        """Processes of this test's workloads."""
        return processes_with(f"BATON_TEST={self.directory}")

    async def until(self, executor: ProcessExecutor, kind: type, key: AttemptKey) -> ExecutorEvent:
        """The first event of this kind for this key."""
        async with asyncio.timeout(25):
            events = executor.events()
            while True:
                for event in self.told:
                    if isinstance(event, kind) and getattr(event, "key", None) == key:
                        return event
                self.told.extend(await anext(events))

    async def exit_of(self, executor: ProcessExecutor, key: AttemptKey) -> Exited:
        """How it ended."""
        event = await self.until(executor, Exited, key)
        assert isinstance(event, Exited)
        return event

    async def run(self, executor: ProcessExecutor, *argv: str, **more: object) -> tuple[Exited, bytes]:
        """Run to the end; its exit and its output."""
        request = self.request(*argv, **more)
        await executor.start([request])
        exited = await self.exit_of(executor, request.key)
        return exited, (await executor.read_log(request.key, 0, 1 << 20))[0]

    async def close(self) -> None:
        """End the guards; nothing may be left then."""
        for executor in self.executors:
            await executor.close()
        await end_guards(self.guards, self.clock)
        await eventually(lambda: not self.living())


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Deep enough that a socket's path would not fit its address (108 bytes)."""
    made = Bench(tmp_path / ("d" * 60) / ("e" * 60))
    yield made
    await made.close()
    assert made.living() == set()


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


INTRUDER = """
import os, socket, sys
os.chdir(sys.argv[1])
guard = socket.socket(socket.AF_UNIX)
guard.connect("guard.sock")
try:
    guard.sendall(bytes.fromhex(sys.argv[2]))
    answer = guard.recv(65536)
except ConnectionError:
    answer = b""
print("heard", len(answer))
"""


@pytest.mark.parametrize("flags", [(), ("--killer", "scan")])
async def test_a_workload_cannot_command_its_guard(bench: Bench, flags: tuple[str, ...]) -> None:
    """F8, G1: same uid, but the guard's own descendant; it hears nothing and takes nobody's place."""
    executor = await bench.agent(*flags)
    victim = bench.request("sleep", "300")
    await executor.start([victim])
    await bench.until(executor, Started, victim.key)
    stop = encode({"op": "stop", "keys": [victim.key.text()], "grace": 0.0}).hex()
    exited, output = await bench.run(executor, sys.executable, "-c", INTRUDER, str(bench.directory), stop)
    assert (exited.exit_code, output) == (0, b"heard 0\n")
    assert not any(isinstance(event, (Exited, Stopped)) and event.key == victim.key for event in bench.told)
    assert len(bench.living()) == 1
    assert "one of its own workloads" in (bench.directory / "guard.err").read_text()
    await executor.stop([victim.key], grace_seconds=5.0)
    await bench.until(executor, Stopped, victim.key)


async def test_checkpoints_go_with_an_accepted_success_and_empty_ones_at_once(bench: Bench) -> None:
    executor = await bench.agent()
    checkpoints = bench.directory / "checkpoints"
    write = ("sh", "-c", 'echo half > "$BATON_CHECKPOINT_DIR/state"')
    failed = bench.request("sh", "-c", f"{write[2]}; exit 1")
    succeeded, empty = bench.request(*write), bench.request("true")
    await executor.start([failed, succeeded, empty])
    for request in (failed, succeeded, empty):
        await bench.exit_of(executor, request.key)
    kept = {f"{request.key.run_uid}.{request.key.task}" for request in (failed, succeeded)}
    assert {path.name for path in checkpoints.iterdir()} == kept
    await executor.forget([failed.key, succeeded.key])
    left = f"{failed.key.run_uid}.{failed.key.task}"
    await eventually(lambda: [path.name for path in checkpoints.iterdir()] == [left])


async def test_a_running_attempt_keeps_the_checkpoints_it_shares(bench: Bench) -> None:
    executor = await bench.agent()
    running = bench.request("sleep", "300")
    other = dataclasses.replace(bench.request("true"), key=dataclasses.replace(running.key, n=2))
    await executor.start([running, other])
    await bench.exit_of(executor, other.key)
    await executor.forget([other.key])
    await executor.read_log(running.key, 0, 1)  # answered after the forget
    assert len(list((bench.directory / "checkpoints").iterdir())) == 1


async def test_checkpoints_count_as_disk(bench: Bench) -> None:
    executor = await bench.agent()
    fill = 'head -c 700000 /dev/zero > "$BATON_CHECKPOINT_DIR/a"; head -c 700000 /dev/zero > b; sleep 300'
    exited, _ = await bench.run(executor, "sh", "-c", fill, limits=Limits(disk_bytes=1 << 20))
    assert exited.cause is Cause.LIMIT
    assert "of disk, over its limit" in exited.message


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
    stopped_at = bench.clock.boot()
    await eventually(lambda: not bench.living())
    assert bench.clock.boot() - stopped_at <= 1.5 + 2.0
    process.kill()
    await process.wait()
    await bench.agent()
    exited = bench.census[AttemptKey("agentrun", 0, 1, "beef")].exited
    assert exited is not None
    assert (exited.cause, exited.late) == (Cause.FENCE, False)


@pytest.mark.parametrize("flags", [(), ("--killer", "scan")])
async def test_a_killed_guard_takes_double_forks_and_setsid_with_it(bench: Bench, flags: tuple[str, ...]) -> None:
    """G4, with and without namespaces."""
    executor = await bench.agent(*flags)
    requests = [bench.request(sys.executable, "-S", "-c", DAEMONIZE) for _ in range(3)]
    await executor.start(requests)
    await eventually(lambda: len(bench.living()) == 6)
    os.kill(executor.guard_pid, signal.SIGKILL)
    await eventually(lambda: not bench.living(), 5.0)
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


async def test_arguments_are_never_a_shell_string(bench: Bench) -> None:
    executor = await bench.agent()
    hostile = ["$(touch pwned)", "; rm -rf /", "`id`", "a b", "*", "", "\n", "--", "é"]
    exited, output = await bench.run(executor, "printf", "[%s]", *hostile)
    assert exited.succeeded
    assert output.decode() == "".join(f"[{word}]" for word in hostile)


async def test_a_workload_sees_its_environment_its_places_and_nothing_else(bench: Bench) -> None:
    executor = await bench.agent()
    env = {"PATH": PATH, "BATON_RUN": "r", "BATON_FENCE": "1.1", "TRACEPARENT": "00-ab-cd-01", **bench.mark}
    script = (
        "import os, sys, json\n"
        "json.dump({'env': dict(os.environ), 'cwd': os.getcwd(), 'fds': sorted(os.listdir('/proc/self/fd'))[:4],"
        " 'stdin': sys.stdin.read(), 'inputs': open(os.environ['BATON_INPUTS']).read(), 'files': os.listdir(),"
        " 'nnp': [l for l in open('/proc/self/status') if l.startswith('NoNewPrivs')][0].split()[1],"
        " 'checkpoint': os.path.isdir(os.environ['BATON_CHECKPOINT_DIR']),"
        " 'leader': os.getpgid(0) == os.getpid()}, sys.stdout)"
    )
    request = StartRequest(bench.key(), 1, (sys.executable, "-S", "-E", "-c", script), env, inputs=b'{"parent": 1}')
    await executor.start([request])
    exited = await bench.exit_of(executor, request.key)
    output, _ = await executor.read_log(request.key, 0, 1 << 16)
    assert exited.succeeded, output
    seen = json.loads(output)
    places = {"BATON_RESULT", "BATON_INPUTS", "BATON_CHECKPOINT_DIR"}
    assert set(seen["env"]) - {"LC_CTYPE"} == set(env) | places
    assert {name: seen["env"][name] for name in env} == env
    assert seen["cwd"] == f"{bench.directory}/work/{request.key.text()}"
    assert seen["env"]["BATON_CHECKPOINT_DIR"] == f"{bench.directory}/checkpoints/0193a1b2c3d4.{request.key.task}"
    assert (seen["stdin"], seen["inputs"], seen["nnp"], seen["checkpoint"]) == ("", '{"parent": 1}', "1", True)
    assert seen["fds"] == ["0", "1", "2", "3"]  # 3 is the directory being listed
    assert seen["leader"]


async def test_checkpoints_survive_to_the_next_attempt_and_the_working_directory_does_not(bench: Bench) -> None:
    executor = await bench.agent()
    first = bench.request("sh", "-c", "echo half > $BATON_CHECKPOINT_DIR/state; echo x > file; exit 1")
    await executor.start([first])
    await bench.exit_of(executor, first.key)
    await executor.forget([first.key])
    again = AttemptKey(first.key.run_uid, first.key.task, 2, "cafe")
    await executor.start([StartRequest(again, 1, ("sh", "-c", "cat $BATON_CHECKPOINT_DIR/state"), {"PATH": PATH})])
    assert (await bench.exit_of(executor, again)).succeeded
    assert await executor.read_log(again, 0, 100) == (b"half\n", True)
    assert not (bench.directory / "work" / first.key.text()).exists()
    assert (await executor.read_log(first.key, 0, 100))[1]


@pytest.mark.parametrize("flags", [(), ("--limits", "poll"), ("--limits", "poll", "--killer", "scan")])
class TestLimits:
    """By control groups where the host has them, by polling where it does not."""

    async def test_memory(self, bench: Bench, flags: tuple[str, ...]) -> None:
        executor = await bench.agent(*flags)
        hog = "import time\nx = bytearray(150 << 20)\ntime.sleep(60)"
        exited, _ = await bench.run(executor, sys.executable, "-S", "-c", hog, limits=Limits(memory_bytes=100 << 20))
        assert exited.cause is Cause.LIMIT
        assert f"limit of {100 << 20} bytes" in exited.message
        assert exited.signal == signal.SIGKILL

    async def test_processes(self, bench: Bench, flags: tuple[str, ...]) -> None:
        executor = await bench.agent(*flags)
        bomb = "i=0; while [ $i -lt 60 ]; do sleep 300 & i=$((i+1)); done; wait"
        exited, _ = await bench.run(executor, "sh", "-c", bomb, limits=Limits(processes=12))
        assert exited.cause is Cause.LIMIT
        assert "limit of 12 processes" in exited.message
        assert bench.living() == set()

    async def test_disk(self, bench: Bench, flags: tuple[str, ...]) -> None:
        executor = await bench.agent(*flags)
        limits = Limits(disk_bytes=1 << 20)
        exited, _ = await bench.run(executor, "sh", "-c", "exec head -c 2000000 /dev/zero > big", limits=limits)
        assert (exited.cause, exited.signal) == (Cause.LIMIT, signal.SIGXFSZ)
        deaf = "f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 16))"  # Python ignores SIGXFSZ
        exited, _ = await bench.run(executor, sys.executable, "-S", "-c", deaf, limits=limits)
        assert (exited.cause, exited.exit_code) == (Cause.LIMIT, 1)
        assert f"at its disk limit of {1 << 20} bytes" in exited.message
        many = "for i in 1 2 3 4 5 6; do head -c 500000 /dev/zero > f$i; done; sleep 300"
        exited, _ = await bench.run(executor, "sh", "-c", many, limits=limits)
        assert exited.cause is Cause.LIMIT
        assert f"of disk, over its limit of {1 << 20} bytes" in exited.message

    async def test_within_limits_nothing_happens(self, bench: Bench, flags: tuple[str, ...]) -> None:
        executor = await bench.agent(*flags)
        limits = Limits(cpu_millis=500, memory_bytes=200 << 20, processes=50, disk_bytes=10 << 20)
        exited, output = await bench.run(executor, "sh", "-c", "echo fine > file; cat file", limits=limits)
        assert (exited.succeeded, output) == (True, b"fine\n")


async def test_a_flood_of_output_is_cut_with_a_marker_and_the_workload_ends_well(bench: Bench) -> None:
    executor = await bench.agent()
    limits = Limits(output_bytes=100_000)
    exited, output = await bench.run(executor, "sh", "-c", "head -c 3000000 /dev/zero; exit 0", limits=limits)
    assert exited.succeeded
    assert output[:100_000] == bytes(100_000)
    assert output[100_000:] == b"\n[baton: the output limit of 100000 bytes was reached; the rest was dropped]\n"


@pytest.mark.parametrize("make", ["ln -s /etc/hostname $BATON_RESULT", "mkfifo $BATON_RESULT", "mkdir $BATON_RESULT"])
async def test_only_a_regular_file_is_a_result(bench: Bench, make: str) -> None:
    executor = await bench.agent()
    exited, _ = await bench.run(executor, "sh", "-c", make)
    assert exited.cause is Cause.RESULT
    assert exited.result == b""


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


async def test_a_full_disk_refuses_starts_with_a_clear_reason(bench: Bench) -> None:
    executor = await bench.agent("--min-free-bytes", str(1 << 60))
    request = bench.request("true")
    await executor.start([request])
    refused = await bench.until(executor, Refused, request.key)
    assert isinstance(refused, Refused)
    assert "disk is full" in refused.reason


async def test_a_directory_left_by_a_crash_before_the_start_was_recorded_bars_nothing(bench: Bench) -> None:
    request = bench.request("sh", "-c", "ls -A")
    left = bench.directory / "work" / request.key.text()
    left.mkdir(parents=True)
    (left / "old").touch()
    executor = await bench.agent()
    await executor.start([request])
    assert (await bench.exit_of(executor, request.key)).succeeded
    assert await executor.read_log(request.key, 0, 100) == (b"", True)
    await eventually(lambda: not list((bench.directory / "trash").iterdir()))


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


async def test_g3_what_was_not_carried_out_is_void_before_a_new_connections_census(bench: Bench) -> None:
    first = await bench.agent()
    request = bench.request("sleep", "60")
    os.kill(first.guard_pid, signal.SIGSTOP)
    await first.start([request])
    joining = asyncio.create_task(bench.agent())
    await bench.clock.sleep(0.3)
    os.kill(first.guard_pid, signal.SIGCONT)
    second = await joining
    await bench.clock.sleep(0.3)
    assert request.key not in bench.census
    assert bench.living() == set()
    await second.start([request])  # void is not refused: it never was asked
    await bench.until(second, Started, request.key)


async def test_few_open_files_are_a_limit_said_in_words_and_never_the_guards_end(bench: Bench) -> None:
    """G1: a guard that met the host's limit unprepared would die, and all work with it."""
    argv = ["sh", "-c", 'ulimit -n 84; exec "$@"', "few", *GUARD]
    executor = await bench.agent(guard=argv)
    pid = executor.guard_pid
    requests = [bench.request("sleep", "60") for _ in range(8)]
    await executor.start(requests)
    for request in requests[:5]:
        await bench.until(executor, Started, request.key)
    for request in requests[5:]:
        refused = await bench.until(executor, Refused, request.key)
        assert isinstance(refused, Refused)
        assert "5 workloads" in refused.reason
    again = await bench.agent(guard=argv)
    assert again.guard_pid == pid
    assert sum(entry.phase is Phase.RUNNING for entry in bench.census.values()) == 5


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


UNSUPERVISED = """
import os, resource, sys
from pathlib import Path
from cluster_agent.executors.base import AttemptKey, StartRequest
from cluster_agent.guard.cgroups import Groups
from cluster_agent.guard.isolation import choose
from cluster_agent.guard.places import Places
from cluster_agent.guard.workload import Spawner

places = Places(Path(sys.argv[1]))
groups, isolation = Groups("few", places.directory / "cgroups", wanted=False), choose("auto")
lives, _held = os.pipe2(os.O_CLOEXEC)
lock = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
request = StartRequest(AttemptKey("run", 0, 1, "beef"), 1, ("sleep", "60"), {"BATON_TEST": sys.argv[1]})
paths = places.prepare(request.key, b"")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

def fill():
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return held

for spare in range(6):
    held = fill()
    for fd in held[:spare]:
        os.close(fd)
    try:
        Spawner(places, groups, isolation, lives, lock).spawn(request, paths, "/bin/sleep")
    except OSError as error:
        print(error.strerror)
    left = fill()
    print(len(left) == spare)
    for fd in {*held[spare:], *left}:
        os.close(fd)
    try:
        print("child", os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        print("no child")
"""


async def test_g1_a_spawn_that_cannot_be_supervised_leaves_no_process_and_no_descriptor(bench: Bench) -> None:
    """Whichever descriptor is the one too many: pipes, log or pidfd."""
    bench.directory.mkdir(parents=True)
    argv = [sys.executable, "-c", UNSUPERVISED, str(bench.directory)]
    done = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    said, _ = await done.communicate()
    assert said.decode().splitlines() == ["Too many open files", "True", "no child"] * 6
    assert bench.living() == set()


async def test_nonsense_costs_the_connection_and_not_the_guard(bench: Bench) -> None:
    executor = await bench.agent()
    request = bench.request("sleep", "300")
    await executor.start([request])
    await bench.until(executor, Started, request.key)
    place = os.open(bench.directory, os.O_RDONLY)
    try:
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{place}/guard.sock")
    finally:
        os.close(place)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(10):
        await reader.read()
    writer.close()
    await bench.agent()
    assert bench.census[request.key].phase is Phase.RUNNING


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
    await eventually(lambda: not bench.living(), 5.0)
    await bench.agent(guard=guard)
    lost = bench.census[daemon.key].exited
    assert lost is not None
    assert lost.cause is Cause.LOST
    await bench.close()


class TestLedger:
    """Durable memory (F4, F8)."""

    KEY = "run.1.1.beef"

    def test_records_survive(self, tmp_path: Path) -> None:
        first = Ledger(tmp_path, "boot")
        first.started(self.KEY, 3, 1.0)
        first.kept(self.KEY, 42, 99)
        first.tombstone(["run.2.1.beef"])
        again = Ledger(tmp_path, "boot")
        assert again.same_boot
        assert (again.started_keys[self.KEY].generation, again.started_keys[self.KEY].keeper_pid) == (3, 42)
        assert again.knows("run.2.1.beef")
        assert not again.knows("run.3.1.beef")

    def test_another_boot_is_seen(self, tmp_path: Path) -> None:
        Ledger(tmp_path, "boot").started(self.KEY, 1, 1.0)
        assert not Ledger(tmp_path, "other").same_boot

    def test_a_torn_tail_is_cut_off_at_every_length(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path, "boot")
        ledger.tombstone(["run.1.1.beef"])
        whole = (tmp_path / "ledger").read_bytes()
        ledger.tombstone(["run.2.1.beef"])
        longer = (tmp_path / "ledger").read_bytes()
        for size in range(len(whole), len(longer)):
            (tmp_path / "ledger").write_bytes(longer[:size] + b"\0" * (size % 3))
            again = Ledger(tmp_path, "boot")
            assert (again.knows("run.1.1.beef"), again.knows("run.2.1.beef")) == (True, False)
            again.tombstone(["run.3.1.beef"])
            assert Ledger(tmp_path, "boot").knows("run.3.1.beef")

    def test_a_damaged_middle_is_an_error(self, tmp_path: Path) -> None:
        Ledger(tmp_path, "boot").tombstone([f"run.{n}.1.beef" for n in range(3)])
        data = bytearray((tmp_path / "ledger").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "ledger").write_bytes(data)
        with pytest.raises(LedgerCorrupt, match="unreadable record at byte"):
            Ledger(tmp_path, "boot")

    def test_forgotten_keys_stay_barred_through_rotation_and_cost_eight_bytes(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path, "boot")
        ledger.started("live.0.1.beef", 1, 1.0)
        keys = [f"run.{n}.1.beef" for n in range(SEGMENT + 10)]
        ledger.tombstone(keys)
        ledger.forget(keys)
        assert (tmp_path / "ledger.old").stat().st_size == 8 * len(keys)
        assert (tmp_path / "ledger").stat().st_size < 1000
        again = Ledger(tmp_path, "boot")
        assert all(again.knows(key) for key in [*keys[:100], *keys[-100:], "live.0.1.beef"])
        assert not again.knows("run.0.2.beef")
