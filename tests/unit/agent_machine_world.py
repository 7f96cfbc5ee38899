"""The agent's rules under test: a machine, its time, the journal that its records would make, and words to say it all."""

from __future__ import annotations

from typing import TypeVar

from cluster_agent.core import events as on
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.core.commands import Action, StartWork, Step
from cluster_agent.core.machine import AgentMachine
from cluster_agent.core.model import AgentState, AttemptKey, Demand, Ended, Epoch, Mark, Outcome, Phase, WorkSpec
from cluster_agent.core.records import Record

F = 9.0


EPOCH = Epoch(1, 5)


ENDED = Ended(Outcome.SUCCEEDED, 0, b"42")


A = TypeVar("A", bound=Action)


def key(task: int = 0, n: int = 1) -> AttemptKey:
    return AttemptKey("run", task, n, "nonce")


def spec(cpu: int = 1000, **changes: object) -> WorkSpec:
    base = {"argv": ("true",), "env": {}, "demand": Demand(cpu), "task_id": "t", "run": "r", "fence": "1.1"}
    return WorkSpec(**{**base, "deadline_wall_ms": 0, **changes})  # type: ignore[arg-type]


class World:
    """A machine, its time, and the journal that its records would make."""

    def __init__(self, cpus: int = 2, *, leased: bool = True, state: AgentState | None = None) -> None:
        self.now = 100.0
        self.records: list[Record] = []
        self.machine = AgentMachine(state or AgentState("j", "boot"), [NodeSpec(cpus * 1000)], fence_seconds=F)
        self.records += self.machine.restore("boot").records
        self.stream = 0
        self.number = 0
        if leased:
            self.step(on.Census({}, ()))
            self.session()
            self.ack()

    def step(self, *happened: on.Event, after: float = 0.0) -> Step:
        self.now += after
        step = self.machine.step(happened, self.now)
        self.records += step.records
        return step

    def session(self, generation: int = 1, *, resumed: bool = False) -> Step:
        self.stream += 1
        self.number = 0
        opened = self.step(on.StreamOpened(self.stream))
        self.step(on.Welcomed(self.stream, generation, resumed, "cu", "fu", F, 5.0))
        return opened

    def ack(self, generation: int = 1, sent: float | None = None, wall_ms: int = 1_000_000) -> Step:
        return self.step(on.HeartbeatAcked(self.stream, generation, self.now if sent is None else sent, wall_ms))

    def dispatch(
        self,
        *tasks: int,
        generation: int = 1,
        epoch: Epoch = EPOCH,
        stream: int | None = None,
        work: WorkSpec | None = None,
        mark: Mark | None = None,
        number: int | None = None,
    ) -> Step:
        self.number = self.number + 1 if number is None else number
        work = work or spec()
        given_ = tuple(on.Assignment(key(task), work) for task in tasks)
        at = self.stream if stream is None else stream
        return self.step(on.Dispatched(at, "s0", epoch, mark, generation, self.number, given_))

    def stop(self, task: int, epoch: Epoch = EPOCH) -> Step:
        return self.step(on.StopOrdered(self.stream, "s0", epoch, None, (key(task),)))

    def settle(self, task: int, epoch: Epoch = EPOCH) -> Step:
        return self.step(on.ReportsSettled(self.stream, "s0", epoch, None, (key(task),)))

    def phase(self, task: int) -> Phase | None:
        attempt = self.machine.state.attempts.get(key(task))
        return None if attempt is None else attempt.phase


def the(step: Step, kind: type[A]) -> A:
    found = [action for action in step.actions if isinstance(action, kind)]
    assert len(found) == 1, step.actions
    return found[0]


def none(step: Step, kind: type[Action]) -> bool:
    return not any(isinstance(action, kind) for action in step.actions)


def started(step: Step) -> list[int]:
    return [order.key.task for action in step.actions if isinstance(action, StartWork) for order in action.orders]
