"""Files of a task, from inside it: those it makes, and those its parents made.

    from baton import artifact_path, input_path, task

    @task
    def report(rows):
        artifact_path("report.csv").write_text(...)      # travels when the task has succeeded

    @task
    def publish(done):
        text = input_path("report", "report.csv").read_text()

Runs in workers, which have the standard library only, of Python 3.9 or newer; the rule for names is that of `baton.artifacts`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["artifact_path", "input_path"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OUTSIDE = "only a task on a cluster has artifacts; to try it elsewhere, set {} to a folder"


def artifact_path(name: str) -> Path:
    """Where to write the artifact `name`. Raises ValueError for a name that no artifact can have, RuntimeError outside a task."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"artifact {name[:60]!r}: use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    folder = os.environ.get("BATON_ARTIFACTS_DIR")
    if folder is None:
        raise RuntimeError(_OUTSIDE.format("BATON_ARTIFACTS_DIR"))
    return Path(folder, name)


def input_path(task: str, name: str) -> Path:
    """Where the artifact `name` of the parent `task` (its id) lies, read-only. Raises FileNotFoundError, with what there is, if that
    parent has published none of this name; RuntimeError outside a task."""
    inputs = os.environ.get("BATON_INPUT_DIR")
    if inputs is None and "BATON_TASK" not in os.environ:
        raise RuntimeError(_OUTSIDE.format("BATON_INPUT_DIR"))
    folder = Path(inputs, task) if inputs else None
    if folder is not None and (folder / name).is_file():
        return folder / name
    known = ", ".join(sorted(os.listdir(folder))) if folder is not None and folder.is_dir() else "none"
    raise FileNotFoundError(f"task {task!r} is no parent with an artifact {name!r} (its artifacts: {known})")
