"""Where files of attempts lie on the agent's disk, and what may be an artifact. No waiting here: callers take threads.

The guard's tree (guard/places.py) holds what workloads write: `work/{key}/.baton-artifacts/` and `checkpoints/{run}.{task}/latest`.
The agent's own tree beside it:

inputs/{key}/{task}/{name}   artifacts of parents, copies made for one attempt; gone with it
kept/{key}.json              what of an attempt is stored already: after a restart it is not stored again
cache/{digest}               content by its hash (cache.py)

What a workload left is judged by what is there when it is over, with nothing followed: symbolic links, folders and odd files are
refused by name, and that is the application's fault.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from baton.artifacts import (
    MAX_ARTIFACT_BYTES,
    MAX_ARTIFACTS,
    MAX_RESULT_BYTES,
    RESULT,
    checkpoint_number,
    name_problem,
)
from baton.names import quote
from cluster_agent.core.model import ArtifactRef, ArtifactSource
from cluster_agent.executors.base import AttemptKey
from cluster_agent.guard.places import ARTIFACTS

LATEST = "latest"
"""The file in a checkpoint folder that workloads rename a complete one onto."""

Stamp = tuple[int, int, int]
"""(inode, time of change in ns, size) of a file: another one after each rename."""


class Unfit(Exception):
    """What a workload left cannot be its artifacts; the text says why and what to do."""


@dataclass(slots=True)
class Kept:
    """What is stored of an attempt already."""

    number: int = 0
    """Of its last stored checkpoint."""
    stamp: Stamp = (0, 0, 0)
    """Of the file it was, or of the one that was there when the attempt began."""
    checkpoint: ArtifactRef | None = None
    artifacts: tuple[ArtifactRef, ...] = ()


class Shelf:
    """The two trees. Raises OSError where the disk does not serve."""

    def __init__(self, guard: Path, own: Path) -> None:
        """`guard`: the guard's directory. `own`: the agent's for this; made if it is not there."""
        self._work, self._checkpoints, self._code = guard / "work", guard / "checkpoints", guard / "python" / "code"
        self._inputs, self._kept, self.cache = own / "inputs", own / "kept", own / "cache"
        for path in (guard, guard / "python", self._code, own, self._inputs, self._kept, self.cache):
            path.mkdir(mode=0o700, exist_ok=True)  # each by itself: `parents` would leave some open to all

    # --- what a workload made -----------------------------------------------------------------------------------------

    def made(self, key: AttemptKey, *, has_result: bool) -> list[str]:
        """Names of its artifacts, in order. `has_result`: it has an inline result too. Raises Unfit."""
        folder = self._artifacts(key)
        try:
            with os.scandir(folder) as entries:
                found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        finally:
            os.close(folder)
        if len(found) > MAX_ARTIFACTS:
            words = f"it left {len(found)} files in $BATON_ARTIFACTS_DIR, over the limit of {MAX_ARTIFACTS}"
            raise Unfit(f"{words}: pack them into fewer files")
        for name, about in sorted(found.items()):
            problem = _problem(name, about)
            if problem:
                raise Unfit(problem)
        if has_result and RESULT in found:
            raise Unfit("its result came twice: inline, and as the artifact 'result'; give one of them")
        return sorted(found)

    def open_made(self, key: AttemptKey, name: str) -> BinaryIO:
        """One of its artifacts, nothing being followed. Raises Unfit if the workload has closed it to us."""
        folder = self._artifacts(key)
        try:
            return _regular(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder))
        except PermissionError:
            raise Unfit(f"artifact {quote(name)} may not be read: leave it readable for its owner") from None
        finally:
            os.close(folder)

    def _artifacts(self, key: AttemptKey) -> int:
        """A descriptor of the folder. Raises Unfit if it is something else by now."""
        path = self._work / key.text() / ARTIFACTS
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (NotADirectoryError, PermissionError):
            raise Unfit("$BATON_ARTIFACTS_DIR is no folder any more that can be read: write files into it") from None

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def latest(self) -> dict[tuple[str, int], Stamp]:
        """The tasks (run uid, index) that have a checkpoint here, and its stamp."""
        found: dict[tuple[str, int], Stamp] = {}
        with os.scandir(self._checkpoints) as entries:
            for entry in entries:
                stamp = _stamp(os.path.join(entry.path, LATEST))
                run, _, task = entry.name.partition(".")
                if stamp is not None and task.isdecimal():
                    found[run, int(task)] = stamp
        return found

    def stamp(self, key: AttemptKey) -> Stamp | None:
        """Of the task's checkpoint here; None if there is none."""
        return _stamp(str(self._checkpoint(key) / LATEST))

    def open_latest(self, key: AttemptKey) -> tuple[BinaryIO, Stamp]:
        """The task's checkpoint: what is opened stays the same, whatever is renamed onto its name."""
        path = self._checkpoint(key) / LATEST
        file = _regular(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        about = os.fstat(file.fileno())
        return file, (about.st_ino, about.st_mtime_ns, about.st_size)

    def draft_checkpoint(self, key: AttemptKey) -> BinaryIO:
        """An empty file to become the task's checkpoint (`place_checkpoint`)."""
        folder = self._checkpoint(key)
        folder.mkdir(mode=0o700, exist_ok=True)
        draft = folder / f".{LATEST}.{key.n}"
        draft.unlink(missing_ok=True)  # the folder is a workload's: a link or a pipe may wait under that name
        return open(draft, "xb")

    def place_checkpoint(self, key: AttemptKey, *, keep: bool) -> Stamp:
        """Let the draft be the checkpoint, or go if not `keep`; the stamp of what is there then."""
        folder = self._checkpoint(key)
        draft = folder / f".{LATEST}.{key.n}"
        if keep:
            if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():
                shutil.rmtree(folder / LATEST)
            draft.replace(folder / LATEST)
        else:
            draft.unlink(missing_ok=True)
        return self.stamp(key) or (0, 0, 0)

    def _checkpoint(self, key: AttemptKey) -> Path:
        return self._checkpoints / f"{key.run_uid}.{key.task}"

    # --- what it is given ---------------------------------------------------------------------------------------------

    def inputs(self, key: AttemptKey) -> Path:
        """Where the artifacts of its parents lie."""
        return self._inputs / key.text()

    def places(self, key: AttemptKey, sources: Iterable[ArtifactSource]) -> list[Path]:
        """Where each of them is to lie; their folders are made."""
        places = [self._inputs / key.text() / source.task_id / source.ref.name for source in sources]
        for folder in {place.parent for place in places}:
            folder.mkdir(parents=True, exist_ok=True)
        return places

    def has_code(self, sha256: str) -> bool:
        """Whether the guard has that archive; if so, it is kept for another day."""
        try:
            os.utime(self._code / f"{sha256}.zip")
        except FileNotFoundError:
            return False
        return True

    def draft_code(self, sha256: str) -> BinaryIO:
        """An empty file to become the archive (`place_code`)."""
        return open(self._code / f"{sha256}.fetched", "wb")

    def place_code(self, sha256: str) -> None:
        """Let the draft be the archive."""
        (self._code / f"{sha256}.fetched").replace(self._code / f"{sha256}.zip")

    # --- what is known to be stored -----------------------------------------------------------------------------------

    def keep(self, key: AttemptKey, kept: Kept) -> None:
        """Write it down, whole or not at all."""
        said = {
            "number": kept.number,
            "stamp": kept.stamp,
            "checkpoint": _said(kept.checkpoint) if kept.checkpoint else None,
            "artifacts": [_said(ref) for ref in kept.artifacts],
        }
        path = self._kept / f"{key.text()}.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(said))
        draft.replace(path)

    def kept(self, key: AttemptKey) -> Kept | None:
        """What was written down; None if nothing was, or nothing that can be read."""
        try:
            said = json.loads((self._kept / f"{key.text()}.json").read_text())
            checkpoint = _heard(said["checkpoint"]) if said["checkpoint"] else None
            inode, changed, size = said["stamp"]
            stamp = (int(inode), int(changed), int(size))
            return Kept(said["number"], stamp, checkpoint, tuple(map(_heard, said["artifacts"])))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def forget(self, keys: Iterable[AttemptKey]) -> None:
        """The attempts' own folders and notes go."""
        for key in keys:
            self.drop_inputs(key)
            with suppress(FileNotFoundError):
                (self._kept / f"{key.text()}.json").unlink()

    def drop_inputs(self, key: AttemptKey) -> None:
        """What it was given goes."""
        shutil.rmtree(self._inputs / key.text(), ignore_errors=True)

    def known(self) -> set[AttemptKey]:
        """Attempts that have something in the agent's own tree."""
        return set(_keys([*os.listdir(self._inputs), *(name.rpartition(".")[0] for name in os.listdir(self._kept))]))


def _keys(names: Iterable[str]) -> Iterator[AttemptKey]:
    for name in names:
        with suppress(ValueError):
            yield AttemptKey.parse(name)


def _problem(name: str, about: os.stat_result) -> str:
    """Why a file cannot be an artifact; nothing if it can."""
    shown = quote(name)
    if stat.S_ISLNK(about.st_mode):
        return f"artifact {shown} is a symbolic link, which is not followed: copy the file to $BATON_ARTIFACTS_DIR"
    if stat.S_ISDIR(about.st_mode):
        return f"{shown} in $BATON_ARTIFACTS_DIR is a folder: only files directly in it travel; pack it into one file"
    if not stat.S_ISREG(about.st_mode):
        return f"artifact {shown} is no regular file"
    if problem := name_problem(name):
        return f"artifact {problem}"
    if checkpoint_number(name):
        return f"artifact {shown} has the name of a checkpoint: give it another"
    limit = MAX_RESULT_BYTES if name == RESULT else MAX_ARTIFACT_BYTES
    if about.st_size > limit:
        return f"artifact {shown} has {about.st_size} bytes, over the limit of {limit >> 30} GiB"
    return ""


def _regular(fd: int) -> BinaryIO:
    """The open file. Raises OSError, and closes it, if it is none."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(fd, "rb")


def _stamp(path: str) -> Stamp | None:
    try:
        about = os.lstat(path)
    except OSError:
        return None
    return (about.st_ino, about.st_mtime_ns, about.st_size) if stat.S_ISREG(about.st_mode) else None


def _said(ref: ArtifactRef) -> list[object]:
    return [ref.name, ref.size, ref.digest.hex()]


def _heard(said: list[object]) -> ArtifactRef:
    name, size, digest = said
    return ArtifactRef(str(name), int(str(size)), bytes.fromhex(str(digest)))
