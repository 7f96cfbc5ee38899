"""Artifacts and checkpoints of a run: which are known, and by whose word (PROTOCOL F1, F2, J7; DESIGN 10).

Theory: content lies in an object store, under a path that names the attempt; the journal holds only refs. An artifact is
published by the batch that accepts its attempt's success, so it is seen exactly if the result is (F2). A checkpoint is committed
while its attempt is live, and is what the task's next attempt starts from, on whatever cluster and whatever made the earlier one
end. Both are kept with the attempt and cluster that made them: the attempt itself may be forgotten (`run.KEPT_ATTEMPTS`).

Few runs have any of this, so a run has `Files` from its first ref on, and nothing before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.core.model import ArtifactRef, AttemptId

RESULT = "result"
"""The artifact that is its task's result, for results over the inline limit."""

CHECKPOINT = "checkpoint-"
"""Checkpoints of an attempt are named by this and a number from 1, rising."""

MAX_DIGITS = 9
"""Of that number: one a second for thirty years. More would be an attempt to fill the journal."""

NAME_BYTES = 128
"""Characters of a name. It becomes a part of an object's key, of which stores take some 1000 bytes in all."""

ATTEMPT_ARTIFACTS = 64
"""Artifacts of one attempt. They ride in its report and in the journal; a folder of thousands is better one archive."""

RUN_ARTIFACTS = 10_000
"""Published artifacts of a run. One task may depend on all others, then its dispatch names them all in one message: at most
3.8 MB of the 48 MiB that agents receive, most of which is for inline results (`inline.RUN_RESULTS_LIMIT`). Ten times as many would
need dispatches in pieces, less would forbid wide graphs of files."""

DIGEST_BYTES = 32
"""Of a sha-256."""

NOTED_EVERY = 10.0
"""Seconds between run events that tell of later checkpoints of attempts. Without it a task that saves twice a second would push
everything else out of the ring of kept events in half an hour; `Attempt.checkpoint` always shows the newest."""

_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_REST = _FIRST | frozenset("._-")


def name_problem(name: str) -> str | None:
    """What is wrong with an artifact's name; None if nothing is. The rule of `baton.artifacts`, which cores may not import."""
    if not name or len(name) > NAME_BYTES or name[0] not in _FIRST or not _REST.issuperset(name):
        shown = name[:NAME_BYTES]
        return f"{shown!r}: use 1 to {NAME_BYTES} letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if checkpoint_number(name):
        return f"{name!r} is the name of a checkpoint"
    return None


def checkpoint_number(name: str) -> int:
    """K of `checkpoint-K`; 0 if that is not what the name is."""
    digits = name.removeprefix(CHECKPOINT)
    if digits == name or not 0 < len(digits) <= MAX_DIGITS or not digits.isascii() or not digits.isdigit():
        return 0
    return int(digits) if digits[0] != "0" else 0


@dataclass(frozen=True, slots=True)
class Made:
    """What one attempt made; `cluster` is a uid."""

    attempt: AttemptId
    cluster: str
    refs: tuple[ArtifactRef, ...]


@dataclass(slots=True)
class Carried:
    """What an attempt was given at its placement, and what it gave since."""

    resumed: str = ""
    """`{n}/{name}` of the checkpoint it starts from."""
    saved: int = 0
    """K of its last committed checkpoint."""


class Files:
    """The refs of one run. Changed by `apply` only."""

    __slots__ = ("carried", "checkpoints", "noted", "published", "total")

    def __init__(self) -> None:
        self.published: dict[int, Made] = {}
        """Task -> what its accepted attempt made."""
        self.total = 0
        """Published refs of all tasks."""
        self.checkpoints: dict[int, Made] = {}
        """Task that is not final -> its last committed checkpoint."""
        self.carried: dict[tuple[int, int], Carried] = {}
        """(task, n) of kept attempts that were given or gave a checkpoint."""
        self.noted = 0.0
        """Wall time of the last run event about checkpoints."""

    def publish(self, attempt: AttemptId, cluster: str, ref: ArtifactRef) -> None:
        """One more artifact of an attempt whose success is accepted with it."""
        before = self.published.get(attempt.task)
        self.published[attempt.task] = Made(attempt, cluster, (*before.refs, ref) if before else (ref,))
        self.total += 1

    def commit(self, attempt: AttemptId, cluster: str, ref: ArtifactRef, wall: float) -> bool:
        """A live attempt's checkpoint takes the place of the task's earlier one. Whether a watcher is to be told."""
        self.checkpoints[attempt.task] = Made(attempt, cluster, (ref,))
        carried = self.carried.setdefault((attempt.task, attempt.n), Carried())
        tell = not carried.saved or wall >= self.noted + NOTED_EVERY
        carried.saved = checkpoint_number(ref.name)
        return tell

    def place(self, task: int, n: int) -> str:
        """A new attempt of the task starts; the words that say from what, empty for nothing."""
        before = self.checkpoints.get(task)
        if before is None:
            return ""
        self.carried[task, n] = Carried(f"{before.attempt.n}/{before.refs[0].name}")
        return f"resumes from {before.refs[0].name} of attempt {before.attempt.n}"

    def saved(self, attempt: AttemptId) -> int:
        """K of the attempt's last committed checkpoint, 0 if it has none."""
        carried = self.carried.get((attempt.task, attempt.n))
        return carried.saved if carried else 0

    def told(self, attempt: AttemptId) -> tuple[str, str]:
        """(last checkpoint, resumed from) of an attempt, as `baton.v1.Attempt` says it."""
        carried = self.carried.get((attempt.task, attempt.n))
        if carried is None:
            return "", ""
        return (f"{CHECKPOINT}{carried.saved}" if carried.saved else ""), carried.resumed

    def start_from(self, attempt: AttemptId) -> Made | None:
        """The checkpoint an attempt's dispatch carries: the last committed one, if an earlier attempt made it (J7)."""
        last = self.checkpoints.get(attempt.task)
        return last if last is not None and last.attempt.n < attempt.n else None

    def given(self, task: int, parents: Iterable[int]) -> bool:
        """Whether a task's next attempt starts from stored content: a checkpoint of its own, or artifacts of its parents."""
        return task in self.checkpoints or not self.published.keys().isdisjoint(parents)

    def forget(self, task: int, n: int) -> None:
        """An attempt is no longer kept."""
        self.carried.pop((task, n), None)
