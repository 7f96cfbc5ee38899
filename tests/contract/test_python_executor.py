"""Python tasks at the process executor: warm workers under the guard's rules (PROTOCOL F4, F5, F8, G1; contract 1-8)."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from baton.time_limits import time_limit
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    Exited,
    Limits,
    Phase,
    PythonCall,
    Refused,
    Started,
    StartRequest,
    Stopped,
)
from cluster_agent.guard import proctree
from cluster_agent.guard.protocol import start_to_wire
from tests.contract.executor_worlds import ProcessWorld
from tests.contract.test_executor import Agent

pytestmark = pytest.mark.timeout(60)

_tasks = itertools.count()

STEPS = """
import os, signal, subprocess, sys, threading, time

def pid(): return os.getpid()
def add(*numbers, scale=1): return sum(numbers) * scale
def echo(value): return value
def length(values): return len(values)
def say(words):
    print(words)
    os.system("echo from a child")
def fail(word): raise ValueError(f"bad {word}")
def leave(code): os._exit(code)
def quit(code): sys.exit(code)
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def sleep(seconds=60): time.sleep(seconds)
def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
def big(size): return "x" * size
def odd(): return {1, 2}
def nan(): return float("nan")
def env(name): return os.environ.get(name)
def where(): return os.getcwd()
def litter():
    subprocess.Popen(["sleep", "60"], start_new_session=True)
def thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def fork():
    if os.fork() == 0:
        return "child"
    os.wait()
    return "parent"
def chatter(size):
    for _ in range(size // 1000):
        print("x" * 999)
def disturb():
    os.environ["LEFT"] = "1"; os.chdir("/tmp"); sys.path.insert(0, "/nowhere")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def stdin(): return sys.stdin.read()
def close_all():
    os.closerange(3, 1000)
    time.sleep(60)
async def later(value): return value
class Box:
    @staticmethod
    def inner(): return "boxed"
number = 7
"""


def packed(**files: str) -> tuple[str, bytes]:
    """Modules as a zip archive, and its hash."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.py"), text)
    return hashlib.sha256(out.getvalue()).hexdigest(), out.getvalue()


CODE, ZIP = packed(steps=STEPS)


def new_key(n: int = 1) -> AttemptKey:
    """An attempt of a task of its own."""
    return AttemptKey("0193a1b2c3d4", next(_tasks), n, "cafe")


def call(function: str, *args: object, tenant: str = "default", **named: object) -> PythonCall:
    """A call of a function of STEPS."""
    return PythonCall(f"steps:{function}", json.dumps({"$baton.args": args, **named}), (), CODE, ZIP, tenant)


def start(key: AttemptKey, python: PythonCall, *, generation: int = 1, **more: object) -> StartRequest:
    """A start of a call."""
    env = {"PATH": "/usr/bin:/bin", "BATON_TASK": "t"}
    return StartRequest(key, generation, (), env, python=python, **more)  # type: ignore[arg-type]


