"""The machinery of `baton.testing`: production replicas and agents on one SimLoop, without chance and without faults of its own.

Theory. It is the simulator's world with an empty nemesis: the same nodes, store, links and hosts, so what a test sees of a failover is
what the simulator proves about it. The caller's thread drives the loop: time passes only inside `finish` and `sleep`. An error
of a scripted program is kept and raised there, since an exception inside the loop would be an agent's death.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from baton import requestid
from baton.client_streams import FINAL_STATES
from baton.errors import BatonError
from baton.leases import PROFILES
from baton.sdk_run import Results
from baton.testing import Call, Ended, Finished, Plan, Program
from baton.v1 import run_pb2
from cluster_agent.executors import fake_python
from cluster_agent.executors.base import StartRequest
from cluster_agent.executors.fake_workload import Script
from control_plane.core.model import FLEET
from control_plane.history import MemoryHistory
from lab.sim_network import Links
from lab.simulation.chance import chance
from lab.simulation.etcd import SimEtcd
from lab.simulation.nodes import Node, SimLoop
from lab.simulation.processes import ClusterProcess, Drift, Ground, ReplicaProcess
from lab.simulation.workload import PASSING
from lab.virtual_time import SeededEntropy, VirtualClock

T = TypeVar("T")

SEED = "testing"
"""One for all: equal tests go equal ways."""

TRUE = Drift(boot_offset=1000.0, wall_offset=0.0, rate=1.0)
"""Clocks that are right."""

TRY_SECONDS = 6.0
"""For one call; a replica that was killed has a successor by then."""

FIRST_POLL, MOST_POLL = 0.05, 1.0
"""Virtual seconds between looks at a run, growing. Larger: time goes on after the run's end; smaller: more calls, in real time."""

START_SECONDS = 60.0
"""Virtual seconds for clusters to be ready; they need about three."""

LATE_SECONDS = 120.0
"""Virtual seconds after the deadline for a run to be final: the promise is far below (DESIGN, promise 3)."""

BOOT_SECONDS = 1.0
"""From the kill of a replica or an agent to its next life."""

PAGE = 1000


@dataclass(slots=True)
class _Trap:
    """Something that is to happen after a task starts somewhere."""

    task: str
    cluster: str
    spring: Callable[[str], None]


