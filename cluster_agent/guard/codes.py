"""What calls share on disk: packed code by its hash, whole or not at all, kept for a day after its last use; environments by their
requirements, which the workers make (python_environment.py)."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Container
from pathlib import Path

from cluster_agent.executors.base import PythonCall
from cluster_agent.guard import host
from cluster_agent.guard.places import Places

CODE_SECONDS = 86_400.0
"""Unused packed code stays for a day; the agent sends it again every hour (executors.process.CODE_SECONDS)."""

SURE_SECONDS = 60.0
"""An archive that was seen is looked for again after so long, not at each call: only `sweep` deletes one, and none that was used
within a day."""


class Codes:
    """A folder of `{sha256}.zip` and what workers unpacked, and one of virtual environments."""

    def __init__(self, directory: Path, places: Places) -> None:
        self._directory, self._venvs, self._places = directory / "code", directory / "venvs", places
        self._seen: dict[str, float] = {}
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def keep(self, sha256: str, data: bytes) -> None:
        """Store packed code under its hash. Raises OSError."""
        path = self.archive(sha256)
        if path.exists():
            os.utime(path)
            return
        draft = path.with_suffix(".draft")
        draft.write_bytes(data)
        draft.rename(path)

    def has(self, sha256: str) -> bool:
        """Whether it arrived."""
        now = host.boot()
        if now - self._seen.get(sha256, -SURE_SECONDS) < SURE_SECONDS:
            return True
        if not self.archive(sha256).exists():
            return False
        self._seen[sha256] = now
        return True

    def sweep(self, used: Container[str]) -> None:
        """Packed code nobody used for long goes."""
        self._seen.clear()
        for entry in os.scandir(self._directory):
            sha256 = entry.name.partition(".")[0]
            if sha256 not in used and host.wall() - entry.stat().st_mtime > CODE_SECONDS:
                self._places.throw_away(Path(entry.path))  # an archive, its folder, or a draft of it

    def archive(self, sha256: str) -> Path:
        """Where it lies."""
        return self._directory / f"{sha256}.zip"

    def folder(self, sha256: str) -> Path:
        """Where it is unpacked."""
        return self._directory / sha256

    def plan(self, call: PythonCall) -> dict[str, object]:
        """What a worker needs to know to be the environment of a call."""
        words = "\n".join((sys.version, *sorted(call.requirements)))
        return {
            "code": str(self.archive(call.code)) if call.code else "",
            "code_dir": str(self.folder(call.code)) if call.code else "",
            "requirements": list(call.requirements),
            "venvs": str(self._venvs),
            "venv": str(self._venvs / hashlib.sha256(words.encode()).hexdigest()[:32]),
            "packages": str(Path(__file__).resolve().parents[2]),
        }
