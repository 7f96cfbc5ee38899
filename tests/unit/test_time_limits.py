"""Time limits, in virtual time; the same on every Python from 3.11.0 on."""

from __future__ import annotations

import asyncio

import pytest

from baton.time_limits import time_limit
from lab.virtual_time import run

FOREVER = 1_000.0


async def fail() -> None:
    raise ValueError("a stream broke")


async def outlive_a_failed_group() -> None:
    """What leaves a count of cancellations behind in every Python before 3.13."""
    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())


def test_what_takes_too_long_is_ended_at_its_time() -> None:
    async def play() -> None:
        with pytest.raises(TimeoutError):
            async with time_limit(2.0):
                await asyncio.sleep(FOREVER)
        assert asyncio.get_running_loop().time() == 2.0

    run(play())


def test_what_is_ready_in_time_is_left_alone() -> None:
    async def play() -> None:
        async with time_limit(2.0):
            await asyncio.sleep(1.0)
        async with time_limit(None) as limit:
            await asyncio.sleep(3.0)
        limit.expire()
        await asyncio.sleep(3.0)

    run(play())


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_time_is_a_time_out_at_the_first_wait(seconds: float) -> None:
    async def play() -> None:
        with pytest.raises(TimeoutError):
            async with time_limit(seconds):
                await asyncio.sleep(FOREVER)

    run(play())


def test_after_a_failed_group_a_time_out_is_a_time_out() -> None:
    """With `asyncio.timeout` of Python 3.11.2 this was a CancelledError that nobody had asked for."""

    async def play() -> None:
        await outlive_a_failed_group()
        with pytest.raises(TimeoutError):
            async with time_limit(2.0):
                await asyncio.sleep(FOREVER)

    run(play())


@pytest.mark.parametrize("early", [True, False])
def test_a_cancellation_from_outside_goes_on(early: bool) -> None:
    """Also one that comes in the very moment at which the time is over."""
    ended: list[BaseException] = []

    async def wait() -> None:
        await outlive_a_failed_group()
        try:
            async with time_limit(2.0):
                await asyncio.sleep(FOREVER)
        except BaseException as error:
            ended.append(error)
            raise

    async def play() -> None:
        task = asyncio.get_running_loop().create_task(wait())
        await asyncio.sleep(1.0)
        if early:
            task.cancel()
        else:
            asyncio.get_running_loop().call_at(2.0, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()
        assert isinstance(ended[0], asyncio.CancelledError)

    run(play())


def test_only_the_limit_that_is_over_says_so() -> None:
    async def play() -> None:
        async with time_limit(9.0):
            with pytest.raises(TimeoutError):
                async with time_limit(2.0):
                    await asyncio.sleep(FOREVER)
            await asyncio.sleep(3.0)

        async def inner() -> None:
            try:
                async with time_limit(9.0):
                    await asyncio.sleep(FOREVER)
            except TimeoutError:
                pytest.fail("the inner one had time left")

        with pytest.raises(TimeoutError):
            async with time_limit(2.0):
                await inner()

    run(play())


def test_an_error_of_the_block_is_its_own() -> None:
    async def play() -> None:
        with pytest.raises(ValueError, match="a stream broke"):
            async with time_limit(2.0):
                await fail()
        await asyncio.sleep(3.0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(play())


def test_it_can_be_over_at_any_time_and_once() -> None:
    async def play() -> None:
        limit = time_limit(None)
        for _ in range(2):
            asyncio.get_running_loop().call_later(1.0, limit.expire)
        with pytest.raises(TimeoutError):
            async with limit:
                await asyncio.sleep(FOREVER)
        await asyncio.sleep(5.0)

    run(play())
