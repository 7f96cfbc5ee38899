"""Python calls that wait behind others: prefetch and recall (PROTOCOL G5, F4, F5, F8; contract 9 of executors/base.py).

Every function leaves a line in a file, so that what ran is known from the effects, not from what the guard says of it.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster_agent.executors.base import AttemptKey, Cause, Exited, Phase, PythonCall, Started, StartRequest, Stopped
from tests.contract.executor_worlds import ProcessWorld
from tests.contract.test_executor import Agent
from tests.contract.test_python_executor import lives, new_key, packed

pytestmark = pytest.mark.timeout(60)

CODE, ZIP = packed(
    steps="""
import os, signal, socket, time

def mark(path, word):
    with open(path, "a") as file:
        file.write(word + "\\n")
    return os.getpid()
def pause(path, word, seconds):
    mark(path, word)
    time.sleep(seconds)
    return os.getpid()
def deaf(path, word):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pause(path, word, 60)
def leave(path, word, code):
    mark(path, word)
    time.sleep(0.2)
    os._exit(code)
def say(path, word, text):
    for fd in range(3, 64):
        try:
            stream = socket.socket(fileno=os.dup(fd))
            stream.send(text.encode())
        except OSError:
            pass
    mark(path, word)
def hang_up(path, word):
    mark(path, word)
    os.closerange(3, 1000)
    time.sleep(60)
"""
)


class Marks:
    """The file of effects."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def words(self) -> list[str]:
        return self.path.read_text().split() if self.path.exists() else []

    def request(
        self, function: str, *more: object, key: AttemptKey | None = None, slots: int = 1, **bounds: object
    ) -> StartRequest:
        """A call that marks its key."""
        key = key or new_key()
        args = {"$baton.args": [str(self.path), key.text(), *more]}
        python = PythonCall(f"steps:{function}", json.dumps(args), (), CODE, ZIP, "default")
        return StartRequest(key, 1, (), {"PATH": "/usr/bin:/bin"}, python=python, slots=slots, **bounds)  # type: ignore[arg-type]


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "marks")


@pytest.fixture(params=["process", "process-scan"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ProcessWorld]:
    """As this host permits best, and with nothing but subreapers and polling."""
    flags = [] if request.param == "process" else ["--killer", "scan", "--limits", "poll"]
    made = ProcessWorld(tmp_path, flags)
    yield made
    await made.close()


@pytest.fixture
async def agent(world: ProcessWorld, marks: Marks) -> AsyncIterator[Agent]:
    """Connected, F = 30 s, K = 4 s, generation 1 renewed now; one worker is warm."""
    made = await Agent(world.executor()).connect()
    await made.executor.configure(30.0, 4.0)
    await made.executor.renew(1, world.clock.boot())
    warm = marks.request("mark")
    await made.executor.start([warm])
    assert (await made.exit_of(warm.key)).succeeded
    marks.path.unlink()
    yield made
    await made.executor.close()


async def ends(agent: Agent, requests: list[StartRequest]) -> list[Exited]:
    """How each ended."""
    events = await agent.until(Exited, *(request.key for request in requests))
    return [event for event in events if isinstance(event, Exited)]


async def test_what_waits_runs_in_order_in_the_same_worker_and_says_when_it_started(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 0.3), *(marks.request("mark") for _ in range(20))]
    await agent.executor.start(requests)
    done = await ends(agent, requests)
    assert all(end.succeeded for end in done)
    assert len({end.result for end in done}) == 1
    assert marks.words == [request.key.text() for request in requests]
    starts = [event for event in await agent.until(Started, *(r.key for r in requests)) if isinstance(event, Started)]
    assert len({each.pid for each in starts}) == 1
    assert done[1].start_wall >= done[0].end_wall
    assert [agent.kinds(request.key) for request in requests] == [["Started", "Exited"]] * len(requests)


async def test_no_more_run_at_once_than_there_are_slots(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 0.1, slots=2) for _ in range(8)]
    await agent.executor.start(requests)
    times = [(end.start_wall, end.end_wall) for end in await ends(agent, requests)]
    most = max(sum(begin <= at < end for begin, end in times) for at, _ in times)
    assert most == 2


