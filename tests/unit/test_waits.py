"""Waits that cost a timer and no task: bells, deadlines, virtual sleeps. Whatever ends first, nothing is left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster_agent.waiting import within
from control_plane.bell import Bell
from lab.simulation.nodes import Node, SimLoop
from lab.virtual_time import VirtualClock, run


def test_a_bell_wakes_its_sleeper_at_once_or_when_its_time_is_over() -> None:
    async def main() -> None:
        clock = VirtualClock(rate=2.0)
        bell, loop = Bell(clock), asyncio.get_running_loop()
        assert not await bell.wait(10.0)
        assert loop.time() == pytest.approx(5.0), "10 s of a clock that is twice as fast"
        loop.call_later(1.0, bell.ring)
        assert await bell.wait(10.0)
        assert loop.time() == pytest.approx(6.0)
        bell.ring()
        bell.ring()
        assert await bell.wait(10.0), "a ring while nobody sleeps is kept"
        assert not await bell.wait(0.0), "once"

    run(main())


def test_a_sleeper_that_is_cancelled_leaves_the_bell_usable() -> None:
    async def main() -> None:
        bell = Bell(VirtualClock())
        sleeper = asyncio.create_task(bell.wait(10.0))
        await asyncio.sleep(1.0)
        sleeper.cancel()
        await asyncio.gather(sleeper, return_exceptions=True)
        bell.ring()
        assert await bell.wait(10.0)

    run(main())


def test_work_within_its_time_gives_its_result_and_late_work_is_cancelled() -> None:
    async def main() -> None:
        clock, ended = VirtualClock(rate=0.5), list[str]()

        async def work(seconds: float) -> str:
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return "done"

        assert await within(clock, 5.0, work(9.0)) == "done", "5 s of a clock that is half as fast"
        with pytest.raises(TimeoutError):
            await within(clock, 5.0, work(11.0))
        assert ended == ["cancelled"]
        assert asyncio.get_running_loop().time() == pytest.approx(19.0)
        with pytest.raises(LookupError):
            await within(clock, 5.0, fail())

    run(main())


async def fail() -> None:
    raise LookupError


def test_being_cancelled_from_outside_is_no_timeout() -> None:
    async def main() -> None:
        outer = asyncio.create_task(within(VirtualClock(), 5.0, asyncio.sleep(60.0)))
        await asyncio.sleep(1.0)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer

    run(main())


def test_a_nap_can_be_cancelled_before_it_began_under_way_and_when_it_is_due() -> None:
    async def main() -> list[float]:
        clock, loop = VirtualClock(), asyncio.get_running_loop()
        woke: list[float] = []

        async def nap() -> None:
            try:
                await clock.sleep(2.0)
            finally:
                woke.append(loop.time())

        fresh, half, due = (asyncio.create_task(nap()) for _ in range(3))
        fresh.cancel()
        loop.call_at(1.0, half.cancel)
        await asyncio.gather(fresh, half, due, return_exceptions=True)
        assert fresh.cancelled()
        assert half.cancelled()
        assert not due.cancelled()
        both = asyncio.create_task(nap())
        loop.call_at(loop.time() + 2.0, both.cancel)  # the timer and the cancel in one moment: it ends once, either way
        await asyncio.gather(both, return_exceptions=True)
        return woke

    for seed in range(4):
        assert run(main(), seed, shuffle=seed > 0) == pytest.approx([1.0, 2.0, 4.0])


def test_a_frozen_nodes_nap_is_over_when_it_thaws_and_can_be_cancelled_meanwhile() -> None:
    async def main(loop: SimLoop) -> list[str]:
        node, heard, clock = Node("n", loop), list[str](), VirtualClock()

        async def live(name: str) -> None:
            try:
                await clock.sleep(1.0)
                heard.append(f"{name} woke at {loop.time():.0f}")
            except asyncio.CancelledError:
                heard.append(f"{name} cancelled at {loop.time():.0f}")

        node.spawn(live("one"))
        other = node.run(lambda: loop.create_task(live("other")))
        await asyncio.sleep(0.5)
        node.freeze()
        await asyncio.sleep(2.5)
        other.cancel()
        await asyncio.sleep(1.0)
        node.thaw()
        await asyncio.sleep(1.0)
        return heard

    loop = SimLoop()
    try:
        heard = loop.run_until_complete(main(loop))
    finally:
        loop.bury()
        loop.close()
    assert sorted(heard) == ["one woke at 4", "other cancelled at 4"]


def test_what_a_frozen_node_missed_comes_in_order_although_the_loop_shuffles() -> None:
    async def main(loop: SimLoop) -> list[int]:
        node, heard = Node("n", loop), list[int]()
        node.freeze()
        for number in range(30):
            loop.call_later(1.0 + number / 1000, heard.append, number, context=node.context())
        await asyncio.sleep(2.0)
        node.thaw()
        loop.call_soon(heard.append, 30, context=node.context())  # arrives in the very moment of the thaw
        await asyncio.sleep(1.0)
        return heard

    for seed in range(4):
        loop = SimLoop(random.Random(seed))
        try:
            assert loop.run_until_complete(main(loop)) == list(range(31))
        finally:
            loop.bury()
            loop.close()
