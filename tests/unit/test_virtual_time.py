"""Virtual time: nothing waits, everything repeats, and a deadlock is said as such."""

from __future__ import annotations

import asyncio

import pytest

from lab.virtual_time import EPOCH, Deadlock, SeededEntropy, VirtualClock, run


def test_an_hour_costs_nothing_and_is_exact() -> None:
    async def main() -> tuple[float, float]:
        clock = VirtualClock(boot_offset=7.0)
        await clock.sleep(3600)
        return clock.boot(), clock.wall()

    assert run(main()) == pytest.approx((3607.0, EPOCH + 3600.0))


def test_clocks_drift_and_step_apart() -> None:
    async def main() -> None:
        true, fast = VirtualClock(), VirtualClock(rate=2.0, wall_offset=60.0)
        start = true.boot(), fast.boot()
        await fast.sleep(10)
        assert true.boot() - start[0] == pytest.approx(5.0)
        assert fast.boot() - start[1] == pytest.approx(10.0)
        fast.set_rate(1.0)
        await true.sleep(5)
        assert fast.boot() - start[1] == pytest.approx(15.0)
        wall = fast.wall()
        fast.step_wall(-3600.0)
        assert fast.wall() == pytest.approx(wall - 3600.0)
        fast.step_boot(30.0)
        assert fast.boot() - start[1] == pytest.approx(45.0)
        with pytest.raises(ValueError, match="never steps back"):
            fast.step_boot(-1.0)

    run(main())


def test_one_seed_gives_one_order() -> None:
    async def main() -> list[int]:
        order: list[int] = []

        async def walk(name: int) -> None:
            for _ in range(5):
                await asyncio.sleep(0)
                order.append(name)

        await asyncio.gather(*(walk(name) for name in range(4)))
        return order

    assert run(main()) == [0, 1, 2, 3] * 5
    shuffled = [run(main(), seed, shuffle=True) for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]


def test_a_deadlock_is_said() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(main())


def test_leftovers_are_cancelled() -> None:
    ended: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.sleep(10**9)
        finally:
            ended.append("cleanly")

    async def main() -> None:
        task = asyncio.create_task(for_ever())
        await asyncio.sleep(1)
        assert not task.done()

    run(main())
    assert ended == ["cleanly"]


def test_chance_comes_from_the_seed() -> None:
    one, same, other = SeededEntropy(1), SeededEntropy(1), SeededEntropy(2)
    assert one.token() == same.token() != other.token()
    assert one.uniform() == same.uniform()
    assert len(one.token(8)) == 16
