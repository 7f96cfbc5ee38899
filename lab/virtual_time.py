"""Virtual time: an asyncio loop that never waits, clocks that drift, and chance from a seed.

Theory. A loop has nothing to do exactly when no callback is ready; then the next thing that can happen is its next
timer, and instead of sleeping until there it *is* there. So a simulated hour costs what its callbacks cost, and one
seed always gives the same run: time comes from timers, chance from the seed, and (if asked for) the order of ready
callbacks from the seed too, which finds code that only works because tasks happen to run in turn.

If there is no timer either, nothing will ever happen again: that is a deadlock, said as such instead of hanging.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

from baton.clock import Alarm

T = TypeVar("T")

EPOCH = 1_700_000_000.0
"""Wall time at virtual time 0. Any date would do; a recent one makes printed times look right."""

MAX_STEPS = 50_000_000
"""Loop turns of one run. A run that needs more spins without time passing."""


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: the awaited coroutine can never end."""


class Spinning(RuntimeError):
    """Far too many turns: something runs in circles without letting time pass."""


class _InstantSelector(selectors.DefaultSelector):
    """Looks at real descriptors without waiting, and lets time jump instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock("nothing is ready and no timer is set")
            self.loop.advance(max(timeout, 0.0))
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time, from 0. With a `shuffle` generator ready callbacks run in its order."""

    def __init__(self, shuffle: random.Random | None = None) -> None:
        selector = _InstantSelector()
        selector.loop = self
        self.now = 0.0
        """As `time()`, which costs a call."""
        self._steps = 0
        self._shuffle = shuffle
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def _run_once(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise Spinning(f"{MAX_STEPS} loop turns, and the virtual time is only {self.now}")
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]  # BaseEventLoop's queue, private and stable
        if self._shuffle is not None and len(ready) > 1:
            order = list(ready)
            self._shuffle.shuffle(order)
            ready.clear()
            ready.extend(order)
        super()._run_once()  # type: ignore[misc]  # as above


class Nap:
    """A sleep that wakes its task with the timer itself; a Future would take another turn of the loop. A future to its task."""

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_loop", "_seconds", "_timer", "_wake")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self._asyncio_future_blocking = False
        self._cancelled = False

    def __await__(self) -> Generator[Nap, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """See asyncio.Future."""
        return self._loop

    def add_done_callback(self, wake: Callable[[Nap], object], *, context: Context) -> None:
        """See asyncio.Future; called by the task that sleeps, once."""
        self._wake, self._context = wake, context
        self._timer = self._loop.call_later(self._seconds, wake, self, context=context)

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002 - as a task calls it
        """See asyncio.Future."""
        self._timer.cancel()
        if not self._cancelled:
            self._cancelled = True
            self._loop.call_soon(self._wake, self, context=self._context)
        return True

    def result(self) -> None:
        """See asyncio.Future."""
        if self._cancelled:
            raise asyncio.CancelledError


async def _nap(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    await Nap(loop, seconds)


class VirtualClock:
    """A node's `baton.clock.Clock` on the running VirtualLoop. Its clocks start at `boot_offset` and EPOCH +
    `wall_offset` and run `rate` times as fast as true time. The wall clock may be stepped, the rate changed; boot
    never steps back."""

    def __init__(self, *, boot_offset: float = 1000.0, wall_offset: float = 0.0, rate: float = 1.0) -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise TypeError(f"virtual time needs a VirtualLoop, not {type(loop).__name__}")
        self._loop = loop
        self._rate = rate
        self._at = loop.now
        self._boot = boot_offset
        self._wall_ahead = EPOCH + wall_offset - boot_offset

    def boot(self) -> float:
        """See `Clock.boot`."""
        return self._boot + (self._loop.now - self._at) * self._rate

    def wall(self) -> float:
        """See `Clock.wall`."""
        return self._boot + (self._loop.now - self._at) * self._rate + self._wall_ahead

    def sleep(self, seconds: float) -> Coroutine[Any, Any, None]:
        """See `Clock.sleep`: `seconds` of this clock."""
        return _nap(self._loop, seconds / self._rate) if seconds > 0 else asyncio.sleep(0)

    def later(self, seconds: float, action: Callable[[], object]) -> Alarm:
        """See `Clock.later`: `seconds` of this clock."""
        return self._loop.call_later(seconds / self._rate, action)

    def step_wall(self, seconds: float) -> None:
        """Somebody set the wall clock."""
        self._wall_ahead += seconds

    def step_boot(self, seconds: float) -> None:
        """The node was suspended: its boot clock and wall clock count the time, its timers did not run."""
        if seconds < 0:
            raise ValueError("a boot clock never steps back")
        self._boot += seconds

    def set_rate(self, rate: float) -> None:
        """From now on the clocks run `rate` times as fast as true time. Sleeps under way keep their length."""
        self._boot, self._at, self._rate = self.boot(), self._loop.now, rate


class SeededEntropy:
    """A `baton.clock.Entropy` from a seed."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret

    def token(self, size: int = 16) -> str:
        """See `Entropy.token`."""
        return self._random.randbytes(size).hex()

    def uniform(self) -> float:
        """See `Entropy.uniform`."""
        return self._random.random()


def run(main: Coroutine[Any, Any, T], seed: int = 0, *, shuffle: bool = False) -> T:
    """Run `main` to its end in virtual time, cancel what it left behind, return its result. Raises Deadlock,
    Spinning."""
    loop = VirtualLoop(random.Random(seed) if shuffle else None)  # noqa: S311 - to be repeated, not to be secret
    try:
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(main)
        finally:
            _cancel_leftovers(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _cancel_leftovers(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in sorted(left, key=lambda task: task.get_name()):
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