@pytest.fixture(params=["process", "process-scan"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ProcessWorld]:
    """As this host permits best, and with nothing but subreapers and polling."""
    flags = [] if request.param == "process" else ["--killer", "scan", "--limits", "poll"]
    made = ProcessWorld(tmp_path, flags)
    yield made
    await made.close()


@pytest.fixture
async def agent(world: ProcessWorld) -> AsyncIterator[Agent]:
    """Connected, F = 30 s, K = 4 s, generation 1 renewed now."""
    made = await Agent(world.executor()).connect()
    await made.executor.configure(30.0, 4.0)
    await made.executor.renew(1, world.clock.boot())
    yield made
    await made.executor.close()


async def ran(agent: Agent, python: PythonCall, **more: Any) -> Exited:
    """One call from start to end."""
    key = new_key()
    await agent.executor.start([start(key, python, **more)])
    return await agent.exit_of(key)


def lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    process = proctree.read(pid)
    return process is not None and process.alive


async def pid_of(agent: Agent, python: PythonCall) -> int:
    """The host's pid of the worker that served a call, which must succeed."""
    key = new_key()
    await agent.executor.start([start(key, python)])
    assert (await agent.exit_of(key)).succeeded
    [started] = await agent.until(Started, key)
    assert isinstance(started, Started)
    return started.pid


async def value(agent: Agent, python: PythonCall, **more: Any) -> object:
    """What a call returned."""
    exited = await ran(agent, python, **more)
    assert exited.succeeded, exited
    return json.loads(exited.result)


async def test_a_call_returns_json_and_the_same_worker_serves_the_next(world: ProcessWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([start(key, call("add", 1, 2, scale=10))])
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.exit_code, exited.result, exited.message) == (Cause.EXIT, 0, b"30", "")
    assert exited.start_wall <= exited.end_wall
    assert agent.kinds(key) == ["Started", "Exited"]
    first = await pid_of(agent, call("add", 1))
    assert [await pid_of(agent, call("add", 1)) for _ in range(5)] == [first] * 5
    assert await value(agent, call("later", "é")) == "é"
    assert await value(agent, call("Box.inner")) == "boxed"
    array = dataclasses.replace(call("add"), args_json="[4, 5]")
    assert await value(agent, array) == 9


async def test_tenants_codes_and_limits_have_workers_of_their_own(world: ProcessWorld, agent: Agent) -> None:
    code, data = packed(steps=STEPS + "\nmore = 1\n")
    calls = [call("pid"), call("pid", tenant="other"), dataclasses.replace(call("pid"), code=code, code_zip=data)]
    keys = [new_key() for _ in range(4)]
    requests = [start(key, each) for key, each in zip(keys, calls, strict=False)]
    await agent.executor.start([*requests, start(keys[3], calls[0], limits=Limits(memory_bytes=256 << 20))])
    pids = [event.pid for event in await agent.until(Started, *keys) if isinstance(event, Started)]
    assert len(set(pids)) == 4
    await agent.until(Exited, *keys)


async def test_attempts_at_one_time_have_workers_of_their_own(world: ProcessWorld, agent: Agent) -> None:
    keys = [new_key() for _ in range(3)]
    await agent.executor.start([start(key, call("sleep", 0.2)) for key in keys])
    ends = await agent.until(Exited, *keys)
    starts = await agent.until(Started, *keys)
    assert all(isinstance(end, Exited) and end.succeeded for end in ends)
    assert len({each.pid for each in starts if isinstance(each, Started)}) == 3


async def test_the_function_sees_its_environment_directory_and_no_input(world: ProcessWorld, agent: Agent) -> None:
    assert await value(agent, call("env", "BATON_TASK")) == "t"
    assert await value(agent, call("env", "PYTHONPATH")) is None
    key = new_key()
    await agent.executor.start([start(key, call("where"))])
    exited = await agent.exit_of(key)
    assert key.text() in json.loads(exited.result)
    assert await value(agent, call("stdin")) == ""


async def test_results_of_parents_take_their_places(world: ProcessWorld, agent: Agent) -> None:
    inputs = json.dumps({"a": "[1, 2]", "b": "no json"}).encode()
    python = call("echo", [{"$baton.result": "a"}, {"x": {"$baton.result": "b"}}, {"$baton.result": "gone"}])
    assert await value(agent, python, inputs=inputs) == [[1, 2], {"x": "no json"}, None]


async def test_a_range_stands_for_the_results_of_numbered_parents(world: ProcessWorld, agent: Agent) -> None:
    inputs = json.dumps({"part-0": "1", "part-2": "[3]"}).encode()
    assert await value(agent, call("echo", [{"$baton.results": ["part-", 0, 3]}]), inputs=inputs) == [[1, None, [3]]]


async def test_all_inline_results_of_a_run_reach_a_wide_join(world: ProcessWorld, agent: Agent) -> None:
    """16 MiB (DESIGN 14) in one start, most of them quotes, which JSON escapes: it fits the guard's frame."""
    results = {f"part-{n}": json.dumps('"' * 2000) for n in range(4000)}
    python = call("length", {"$baton.results": ["part-", 0, 4000]})
    assert await value(agent, python, inputs=json.dumps(results).encode()) == 4000


async def test_output_goes_to_the_log_of_the_attempt_up_to_its_cap(world: ProcessWorld, agent: Agent) -> None:
    keys = [new_key() for _ in range(3)]
    for key, words in zip(keys, ("one", "two"), strict=False):
        await agent.executor.start([start(key, call("say", words))])
        await agent.exit_of(key)
        assert await agent.executor.read_log(key, 0, 1000) == (f"{words}\nfrom a child\n".encode(), True)
    limits = Limits(output_bytes=10_000)
    await agent.executor.start([start(keys[2], call("chatter", 1_000_000), limits=limits)])
    await agent.exit_of(keys[2])
    log, _ = await agent.executor.read_log(keys[2], 0, 1 << 20)
    assert len(log) < 11_000
    assert b"output limit of 10000 bytes" in log


async def test_an_exception_is_a_failure_with_its_line_and_costs_no_worker(world: ProcessWorld, agent: Agent) -> None:
    first = await pid_of(agent, call("add", 1))
    key = new_key()
    await agent.executor.start([start(key, call("fail", "word"))])
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.exit_code, exited.succeeded, exited.result) == (Cause.EXIT, 1, False, b"")
    assert "ValueError: bad word" in exited.message
    assert "steps.py" in exited.message
    log, _ = await agent.executor.read_log(key, 0, 10_000)
    assert b"Traceback" in log
    quit_ = await ran(agent, call("quit", 0))
    assert not quit_.succeeded
    assert "SystemExit" in quit_.message
    assert await pid_of(agent, call("add", 1)) == first


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (call("odd"), ["set", "not JSON"]),
        (call("nan"), ["float", "not JSON"]),
    ],
)
async def test_a_bad_result_says_what_is_wrong(
    world: ProcessWorld, agent: Agent, python: PythonCall, words: list[str]
) -> None:
    exited = await ran(agent, python)
    assert exited.cause is Cause.RESULT
    assert exited.result == b""
    assert all(word in exited.message for word in words), exited.message


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nowhere:f", ["nowhere:f is not importable", "ModuleNotFoundError", "packed with the graph"]),
        ("steps:nothing", ["AttributeError"]),
        ("steps:number", ["int, not a function"]),
        ("broken:f", ["SyntaxError"]),
        ("exits:f", ["SystemExit"]),
    ],
)
async def test_a_function_that_is_not_importable_is_told(
    world: ProcessWorld, agent: Agent, function: str, words: list[str]
) -> None:
    code, data = packed(steps=STEPS, broken="def f(:\n", exits="raise SystemExit(3)\n")
    exited = await ran(agent, dataclasses.replace(call("pid"), function=function, code=code, code_zip=data))
    assert (exited.cause, exited.exit_code) == (Cause.SPAWN, None)
    assert all(word in exited.message for word in words), exited.message


