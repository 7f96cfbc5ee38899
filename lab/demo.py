"""The demonstration: a run that loses one cluster to a power cut and another to silence, and ends as if nothing had been.

Theory: what is shown is what happened. The story is told by real faults on real processes, and every number comes back
through the public API, counted from the attempts that the federation recorded. It is a success only if all of it is
seen: the run succeeded, each task's result was accepted once, work moved, a late result of the frozen cluster came in under
its old fence and was refused (PROTOCOL F2, F8), and the results are those of the same graph without faults.

The order of the faults is not free. The second cluster is frozen only after the first one's work has moved, so that the two
losses seldom look like a storm (S7), which would hold the work for another 20 s. The frozen agent's guard lets a task of
three seconds end before the fence at nine (F5), keeps its report, and the agent delivers it after the thaw, when a copy has
long been placed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cli import timeline
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.errors import BatonError
from baton.graphfile import GraphFile, load
from baton.v1 import run_pb2
from lab import processes
from lab.etcd_binary import EtcdNotFound
from lab.federation import Federation
from lab.layout import Layout, Settings
from lab.parts import PartFailed

GRAPH = processes.ROOT / "examples" / "timezones" / "graph.yaml"

SETTINGS = Settings(replicas=2, clusters=("eu", "us", "ap"), profile="fast", cpus=2)
"""Two CPUs each: four tasks fit a cluster, so the twelve parts are spread over all three."""

LOOK_SECONDS = 0.1
"""Between looks at the run; a part runs for three seconds, and the freeze has to come while it does."""

STEP_SECONDS = 75.0
"""Longest wait for one thing to happen. A loss takes L + G = 20 s; if two losses did look like a storm, 40 s more."""

RUN_SECONDS = 600.0
"""Deadline of the runs."""

Tasks = Sequence[run_pb2.TaskStatus]


class NotShown(Exception):
    """Something that the demonstration promises was not seen; the text says what."""


@dataclass(frozen=True, slots=True)
class Victim:
    """An attempt that runs on the cluster that is about to be frozen."""

    task: str
    n: int
    cluster: str


class Story:
    """One demonstration on a federation that is up."""

    def __init__(self, federation: Federation, client: AsyncClient, say: Callable[[str], None]) -> None:
        self._federation = federation
        self._client = client
        self._say = say
        self._clock = SystemClock()
        self._graph: GraphFile = load(str(GRAPH))

    async def undisturbed(self) -> str:
        """The hash of the results without faults. Raises NotShown."""
        name = await self._create("undisturbed")
        run = await self._client.wait_run(name)
        if run.state != run_pb2.RUN_STATE_SUCCEEDED:
            raise NotShown(f"the run without faults did not succeed: {run.reason}")
        self._say("the run without faults succeeded")
        return timeline.result_sha256(await self._tasks(name))

    async def disturbed(self) -> str:
        """Tell the story; the run's name. Raises NotShown."""
        name = await self._create("disturbed")
        await self._kill_one(name)
        victim = await self._freeze_another(name)
        await self._see_it_copied(name, victim)
        await self._federation.thaw(victim.cluster)
        self._say(f"thawed the agent of {victim.cluster}; its guard has kept the old result of {victim.task}")
        await self._see(name, lambda tasks: _refused(tasks, victim), "the frozen cluster's late result to be refused")
        self._say(f"the result of {victim.task} under its old fence was refused")
        run = await self._client.wait_run(name)
        if run.state != run_pb2.RUN_STATE_SUCCEEDED:
            raise NotShown(f"the run with faults did not succeed: {run.reason}")
        self._say("the run with faults succeeded")
        return name

    async def _create(self, word: str) -> str:
        graph = self._graph
        deadline = self._clock.wall() + RUN_SECONDS
        run = await self._client.create_run(graph.spec, deadline=deadline, run_id=word, labels=graph.labels)
        self._say(f"created {run.name}: {run.task_count} tasks")
        return run.name

    async def _kill_one(self, name: str) -> None:
        """The power cut: whatever cluster runs most."""
        tasks = await self._see(name, lambda tasks: len(_busy(tasks)) > 1, "two clusters to run tasks")
        cluster, count = _busy(tasks).most_common(1)[0]
        await self._federation.kill(cluster)
        self._say(f"killed {cluster} while it ran {count} task(s): agent, guard and workloads at once")

    async def _freeze_another(self, name: str) -> Victim:
        """Silence: the agent that runs a task which has moved already."""
        tasks = await self._see(name, lambda tasks: bool(_moved_and_running(tasks)), "a task of it to run elsewhere")
        victim = _moved_and_running(tasks)[0]
        await self._federation.freeze(victim.cluster)
        self._say(f"{victim.task} has moved to {victim.cluster}; froze the agent there while the task runs")
        return victim

    async def _see_it_copied(self, name: str, victim: Victim) -> None:
        def copied(tasks: Tasks) -> bool:
            attempts = _task(tasks, victim.task).attempts
            if any(each.n == victim.n and each.state == run_pb2.ATTEMPT_STATE_SUCCEEDED for each in attempts):
                raise NotShown(f"{victim.task} was reported before its agent stood still; nothing can come late")
            return any(each.n > victim.n for each in attempts)

        await self._see(name, copied, f"{victim.task} to be copied after the silence of {victim.cluster}")
        self._say(f"{victim.cluster} is lost by its lease, and {victim.task} was placed once more")

    async def _see(self, name: str, seen: Callable[[Tasks], bool], what: str) -> Tasks:
        """Wait for something to show in the run's tasks. Raises NotShown."""
        deadline = self._clock.boot() + STEP_SECONDS
        while self._clock.boot() < deadline:
            tasks = await self._tasks(name)
            if seen(tasks):
                return tasks
            await self._clock.sleep(LOOK_SECONDS)
        raise NotShown(f"waited {STEP_SECONDS:.0f} s for {what}")

    async def _tasks(self, name: str) -> Tasks:
        return [task async for task in self._client.list_tasks(name)]


