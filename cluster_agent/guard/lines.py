"""The life of python calls at the guard: admitted, dealt to workers, answered, recalled, buried (PROTOCOL F4, G5).

A call counts as started from its admission on: it is on the ledger before a worker can have it, its lease and its deadline end
it also while it waits, and nobody may start it again. Its time-out counts from when it is at the head of a line. To end a
call that waits is to recall it; that which cannot be recalled was begun.

Order is safety when the head of a line is to end: first what is behind it is recalled, then the answers are read. What was not
recalled and has no answer is running now, and it is alone: only then may its worker be signalled, or the signal would meet
the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from cluster_agent.core.lease import Bounds, Leases, Reason
from cluster_agent.executors.base import Cause, Exited, Phase, StartRequest
from cluster_agent.guard import host
from cluster_agent.guard.answers import Answer, died, ended
from cluster_agent.guard.calls import Call, Worker
from cluster_agent.guard.pythons import Pythons
from cluster_agent.guard.workload import Workload

FOREVER = 1e9
"""Time-out while a worker makes its environment, which it bounds itself (python_worker.INSTALL_SECONDS)."""

ANSWERS = 256
"""Answers of one worker read in a row; then the others, the timers and the agent have their turn."""


class Owner(Protocol):
    """What the guard does for its lines."""

    def took(self, workload: Workload, pid: int) -> None:
        """The workload bears another attempt, which has begun; `pid`: its process, 0 while it is being made."""
        ...

    def gave_back(self, key: str) -> None:
        """An attempt that had begun, as it seemed, waits again: its worker died without having received it."""
        ...

    def concluded(self, workload: Workload, exited: Exited, *, bare: bool = False) -> None:
        """The attempt that it bears is over."""
        ...

    def ended_unbegun(self, exited: Exited) -> None:
        """An attempt is over that no worker began."""
        ...

    def listen(self, workload: Workload) -> None:
        """Watch a new one."""
        ...


class Lines:
    """All python calls of one guard."""

    def __init__(
        self,
        pythons: Pythons,
        leases: Leases[str],
        owner: Owner,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        self._pythons, self._leases, self._owner = pythons, leases, owner
        self._watch, self._unwatch = watch, unwatch

    def admit(self, requests: Iterable[StartRequest], now: float) -> None:
        """Take calls that are on the ledger, and deal."""
        for request in requests:
            python = request.python
            if python is None:
                continue
            try:
                call = self._pythons.admit(request, python)
            except OSError as error:
                self._owner.ended_unbegun(_unbegun(request, Cause.SPAWN, error.strerror or str(error)))
                continue
            grace, keep = request.grace_seconds, request.keep_at_fence
            self._leases.add(call.name, Bounds(request.generation, now, request.stop_at, None, grace, keep))
        self.deal(now)

    def deal(self, now: float) -> None:
        """Whoever waits and may run goes to a worker."""
        begun, failed = self._pythons.deal(now)
        for call in begun:
            worker = call.worker
            if worker is None:
                continue
            if worker.workload.phase is Phase.STARTING and not worker.warm and worker.workload.pid == 0:
                self._owner.listen(worker.workload)
                self._watch(worker.control.fileno(), lambda worker=worker: self.answered(worker))  # type: ignore[misc]
            self._began(call, worker, now)
        for call, error in failed:
            self._leases.remove(call.name, now)
            self._owner.ended_unbegun(_unbegun(call.request, Cause.SPAWN, str(error)))

    def answered(self, worker: Worker) -> None:
        """A worker spoke, or closed its socket."""
        for _ in range(ANSWERS):
            answer = self._pythons.receive(worker)
            if answer is None:
                break
            if not worker.line or answer.key != worker.line[0].name:
                continue  # no call of ours: a task's own words, and the answer may be behind them
            if answer.ready:
                self._leases.restart(answer.key, host.boot(), worker.workload.request.timeout_seconds)
            elif worker.answer is None:
                self._take(worker, answer)
        if worker.hung_up is not None:
            self._unwatch(worker.control.fileno())

    def _take(self, worker: Worker, answer: Answer) -> None:
        """The call at the head of its line is over."""
        workload, now = worker.workload, host.boot()
        ordered_to_end = workload.phase is Phase.STOPPING
        if ordered_to_end or answer.soiled:
            worker.answer = answer  # before anything else: its head is over, and stays in line until the worker is dead
            self._pythons.recall(worker)
            self._pythons.kill(worker)
            return
        if not worker.retired and self._breached(worker, answer):
            worker.retired = True
            self.recall(worker)
        late = self._leases.remove(answer.key, now)
        self._owner.concluded(workload, ended(workload, answer, late=late, now_wall=host.wall()), bare=not answer.left)
        following = self._pythons.over(worker, now, bare=not answer.left)
        if following is not None:
            self._began(following, worker, now)
        else:
            self._pythons.trim()

    @staticmethod
    def _breached(worker: Worker, answer: Answer) -> bool:
        """Whether its control group met a limit: it keeps count, so the worker is not lent for long after. Looked at when a call
        failed and when the line is empty, for it costs two reads."""
        group = worker.workload.group
        looks = len(worker.line) == 1 or "fault" in answer.head
        return looks and group is not None and bool(group.breach())

    def _began(self, call: Call, worker: Worker, now: float) -> None:
        """It is at the head of a line."""
        timeout = call.request.timeout_seconds
        if not worker.warm and call.python.requirements:
            self._leases.restart(call.name, now, FOREVER)
        elif timeout is not None:
            self._leases.restart(call.name, now, timeout)
        self._owner.took(worker.workload, worker.workload.pid)

    def tick(self, now: float) -> None:
        """What waits behind a call that takes long goes where it can run."""
        for worker in self._pythons.stalled(now):
            self.recall(worker)

    def recall(self, worker: Worker) -> None:
        """Have back what a worker did not receive. Its head may be among it, and the next one not: while the guard reads, the worker
        may, too. Then that one has begun in its stead."""
        head = worker.line[0] if worker.line else None
        self._pythons.recall(worker)
        if head is None or head.worker is worker:
            return
        self._give_back(head)
        if worker.line:
            now = host.boot()
            self._pythons.take_up(worker, now)
            self._began(worker.line[0], worker, now)
        else:
            self._pythons.rest(worker, host.boot())

    def _give_back(self, head: Call) -> None:
        """It seemed to have begun, and waits again."""
        self._leases.restart(head.name, host.boot(), None)
        self._owner.gave_back(head.name)

    # --- ends that are not answers -----------------------------------------------------------------------------------

    def withdraw(self, name: str, reason: Reason, now: float) -> bool:
        """End a call that was not begun; False if it is no such call (any more): then it runs, is over, or never was here."""
        call = self._pythons.calls.get(name)
        if call is None or call.begun:
            return False
        if call.worker is not None:
            worker = call.worker
            self.recall(worker)
            self.answered(worker)
            if call.worker is not None or name not in self._pythons.calls:
                return False
        self._pythons.withdraw(call)
        late = self._leases.remove(name, now)
        exited = _unbegun(call.request, Cause(reason.value), "")
        self._owner.ended_unbegun(replace(exited, late=late))
        return True

    def alone(self, workload: Workload, name: str) -> bool:
        """Before a signal: whether this attempt runs, and nothing is in line behind it."""
        worker = self._pythons.of(workload)
        if worker is None:
            return True
        if len(worker.line) > 1:
            self.recall(worker)
            self.answered(worker)
        return bool(worker.line) and worker.line[0].name == name

    def buried(self, worker: Worker, exited: Callable[[], Exited], now: float) -> None:
        """The worker is dead, and with it everything. `exited`: how its process ended, asked if its head did not answer."""
        self.answered(worker)  # it may have answered right before it died
        self._unwatch(worker.control.fileno())
        head = worker.line[0] if worker.line else None
        self._pythons.recall(worker)
        if head is not None and head.worker is None:
            if worker.warm and self._leases.reason(head.name) is None:
                self._give_back(head)  # it died before it received the call
            else:  # it never came to life, or it was ended for this call: the call is its cost
                head.pool.waiting.remove(head)
                worker.line.appendleft(head)
                head.worker = worker
        workload = worker.workload
        if head is not None and head.worker is worker:
            reason = self._leases.reason(head.name)
            if worker.answer is not None and reason is None:
                late = self._leases.remove(head.name, now)
                end = ended(workload, worker.answer, late=late, now_wall=host.wall())
            else:
                end = died(exited())
            self._pythons.lose(head)
            self._owner.concluded(workload, end)
        for call in list(worker.line):  # received before their turn: no worker of ours does that
            self._leases.remove(call.name, now)
            self._pythons.lose(call)
            message = "its worker died, and it cannot be told whether it had begun"
            self._owner.ended_unbegun(_unbegun(call.request, Cause.LOST, message))
        self._pythons.bury(worker)


def _unbegun(request: StartRequest, cause: Cause, message: str) -> Exited:
    """The end of an attempt without a beginning."""
    wall = host.wall()
    return Exited(request.key, cause, None, None, wall, wall, message=message)
