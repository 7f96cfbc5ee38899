"""What workloads write about themselves, outside of Baton: an append-only file for each cluster.

Theory. A line is written by one `write` with O_APPEND, so lines of many writers never mix and none is half there; a copy
lived at least from its first line to its last. Intervals are therefore too short and never too long: what the checkers
call an overlap was one. Times are of the cluster's boot clock (/proc/uptime, in hundredths, cut off), and are brought back
to this host's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.v1 import graph_pb2
from cluster_agent.executors.base import AttemptKey
from cluster_agent.guard import proctree
from control_plane.core import events as ev
from lab.checking.history import Ran, Written

TICK = 0.25
"""Seconds between two signs of life of a task."""

COARSE = 0.01
"""Seconds by which /proc/uptime may be late: starts are moved up by it. (What lived for less ends before it started, which no checker
minds.)"""

DECIDED = 0.02
"""Seconds by which a decision's stamp may be older than the report it decides on: ends are moved down by so much more. (Stamps are
taken at the beginning of a cycle.)"""

# Built-ins of the shell only, except for `sleep`: a workload must cost next to nothing.
_SCRIPT = """\
note() {{
    read up rest < /proc/uptime
    echo "$1 $BATON_RUN $BATON_TASK $BATON_FENCE $$ $up" >> "$EFFECTS/$BATON_CLUSTER.log"
}}
note start
i=0
while [ $i -lt {ticks} ]; do sleep {tick}; note tick; i=$((i + 1)); done
if [ "$BATON_ATTEMPT" -le {failures} ]; then note end; exit 1; fi
printf %s "$BATON_TASK" > "$BATON_RESULT"
note end
"""


def workload(directory: Path, seconds: float, failures: int) -> graph_pb2.ProcessTask:
    """A process that lives for about so long, and fails in its first attempts."""
    script = _SCRIPT.format(ticks=round(seconds / TICK), tick=TICK, failures=failures)
    return graph_pb2.ProcessTask(argv=["sh", "-c", script], env={"EFFECTS": str(directory)})


@dataclass(frozen=True, slots=True)
class Lived:
    """A copy, as `lab.checking.history.Life` wants it."""

    key: AttemptKey
    start: float
    end: float | None


class Effects:
    """Reads the files. `offsets`: cluster -> seconds that its clock is ahead; `zero`: this host's boot clock at the beginning."""

    def __init__(self, directory: Path, offsets: Mapping[str, int], zero: float) -> None:
        self.directory, self._offsets, self._zero = directory, offsets, zero
        directory.mkdir(parents=True, exist_ok=True)

    def ran(self, journal: Iterable[Written]) -> list[Ran]:
        """Every copy that has left a line, by the attempt that the journal knows it as; an unknown one has the nonce `unplaced`."""
        names, numbers, nonces = _names(journal)
        found: list[Ran] = []
        for cluster in self._offsets:
            for (run, task, fence, _pid), (first, last) in self._lives(cluster).items():
                uid, (incarnation, n) = names.get(run, run), map(int, fence.split("."))
                index = numbers.get((uid, task), -1)
                key = AttemptKey(uid, index, n, nonces.get((uid, index, n, incarnation), "unplaced"))
                found.append(Ran(cluster, Lived(key, first + COARSE, last - DECIDED)))
        return sorted(found, key=lambda each: each.interval.start)

    def _lives(self, cluster: str) -> dict[tuple[str, str, str, str], tuple[float, float]]:
        """(run name, task id, fence, own pid) -> first and last line. A pid that comes again under one fence is another life."""
        found: dict[tuple[str, str, str, str], tuple[float, float]] = {}
        path = self.directory / f"{cluster}.log"
        again = 0
        for line in path.read_text().splitlines() if path.exists() else ():
            word, run, task, fence, pid, up = line.split(" ")
            at, key = float(up) - self._offsets[cluster] - self._zero, (run, task, fence, pid)
            if word == "start" and key in found:
                again += 1
                found[run, task, fence, f"{pid}/{again}"] = found.pop(key)
            found[key] = (found[key][0] if key in found else at, at)
        return found

    def living(self) -> list[str]:
        """Workloads that run now, told from others by their environment."""
        mine = b"EFFECTS=" + os.fsencode(self.directory)
        found = []
        for pid in proctree.everything():
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # gone
            if mine in words:
                env = dict(os.fsdecode(word).partition("=")[::2] for word in words)
                found.append(f"{env['BATON_CLUSTER']}: {env['BATON_RUN']} {env['BATON_TASK']} {env['BATON_FENCE']}")
        return sorted(set(found))


def _names(
    journal: Iterable[Written],
) -> tuple[dict[str, str], dict[tuple[str, str], int], dict[tuple[str, int, int, int], str]]:
    """Name of a run -> its uid; (run uid, task id) -> index; (run uid, index, n, incarnation) -> nonce of the placement."""
    names: dict[str, str] = {}
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    nonces: dict[tuple[str, int, int, int], str] = {}
    for written in journal:
        event = written.event
        if isinstance(event, ev.RunCreated):
            names[f"namespaces/{event.namespace}/runs/{event.run_id}"] = event.run
        elif isinstance(event, ev.TasksAdded):
            for task in event.tasks:
                numbers[event.run, task.id] = counts.get(event.run, 0)
                counts[event.run] = counts.get(event.run, 0) + 1
        elif isinstance(event, ev.AttemptsPlaced):
            for index, n in zip(event.tasks, event.ns, strict=True):
                nonces[event.run, index, n, written.stamp.incarnation] = written.stamp.nonce
    return names, numbers, nonces
