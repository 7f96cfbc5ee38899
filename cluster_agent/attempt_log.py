"""Lines about single attempts at their cluster: those whose end was not their own.

Theory. A workload that exits, well or badly, is reported, and the control plane's events say it. What only this host knows is told
here: a start that was refused, work that was killed because its lease had passed or that died with the guard, and a kill that came
later than promised (F6). The executor knows an attempt by its key: run uid and number lead to the same one in the replicas' logs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.telemetry.logs import about
from cluster_agent.executors.base import AttemptKey, Cause, ExecutorEvent, Exited, Refused

log = logging.getLogger("baton.agent")

_SENTENCES = {
    Cause.FENCE: "An attempt was stopped at its fence.",
    Cause.LOST: "An attempt was lost with the guard.",
    Cause.LIMIT: "An attempt was stopped at a limit.",
    Cause.SPAWN: "An attempt could not be started.",
    Cause.CARRIAGE: "Files of an attempt could not be fetched or stored.",
}
"""Ends that are told; an end by itself, by a stop or by a deadline is as planned."""

LATE = "An attempt was killed later than its lease allowed."


def tell(event: ExecutorEvent, incarnation: Callable[[AttemptKey], int]) -> None:
    """A line, if the event is one to be told. `incarnation`: under which an attempt's shard is known here, 0 if it is not."""
    if isinstance(event, Exited):
        sentence = LATE if event.late else _SENTENCES.get(event.cause)
        if sentence is not None:
            log.warning(sentence, extra=_fields(event.key, incarnation, event.message))
    elif isinstance(event, Refused):
        log.warning("A start was refused.", extra=_fields(event.key, incarnation, event.reason))


def _fields(key: AttemptKey, incarnation: Callable[[AttemptKey], int], reason: str) -> dict[str, object]:
    known = incarnation(key)
    fence = f"{known}.{key.n}" if known else ""
    return about(key.run_uid, task=key.task, attempt=key.n, fence=fence, reason=reason)
