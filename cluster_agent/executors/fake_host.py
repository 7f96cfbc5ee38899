"""The fake host: a machine with a disk (ledger), a guard and processes, in memory, under whatever time its clock keeps.

It outlives agents, can lose its guard, be frozen and be rebooted. Its guard runs the very lease arithmetic of the real
one (core/lease.py), so what the simulator finds about fences holds for both. `FakeExecutor` (fake.py) is an agent's end
of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from baton.clock import Clock
from cluster_agent.core.lease import Action, Bounds, Leases, Reason
from cluster_agent.executors import fake_python
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    CensusEntry,
    ExecutorEvent,
    Exited,
    Features,
    Phase,
    Refused,
    Saved,
    Started,
    StartRequest,
    Stopped,
)
from cluster_agent.executors.fake_workload import FakeDisk, Interval, Process, Script
from cluster_agent.executors.wording import worded

SIGKILL, SIGTERM = 9, 15

TICK_SECONDS = 0.2
"""How often a real guard gives a sign of life at least; `ticked_at` of the fake is rounded down to it."""

STEP_SECONDS = 1e-6
"""The least the host's timer waits: with a drifting clock, a shorter sleep can round to none and time would stand
still."""


Program = Callable[[StartRequest], Script]
"""What a workload does. A ValueError is its failure to start, in words."""


class Connection(Protocol):
    """What the host tells an agent's end."""

    def hear(self, event: ExecutorEvent) -> None:
        """The guard tells something."""
        ...

    def guard_died(self, killed: bool) -> None:
        """The connection broke because the guard is dead."""
        ...

    def taken_over(self) -> None:
        """Another connection took the guard."""
        ...


