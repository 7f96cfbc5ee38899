"""Ends for waits: `async with time_limit(seconds)`.

Theory. A wait is ended by cancelling its task; what arrives as CancelledError is told as TimeoutError at the block that asked for it,
and nowhere else. Whether somebody else wants the task cancelled too is seen from its count of cancellations: if it is higher at
the end of the block than it was at its beginning, beside our own, the cancellation goes on.

Why not asyncio's: before Python 3.11.3, which Debian 12 does not have, `asyncio.timeout` takes any count but 0 for somebody else's
wish, whatever it was at the beginning; and a `TaskGroup` that failed leaves a count behind (until 3.13). So in a task that has
outlived a failed group every time-out is a cancellation that nobody asked for: an agent whose stream broke once never came back.
`asyncio.wait_for` of 3.11 loses a cancellation that meets the result.

Two things it cannot do: a group that fails *inside* the block leaves its count there, so the error is not to be caught inside; and
`expire` is for timers and other tasks, not for the block itself.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class time_limit:  # noqa: N801 - reads as a word of the language, as `suppress` does
    """A block that raises TimeoutError if it takes longer than `seconds` of the loop's time (None: until `expire`). Enter it once."""

    __slots__ = ("_before", "_expired", "_seconds", "_task", "_timer")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False

    def expire(self) -> None:
        """The time is over now. Nothing happens outside of the block, or a second time."""
        if self._task is not None and not self._expired:
            self._expired = True
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = self._task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a time limit ends a task, and there is none")
        self._before = task.cancelling()
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self._seconds), self.expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._expired and task is not None and task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise TimeoutError from error
