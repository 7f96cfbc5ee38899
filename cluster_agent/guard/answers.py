"""What a Python worker says of a call, and what that means for the attempt."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from cluster_agent.executors.base import Cause, Exited
from cluster_agent.executors.wording import signal_name
from cluster_agent.guard.workload import Workload, run_of

MAX_ANSWER = 1 << 20
"""Bytes of an answer: head and result. The worker holds results to the attempt's limit; this is only our buffer."""


LATEST_WALL = 1e11
"""Seconds: the year 5138. What is later, or no number, would not fit into a report."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A message of a worker: `head` as python_worker writes it."""

    head: dict[str, Any]
    result: bytes

    @property
    def key(self) -> str:
        """What it is about."""
        return str(self.head.get("key") or self.head.get("ready"))

    @property
    def ready(self) -> bool:
        """Not an end: the environment is made, the function is about to be called."""
        return "ready" in self.head

    @property
    def soiled(self) -> bool:
        """The worker is not fit for another call: something of this one is left in it."""
        return bool(self.head.get("soiled"))

    @property
    def left(self) -> bool:
        """The attempt's log or a directory of it holds something; else the worker has deleted them."""
        return bool(self.head.get("left") or self.head.get("log"))


def read_answer(data: bytes, asked: str) -> Answer:
    """What it said about the call `asked`; nonsense soils it."""
    try:
        head, _, result = data.partition(b"\n")
        said = json.loads(head)
        if _sensible(said):
            return Answer(said, result)
        raise ValueError(f"no answer: {head[:80]!r}")
    except (ValueError, RecursionError):
        nonsense = {"key": asked, "fault": "raised", "soiled": True, "left": True}
        return Answer({**nonsense, "message": "something else than the worker wrote to its guard"}, b"")


def _sensible(said: object) -> bool:
    """Whether it has the form of an answer. The task runs in the same process, and its nonsense must cost nobody else."""
    if not isinstance(said, dict) or not isinstance(said.get("fault", ""), str):
        return False
    times = [said[name] for name in ("from", "to") if name in said]
    return all(isinstance(time, int | float) and 0 <= time < LATEST_WALL for time in times)


_FAULTS = {
    "": (Cause.EXIT, 0),
    "raised": (Cause.EXIT, 1),
    "result": (Cause.RESULT, None),
    "carriage": (Cause.CARRIAGE, None),
}


def ended(workload: Workload, answer: Answer, *, late: bool, now_wall: float) -> Exited:
    """How an attempt ended whose worker answered."""
    head = answer.head
    fault = head.get("fault", "")
    cause, code = _FAULTS.get(fault, (Cause.SPAWN, None))
    start, end = head.get("from", workload.start_wall), head.get("to", now_wall)
    result, message = b"" if fault else answer.result, str(head.get("message", ""))
    files_of = run_of(workload.request) if head.get("made") and not fault else ""
    return Exited(workload.request.key, cause, code, None, float(start), float(end), result, message, late, files_of)


def died(exited: Exited) -> Exited:
    """How an attempt ended whose worker died without an answer; `exited` is what its process's end says."""
    if exited.cause is Cause.SPAWN:
        return replace(exited, message=f"no Python worker could be started: {exited.message}")
    if exited.cause is not Cause.EXIT:
        return exited
    how = f"exit code {exited.exit_code}" if exited.signal is None else signal_name(exited.signal)
    message = exited.message or f"the worker process ended in mid-task, by {how}"
    return replace(exited, cause=Cause.RESULT if exited.exit_code == 0 else Cause.EXIT, result=b"", message=message)
