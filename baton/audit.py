"""What a run's recorded attempts prove about the promise: one owner at a time, one accepted result, in time.

Theory. A journal knows the order of decisions for certain and the times of work only as far as somebody reported them. So each
hand-over of a task, from one attempt to the next, is judged by *evidence* and never by comparing clocks of two machines:

- the earlier one ended by its own report, was rejected, or is known dead (`EVIDENCE_REPORTED`): there was no overlap;
- the time of its guard had passed (`EVIDENCE_TIMED`): there was none while the bounds of F5 held, and that is what is said;
- nobody knows (`EVIDENCE_NONE`), or it still lives: an overlap is possible, and must have been declared by the placement of
  the later one, that is before it started (F6, F7). If it was not, the promise is broken.

The order itself is that of the run's numbered events, as far as they are kept. A fence is (incarnation, n) and rises with every
placement (F1). A placement that is no hedge empties its task's live set (F2), so a result accepted from an attempt older than that
placement was stale: the fence in force was another's. Reported times are compared only where one clock made both; where they
contradict the order they prove nothing, and that is said.

A promise on time holds while the store and a replica live, which a run's history does not show: a late end is named, as unproven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from google.protobuf.timestamp_pb2 import Timestamp

from baton.v1 import run_pb2

DEADLINE_BOUND = 30.0
"""Seconds after a deadline within which a run is final (DESIGN, promise 3): an expired lease, a takeover with its recovery, an
election, clocks. Smaller: a takeover at the deadline is called late; larger: delays nobody understands go unnamed."""

CLOCK_ERROR = 1.0
"""Seconds by which one host's reported times may disagree with themselves: a wall clock that NTP slews. Smaller: noise is told;
larger: a stepped clock is not noticed."""

SKEW = 5.0
"""Seconds that two replicas' wall clocks may differ before a placement after the deadline is called one."""

FINDINGS = 1_000
"""Findings kept of one audit; more are only counted. A run of a million tasks may break every promise a million times."""


class Verdict(Enum):
    """What is known of a promise, worst last."""

    PROVEN = "proven"
    DECLARED = "declared"
    """Copies may have run side by side, and the history said so before the later one started: kept, as far as promised."""
    UNPROVEN = "unproven"
    """Nothing contradicts the promise, and the evidence does not carry it."""
    VIOLATED = "violated"

    @property
    def weight(self) -> int:
        """Its place among the verdicts: the worst of many is the verdict of all."""
        return list(Verdict).index(self)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not simply proven. `task` is an id, empty for the run itself; `rule` is of PROTOCOL.md."""

    verdict: Verdict
    rule: str
    task: str
    text: str


@dataclass(slots=True)
class Audit:
    """What was looked at, and what was found. Counts are of everything; `findings` are the first `FINDINGS`."""

    run: str
    final: bool
    tasks: int = 0
    attempts: int = 0
    accepted: int = 0
    refused: int = 0
    """Stale results that came and were not accepted."""
    handovers: Counter[str] = field(default_factory=Counter)
    """How it is known that the earlier attempt was over when the later one was placed -> hand-overs."""
    counts: Counter[Verdict] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of all; of a run that goes on it is a verdict so far."""
        return max(self.counts, key=lambda each: each.weight, default=Verdict.PROVEN)

    def add(self, finding: Finding) -> None:
        """Take a finding in."""
        self.counts[finding.verdict] += 1
        if len(self.findings) < FINDINGS:
            self.findings.append(finding)


REPORT, REJECTION, TIMER, NOBODY = "reported", "rejected", "timed", "declared"
"""Keys of `Audit.handovers`."""

LIVE = frozenset({run_pb2.ATTEMPT_STATE_PLACED, run_pb2.ATTEMPT_STATE_RUNNING})
FINAL_TASK = run_pb2.TASK_STATE_SUCCEEDED
FINAL_RUN = run_pb2.RUN_STATE_SUCCEEDED
"""The first final states; all greater ones are final too."""


