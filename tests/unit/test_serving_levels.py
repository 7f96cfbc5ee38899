"""At the edge of a session: an older agent never sees an attempt that starts from stored content (PROTOCOL J11, J7, S2)."""

from __future__ import annotations

import asyncio

from control_plane.core.commands import CreateRun, Request
from control_plane.core.events import ARTIFACTS_LEVEL
from control_plane.core.model import GraphTask, PythonCall, TaskSpec
from control_plane.dispatcher import RESEND
from control_plane.store.memory import MemoryEtcd
from tests.unit.journal_world import story, until
from tests.unit.test_serving import Node, alone, linked

STORED = TaskSpec((), python=PythonCall("m:f", "[]", code="ab" * 32))
CARRIED = TaskSpec((), python=PythonCall("m:f", "[]", code="cd" * 32, code_zip=b"zip"))


async def create(node: Node, *specs: TaskSpec) -> None:
    graph = tuple(GraphTask(f"t{n}", (), spec) for n, spec in enumerate(specs))
    await node.submit(CreateRun(Request("", ""), "ns", "r", "r", node.clock.wall() + 3600.0, 0, graph))


@story
async def test_j11_the_agents_level_is_in_its_session_and_follows_each_stream(server: MemoryEtcd) -> None:
    a = await alone(server)
    await linked(a, a.dial(feature_level=1))
    await until(lambda: a.view.sessions[a.cluster].level == 1)
    upgraded = a.dial(instance="i1", feature_level=ARTIFACTS_LEVEL)
    assert (await upgraded.welcomed()).resumed, "the generation goes on"
    await until(lambda: a.view.sessions[a.cluster].level == ARTIFACTS_LEVEL)
    await a.crash()


@story
async def test_j11_what_an_older_agent_cannot_read_waits_for_a_newer_one(server: MemoryEtcd) -> None:
    a = await alone(server)
    old = a.dial(feature_level=1)
    await linked(a, old)
    await create(a, STORED)
    await a.place(1)
    await asyncio.sleep(3 * RESEND)
    assert old.tasks() == []
    assert not any(sent.codes for sent in old.of("dispatches"))
    new = a.dial(feature_level=ARTIFACTS_LEVEL)
    assert (await new.welcomed()).resumed
    await until(lambda: new.tasks() == [0])
    assert new.of("dispatches")[0].codes[0].stored
    await a.crash()


@story
async def test_j11_an_older_agent_gets_everything_else(server: MemoryEtcd) -> None:
    a = await alone(server)
    old = a.dial(feature_level=1)
    await linked(a, old)
    await create(a, CARRIED, TaskSpec(("work",)))
    await a.place(2)
    await until(lambda: sorted(old.tasks()) == [0, 1])
    await a.crash()
