"""Checkpoints of a long task, from inside it: what was saved last is there when the task runs again, on whatever cluster.

    from baton import checkpoint, task

    @task(retry=3)
    def train(steps):
        state = checkpoint.load({"step": 0})
        while state["step"] < steps:
            state["step"] += 1
            checkpoint.save(state)
        return state

A value that is JSON comes back as it was, and so do bytes. Saving is one write and one rename: it is here at once, and the cluster's
agent carries it away within seconds, unless a newer one comes first. Outside a task (a test, a try at the desk) `save` does nothing
and `load` gives the default. A program of another language does the same by renaming a complete file of its own form onto
`$BATON_CHECKPOINT_DIR/latest`.

Runs in workers, which have the standard library only, of Python 3.9 or newer.
"""

from __future__ import annotations

import json
import os
from typing import Any

__all__ = ["load", "save"]

_JSON, _BYTES = b"baton checkpoint json\n", b"baton checkpoint bytes\n"
"""First line of the file: what follows it."""


def save(value: Any) -> None:
    """Have the next attempt of this task start from `value`: bytes, or what is JSON. Raises TypeError or ValueError for another
    value (nothing is pickled), and OSError when the disk refuses; what was saved before then stands."""
    directory = os.environ.get("BATON_CHECKPOINT_DIR")
    data = _BYTES + value if isinstance(value, bytes) else _JSON + _text(value)
    if directory is None:
        return
    draft = os.path.join(directory, f".saving.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
        os.replace(draft, os.path.join(directory, "latest"))
    except OSError:
        if os.path.exists(draft):
            os.unlink(draft)
        raise


def load(default: Any = None) -> Any:
    """What was saved last, by this attempt or an earlier one; `default` if nothing was. Raises ValueError for a file of another
    form, which a program of this task has put there."""
    directory = os.environ.get("BATON_CHECKPOINT_DIR")
    if directory is None:
        return default
    try:
        with open(os.path.join(directory, "latest"), "rb") as file:
            head = file.readline(len(_BYTES))
            data = file.read()
    except FileNotFoundError:
        return default
    if head == _BYTES:
        return data
    if head == _JSON:
        return json.loads(data)
    raise ValueError(
        "the checkpoint was not saved with baton.checkpoint.save: read $BATON_CHECKPOINT_DIR/latest yourself"
    )


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise TypeError(f"a checkpoint is bytes or JSON, and this {type(value).__name__} is neither: {error}") from None
