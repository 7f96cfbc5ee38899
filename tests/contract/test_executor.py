"""The Executor contract (cluster_agent/executors/base.py): one suite for the real guard and for the fake.

The process world runs twice: as this host permits best, and with nothing but subreapers and polling.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from baton.time_limits import time_limit
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    CensusEntry,
    Executor,
    ExecutorEvent,
    Exited,
    Features,
    GuardLost,
    Limits,
    Phase,
    Refused,
    Started,
    StartRequest,
    Stopped,
)
from cluster_agent.executors.fake import FakeExecutor, FakeHost
from tests.contract.carrying_world import CarryingWorld
from tests.contract.executor_worlds import ExecutorWorld, FakeWorld, ProcessWorld

pytestmark = pytest.mark.timeout(60)

_tasks = itertools.count()


def new_key(n: int = 1) -> AttemptKey:
    """An attempt of a task of its own."""
    return AttemptKey("0193a1b2c3d4", next(_tasks), n, "beef")


@pytest.fixture(params=["process", "process-scan", "process-carrying", "fake"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ExecutorWorld]:
    """Each adapter."""
    made: ExecutorWorld
    match request.param:
        case "process":
            made = ProcessWorld(tmp_path)
        case "process-scan":
            made = ProcessWorld(tmp_path, ["--killer", "scan", "--limits", "poll"])
        case "process-carrying":  # a decorator, which keeps the whole contract
            made = CarryingWorld(tmp_path)
        case _:
            made = FakeWorld()
    yield made
    await made.close()


class Agent:
    """One connection, and everything it was told."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.told: list[ExecutorEvent] = []
        self.census: dict[AttemptKey, CensusEntry] = {}

    async def connect(self) -> Agent:
        """Join, and take note of the census."""
        self.census = {entry.key: entry for entry in await self.executor.connect()}
        return self

    async def until(self, kind: type, *keys: AttemptKey) -> list[ExecutorEvent]:
        """Wait until an event of this kind was told for each key (or at all); returns those, in the order of `keys`."""

        def found() -> list[ExecutorEvent]:
            events = [event for event in self.told if isinstance(event, kind)]
            return events if not keys else [e for key in keys for e in events if getattr(e, "key", None) == key]

        async with time_limit(20):
            events = self.executor.events()
            while len(found()) < max(1, len(keys)):
                self.told.extend(await anext(events))
        return found()

    async def exit_of(self, key: AttemptKey) -> Exited:
        """How the attempt ended."""
        [event] = await self.until(Exited, key)
        assert isinstance(event, Exited)
        return event

    def kinds(self, key: AttemptKey) -> list[str]:
        """Names of what was told of this key so far, in order."""
        return [type(e).__name__ for e in self.told if not isinstance(e, GuardLost) and e.key == key]


@pytest.fixture
async def agent(world: ExecutorWorld) -> AsyncIterator[Agent]:
    """Connected, F = 30 s, K = 4 s, generation 1 renewed now."""
    made = await Agent(world.executor()).connect()
    await made.executor.configure(30.0, 4.0)
    await made.executor.renew(1, world.clock.boot())
    yield made
    await made.executor.close()


async def test_a_workload_runs_and_its_exit_carries_code_result_and_times(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--result", "fine", "--output", "said")])
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.exit_code, exited.signal, exited.result) == (Cause.EXIT, 0, None, b"fine")
    assert exited.succeeded
    assert exited.start_wall <= exited.end_wall
    assert not exited.late
    assert agent.kinds(key) == ["Started", "Exited"]
    assert await agent.executor.read_log(key, 0, 100) == (b"said", True)
    assert await agent.executor.read_log(key, 2, 1) == (b"i", False)


async def test_a_failing_workload_is_told_with_its_code(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--exit", "7", "--result", "ignored")])
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.exit_code, exited.succeeded, exited.result) == (Cause.EXIT, 7, False, b"")
    assert exited.message == "exited with code 7"