async def test_a_worker_that_ends_in_mid_task_costs_its_one_attempt(world: ProcessWorld, agent: Agent) -> None:
    other = new_key()
    await agent.executor.start([start(other, call("sleep", 1.0))])
    codes = {0: Cause.RESULT, 3: Cause.EXIT}
    for code, cause in codes.items():
        exited = await ran(agent, call("leave", code))
        assert (exited.cause, exited.exit_code, exited.succeeded) == (cause, code, False)
        assert f"ended in mid-task, by exit code {code}" in exited.message
    crashed = await ran(agent, call("crash"))
    assert (crashed.cause, crashed.signal) == (Cause.EXIT, 11)
    assert "by SIGSEGV" in crashed.message
    hung_up = await ran(agent, call("close_all"))
    assert not hung_up.succeeded
    assert (await agent.exit_of(other)).succeeded
    assert await value(agent, call("add", 1)) == 1


async def test_a_hung_call_is_killed_at_its_time_out(world: ProcessWorld, agent: Agent) -> None:
    exited = await ran(agent, call("deaf"), timeout_seconds=1.0, grace_seconds=0.3)
    assert exited.cause is Cause.TIMEOUT
    assert exited.end_wall - exited.start_wall >= 0.7
    assert await value(agent, call("add", 1)) == 1


async def test_a_call_is_killed_at_its_deadline(world: ProcessWorld, agent: Agent) -> None:
    exited = await ran(agent, call("sleep"), stop_at=world.clock.boot() + 3.0, grace_seconds=0.2)
    assert exited.cause is Cause.DEADLINE


async def test_a_stop_kills_the_call_and_is_confirmed(world: ProcessWorld, agent: Agent) -> None:
    warm = await pid_of(agent, call("add", 1))
    key = new_key()
    await agent.executor.start([start(key, call("deaf"))])
    await agent.until(Started, key)
    await agent.executor.stop([key], grace_seconds=0.1)
    await agent.until(Stopped, key)
    assert agent.kinds(key) == ["Started", "Exited", "Stopped"]
    assert (await agent.exit_of(key)).cause is Cause.STOP
    await agent.executor.start([start(key, call("pid"))])
    await agent.until(Refused, key)
    assert await pid_of(agent, call("add", 1)) != warm


