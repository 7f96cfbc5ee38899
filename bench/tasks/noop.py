"""What the benchmark runs on its workers: nothing. Packed and sent like any user's code."""

import time


def nothing() -> None:
    """The shortest task."""


def moment() -> float:
    """When it ran: seconds on the clock of all processes of this machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
