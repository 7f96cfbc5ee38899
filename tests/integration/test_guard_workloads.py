"""What a workload finds and leaves under a guard: arguments, environment, places, checkpoints, output, result, limits.

PROTOCOL F1, F3 and contract 7 of the Executor port; real processes, and real limits where the host has them.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest

from cluster_agent.executors.base import AttemptKey, Cause, Limits, StartRequest
from tests.integration.guard_bench import PATH, Bench, eventually

pytestmark = pytest.mark.timeout(60)


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
    places = {"BATON_RESULT", "BATON_INPUTS", "BATON_CHECKPOINT_DIR", "BATON_ARTIFACTS_DIR"}
    assert set(seen["env"]) - {"LC_CTYPE"} == set(env) | places
    assert {name: seen["env"][name] for name in env} == env
    assert Path(seen["cwd"]) == bench.directory / "work" / request.key.text()
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


async def test_checkpoints_count_as_disk(bench: Bench) -> None:
    executor = await bench.agent()
    fill = 'head -c 700000 /dev/zero > "$BATON_CHECKPOINT_DIR/a"; head -c 700000 /dev/zero > b; sleep 300'
    exited, _ = await bench.run(executor, "sh", "-c", fill, limits=Limits(disk_bytes=1 << 20))
    assert exited.cause is Cause.LIMIT
    assert "of disk, over its limit" in exited.message


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
