"""A graph of 10,000 tasks: accepted, run to its end and listed, by the library and by the command line, whatever its bytes.

The tasks carry arguments, so that graph and lists are larger than any one message may be (4 MiB): the graph has to go in pieces, the
lists in pages. Nothing here asserts a speed; the times are printed. What grew with the square of the tasks would not come to its
end within the test's time: 10,000 such steps of a millisecond are a day.
"""

from __future__ import annotations

import json

import pytest

from baton.client import AsyncClient
from baton.v1 import graph_pb2, run_pb2
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, SUCCEEDED

TASKS = 10_000

CHAIN = 20
"""Tasks at the graph's head that wait for each other, then a fan of all others but the last, which waits for all of them."""

MESSAGE_LIMIT = 4 << 20
"""Bytes that a replica takes in one message."""

PATIENCE = 240.0
"""Seconds for the whole run. Most of it is the machine's: 10,000 processes, each in namespaces of its own."""


def graph() -> graph_pb2.GraphSpec:
    """A chain, a fan, and a task with 9,979 parents."""
    spec = graph_pb2.GraphSpec()
    resources = graph_pb2.Resources(cpu_millis=100)
    for number in range(TASKS):
        task = spec.tasks.add(id=f"t-{number:05}", resources=resources)
        task.process.argv.extend(["true", f"{number:0500}"])
        if 0 < number < TASKS - 1:
            task.parents.append(f"t-{min(number, CHAIN) - 1:05}")
    spec.tasks[-1].parents.extend(f"t-{number:05}" for number in range(CHAIN, TASKS - 1))
    return spec


@pytest.mark.timeout(330)
async def test_ten_thousand_tasks_are_accepted_run_and_listed(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed, AsyncClient(fed.lab.endpoints, timeout=60.0) as client:
        spec = graph()
        assert spec.ByteSize() > MESSAGE_LIMIT
        began = CLOCK.boot()
        run = await client.create_run(spec, deadline=CLOCK.wall() + 900, run_id="large")
        accepted = CLOCK.boot()
        assert run.task_count == TASKS
        early = [task.id async for task in client.list_tasks(run.name)]
        assert early == [task.id for task in spec.tasks]

        ended = await client.wait_run(run.name, patience=PATIENCE)
        done = CLOCK.boot()
        assert (ended.state, ended.accepted_results) == (SUCCEEDED, TASKS), ended
        assert ended.tasks_by_state == {run_pb2.TASK_STATE_SUCCEEDED: TASKS}

        tasks = [task async for task in client.list_tasks(run.name)]
        listed = CLOCK.boot()
        assert [task.id for task in tasks] == early
        assert {task.accepted_results for task in tasks} == {1}
        assert len(tasks[-1].parents) == TASKS - 1 - CHAIN
        shown = await fed.cli("get", "tasks", "large", "-o", "json")
        told = CLOCK.boot()
        assert shown.returncode == 0, shown.stderr
        assert len(json.loads(shown.stdout)["tasks"]) == TASKS
        described = await fed.cli("timeline", "large", "--json")
        assert json.loads(described.stdout)["summary"]["accepted_results"] == TASKS
        print(
            f"{TASKS} tasks, {spec.ByteSize() / 1e6:.1f} MB: accepted in {accepted - began:.2f} s, run in {done - accepted:.1f} s"
            f" ({TASKS / (done - accepted):.0f} tasks/s), listed in {listed - done:.2f} s, by the command line in"
            f" {told - listed:.2f} s"
        )
