"""The command line `baton`: a thin face over `baton.client`. `main` is the entry point.

Theory: most of the first second of a command is the loading of gRPC. A ctrl-C in it is a person's, not a fault's, so it
ends the process at once and says nothing; nothing was asked of a federation yet. Hence this module loads nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["INTERRUPTED", "interruptible", "main"]

INTERRUPTED = 130
"""Exit code of a command that was interrupted before it began: 128 and the number of SIGINT, as shells have it."""


def main(prog_name: str | None = None) -> None:
    """Runs the command line of this process and exits with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ctrl-C is ignored, or somebody else's
        signal.signal(signal.SIGINT, _quit)
    _open_closed_streams()
    from baton.cli import root  # noqa: PLC0415 - what takes long is loaded here, not before

    root.main(prog_name=prog_name)


def interruptible() -> None:
    """From here on an interruption is an exception again, for a command may have to tidy up."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_closed_streams() -> None:
    """A standard stream that the caller closed (`>&-`) leads nowhere: else the next socket would take its number, and Python has None
    where everybody writes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the process's life


def _quit(_number: int, _frame: FrameType | None) -> None:
    """Not an exception: what is being loaded may catch one, or print it."""
    os._exit(INTERRUPTED)
