"""What `words.py` counts."""

from __future__ import annotations

BOOKS = {
    "relay": "the baton is held by one runner and the next runner waits for the baton",
    "orchestra": "the conductor lifts the baton and the orchestra waits",
    "dough": "the baker shapes the baguette and the dough waits",
}