async def test_one_that_waits_is_stopped_without_having_run(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 0.5), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    await agent.until(Started, requests[0].key)
    stopped = requests[3].key
    await agent.executor.stop([stopped], grace_seconds=1.0)
    await agent.until(Stopped, stopped)
    assert agent.kinds(stopped) == ["Exited", "Stopped"]
    done = await ends(agent, requests)
    assert [end.cause for end in done] == [Cause.STOP if r.key == stopped else Cause.EXIT for r in requests]
    assert marks.words == [request.key.text() for request in requests if request.key != stopped]


async def test_the_stop_of_what_runs_costs_nothing_that_waits_behind_it(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("deaf"), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    await agent.until(Started, requests[0].key)
    await agent.executor.stop([requests[0].key], grace_seconds=0.1)
    done = await ends(agent, requests)
    assert [end.cause for end in done] == [Cause.STOP, *[Cause.EXIT] * 5]
    assert all(end.succeeded for end in done[1:])
    assert Counter(marks.words).most_common(1)[0][1] == 1


@pytest.mark.parametrize(("function", "more"), [("leave", (3,)), ("hang_up", ())])
async def test_a_worker_that_dies_costs_the_one_it_ran(
    agent: Agent, marks: Marks, function: str, more: tuple[object]
) -> None:
    requests = [marks.request(function, *more), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    done = await ends(agent, requests)
    assert [end.succeeded for end in done] == [False, *[True] * 5]
    assert sorted(marks.words) == sorted(request.key.text() for request in requests)
    assert len({end.result for end in done[1:]}) == 1


async def test_what_waits_behind_one_that_hangs_goes_to_another_worker(agent: Agent, marks: Marks) -> None:
    hangs = marks.request("deaf", slots=2, timeout_seconds=20.0)
    behind = [marks.request("mark", slots=2) for _ in range(10)]
    await agent.executor.start([hangs, *behind])
    assert all(end.succeeded for end in await ends(agent, behind))
    assert agent.kinds(hangs.key) == ["Started"]
    await agent.executor.stop([hangs.key], grace_seconds=0.0)
    await agent.until(Stopped, hangs.key)
    assert sorted(marks.words) == sorted(request.key.text() for request in [hangs, *behind])


async def test_a_time_out_counts_from_the_beginning_not_from_the_wait(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 1.5), marks.request("pause", 0.2, timeout_seconds=1.0)]
    await agent.executor.start(requests)
    assert all(end.succeeded for end in await ends(agent, requests))
    late = [marks.request("deaf", timeout_seconds=0.3, grace_seconds=0.1), marks.request("mark", timeout_seconds=20.0)]
    await agent.executor.start(late)
    assert [end.cause for end in await ends(agent, late)] == [Cause.TIMEOUT, Cause.EXIT]


async def test_a_stopped_worker_gives_back_what_it_has_not_received(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 0.3), *(marks.request("mark") for _ in range(3))]
    await agent.executor.start(requests)
    [started] = await agent.until(Started, requests[0].key)
    assert isinstance(started, Started)
    os.kill(started.pid, signal.SIGSTOP)
    try:
        await agent.executor.stop([requests[2].key], grace_seconds=1.0)
        await agent.until(Stopped, requests[2].key)
    finally:
        os.kill(started.pid, signal.SIGCONT)
    done = await ends(agent, requests)
    assert [end.cause for end in done] == [Cause.EXIT, Cause.EXIT, Cause.STOP, Cause.EXIT]
    assert requests[2].key.text() not in marks.words


async def test_the_fence_ends_what_waits_without_starting_it(world: ProcessWorld, agent: Agent, marks: Marks) -> None:
    await agent.executor.configure(1.0, 1.0)
    await agent.executor.renew(1, world.clock.boot())
    requests = [marks.request("deaf"), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    done = await ends(agent, requests)
    assert [end.cause for end in done] == [Cause.FENCE] * 6
    assert marks.words == [requests[0].key.text()]


async def test_a_deadline_ends_what_waits(world: ProcessWorld, agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 2.0), marks.request("mark", stop_at=world.clock.boot() + 0.5)]
    await agent.executor.start(requests)
    assert [end.cause for end in await ends(agent, requests)] == [Cause.EXIT, Cause.DEADLINE]
    assert marks.words == [requests[0].key.text()]


