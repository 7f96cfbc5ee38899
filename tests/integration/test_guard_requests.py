"""Whom a guard obeys, and what it refuses without dying of it (PROTOCOL G1, G3, F8)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import closing

import pytest

from baton.time_limits import time_limit
from cluster_agent.executors.base import Exited, Phase, Refused, Started, Stopped
from cluster_agent.guard import proctree
from cluster_agent.guard.protocol import SocketDirectory, encode
from tests.integration.guard_bench import GUARD, Bench, eventually

pytestmark = pytest.mark.timeout(60)


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


async def test_g3_what_was_not_carried_out_is_void_before_a_new_connections_census(bench: Bench) -> None:
    """The guard goes on with both before it: the start, and the connection that makes it void. Whichever it sees first."""
    first = await bench.agent()
    request = bench.request("sleep", "60")
    os.kill(first.guard_pid, signal.SIGSTOP)
    await eventually(lambda: (guard := proctree.read(first.guard_pid)) is not None and guard.state == "T")
    await first.start([request])
    place = SocketDirectory(bench.directory)
    with closing(place), socket.socket(socket.AF_UNIX) as second:
        second.connect(place.address)  # it waits from here on, before a word is said
        os.kill(first.guard_pid, signal.SIGCONT)
        third = await bench.agent()
        assert request.key not in bench.census
    assert bench.living() == set()
    await third.start([request])  # void is not refused: it never was asked
    await bench.until(third, Started, request.key)


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
    async with time_limit(10):
        await reader.read()
    writer.close()
    await bench.agent()
    assert bench.census[request.key].phase is Phase.RUNNING


async def test_a_full_disk_refuses_starts_with_a_clear_reason(bench: Bench) -> None:
    executor = await bench.agent("--min-free-bytes", str(1 << 60))
    request = bench.request("true")
    await executor.start([request])
    refused = await bench.until(executor, Refused, request.key)
    assert isinstance(refused, Refused)
    assert "disk is full" in refused.reason


async def test_a_directory_left_by_a_crash_before_the_start_was_recorded_bars_nothing(bench: Bench) -> None:
    request = bench.request("sh", "-c", "ls")
    left = bench.directory / "work" / request.key.text()
    left.mkdir(parents=True)
    (left / "old").touch()
    executor = await bench.agent()
    await executor.start([request])
    assert (await bench.exit_of(executor, request.key)).succeeded
    assert await executor.read_log(request.key, 0, 100) == (b"", True)
    await eventually(lambda: not list((bench.directory / "trash").iterdir()))


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
