"""A ctrl-C ends a wait, also when it meets an answer in the same moment."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, cast

import pytest

from baton import client_streams
from baton.cli import INTERRUPTED, runs
from baton.contexts import Context

pytestmark = pytest.mark.timeout(60)


class Stream:
    """A stream whose next message the test gives."""

    def __init__(self) -> None:
        self.message: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def read(self) -> str:
        return await self.message


@pytest.mark.parametrize("steps", range(4))
async def test_a_cancellation_that_meets_a_message_is_not_lost(steps: int) -> None:
    stream = Stream()
    reading = asyncio.ensure_future(client_streams.next_message(cast("Any", stream)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    stream.message.set_result("message")
    for _ in range(steps):
        await asyncio.sleep(0)
    # If it has not ended yet: asyncio.wait_for of 3.11 would give the message and forget what it was told.
    if reading.cancel():
        with pytest.raises(asyncio.CancelledError):
            await reading


def test_a_wait_that_lost_the_first_cancellation_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "DETACH_SECONDS", 0.01)
    lost = 0

    async def story() -> None:
        nonlocal lost
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    with pytest.raises(SystemExit) as left:
        runs._until_detached(story(), Context(("127.0.0.1:1",)))
    assert (left.value.code, lost) == (INTERRUPTED, 3)
