"""Python's cyclic garbage collector, as long-lived processes with large states want it.

Theory. Replicas and agents hold hundreds of thousands of small objects that live as long as their runs and form no cycles:
reference counts free them. The collector walks all of them again and again to find the few cycles that exceptions and tasks leave,
every 700 allocations by default, which cost a tenth of a busy replica's time. So it looks more seldom, and never at what was loaded
before the first request.
"""

from __future__ import annotations

import gc

YOUNG, MIDDLE, OLD = 50_000, 20, 20
"""Allocations until a look at the young; looks at these until one at the middle, and so on. Smaller: the time above; larger: cycles of
a busy process hold more memory before they go, here some tens of MB at most."""


def tune() -> None:
    """Call it once, when everything is loaded."""
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