async def test_a_missing_program_is_a_spawn_failure_that_names_it(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    request = dataclasses.replace(world.request(key), argv=("no-such-program",))
    await agent.executor.start([request])
    exited = await agent.exit_of(key)
    assert exited.cause is Cause.SPAWN
    assert "no-such-program" in exited.message
    assert exited.exit_code is None


async def test_an_empty_argv_is_refused(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([dataclasses.replace(world.request(key), argv=())])
    [refused] = await agent.until(Refused, key)
    assert isinstance(refused, Refused)
    assert refused.reason == "argv is empty"


async def test_a_result_over_its_limit_fails_the_attempt_and_names_the_limit(
    world: ExecutorWorld, agent: Agent
) -> None:
    key, fits = new_key(), new_key()
    await agent.executor.start(
        [
            world.request(key, "--result", "x" * (16 * 1024 + 1)),
            world.request(fits, "--result", "x" * (16 * 1024)),
        ]
    )
    exited = await agent.exit_of(key)
    assert exited.cause is Cause.RESULT
    assert "16385 bytes" in exited.message
    assert "16 KiB" in exited.message
    assert not exited.succeeded
    assert (await agent.exit_of(fits)).succeeded


async def test_a_key_is_started_at_most_once(world: ExecutorWorld, agent: Agent) -> None:
    """F4: while it runs a second start is ignored; after its exit, and after `forget`, it is refused."""
    key = new_key()
    request = world.request(key, "--seconds", "0.4")
    await agent.executor.start([request, request])
    await agent.until(Started, key)
    await agent.executor.start([request])
    await agent.exit_of(key)
    await agent.executor.start([request])
    await agent.until(Refused, key)
    assert agent.kinds(key) == ["Started", "Exited", "Refused"]
    await agent.executor.forget([key])
    agent.told.clear()
    await agent.executor.start([request])
    await agent.until(Refused, key)
    assert agent.kinds(key) == ["Refused"]


async def test_without_a_renewed_lease_a_start_is_refused_and_stays_so(world: ExecutorWorld, agent: Agent) -> None:
    """G1: refused and tombstoned, even when the lease comes later."""
    key = new_key()
    await agent.executor.start([world.request(key, generation=2)])
    await agent.until(Refused, key)
    await agent.executor.renew(2, world.clock.boot())
    agent.told.clear()
    await agent.executor.start([world.request(key, generation=2)])
    await agent.until(Refused, key)
    assert agent.kinds(key) == ["Refused"]


async def test_a_stop_ends_the_workload_and_is_confirmed_after_its_exit(world: ExecutorWorld, agent: Agent) -> None:
    """F8."""
    key = new_key()
    await agent.executor.start([world.request(key, "--seconds", "60")])
    await agent.until(Started, key)
    await agent.executor.stop([key], grace_seconds=10.0)
    await agent.until(Stopped, key)
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.signal) == (Cause.STOP, 15)
    assert agent.kinds(key) == ["Started", "Exited", "Stopped"]


async def test_a_stop_right_behind_its_start_still_uses_term(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--seconds", "60")])
    await agent.executor.stop([key], grace_seconds=15.0)
    await agent.until(Stopped, key)
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.signal) == (Cause.STOP, 15)


async def test_a_workload_that_ignores_term_is_killed_after_the_grace_period(
    world: ExecutorWorld, agent: Agent
) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--ignore-term", "--output", "deaf", "--seconds", "60")])
    await agent.until(Started, key)
    async with time_limit(20):  # it says so once it is
        while (await agent.executor.read_log(key, 0, 100))[0] != b"deaf":
            await world.clock.sleep(0.02)
    await agent.executor.stop([key], grace_seconds=0.3)
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.signal) == (Cause.STOP, 9)


async def test_stopping_an_unknown_key_means_that_it_never_starts(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.stop([key], grace_seconds=1.0)
    await agent.until(Stopped, key)
    await agent.executor.start([world.request(key)])
    await agent.until(Refused, key)
    await agent.executor.stop([key], grace_seconds=1.0)
    assert len(await agent.until(Stopped, key, key)) >= 2
    again = await Agent(world.executor()).connect()
    assert again.census[key].phase is Phase.TOMBSTONED


async def test_the_deadline_kills_by_itself(world: ExecutorWorld, agent: Agent) -> None:
    """D1: the executor counts down alone."""
    key, passed = new_key(), new_key()
    now = world.clock.boot()
    await agent.executor.start(
        [
            world.request(key, "--seconds", "60", stop_at=now + 2.0, grace_seconds=0.4),
            world.request(passed, "--seconds", "60", stop_at=now - 0.1),
        ]
    )
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.message) == (Cause.DEADLINE, "stopped at the run's deadline")
    assert world.clock.boot() >= now + 1.6
    await agent.until(Refused, passed)


