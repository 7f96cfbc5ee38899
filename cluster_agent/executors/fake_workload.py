"""Fake workloads, and the disk of the host they run on. Scripts in argv: `fake --seconds 1.5 --exit 0 --result text
--output text --ignore-term --artifact name --checkpoint 1`.

A process ends by itself after `seconds`, at TERM unless it ignores it, and at KILL. Its `Interval` tells when it really
lived, in true time, for the checkers of overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster_agent.core.model import ArtifactRef
from cluster_agent.executors.base import AttemptKey, Cause, Exited, Phase, StartRequest


@dataclass(slots=True)
class Interval:
    """When a process lived, in true time; `end` is None while it does."""

    key: AttemptKey
    start: float
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """What a fake workload does."""

    seconds: float = 0.0
    exit_code: int = 0
    result: bytes = b""
    output: bytes = b""
    ignore_term: bool = False
    cause: Cause = Cause.EXIT
    """How its end is classed if it ends by itself; RESULT and SPAWN have no exit code."""
    message: str = ""
    """Why it failed, in its own words."""
    artifacts: tuple[ArtifactRef, ...] = ()
    """What it has made, and stored, if it succeeds."""
    checkpoint: ArtifactRef | None = None
    """What it has saved, and stored, as soon as it runs."""

    @staticmethod
    def parse(argv: Sequence[str]) -> Script:
        """From `fake --seconds S --exit N --result TEXT --output TEXT --ignore-term --artifact NAME --checkpoint K`. Raises
        ValueError."""
        if not argv or argv[0] != "fake":
            raise ValueError(f"program {argv[0] if argv else ''!r} was not found: this executor runs only 'fake'")
        words, found, ignore_term = list(argv[1:]), {}, False
        while words:
            word = words.pop(0)
            if word == "--ignore-term":
                ignore_term = True
            elif word in ("--seconds", "--exit", "--result", "--output", "--artifact", "--checkpoint") and words:
                found[word] = words.pop(0)
            else:
                raise ValueError(f"fake workload: cannot read {word!r}")
        return Script(
            float(found.get("--seconds", "0")),
            int(found.get("--exit", "0")),
            found.get("--result", "").encode(),
            found.get("--output", "").encode(),
            ignore_term,
            artifacts=(_ref(found["--artifact"]),) if "--artifact" in found else (),
            checkpoint=_ref(f"checkpoint-{found['--checkpoint']}") if "--checkpoint" in found else None,
        )


def _ref(name: str) -> ArtifactRef:
    """Of content that is its own name; nothing stores it."""
    return ArtifactRef(name, len(name), hashlib.sha256(name.encode()).digest())


@dataclass(slots=True)
class Process:
    """A living fake process."""

    request: StartRequest
    script: Script
    pid: int
    start_wall: float
    ends_at: float
    interval: Interval
    phase: Phase = Phase.RUNNING
    ended: tuple[int | None, int | None] | None = None
    """(exit code, signal) once it is over, whether or not the guard has seen it."""
    confirm_stop: bool = False


@dataclass(slots=True)
class FakeDisk:
    """What survives the guard and the reboot."""

    started: dict[AttemptKey, tuple[int, float]] = field(default_factory=dict)
    exits: dict[AttemptKey, tuple[int, Exited]] = field(default_factory=dict)
    tombstones: set[AttemptKey] = field(default_factory=set)
    forgotten: set[AttemptKey] = field(default_factory=set)
    logs: dict[AttemptKey, bytes] = field(default_factory=dict)

    def knows(self, key: AttemptKey) -> bool:
        """Whether the key may never be started (again)."""
        return key in self.started or key in self.exits or key in self.tombstones or key in self.forgotten