class FakeHost:
    """A machine with a guard. `true_time` gives the time of `intervals`; by default the host's own boot clock.

    `programs` adds workloads by name: argv[0] -> Script for the request, for tests that need more than `fake`.
    `anything` is asked for what none of them names, python tasks included; without it those call their function.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        features: Features | None = None,
        true_time: Callable[[], float] | None = None,
        programs: Mapping[str, Program] | None = None,
        anything: Program | None = None,
    ) -> None:
        self.clock = clock
        self.features = features or Features(isolation=True, orphan_killer=True, detail="fake")
        self.intervals: list[Interval] = []
        self._true_time = true_time or clock.boot
        self._programs = dict(programs or {})
        self._anything = anything
        self._disk = FakeDisk()
        self._leases: Leases[AttemptKey] = Leases()
        self._live: dict[AttemptKey, Process] = {}
        self._orphans: list[Process] = []
        self._guard_alive = False
        self._frozen = False
        self._lost_before = False
        self._requests: list[Callable[[float], None]] = []
        self._connection: Connection | None = None
        self._timer: asyncio.Task[None] | None = None
        self._pids = 1000

    # --- faults ----------------------------------------------------------------------------------------------------

    def kill_guard(self) -> None:
        """SIGKILL of the guard. Its work dies with it, unless `features.orphan_killer` is false: then it runs on,
        unseen."""
        if not self._guard_alive:
            return
        self._pass_time()
        self._guard_alive, self._frozen = False, False
        self._requests.clear()
        for process in self._live.values():
            if self.features.orphan_killer:
                self._end_process(process, None, SIGKILL)
            elif process.ended is None:
                self._orphans.append(process)
        self._live, self._leases = {}, Leases()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.guard_died(self.features.orphan_killer)
        self._arm()

    def freeze_guard(self) -> None:
        """SIGSTOP of the guard alone: processes run on, timers and requests wait."""
        self._pass_time()
        self._frozen = True
        self._arm()

    def thaw_guard(self) -> None:
        """The guard wakes: the clock first, then what waited (G1)."""
        self._frozen = False
        self._step()

    def reboot(self) -> None:
        """Power off and on: every process is dead, the disk is what it was. (The caller gives the agent a new boot
        id.)"""
        self._pass_time()
        for process in [*self._live.values(), *self._orphans]:
            self._end_process(process, None, SIGKILL)
        self._orphans = []
        self.kill_guard()

    def living(self) -> list[AttemptKey]:
        """Keys with a living process, orphans of a dead guard included."""
        self._pass_time()
        return [p.request.key for p in [*self._live.values(), *self._orphans] if p.ended is None]

    async def close(self) -> None:
        """End the host's timer; nothing moves any more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            with suppress(asyncio.CancelledError):
                await timer

    # --- the guard's side of a connection --------------------------------------------------------------------------

    def join(self, connection: Connection) -> tuple[list[CensusEntry], bool]:
        """A new connection: void what the old one asked, start a guard if there is none, take the census (G3).

        Returns the census and whether an earlier guard was lost with work. Raises TimeoutError while the guard is
        frozen.
        """
        if self._frozen:
            raise TimeoutError("the guard does not answer")
        if self._connection is not None and self._connection is not connection:
            self._connection.taken_over()
        self._requests.clear()
        self._connection = connection
        if not self._guard_alive:
            self._guard_alive = True
            self._bury()
        self._step()
        lost, self._lost_before = self._lost_before, False
        return self._census(), lost

    def leave(self, connection: Connection) -> None:
        """The connection ended; work goes on."""
        if self._connection is connection:
            self._connection = None
            self._requests.clear()

    def ask(self, request: Callable[[float], None]) -> None:
        """Queue one request; carried out at once unless the guard is frozen."""
        self._requests.append(request)
        self._step()

    def ticked_at(self) -> float:
        """The guard's last sign of life as a real one would give it."""
        now = self.clock.boot()
        return now - now % TICK_SECONDS

    @property
    def responsive(self) -> bool:
        """Alive and not frozen."""
        return self._guard_alive and not self._frozen

    def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """See Executor."""
        self._leases.configure(fence_seconds, kill_seconds)

    def renew(self, generation: int, sent: float, now: float) -> None:
        """See Executor."""
        self._leases.renew(generation, sent, now)

    def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """See Executor."""
        for key in keys:
            if self._leases.adopt(key, generation):
                self._disk.started[key] = (generation, self._disk.started[key][1])

    def start(self, request: StartRequest, now: float) -> None:
        """See Executor."""
        key = request.key
        if key in self._live:
            return
        refusal = self._refusal(request, now)
        if refusal is not None:
            self._disk.tombstones.add(key)
            self._tell(Refused(key, refusal))
            return
        wall = self.clock.wall()
        self._disk.started[key] = (request.generation, wall)
        try:
            script = self._script(request)
        except ValueError as error:
            self._record(Exited(key, Cause.SPAWN, None, None, wall, wall, message=str(error)))
            return
        self._pids += 1
        interval = Interval(key, self._true_time())
        self.intervals.append(interval)
        self._live[key] = Process(request, script, self._pids, wall, now + script.seconds, interval)
        self._disk.logs[key] = script.output[: request.limits.output_bytes or None]
        self._leases.add(
            key,
            Bounds(
                request.generation,
                now,
                request.stop_at,
                request.timeout_seconds,
                request.grace_seconds,
                request.keep_at_fence,
            ),
        )
        self._tell(Started(key, self._pids, wall))
        if script.checkpoint is not None:
            self._tell(Saved(key, script.checkpoint))

    def stop(self, keys: Sequence[AttemptKey], grace_seconds: float, now: float) -> None:
        """See Executor."""
        for key in keys:
            self._disk.tombstones.add(key)
            process = self._live.get(key)
            if process is None:
                self._tell(Stopped(key))
            else:
                process.confirm_stop = True
                self._leases.cut(key, Reason.STOP, now, grace_seconds)

    def forget(self, keys: Sequence[AttemptKey]) -> None:
        """See Executor."""
        for key in keys:
            if key not in self._live and self._disk.knows(key):
                self._disk.exits.pop(key, None)
                self._disk.tombstones.discard(key)
                self._disk.forgotten.add(key)

    def kill_all(self, now: float) -> None:
        """See Executor."""
        for key in self._live:
            self._leases.cut(key, Reason.STOP, now, 0.0)

    def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:
        """See Executor."""
        log = self._disk.logs.get(key, b"")
        data = log[offset : offset + limit]
        return data, key not in self._live and offset + len(data) >= len(log)

    # --- time ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Let time pass up to now: processes end, then the guard (if it can) looks at the clock, then at its
        requests."""
        self._pass_time()
        if self.responsive:
            self._guard_turn(self.clock.boot())
            while self._requests:
                self._requests.pop(0)(self.clock.boot())
            self._pass_time()
            self._guard_turn(self.clock.boot())
        self._arm()

    def _pass_time(self) -> None:
        """Processes that are over by themselves."""
        now = self.clock.boot()
        for process in [*self._live.values(), *self._orphans]:
            if process.ended is None and process.ends_at <= now:
                self._end_process(process, process.script.exit_code, None)
        self._orphans = [process for process in self._orphans if process.ended is None]

    def _guard_turn(self, now: float) -> None:
        """Send what is due, see what is dead."""
        for order in self._leases.due(now):
            process = self._live[order.key]
            process.phase = Phase.STOPPING
            if order.action is Action.KILL:
                self._end_process(process, None, SIGKILL)
            elif not process.script.ignore_term:
                self._end_process(process, None, SIGTERM)
        for process in [process for process in self._live.values() if process.ended is not None]:
            self._collect(process, now)

    def _end_process(self, process: Process, code: int | None, number: int | None) -> None:
        if process.ended is None:
            process.ended = (code, number)
            process.interval.end = self._true_time()

    def _arm(self) -> None:
        """One timer: the next time something happens by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [p.ends_at for p in [*self._live.values(), *self._orphans] if p.ended is None]
        wakeup = self._leases.next_wakeup() if self.responsive else None
        if wakeup is not None:
            times.append(wakeup)
        if times:
            self._timer = asyncio.get_running_loop().create_task(
                self._wake(max(STEP_SECONDS, min(times) - self.clock.boot()))
            )

    async def _wake(self, seconds: float) -> None:
        await self.clock.sleep(seconds)
        self._timer = None
        self._step()

    # --- records ---------------------------------------------------------------------------------------------------

    def _script(self, request: StartRequest) -> Script:
        """What the request's workload does. Raises ValueError if nobody knows."""
        program = self._programs.get(request.argv[0] if request.argv else "", self._anything)
        if program is not None:
            return program(request)
        return fake_python.call(request) if request.python is not None else Script.parse(request.argv)

    def _refusal(self, request: StartRequest, now: float) -> str | None:
        if self._disk.knows(request.key):
            return "this attempt was started, refused or stopped before"
        lease = self._leases.refusal(request.generation, now)
        if lease is not None:
            return lease
        if request.stop_at is not None and now >= request.stop_at:
            return "its deadline has passed"
        return None if request.python is not None or (request.argv and request.argv[0]) else "argv is empty"

    def _collect(self, process: Process, now: float) -> None:
        """The guard sees that a process is over."""
        key, request = process.request.key, process.request
        code, number = process.ended or (None, None)
        reason = self._leases.reason(key)
        late = self._leases.remove(key, now)
        del self._live[key]
        cause, message, result = (Cause(reason.value) if reason else Cause.EXIT), "", b""
        if reason is None and number is None and process.script.message:
            cause, message = process.script.cause, process.script.message
            code = code if cause is Cause.EXIT else None
        elif reason is None and code == 0:
            result = process.script.result
            limit = request.limits.result_bytes
            if len(result) > limit:
                cause, result = Cause.RESULT, b""
                message = f"the result has {len(process.script.result)} bytes, over the limit of {limit // 1024} KiB"
        wall = self.clock.wall()
        made = process.script.artifacts if cause is Cause.EXIT and code == 0 else ()
        exited = Exited(key, cause, code, number, process.start_wall, wall, result, message, late, artifacts=made)
        self._record(worded(exited, request))
        if process.confirm_stop:
            self._tell(Stopped(key))

    def _record(self, exited: Exited) -> None:
        generation, _wall = self._disk.started.pop(exited.key)
        self._disk.exits[exited.key] = (generation, exited)
        self._tell(exited)

    def _bury(self) -> None:
        """A new guard on the disk of a dead one: starts without an exit are LOST (F4)."""
        for key, (generation, wall) in list(self._disk.started.items()):
            lost = Exited(key, Cause.LOST, None, None, wall, self.clock.wall(), message="the guard died with it")
            del self._disk.started[key]
            self._disk.exits[key] = (generation, lost)
            self._lost_before = True

    def _census(self) -> list[CensusEntry]:
        running = [
            CensusEntry(key, self._leases.generation(key) or 0, process.phase) for key, process in self._live.items()
        ]
        ended = [CensusEntry(key, gen, Phase.EXITED, exited) for key, (gen, exited) in self._disk.exits.items()]
        barred = self._disk.tombstones - self._live.keys() - self._disk.exits.keys()
        return [*running, *ended, *(CensusEntry(key, 0, Phase.TOMBSTONED) for key in sorted(barred))]

    def _tell(self, event: ExecutorEvent) -> None:
        if self._connection is not None:
            self._connection.hear(event)