async def test_the_timeout_kills_by_itself(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    words = ("--ignore-term", "--seconds", "60")
    await agent.executor.start([world.request(key, *words, timeout_seconds=2.0, grace_seconds=0.2)])
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.signal) == (Cause.TIMEOUT, 9)
    assert exited.message == "timed out after 2s"
    assert exited.end_wall - exited.start_wall >= 2.19  # TERM after the time-out, KILL after the grace


async def test_when_the_lease_passes_work_dies_except_what_is_to_be_kept(world: ExecutorWorld, agent: Agent) -> None:
    """F5, F7: no agent is needed for that, and it is done within F + K."""
    key, stubborn, kept = new_key(), new_key(), new_key()
    await agent.executor.configure(2.0, 2.0)
    sent = world.clock.boot()
    await agent.executor.renew(1, sent)
    await agent.executor.start(
        [
            world.request(key, "--seconds", "60"),
            world.request(stubborn, "--ignore-term", "--seconds", "60"),
            world.request(kept, "--seconds", "60", keep_at_fence=True),
        ]
    )
    for one in (key, stubborn):
        exited = await agent.exit_of(one)
        assert exited.cause is Cause.FENCE
        assert not exited.late  # by the guard's own clock; when we hear of it is no rule
    assert sent + 2.0 <= world.clock.boot()
    late_start = new_key()
    await agent.executor.start([world.request(late_start)])
    await agent.until(Refused, late_start)
    await agent.executor.renew(1, world.clock.boot())
    fresh = new_key()
    await agent.executor.start([world.request(fresh)])
    assert (await agent.exit_of(fresh)).succeeded
    assert "Exited" not in agent.kinds(kept)


async def test_an_adopted_attempt_lives_under_its_new_generation(world: ExecutorWorld, agent: Agent) -> None:
    key, left = new_key(), new_key()
    await agent.executor.configure(3.0, 1.0)
    await agent.executor.renew(1, world.clock.boot())
    await agent.executor.start([world.request(key, "--seconds", "60"), world.request(left, "--seconds", "60")])
    await agent.until(Started, key, left)
    await agent.executor.adopt([key], 2)

    async def renew() -> None:
        while True:
            await agent.executor.renew(2, world.clock.boot())
            await world.clock.sleep(0.2)

    renewing = asyncio.create_task(renew())
    assert (await agent.exit_of(left)).cause is Cause.FENCE
    assert agent.kinds(key) == ["Started"]
    await agent.executor.stop([key], grace_seconds=10.0)
    assert (await agent.exit_of(key)).cause is Cause.STOP
    renewing.cancel()


async def test_work_outlives_its_agent_and_is_found_by_the_next(world: ExecutorWorld, agent: Agent) -> None:
    """G1, contract 6: running work is adopted, exits that nobody heard are in the census until `forget`."""
    running, ended = new_key(), new_key()
    await agent.executor.start([world.request(running, "--seconds", "60"), world.request(ended, "--seconds", "0.3")])
    await agent.until(Started, running, ended)
    await agent.executor.close()
    second = await Agent(world.executor()).connect()
    async with time_limit(20):
        while second.census[ended].phase is not Phase.EXITED:
            await second.executor.close()
            await world.clock.sleep(0.1)
            await second.connect()
    assert second.census[running].phase is Phase.RUNNING
    assert second.census[running].generation == 1
    entry = second.census[ended]
    assert entry.phase is Phase.EXITED
    assert entry.exited is not None
    assert entry.exited.succeeded
    await second.executor.forget([ended])
    await second.executor.stop([running], grace_seconds=0.0)
    await second.until(Stopped, running)
    third = await Agent(world.executor()).connect()
    assert ended not in third.census
    assert third.census[running].phase is Phase.EXITED


async def test_a_new_connection_ends_the_old_one(world: ExecutorWorld, agent: Agent) -> None:
    """G3: nothing of the old agent is heard any more; its events end, its calls fail."""
    second = await Agent(world.executor()).connect()
    async with time_limit(10):
        assert [batch async for batch in agent.executor.events()] == []
    with pytest.raises(ConnectionError):
        await agent.executor.renew(1, world.clock.boot())
    await second.executor.renew(1, world.clock.boot())