class Order:
    """What the numbered events of a run add to its tasks: what was before a placement. Without events it knows nothing."""

    def __init__(self, events: Iterable[run_pb2.RunEvent] = ()) -> None:
        self._numbers: dict[str, dict[tuple[int, int], int]] = {"placed": {}, "left": {}, "told": {}}
        for event in events:
            for meaning in _MEANINGS.get(event.kind, ()):
                to = self._numbers[meaning]
                for change in event.changes:
                    to.setdefault((change.index, change.attempt), event.number)

    def knows(self, task: int, n: int) -> bool:
        """Whether the placement of attempt n is among the events."""
        return (task, n) in self._numbers["placed"]

    def left_before(self, task: int, earlier: int, later: int) -> bool:
        """Whether attempt `earlier` was out of the live set when `later`, which is known, was placed (F2)."""
        return self._before("left", task, earlier, later)

    def told_before(self, task: int, earlier: int, later: int) -> bool:
        """Whether it was told by then that attempt `earlier` is over for good (F8). False if `later` is not known."""
        return self.knows(task, later) and self._before("told", task, earlier, later)

    def _before(self, meaning: str, task: int, earlier: int, later: int) -> bool:
        placed = self._numbers["placed"][task, later]
        return self._numbers[meaning].get((task, earlier), placed) < placed


_MEANINGS = {
    "placed": ("placed",),
    "hedged": ("placed",),
    "finished": ("left", "told"),
    "rejected": ("left", "told"),
    "lost": ("left",),
    "stopped": ("left", "told"),
    "refused": ("told",),
}
"""Kind of an event -> what it says of its attempts."""


def audit(
    run: run_pb2.Run, tasks: Iterable[run_pb2.TaskStatus], now: float, events: Iterable[run_pb2.RunEvent] = ()
) -> Audit:
    """Judge a run by its tasks (all of them, in any pages) and, as far as they are kept, its events. `now` is wall time, for
    a run that is not final."""
    found = Audit(run.name, run.state >= FINAL_RUN)
    order = Order(events)
    unordered = 0
    for task in tasks:
        found.tasks += 1
        found.attempts += len(task.attempts)
        found.accepted += task.accepted_results
        found.refused += sum(attempt.refused_results for attempt in task.attempts)
        for finding in _judge_task(task, _seconds(run.deadline_time), order, found.handovers):
            found.add(finding)
        unordered += sum(not order.knows(task.index, attempt.n) for attempt in task.attempts[1:])
    if unordered:
        text = f"events of {unordered} hand-overs are not kept: that the earlier attempts had left first rests on their states"
        found.add(Finding(Verdict.UNPROVEN, "F2", "", text))
    for finding in _judge_run(run, found, now):
        found.add(finding)
    return found


def _judge_task(task: run_pb2.TaskStatus, deadline: float, order: Order, handovers: Counter[str]) -> Iterator[Finding]:
    """The findings of one task. `deadline`: wall seconds, 0 for none."""
    yield from _fences(task)
    yield from _results(task)
    for place, attempt in enumerate(task.attempts):
        yield from _second_copy(task, task.attempts[:place], attempt, order, handovers)
        if deadline and _seconds(attempt.place_time) > deadline + SKEW:
            late = _seconds(attempt.place_time) - deadline
            text = f"attempt {attempt.n} was placed {late:.1f} s after the run's deadline"
            yield Finding(Verdict.VIOLATED, "D1", task.id, text)


def _fences(task: run_pb2.TaskStatus) -> Iterator[Finding]:
    """F1: they rise strictly."""
    for before, after in pairwise(task.attempts):
        if _fence(after) <= _fence(before):
            text = f"attempt {after.n} has the fence {after.fence}, placed after {before.fence}"
            yield Finding(Verdict.VIOLATED, "F1", task.id, text)


def _fence(attempt: run_pb2.Attempt) -> tuple[int, ...]:
    return tuple(int(part) for part in attempt.fence.split(".") if part.isdecimal())


def _results(task: run_pb2.TaskStatus) -> Iterator[Finding]:
    """F2: one accepted result, from an attempt whose fence was in force."""
    winners = [attempt for attempt in task.attempts if attempt.state == run_pb2.ATTEMPT_STATE_SUCCEEDED]
    succeeded = task.state == FINAL_TASK
    if task.accepted_results > 1 or len(winners) > 1:
        count = max(task.accepted_results, len(winners))
        yield Finding(Verdict.VIOLATED, "F2", task.id, f"{count} results were accepted")
        return
    if len(winners) != int(succeeded) or task.accepted_results != int(succeeded):
        text = (
            f"the task is {_word(run_pb2.TaskState.Name, task.state)} with {task.accepted_results} accepted results and "
            f"{len(winners)} successful attempts"
        )
        yield Finding(Verdict.VIOLATED, "F2", task.id, text)
    for winner in winners:
        newer = [each for each in task.attempts if _fence(each) > _fence(winner) and not each.hedge]
        if newer:
            text = f"the result of fence {winner.fence} was accepted, but fence {newer[0].fence} was in force"
            yield Finding(Verdict.VIOLATED, "F2", task.id, text)


