"""An agent whose files travel: the other end of a `CarryingWorld`, as it is once it has a lease."""

from __future__ import annotations

from tests.contract.carrying_world import CarryingWorld
from tests.contract.test_executor import Agent


async def join(world: CarryingWorld) -> Agent:
    """Connected, F = 30 s, K = 4 s, generation 1 renewed now."""
    agent = await Agent(world.executor()).connect()
    await agent.executor.configure(30.0, 4.0)
    await agent.executor.renew(1, world.clock.boot())
    return agent