def _task(tasks: Tasks, task_id: str) -> run_pb2.TaskStatus:
    return next(task for task in tasks if task.id == task_id)


def _running(task: run_pb2.TaskStatus) -> list[run_pb2.Attempt]:
    return [each for each in task.attempts if each.state == run_pb2.ATTEMPT_STATE_RUNNING]


def _busy(tasks: Tasks) -> Counter[str]:
    """Running attempts of parts (tasks that sleep, and so can be caught in the act), by cluster."""
    return Counter(each.cluster for task in tasks if task.id.startswith("count-") for each in _running(task))


def _moved_and_running(tasks: Tasks) -> list[Victim]:
    return [
        Victim(task.id, each.n, each.cluster)
        for task in tasks
        if timeline.moved(task)
        for each in _running(task)
        if each.n == task.attempts[-1].n
    ]


def _refused(tasks: Tasks, victim: Victim) -> bool:
    return any(each.n == victim.n and each.refused_results > 0 for each in _task(tasks, victim.task).attempts)


# --- the command ------------------------------------------------------------------------------------------------------


async def demonstrate(directory: Path, since: float, *, as_json: bool) -> dict[str, Any]:
    """The whole demonstration; its sums. Raises NotShown, PartFailed, BatonError, EtcdNotFound."""
    clock = SystemClock()

    def say(words: str) -> None:
        print(f"[{clock.wall() - since:6.1f} s] {words}", file=sys.stderr if as_json else sys.stdout, flush=True)

    federation = Federation(Layout(directory), SETTINGS)
    say(f"starting etcd {federation.binary.version}, 2 replicas and the clusters eu, us, ap (profile fast)")
    if federation.warning:
        say(federation.warning)
    await federation.start()
    try:
        async with federation.client() as client:
            story = Story(federation, client, say)
            expected = await story.undisturbed()
            name = await story.disturbed()
            run, tasks = await timeline.fetch(client, name)
        if not as_json:
            await _print_timeline(name, federation.endpoints)
    finally:
        await federation.stop()
    sums = timeline.summary(run, tasks)
    wanted = ("tasks", "accepted_results", "max_accepted_per_task", "moved_tasks", "stale_results_refused")
    found = {
        "run_state": sums["run_state"],
        **{key: sums[key] for key in wanted},
        "seconds": round(clock.wall() - since, 1),
        "etcd_version": federation.binary.version,
        "result_sha256": sums["result_sha256"],
        "result_sha256_without_faults": expected,
    }
    judge(found)
    return found


def judge(found: dict[str, Any]) -> None:
    """Raise NotShown unless the sums are what Baton promises."""
    broken = [
        words
        for words, holds in (
            ("the run did not succeed", found["run_state"] == "SUCCEEDED"),
            ("not every task has one accepted result", found["accepted_results"] == found["tasks"]),
            ("a task has two accepted results", found["max_accepted_per_task"] == 1),
            ("no task moved", found["moved_tasks"] >= 1),
            ("no late result was refused", found["stale_results_refused"] >= 1),
            (
                "the results differ from those without faults",
                found["result_sha256"] == found["result_sha256_without_faults"],
            ),
        )
        if not holds
    ]
    if broken:
        raise NotShown(f"{'; '.join(broken)}: {json.dumps(found)}")


async def _print_timeline(name: str, endpoints: Sequence[str]) -> None:
    """What `baton timeline` shows a person."""
    flags = [word for endpoint in endpoints for word in ("--endpoint", endpoint)]
    print(f"\n$ baton timeline {name}", flush=True)
    command = processes.python("baton.cli", *flags, "timeline", name)
    child = await asyncio.create_subprocess_exec(*command, env=processes.environment())
    if await child.wait():
        raise NotShown("`baton timeline` failed")


def one_line(found: dict[str, Any]) -> str:
    """The summary."""
    return (
        f"demo: {found['run_state']}, {found['tasks']} tasks, {found['accepted_results']} results accepted (at most"
        f" {found['max_accepted_per_task']} per task), {found['moved_tasks']} moved, {found['stale_results_refused']}"
        f" late result(s) refused, same outcome as without faults, {found['seconds']} s"
    )


def main() -> int:
    """Demonstrate; 0 if everything was seen."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A run that survives the loss of two clusters.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--since", type=float, help="when the demonstration began, in seconds since the epoch")
    given = parser.parse_args()
    since = SystemClock().wall() if given.since is None else given.since
    directory = Path(tempfile.mkdtemp(prefix="baton-demo-"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # all three end it in order, as ctrl-C does
    try:
        found = asyncio.run(demonstrate(directory, since, as_json=given.json))
    except (NotShown, PartFailed, BatonError, EtcdNotFound, OSError) as error:
        sys.stderr.write(f"demo: failed: {error}\ndemo: logs and state are kept in {directory}\n")
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        sys.stderr.write("demo: interrupted; everything it started was ended\n")
        return 130
    shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(found) if given.json else f"\n{one_line(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
