"""How ctrl-C and SIGTERM end a campaign: in order, in whatever phase they come.

Theory. Whatever was started has to be ended before we end, and by the event loop that owns it. So while that loop runs, a signal
cancels the one task that all else hangs on; before and after it, when nothing is started or all is ended, it ends the process where
it stands. Python does the same for ctrl-C alone. Only the first signal counts: a second one must not disturb the cleaning (SIGKILL
may: all children die with us).

Only the standard library is imported here, and little of it: the campaign takes a second to load, in which a signal may come.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGHUP: the terminal was closed; who wants to live on without it starts us with `nohup`."""


class Interrupted(SystemExit):
    """A signal came. Not told of by Python if nobody catches it; its exit code is that of a shell: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Ending:
    """What the signals of this process mean from `listen` on."""

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal that came; 0 while none has."""
        self._over = False
        self._cancel: Callable[[], None] | None = None

    def listen(self) -> None:
        """Hear signals from now on, in the main thread."""
        for number in HEARD:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    def over(self) -> None:
        """The exit code is known: a signal comes too late to change it."""
        self._over = True

    @contextmanager
    def through(self, cancel: Callable[[], None]) -> Iterator[None]:
        """While the body runs a signal calls `cancel`, which may be called between any two instructions, instead of raising."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.number:
            raise Interrupted(self.number)

    def _hear(self, number: int, _frame: object) -> None:
        if self.number or self._over:
            return
        self.number = number
        if self._cancel is None:
            raise Interrupted(number)
        self._cancel()