async def test_the_fence_kills_a_call(world: ProcessWorld, agent: Agent) -> None:
    await agent.executor.configure(2.0, 2.0)
    await agent.executor.renew(1, world.clock.boot())
    key, kept = new_key(), new_key()
    requests = [start(key, call("deaf")), start(kept, call("sleep", 4.5), keep_at_fence=True)]
    await agent.executor.start(requests)
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.late) == (Cause.FENCE, False)
    assert (await agent.exit_of(kept)).succeeded
    late = new_key()
    await agent.executor.start([start(late, call("pid"))])
    await agent.until(Refused, late)


async def test_a_key_is_started_once(world: ProcessWorld, agent: Agent) -> None:
    key = new_key()
    request = start(key, call("pid"))
    await agent.executor.start([request, request])
    await agent.exit_of(key)
    await agent.executor.start([request])
    await agent.until(Refused, key)
    assert agent.kinds(key) == ["Started", "Exited", "Refused"]


@pytest.mark.parametrize("function", ["litter", "thread"])
async def test_what_a_call_leaves_behind_dies_with_its_worker(world: ProcessWorld, agent: Agent, function: str) -> None:
    before = _sleepers(world.guard_pid)
    left = await pid_of(agent, call(function))
    assert await pid_of(agent, call("add", 1)) != left
    assert _sleepers(world.guard_pid) == before


def _sleepers(guard: int) -> int:
    """How many `sleep` processes the guard's tree has."""
    below = proctree.descendants(guard, proctree.everything())
    return sum(Path(f"/proc/{each.pid}/comm").read_text() == "sleep\n" for each in below)


async def test_a_fork_that_returns_answers_nothing(world: ProcessWorld, agent: Agent) -> None:
    assert await value(agent, call("fork")) == "parent"
    assert await value(agent, call("add", 2)) == 2


async def test_what_a_call_changes_in_its_process_is_undone(world: ProcessWorld, agent: Agent) -> None:
    warm = await pid_of(agent, call("add", 1))
    await value(agent, call("disturb"))
    assert await value(agent, call("env", "LEFT")) is None
    assert await pid_of(agent, call("add", 1)) == warm
    exited = await ran(agent, call("sleep"), timeout_seconds=0.5, grace_seconds=0.5)
    assert exited.cause is Cause.TIMEOUT


async def test_an_agent_that_comes_back_adopts_a_running_call(world: ProcessWorld) -> None:
    first = await Agent(world.executor()).connect()
    await first.executor.configure(30.0, 4.0)
    await first.executor.renew(1, world.clock.boot())
    key = new_key()
    await first.executor.start([start(key, call("sleep", 1.0))])
    await first.until(Started, key)
    await first.executor.close()
    second = await Agent(world.executor()).connect()
    assert second.census[key].phase is Phase.RUNNING
    await second.executor.renew(2, world.clock.boot())
    await second.executor.adopt([key], 2)
    assert (await second.exit_of(key)).succeeded
    assert await value(second, call("add", 1), generation=2) == 1
    await second.executor.close()