async def test_kill_all_ends_what_runs_and_what_waits(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("deaf"), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    await agent.until(Started, requests[0].key)
    await agent.executor.kill_all()
    assert {end.cause for end in await ends(agent, requests)} == {Cause.STOP}
    assert set(marks.words) <= {requests[0].key.text()}


async def test_what_waited_is_lost_with_the_guard_and_never_begins(
    world: ProcessWorld, agent: Agent, marks: Marks
) -> None:
    requests = [marks.request("pause", 0.5), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    [started] = await agent.until(Started, requests[0].key)
    assert isinstance(started, Started)
    world.kill_guard()
    again = await Agent(world.executor()).connect()
    assert not lives(started.pid)
    held = [again.census[request.key].exited for request in requests]
    assert all(each is not None and each.cause is Cause.LOST for each in held)
    before = marks.words
    fresh = marks.request("mark")
    await again.executor.configure(30.0, 4.0)
    await again.executor.renew(1, world.clock.boot())
    await again.executor.start([fresh])
    assert (await again.exit_of(fresh.key)).succeeded
    assert marks.words == [*before, fresh.key.text()]
    await again.executor.close()


async def test_an_agent_that_comes_back_finds_what_waits(world: ProcessWorld, agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 1.0), *(marks.request("mark") for _ in range(5))]
    await agent.executor.start(requests)
    await agent.until(Started, requests[0].key)
    await agent.executor.close()
    again = await Agent(world.executor()).connect()
    assert {again.census[request.key].phase for request in requests} <= {Phase.STARTING, Phase.RUNNING}
    await again.executor.renew(2, world.clock.boot())
    await again.executor.adopt([request.key for request in requests], 2)
    await again.executor.start([requests[2]])  # it is there: nothing
    assert all(end.succeeded for end in await ends(again, requests))
    assert marks.words == [request.key.text() for request in requests]
    await again.executor.close()


async def test_widening_lets_what_waits_begin(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("pause", 30.0), marks.request("mark")]
    await agent.executor.start(requests)
    await agent.until(Started, requests[0].key)
    await agent.executor.widen(requests[1].key, 2)
    assert (await agent.exit_of(requests[1].key)).succeeded
    await agent.executor.stop([requests[0].key], grace_seconds=0.0)
    await agent.until(Stopped, requests[0].key)


async def test_inputs_and_logs_stay_each_with_their_own(agent: Agent, marks: Marks) -> None:
    code, data = packed(
        says="import os\ndef say(x):\n    print('says', x)\n    return open(os.environ['BATON_INPUTS']).read()\n"
        "def write(x):\n    open(os.path.join(os.environ['BATON_CHECKPOINT_DIR'], 'c'), 'w').write(str(x))\n"
        "    open('left', 'w').write(str(x))\n    return sorted(os.listdir('.'))\n"
    )
    keys = [new_key() for _ in range(12)]
    requests = [
        StartRequest(
            key,
            1,
            (),
            {"PATH": "/usr/bin:/bin"},
            inputs=json.dumps({"a": f"{number}"}).encode(),
            python=PythonCall(
                "says:write" if number % 3 == 0 else "says:say", f"[{number}]", (), code, data, "default"
            ),
            slots=1,
        )
        for number, key in enumerate(keys)
    ]
    await agent.executor.start(requests)
    for number, end in enumerate(await ends(agent, requests)):
        assert end.succeeded, end
        if number % 3 == 0:
            assert json.loads(end.result) == ["left"]
        else:
            assert json.loads(json.loads(end.result)) == {"a": f"{number}"}
        said = b"" if number % 3 == 0 else f"says {number}\n".encode()
        assert await agent.executor.read_log(end.key, 0, 100) == (said, True)


async def test_stops_in_the_middle_of_a_stream_of_calls_lose_and_double_nothing(agent: Agent, marks: Marks) -> None:
    requests = [marks.request("mark", slots=2) for _ in range(400)]
    stopped = {request.key for request in requests[::7]}
    for at in range(0, len(requests), 20):
        part = requests[at : at + 20]
        await agent.executor.start(part)
        await agent.executor.stop([request.key for request in part if request.key in stopped], grace_seconds=0.0)
    done = await ends(agent, requests)
    await agent.until(Stopped, *stopped)
    counted = Counter(marks.words)
    for end in done:
        ran = counted[end.key.text()]
        assert ran == 1 if end.succeeded else ran <= 1, end
        assert end.succeeded or (end.cause is Cause.STOP and end.key in stopped), end