async def test_kill_all_ends_everything(world: ExecutorWorld, agent: Agent) -> None:
    keys = [new_key() for _ in range(5)]
    await agent.executor.start([world.request(key, "--ignore-term", "--seconds", "60") for key in keys])
    await agent.until(Started, *keys)
    await agent.executor.kill_all()
    for key in keys:
        exited = await agent.exit_of(key)
        assert (exited.cause, exited.signal) == (Cause.STOP, 9)


async def test_a_dead_guard_is_told_and_its_work_is_lost_and_never_starts_again(
    world: ExecutorWorld, agent: Agent
) -> None:
    """F4, G4."""
    key, done = new_key(), new_key()
    request = world.request(key, "--seconds", "60")
    await agent.executor.start([request, world.request(done, "--result", "kept")])
    await agent.until(Started, key)
    await agent.exit_of(done)
    world.kill_guard()
    [lost] = await agent.until(GuardLost)
    assert isinstance(lost, GuardLost)
    assert lost.killed is agent.executor.features().orphan_killer
    with pytest.raises(ConnectionError):
        await agent.executor.start([request])
    await agent.connect()
    entry = agent.census[key]
    assert entry.phase is Phase.EXITED
    assert entry.exited is not None
    assert entry.exited.cause is Cause.LOST
    survivor = agent.census[done].exited
    assert survivor is not None
    assert survivor.result == b"kept"
    await agent.executor.configure(30.0, 4.0)
    await agent.executor.renew(1, world.clock.boot())
    agent.told.clear()
    await agent.executor.start([request])
    await agent.until(Refused, key)


async def test_an_agent_that_was_away_learns_that_the_guard_died(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--seconds", "60")])
    await agent.until(Started, key)
    await agent.executor.close()
    world.kill_guard()
    second = await Agent(world.executor()).connect()
    entry = second.census[key]
    assert entry.exited is not None
    assert entry.exited.cause is Cause.LOST
    assert await second.until(GuardLost) == [GuardLost(killed=True)]


async def test_a_frozen_guard_gives_no_sign_of_life_and_says_late_when_it_wakes(
    world: ExecutorWorld, agent: Agent
) -> None:
    """G2, F6: woken after F + K, it kills first and owns up."""
    key, queued = new_key(), new_key()
    fence, kill = 2.0, 1.0
    await agent.executor.configure(fence, kill)
    sent = world.clock.boot()
    await agent.executor.renew(1, sent)
    await agent.executor.start([world.request(key, "--seconds", "60")])
    await agent.until(Started, key)
    world.freeze_guard()
    await world.clock.sleep(0.5)  # what it said before is heard by then
    before = agent.executor.ticked_at()
    await agent.executor.start([world.request(queued)])
    await world.clock.sleep(max(0.0, sent + fence + kill + 0.3 - world.clock.boot()))
    assert agent.executor.ticked_at() == before
    world.thaw_guard()
    thawed = world.clock.boot()
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.late) == (Cause.FENCE, True)
    await agent.until(Refused, queued)
    async with time_limit(20):
        while agent.executor.ticked_at() <= thawed:
            await world.clock.sleep(0.05)


async def test_a_silent_guard_is_killed_with_its_work_and_a_living_one_is_left_alone(
    world: ExecutorWorld, agent: Agent
) -> None:
    """G2: at F somebody must stop the work; SIGKILL ends a stopped guard too."""
    key = new_key()
    await agent.executor.start([world.request(key, "--seconds", "60")])
    await agent.until(Started, key)
    await agent.executor.kill_if_silent()
    await world.clock.sleep(0.3)
    assert agent.kinds(key) == ["Started"]
    world.freeze_guard()
    await agent.executor.kill_if_silent()
    assert isinstance((await agent.until(GuardLost))[0], GuardLost)
    second = await Agent(world.executor()).connect()
    entry = second.census[key]
    assert entry.exited is not None
    assert entry.exited.cause is Cause.LOST
    await second.executor.close()


async def test_output_is_capped_and_the_attempt_goes_on(world: ExecutorWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.request(key, "--output", "x" * 5000, limits=Limits(output_bytes=1000))])
    assert (await agent.exit_of(key)).succeeded
    data, complete = await agent.executor.read_log(key, 0, 1 << 20)
    assert complete
    assert data.startswith(b"x" * 1000)
    assert b"x" * 1001 not in data


async def test_many_starts_in_one_batch_all_end(world: ExecutorWorld, agent: Agent) -> None:
    keys = [new_key() for _ in range(40)]
    await agent.executor.start([world.request(key, "--result", str(key.task)) for key in keys])
    for key in keys:
        assert (await agent.exit_of(key)).result == str(key.task).encode()