async def test_workers_die_with_their_guard(world: ProcessWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([start(key, call("sleep"))])
    [started] = await agent.until(Started, key)
    idle = await pid_of(agent, call("add", 1))
    assert isinstance(started, Started)
    assert lives(idle)
    world.kill_guard()
    again = await Agent(world.executor()).connect()
    lost = again.census[key].exited
    assert lost is not None
    assert lost.cause is Cause.LOST
    assert not lives(started.pid)
    assert not lives(idle)
    await again.executor.close()


async def test_damaged_code_closes_the_connection_and_missing_code_is_refused(
    world: ProcessWorld, agent: Agent
) -> None:
    key = new_key()
    missing = dataclasses.replace(call("pid"), code="0" * 64, code_zip=b"")
    await agent.executor._ask(  # type: ignore[attr-defined]
        {"op": "start", "requests": [_wire(start(key, missing))]}
    )
    [refused] = await agent.until(Refused, key)
    assert isinstance(refused, Refused)
    assert "did not arrive" in refused.reason
    damaged = {"op": "code", "sha256": "0" * 64, "zip": base64.b64encode(ZIP).decode()}
    await agent.executor._ask(damaged)  # type: ignore[attr-defined]
    async with time_limit(10):
        async for _ in agent.executor.events():
            pass


def _wire(request: StartRequest) -> dict[str, object]:
    return start_to_wire(request)


async def test_memory_over_the_limit_is_named(world: ProcessWorld, agent: Agent) -> None:
    python = dataclasses.replace(call("big", 400 << 20))
    exited = await ran(agent, python, limits=Limits(memory_bytes=100 << 20))
    assert not exited.succeeded
    assert "memory" in exited.message.lower()


WHEEL = {
    "small_package.py": "def double(x): return 2 * x\n",
    "small_package-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small-package\nVersion: 1.0\n",
    "small_package-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "small_package-1.0.dist-info/RECORD": "small_package.py,,\n",
}


async def installed(world: ProcessWorld, agent: Agent, key: AttemptKey) -> Exited:
    """How an attempt ended whose environment had to be made: seconds on a quiet machine, far more on a busy one."""
    async with time_limit(150):
        while True:
            await agent.executor.renew(1, world.clock.boot())
            try:
                return await agent.exit_of(key)
            except TimeoutError:
                continue


@pytest.mark.timeout(180)
async def test_requirements_have_an_environment_of_their_own_made_once(
    world: ProcessWorld, agent: Agent, tmp_path: Path
) -> None:
    wheel = tmp_path / "small_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
    requirement = f"small_package @ file://{wheel}"
    code, data = packed(
        uses="import small_package, sys\nfrom baton import task\n"
        "def f(x): return [small_package.double(x), 'google.protobuf' in sys.modules]\n"
        "def grpc():\n    import grpc\n"
    )
    python = PythonCall("uses:f", "[21]", (requirement,), code, data, "default")
    keys = [new_key() for _ in range(2)]
    await agent.executor.start([start(key, python, timeout_seconds=15.0, grace_seconds=0.1) for key in keys])
    for key in keys:
        exited = await installed(world, agent, key)
        assert json.loads(exited.result) == [42, False], exited
    hidden = await ran(agent, dataclasses.replace(python, function="uses:grpc", args_json="[]"))
    assert "ModuleNotFoundError" in hidden.message
    assert len(list((world.directory / "python" / "venvs").glob("*/.complete"))) == 1


@pytest.mark.timeout(180)
async def test_a_package_that_does_not_install_is_an_applications_failure(
    world: ProcessWorld, agent: Agent, tmp_path: Path
) -> None:
    requirement = f"small_package @ file://{tmp_path}/missing-1.0-py3-none-any.whl"
    python = dataclasses.replace(call("add", 1), requirements=(requirement,))
    key = new_key()
    await agent.executor.start([start(key, python)])
    first = await installed(world, agent, key)
    assert first.cause is Cause.SPAWN
    assert "small_package" in first.message
    assert "does not install: " in first.message
    again = await ran(agent, python)
    assert again.message == first.message
    assert again.end_wall - again.start_wall < first.end_wall - first.start_wall


async def test_a_task_that_no_worker_can_be_given_leaves_no_worker(world: ProcessWorld, agent: Agent) -> None:
    key = new_key()
    request = start(key, call("add", 1))
    await agent.executor.start([dataclasses.replace(request, env={"BATON_LONG": "x" * 1_000_000})])
    exited = await agent.exit_of(key)
    assert exited.cause is Cause.SPAWN
    async with time_limit(20):  # the guard's janitor is a child, too, for a moment
        while proctree.descendants(world.guard_pid, proctree.everything()):  # noqa: ASYNC110 - /proc tells nobody
            await asyncio.sleep(0.02)
    assert await value(agent, call("add", 1)) == 1


async def test_many_workers_unpack_one_code_at_one_time(world: ProcessWorld, agent: Agent) -> None:
    keys = [new_key() for _ in range(6)]
    await agent.executor.start([start(key, call("sleep", 0.1)) for key in keys])
    ends = await agent.until(Exited, *keys)
    assert all(isinstance(end, Exited) and end.succeeded for end in ends), ends
    code = world.directory / "python" / "code"
    assert sorted(path.name for path in code.iterdir()) == [CODE, f"{CODE}.zip"]