@dataclass(slots=True)
class _World:
    """What one test's federation consists of."""

    ground: Ground
    replicas: list[ReplicaProcess]
    clusters: dict[str, ClusterProcess]
    clock: VirtualClock
    entropy: SeededEntropy
    traps: list[_Trap] = field(default_factory=list)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Run -> task id -> output of its newest attempt."""
    wrong: list[BaseException] = field(default_factory=list)
    """What scripted programs raised, and tasks of the loop that failed."""


class Machinery:
    """See `baton.testing.Machinery`."""

    def __init__(self, plan: Plan) -> None:
        _refuse_in_coroutine()
        self._plan, self._loop = plan, SimLoop()
        try:
            self._world: _World = self._drive(self._make())
        except BaseException:
            self.close()
            raise

    # --- baton.testing.Machinery -----------------------------------------------------------------------------------

    def now(self) -> float:
        """See the port."""
        return self._loop.time()

    def sleep(self, seconds: float) -> None:
        """See the port."""
        _refuse_in_coroutine()
        self._drive(asyncio.sleep(seconds))

    def plan(self, action: str, target: str, when: str, at: float, lasts: float | None) -> None:
        """See the port."""
        known = [each.name for each in self._world.replicas] if action == "kill_replica" else list(self._world.clusters)
        if target not in known and (target or not when):
            raise ValueError(f"{target!r} is none of {', '.join(known)}")
        if when:
            spring = partial(self._spring, action, target, at, lasts)
            cluster = "" if action == "kill_replica" else target
            self._world.traps.append(_Trap(when, cluster, spring))
        else:
            self._later(at, partial(self._act, action, target, lasts))

    def finish(self, request: run_pb2.CreateRunRequest, lifetime: float) -> Finished:
        """See the port."""
        _refuse_in_coroutine()
        return self._drive(self._finish(request, lifetime))

    def close(self) -> None:
        """See the port. What its processes say while they are buried is no news of the test's."""
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            self._loop.bury()
        finally:
            self._loop.close()
            logging.disable(before)

    # --- driving ---------------------------------------------------------------------------------------------------

    def _drive(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the loop until `work` is done."""
        asyncio.set_event_loop(self._loop)
        try:
            return self._loop.run_until_complete(work)
        finally:
            asyncio.set_event_loop(None)

    async def _make(self) -> _World:
        loop, plan = self._loop, self._plan
        loop.set_exception_handler(self._unhandled)
        links = Links(chance("links", SEED), Counter())
        ground = Ground(loop, links, SimEtcd(Node("etcd", loop)), MemoryHistory(), Counter(), SEED)
        links.nodes["client"] = Node("client", loop)
        replicas = [ReplicaProcess(f"r{number}", ground, TRUE) for number in range(plan.replicas)]
        lease = PROFILES[plan.profile]
        clusters = {
            name: ClusterProcess(
                name, ground, TRUE, replicas, lease, plan.cpus, program=partial(self._start, name), labels=labels
            )
            for name, labels in plan.clusters.items()
        }
        world = self._world = _World(ground, replicas, clusters, VirtualClock(), SeededEntropy(SEED))
        for replica in replicas:
            replica.start()
        await self._until(
            lambda: all(each.replica is not None and FLEET in each.replica.view.owners for each in replicas)
        )
        for cluster in clusters.values():  # now: an agent that finds nobody says so, and waits
            cluster.start()
        await self._until(lambda: self._ready(world))
        return world

    async def _until(self, there: Callable[[], bool]) -> None:
        while not there():
            if self._loop.time() > START_SECONDS:
                raise RuntimeError(f"the federation does not come up: {self._world.ground.died}")
            await asyncio.sleep(FIRST_POLL)

    def _ready(self, world: _World) -> bool:
        served = [replica.replica for replica in world.replicas]
        return all(
            each is not None
            and len(each.view.members) == len(served)
            and sum(facts.health.name == "READY" for facts in each.view.table.clusters.values()) == len(world.clusters)
            for each in served
        )

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not self._loop.buried:
            error = context.get("exception")
            self._world.wrong.append(
                error if isinstance(error, BaseException) else RuntimeError(context.get("message"))
            )

    # --- a run -----------------------------------------------------------------------------------------------------

    async def _finish(self, request: run_pb2.CreateRunRequest, lifetime: float) -> Finished:
        world = self._world
        known = {task.id for task in request.spec.tasks}
        if strange := [trap.task for trap in world.traps if trap.task not in known]:
            raise ValueError(f"when={strange[0]!r}: the graph has no such task")
        request.request_id = requestid.new(world.clock, world.entropy)
        request.deadline_time.FromMilliseconds(round((world.clock.wall() + lifetime) * 1000))
        run = run_pb2.CreateRunResponse.FromString(await self._insist("CreateRun", request)).run
        end, pause = self._loop.time() + lifetime + LATE_SECONDS, FIRST_POLL
        while run.state not in FINAL_STATES:
            await asyncio.sleep(pause)
            pause = min(MOST_POLL, pause * 1.5)
            answer = await self._insist("GetRun", run_pb2.GetRunRequest(name=run.name))
            run = run_pb2.GetRunResponse.FromString(answer).run
            if world.wrong:
                raise world.wrong[0]
            if world.ground.died or self._loop.time() > end:
                raise RuntimeError(
                    f"{run.name} cannot end: {'; '.join(world.ground.died) or 'its deadline has passed'}"
                )
        tasks = {task.id: task async for task in self._tasks(run.name)}
        results = Results(run, {name: task.result for name, task in tasks.items()})
        world.traps.clear()
        return Finished(run, results, tasks, dict(world.outputs.get(run.name, {})))

    async def _tasks(self, run: str) -> Any:
        request = run_pb2.ListTasksRequest(run=run, page_size=PAGE)
        while True:
            page = run_pb2.ListTasksResponse.FromString(await self._insist("ListTasks", request))
            for task in page.tasks:
                yield task
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _insist(self, method: str, request: Any) -> bytes:
        """A call, as a patient client makes it: any replica, again while nobody can answer."""
        end = self._loop.time() + LATE_SECONDS
        while True:
            for replica in self._world.replicas:
                try:
                    return await replica.call(method, request, TRY_SECONDS)
                except (ConnectionError, TimeoutError):
                    continue
                except BatonError as error:
                    if error.reason not in PASSING:
                        raise
            if self._loop.time() > end:
                raise RuntimeError(f"no replica answers {method}")
            await asyncio.sleep(FIRST_POLL)

    # --- workloads -------------------------------------------------------------------------------------------------

    def _start(self, cluster: str, request: StartRequest) -> Script:
        """What an attempt does: springs traps, then its function or its script."""
        task, world = request.env["BATON_TASK"], self._world
        for trap in [each for each in world.traps if each.task == task and each.cluster in ("", cluster)]:
            world.traps.remove(trap)
            trap.spring(cluster)
        if request.python is not None:
            function = request.python.function.rpartition(":")[2]
            seconds = self._plan.seconds
            script = fake_python.call(request)
            lasts = seconds.get(task, seconds.get(function, self._plan.default_seconds))
            script = replace(script, seconds=lasts)
        else:
            script = self._scripted(cluster, task, request)
        world.outputs.setdefault(request.env["BATON_RUN"], {})[task] = script.output.decode(errors="replace")
        return script

    def _scripted(self, cluster: str, task: str, request: StartRequest) -> Script:
        inputs = json.loads(request.inputs or b"{}")
        call = Call(request.argv, request.env, inputs, task, request.key.n, cluster)
        try:
            said = _program(self._plan.programs, request.argv[0])(call)
            ended = said if isinstance(said, Ended) else Ended(said)
            return Script(ended.seconds, ended.exit_code, _bytes(ended.result), ended.output.encode())
        except BaseException as error:  # noqa: BLE001 - the test's own, raised where it waits
            self._world.wrong.append(error)
            return Script(exit_code=1, message="the script of this program failed in the test")

    # --- faults ----------------------------------------------------------------------------------------------------

    def _spring(self, action: str, target: str, at: float, lasts: float | None, cluster: str) -> None:
        self._later(at, partial(self._act, action, target or cluster, lasts))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        """As nobody: a fault does not die with whoever it hits."""
        self._loop.call_later(seconds, act, context=Node("fate", self._loop).context())

    def _act(self, action: str, target: str, lasts: float | None) -> None:
        world, links = self._world, self._world.ground.links
        match action:
            case "lose":
                world.clusters[target].reboot()
            case "restore":
                world.clusters[target].start()
            case "kill_replica" | "kill_agent":
                living: list[ReplicaProcess | ClusterProcess] = [*world.replicas, *world.clusters.values()]
                process = next(each for each in living if each.name == target)
                process.kill()
                self._later(BOOT_SECONDS, process.start)
            case _:
                change = links.cut if action == "cut" else links.heal
                for replica in world.replicas:
                    change(target, replica.name)
                    change(replica.name, target)
                if lasts is not None:
                    self._later(lasts, partial(self._act, "heal", target, None))


def _refuse_in_coroutine() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError("a test federation has a loop of its own: use it in a plain test, or in asyncio.to_thread")


def make(plan: Plan) -> Machinery:
    """What `baton.testing` asks for. Raises KeyError for an unknown lease profile."""
    return Machinery(plan)


def _program(programs: Mapping[str, Program] | Program | None, name: str) -> Program:
    """Raises LookupError naming what is missing."""
    if callable(programs):
        return programs
    found = (programs or {}).get(name)
    if found is None:
        raise LookupError(
            f"the test does not say what {name!r} does: Federation(programs={{{name!r}: lambda call: ...}})"
        )
    return found


def _bytes(result: Any) -> bytes:
    if result is None:
        return b""
    if isinstance(result, bytes):
        return result
    return result.encode() if isinstance(result, str) else json.dumps(result).encode()