class ManualClock:
    """Time that a test moves. `rate` > 1: this node's clocks run fast."""

    def __init__(self, rate: float = 1.0) -> None:
        self.true = 0.0
        self._rate = rate
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def boot(self) -> float:
        return 1000.0 + self.true * self._rate

    def wall(self) -> float:
        return self.boot()

    async def sleep(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.true + seconds / self._rate, waiter))
        await waiter

    def later(self, seconds: float, action: Callable[[], object]) -> asyncio.Task[None]:
        async def wait() -> None:
            await self.sleep(seconds)
            action()

        return asyncio.create_task(wait())

    async def advance(self, seconds: float) -> None:
        """Wake every sleeper at its own time."""
        end = self.true + seconds
        while True:
            await self._settle()
            self._sleepers = [(at, waiter) for at, waiter in self._sleepers if not waiter.done()]
            due = min(self._sleepers, key=lambda sleeper: sleeper[0], default=None)
            if due is None or due[0] > end:
                break
            self.true = max(self.true, due[0])
            due[1].set_result(None)
        self.true = end
        await self._settle()

    @staticmethod
    async def _settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)


class TestFakeHost:
    """What only the fake can show: virtual time, true intervals, faults of the host."""

    async def begin(self, clock: ManualClock, host: FakeHost, *words: str, **more: object) -> tuple[Agent, AttemptKey]:
        agent = await Agent(FakeExecutor(host)).connect()
        await agent.executor.configure(10.0, 4.0)
        await agent.executor.renew(1, clock.boot())
        key = new_key()
        await agent.executor.start([StartRequest(key, 1, ("fake", *words), {}, **more)])  # type: ignore[arg-type]
        return agent, key

    async def test_processes_live_exactly_as_long_as_scripted_in_virtual_time(self) -> None:
        clock = ManualClock()
        host = FakeHost(clock)
        agent, key = await self.begin(clock, host, "--seconds", "7.25")
        await clock.advance(60.0)
        assert (await agent.exit_of(key)).succeeded
        assert [(i.key, i.start, i.end) for i in host.intervals] == [(key, 1000.0, 1007.25)]

    @pytest.mark.parametrize("rate", [0.5, 1.0, 1.0003, 2.0])
    async def test_the_fence_is_kept_by_the_hosts_own_clock(self, rate: float) -> None:
        clock = ManualClock(rate)
        host = FakeHost(clock, true_time=lambda: clock.true)
        agent, key = await self.begin(clock, host, "--ignore-term", "--seconds", "600")
        await clock.advance(60.0)
        exited = await agent.exit_of(key)
        assert (exited.cause, exited.late) == (Cause.FENCE, False)
        [interval] = host.intervals
        assert interval.end is not None
        assert 10.0 / rate <= interval.end <= 14.0 / rate

    async def test_without_an_orphan_killer_work_runs_on_unseen(self) -> None:
        clock = ManualClock()
        host = FakeHost(clock, features=Features(isolation=False, orphan_killer=False, detail="none"))
        agent, key = await self.begin(clock, host, "--seconds", "30")
        host.kill_guard()
        assert await agent.until(GuardLost) == [GuardLost(killed=False)]
        assert host.living() == [key]
        await clock.advance(60.0)
        assert host.living() == []
        assert host.intervals[0].end == 1030.0

    async def test_a_reboot_kills_everything_and_keeps_the_disk(self) -> None:
        clock = ManualClock()
        host = FakeHost(clock)
        _, key = await self.begin(clock, host, "--seconds", "30")
        host.reboot()
        assert host.living() == []
        agent = await Agent(FakeExecutor(host)).connect()
        entry = agent.census[key]
        assert entry.exited is not None
        assert entry.exited.cause is Cause.LOST

    async def test_a_frozen_guard_lets_work_overrun_and_says_late(self) -> None:
        clock = ManualClock()
        host = FakeHost(clock)
        agent, key = await self.begin(clock, host, "--seconds", "600")
        host.freeze_guard()
        with pytest.raises(TimeoutError):
            await FakeExecutor(host).connect()
        await clock.advance(50.0)
        assert host.living() == [key]
        host.thaw_guard()
        exited = await agent.exit_of(key)
        assert (exited.cause, exited.late) == (Cause.FENCE, True)
        assert host.intervals[0].end == 1050.0
