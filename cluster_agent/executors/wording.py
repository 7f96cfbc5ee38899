"""How an attempt ended, in the words that people read first: one clause, no full stop, names instead of numbers."""

from __future__ import annotations

import signal
from dataclasses import replace

from cluster_agent.executors.base import Cause, Exited, StartRequest


def worded(exited: Exited, request: StartRequest) -> Exited:
    """The same end with a message; one that has a message already, and a success, stay as they are."""
    if exited.message or exited.succeeded:
        return exited
    return replace(exited, message=_words(exited, request))


def signal_name(number: int) -> str:
    """`SIGSEGV`; `signal 40` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _words(exited: Exited, request: StartRequest) -> str:
    match exited.cause:
        case Cause.TIMEOUT if request.timeout_seconds is not None:
            return f"timed out after {request.timeout_seconds:g}s"
        case Cause.DEADLINE:
            return "stopped at the run's deadline"
        case Cause.FENCE:
            return "stopped at its fence: its cluster was out of touch for too long"
        case Cause.STOP:
            return "stopped"
    if exited.signal is not None:
        return f"ended by {signal_name(exited.signal)}"
    return f"exited with code {exited.exit_code}"
