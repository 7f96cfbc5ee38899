"""What the guard knows of python calls and their workers: plain values (see `pythons` for what is done with them)."""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass, field

from cluster_agent.executors.base import Limits, Phase, PythonCall, StartRequest
from cluster_agent.guard.answers import Answer
from cluster_agent.guard.workload import Workload

Kind = tuple[str, tuple[str, ...], str, Limits, tuple[tuple[str, int], ...]]
"""One environment: tenant, requirements, code, limits, resources without a limit. What one lane of the agent is (core/lanes.py)."""


@dataclass(slots=True, eq=False)
class Call:
    """One attempt of a python task, from its start request to its end."""

    request: StartRequest
    python: PythonCall
    pool: Pool
    name: str
    """The key as text."""
    message: bytes
    worker: Worker | None = None
    """In whose line it is; None while it waits here."""

    @property
    def begun(self) -> bool:
        """It is at the head of a worker's line."""
        return self.worker is not None and self.worker.line[0] is self


@dataclass(slots=True, eq=False)
class Pool:
    """The workers of one environment, and the calls that wait for one."""

    kind: Kind
    slots: int = 0
    """Calls that may run at once, as the agent said last."""
    waiting: deque[Call] = field(default_factory=deque)
    workers: list[Worker] = field(default_factory=list)

    @property
    def busy(self) -> int:
        """Calls that run, and workers that are dying with one."""
        return sum(1 for worker in self.workers if worker.line)


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process. `workload` bears the request of the call at the head of its line, or of the last one."""

    pool: Pool
    name: str
    workload: Workload
    pipe: socket.socket
    """Our end of the calls' socket."""
    unread: socket.socket
    """A copy of the worker's own end of it: what is received here was never begun."""
    control: socket.socket
    """Answers come from here."""
    keeper_ticks: int
    line: deque[Call] = field(default_factory=deque)
    warm: bool = False
    """It has answered a call: its environment is made, so others may be put behind the next one."""
    bare: str = ""
    """The last call, if it left nothing: the worker keeps its empty directory and log for the next one."""
    retired: bool = False
    """It is killed when its line is empty."""
    head_since: float = 0.0
    idle_since: float = 0.0
    answer: Answer | None = None
    """How its attempt ended, told only when the worker is dead."""
    hung_up: float | None = None
    """When its socket ended."""

    @property
    def fit(self) -> bool:
        """It may get calls."""
        return self.workload.phase is not Phase.STOPPING and not self.retired and self.hung_up is None
