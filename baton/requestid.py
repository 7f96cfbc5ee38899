"""Request ids: UUIDv7, the time-ordered names of a client's intents (PROTOCOL O8).

Theory: a mutation is an intent with a name. The name is drawn once, before the first try, and kept over all tries, so
a server that has seen it gives the same answer instead of acting twice. Its leading 48 bits are the sender's wall clock
in milliseconds, so a server knows an id's age without having kept it: older than its floor is EXPIRED, more than five
minutes ahead is refused. Chance and time come from `baton.clock`, never from the uuid module.
"""

from __future__ import annotations

import re

from baton.clock import Clock, Entropy

MAX_AHEAD_SECONDS = 300.0
"""How far ahead of a server's clock an id may lie (PROTOCOL O8). Smaller: clients with a sloppy clock are turned away;
larger: an id from a wrong clock outlives the hour for which ids are remembered."""

_FORM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def new(clock: Clock, entropy: Entropy) -> str:
    """A fresh request id, stamped with `clock.wall()`."""
    return compose(clock.wall(), entropy.token(10))


def compose(wall: float, random_hex: str) -> str:
    """The UUIDv7 of a wall time (seconds since the epoch) and 20 hex digits of chance. Raises ValueError."""
    if len(random_hex) != 20:
        raise ValueError(f"needs 20 hex digits of chance, got {len(random_hex)}")
    millis = int(wall * 1000)
    if not 0 <= millis < 1 << 48:
        raise ValueError(f"wall time {wall!r} does not fit a UUIDv7")
    chance = int(random_hex, 16)
    high = (millis << 16) | 0x7000 | (chance >> 68)
    low = (0b10 << 62) | (chance & ((1 << 62) - 1))
    digits = f"{(high << 64) | low:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def time_of(request_id: str) -> float:
    """The wall time (seconds since the epoch) inside a request id. Raises ValueError if it is no UUIDv7."""
    if not _FORM.fullmatch(request_id):
        raise ValueError("is not a UUIDv7 in lower-case 8-4-4-4-12 form")
    return int(request_id[:8] + request_id[9:13], 16) / 1000
