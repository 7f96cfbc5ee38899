"""What a task of a warm Python worker finds on disk: its log and directories, taken over from the last task where that left them
empty; and what is rarely asked for, made when it is: directories and files whose paths are in its environment.

Loaded by python_worker.py from beside it: the standard library only.
"""

from __future__ import annotations

import os
from typing import Any

LAZY: dict[str, Any] = {}
"""What is to be made before somebody uses the path in this variable of the environment."""


def make_lazy(names: Any) -> None:
    """Make those."""
    for name in names:
        make = LAZY.pop(name, None)
        if make is not None:
            make()


class LazyEnviron(type(os.environ)):  # type: ignore[misc]
    """`os.environ`, whose paths are there once they were looked up."""

    def __getitem__(self, name: str) -> str:
        if name in LAZY:
            make_lazy([name])
        return str(super().__getitem__(name))


def before_children(event: str, _args: object) -> None:
    """An audit hook: a child inherits the environment without a look at it."""
    if LAZY and event in ("subprocess.Popen", "os.system", "os.fork", "os.exec", "os.posix_spawn"):
        make_lazy(list(LAZY))


def make_directory(path: str) -> None:
    """Make it, or show that it is in use. Raises OSError."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:  # with the inputs, or with the checkpoint of an earlier attempt
        os.utime(path)


def write(path: str, data: bytes) -> None:
    """Put a file there."""
    with open(path, "wb") as file:
        file.write(data)


def renamed_or(make: Any, old: str, new: str) -> None:
    """Rename, or make it if there is nothing to rename or something in the way. Raises OSError."""
    if old:
        try:
            os.rename(old, new)
            return
        except OSError:
            pass
    make(new)


def open_log(path: str) -> None:
    """Make it where output goes. Raises OSError."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
