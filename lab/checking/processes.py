"""What processes did in true time, against what the journal allowed (F4, J7, I9, I10, I11, I12; reliability.md 2).

Theory. A process is known by its attempt (run, task, n, nonce) and has a beginning and an end in true time, written down by the
host and not by anything under test. So each promise about running work is a comparison of intervals with moments of the journal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from control_plane.core.model import AttemptId
from lab.checking.fold import SUCCEEDED, Fold
from lab.checking.history import Key, Record, Violation


def spawned_once(record: Record, fold: Fold) -> Iterator[Violation]:
    """F4: an attempt has at most one process, ever, anywhere."""
    del fold
    seen: dict[AttemptId, str] = {}
    for ran in record.ran:
        key = attempt_id(ran.interval.key)
        if key in seen:
            text = f"{key} was spawned on {seen[key]} and again on {ran.cluster}"
            yield Violation("F4 one spawn", ran.interval.start, text)
        seen[key] = ran.cluster


def placed_first(record: Record, fold: Fold) -> Iterator[Violation]:
    """J7: an effect leaves only after the commit of its cause: no process before its placement is in the journal."""
    for ran in record.ran:
        key = attempt_id(ran.interval.key)
        member = fold.placements.get(key)
        if member is None or member.placed > ran.interval.start:
            yield Violation(
                "J7 effects after commit", ran.interval.start, f"{key} ran before it was placed in the journal"
            )


def no_overlap(record: Record, fold: Fold) -> Iterator[Violation]:
    """I9: two processes of one task never live at one time, unless that was said before the second started."""
    by_task: dict[tuple[str, int], list[tuple[float, float, AttemptId, str]]] = defaultdict(list)
    for ran in record.ran:
        key = attempt_id(ran.interval.key)
        end = record.ended if ran.interval.end is None else ran.interval.end
        by_task[key.run, key.task].append((ran.interval.start, end, key, ran.cluster))
    for lives in by_task.values():
        lives.sort()
        for place, (start, _, key, cluster) in enumerate(lives):
            for before, end, other, at in lives[:place]:
                if end <= start or other == key or _declared(fold, key, other):
                    continue
                text = (
                    f"{other} ran on {at} from {before:.3f} to {end:.3f}, {key} on {cluster} from {start:.3f}, "
                    "and no overlap was declared"
                )
                yield Violation("I9 no overlap", start, text)


def results_have_a_source(record: Record, fold: Fold) -> Iterator[Violation]:
    """I10: only the attempt itself can have its success accepted: a process of that very fence and nonce ran to its end before."""
    lives = {attempt_id(ran.interval.key): ran.interval for ran in record.ran}
    for id_, member in fold.attempts.items():
        if member.dead_why != SUCCEEDED or not lives:
            continue
        life = lives.get(id_)
        if life is None:
            yield Violation("I10 fenced effects", member.dead_at, f"a success of {id_} was accepted, which never ran")
        elif life.end is None or life.end > member.dead_at:
            text = f"a success of {id_} was accepted while its process lived: it was another's"
            yield Violation("I10 fenced effects", member.dead_at, text)


def dead_is_dead(record: Record, fold: Fold) -> Iterator[Violation]:
    """I11, F4, F6, F8: once the journal says for certain that an attempt is over (its own end, a rejection, a confirmed stop, evidence
    REPORTED), no process of it lives, and none ever starts."""
    for ran in record.ran:
        member = fold.attempts.get(attempt_id(ran.interval.key))
        if member is None or member.dead_at < 0:
            continue
        end = record.ended if ran.interval.end is None else ran.interval.end
        if end > member.dead_at:
            text = (
                f"{member.id} is said to be over at {member.dead_at:.3f} ({member.dead_why}), "
                f"its process on {ran.cluster} lived from {ran.interval.start:.3f} to {end:.3f}"
            )
            yield Violation("I11 stops are true", max(ran.interval.start, member.dead_at), text)


def within_capacity(record: Record, fold: Fold) -> Iterator[Violation]:
    """I12: a cluster never runs more than fits on it."""
    del fold
    moments: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for ran in record.ran:
        if ran.cluster in record.capacity:
            moments[ran.cluster].append((ran.interval.start, 1))
            if ran.interval.end is not None:
                moments[ran.cluster].append((ran.interval.end, -1))
    for cluster, changes in moments.items():
        running = 0
        for at, change in sorted(changes):
            running += change
            if running > record.capacity[cluster]:
                text = f"{cluster} runs {running} processes and has room for {record.capacity[cluster]}"
                yield Violation("I12 capacity", at, text)
                break


def released(record: Record, fold: Fold) -> Iterator[Violation]:
    """I12, I11: in the end every reservation was released, each outstanding stop confirmed."""
    if not record.quiet:
        return
    for member in fold.stopping.values():
        yield Violation(
            "I12 released once", record.ended, f"the stop of {member.id} on {member.cluster} was never confirmed"
        )
    for run in fold.runs.values():
        for task in run.tasks if run.finished_at >= 0 else ():
            for member in task.live.values():
                yield Violation(
                    "I12 released once", record.ended, f"{member.id} still holds its place on {member.cluster}"
                )


def _declared(fold: Fold, *keys: AttemptId) -> bool:
    """The later one was placed as a hedge, or with `overlap_possible`. (A placement comes before its process: J7.)"""
    members = [fold.placements[key] for key in keys if key in fold.placements]
    last = max(members, key=lambda member: (member.placed, member.id.n), default=None)
    return last is not None and (last.overlap or last.hedge)


def attempt_id(key: Key) -> AttemptId:
    """The control plane's name of an attempt that its agent names `key`."""
    return AttemptId(key.run_uid, key.task, key.n, key.nonce)