def _second_copy(
    task: run_pb2.TaskStatus,
    earlier: Sequence[run_pb2.Attempt],
    attempt: run_pb2.Attempt,
    order: Order,
    handovers: Counter[str],
) -> Iterator[Finding]:
    """F5, F6: whatever was placed before this attempt is over, or it was said that it may not be."""
    if not earlier:
        return
    known = order.knows(task.index, attempt.n)
    beside = [
        each
        for each in earlier
        if each.state in LIVE or (known and not order.left_before(task.index, each.n, attempt.n))
    ]
    unseen = [
        each
        for each in earlier
        if _how_over(each) == NOBODY and not order.told_before(task.index, each.n, attempt.n) and each not in beside
    ]
    handovers[NOBODY if attempt.hedge or earlier[-1] in (*beside, *unseen) else _how_over(earlier[-1])] += 1
    for other in earlier:
        yield from _clocks(task, other, attempt)
    names = ", ".join(str(each.n) for each in (*beside, *unseen))
    if attempt.hedge:
        text = f"attempt {attempt.n} is a hedge: it may have run beside attempt {names or earlier[-1].n}"
        yield Finding(Verdict.DECLARED, "F7", task.id, text)
    elif beside:
        text = f"attempt {attempt.n} was placed while attempt {names} was live, and it is no hedge"
        yield Finding(Verdict.VIOLATED, "F2", task.id, text)
    elif unseen and attempt.overlap_possible:
        text = f"attempt {attempt.n} was placed with overlap_possible: nobody knew whether attempt {names} was over"
        yield Finding(Verdict.DECLARED, "F6", task.id, text)
    elif unseen and earlier[-1] not in unseen and not known:
        text = (
            f"attempt {attempt.n} was placed with no overlap declared; whether the end of attempt {names}, lost without evidence, had "
            "been told by then is in events that are not kept any more"
        )
        yield Finding(Verdict.UNPROVEN, "F6", task.id, text)
    elif unseen:
        text = f"attempt {attempt.n} was placed with no evidence of the end of attempt {names}, and no overlap was declared"
        yield Finding(Verdict.VIOLATED, "F6", task.id, text)


def _how_over(attempt: run_pb2.Attempt) -> str:
    """By what an attempt is known to be over."""
    if attempt.state in LIVE:
        return NOBODY
    if attempt.state == run_pb2.ATTEMPT_STATE_REJECTED:
        return REJECTION
    if attempt.evidence == run_pb2.EVIDENCE_TIMED:
        return TIMER
    return NOBODY if attempt.evidence == run_pb2.EVIDENCE_NONE else REPORT


def _clocks(task: run_pb2.TaskStatus, before: run_pb2.Attempt, after: run_pb2.Attempt) -> Iterator[Finding]:
    """Reported times of one host that contradict the order: no violation, for the clock may have been set; no proof either."""
    ended, started = _seconds(before.finish_time), _seconds(after.start_time)
    same = before.cluster == after.cluster and _how_over(before) == REPORT and not after.hedge
    if same and ended and started and ended > started + CLOCK_ERROR:
        text = (
            f"by the clock of {after.cluster} attempt {after.n} began {ended - started:.1f} s before attempt {before.n} ended, "
            "which was reported before the placement: was that clock set?"
        )
        yield Finding(Verdict.UNPROVEN, "F6", task.id, text)


def _judge_run(run: run_pb2.Run, found: Audit, now: float) -> Iterator[Finding]:
    """The run as a whole."""
    if found.final and found.tasks != run.task_count:
        text = f"the run has {run.task_count} tasks, and {found.tasks} are recorded"
        yield Finding(Verdict.UNPROVEN, "J10", "", text)
    elif found.final and found.accepted != run.accepted_results:
        text = f"the run counts {run.accepted_results} accepted results, its tasks {found.accepted}"
        yield Finding(Verdict.VIOLATED, "F2", "", text)
    deadline = _seconds(run.deadline_time)
    end = _seconds(run.finish_time) if found.final else now
    if deadline and end > deadline + DEADLINE_BOUND:
        what = "became final" if found.final else "is not final"
        text = f"it {what} {end - deadline:.1f} s after its deadline: kept only if the store or all replicas were down"
        yield Finding(Verdict.UNPROVEN, "D1", "", text)


def _seconds(stamp: Timestamp) -> float:
    return stamp.seconds + stamp.nanos / 1e9


def _word(name: object, value: int) -> str:
    try:
        return str(name(value)).rpartition("STATE_")[2]  # type: ignore[operator]
    except ValueError:
        return str(value)
