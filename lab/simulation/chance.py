"""Where a simulation's chance comes from: a generator per purpose, so that one more draw here changes nothing there."""

from __future__ import annotations

import random


def chance(*purpose: object) -> random.Random:
    """The generator of one purpose of one seed."""
    return random.Random("/".join(map(str, purpose)))  # noqa: S311 - it has to come again
