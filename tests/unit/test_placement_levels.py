"""The leader hears what agents read from their sessions: stored code waits for one that is new enough (PROTOCOL J11, C1)."""

from __future__ import annotations

from control_plane.core.events import ARTIFACTS_LEVEL
from control_plane.core.model import PythonCall, TaskSpec
from control_plane.fleet_keys import SessionInfo, encode_session
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from tests.unit.placement_world import World, story

STORED = TaskSpec((), python=PythonCall("m:f", "[]", code="ab" * 32))


async def session(world: World, name: str, level: int, generation: int = 1) -> None:
    value = encode_session(SessionInfo(generation, "r1", ended=False, nonce="n", level=level))
    await world.store.txn(Txn([], [Put(keys.session_owner(name), value)]), timeout=1.0)


def test_j11_stored_code_waits_for_an_agent_that_reads_of_it_and_says_so() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.cluster("eu", 8, agent_version="0.1.0")
        await session(world, "eu", 1)
        await world.submit_run(2, spec=STORED)
        await world.submit_run(1, name="plain")
        await world.clock.sleep(3.0)
        assert world.live() == {"eu": 1}, "only the plain one"
        view = world.shards["00"].task_at("run-r", 0)
        assert view is not None
        assert "no cluster with an agent of feature level 2; eu runs 0.1.0" in view.reason
        await session(world, "eu", ARTIFACTS_LEVEL)  # upgraded in its generation, on a new stream
        await world.report("eu", 7)
        await world.clock.sleep(3.0)
        assert world.live() == {"eu": 3}

    story(play)


def test_j11_what_an_ended_generation_read_says_nothing_of_the_next() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.cluster("eu", 8)
        await session(world, "eu", ARTIFACTS_LEVEL, generation=7)
        await world.submit_run(1, spec=STORED)
        await world.clock.sleep(3.0)
        assert world.live() == {}

    story(play)
