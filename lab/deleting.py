"""Deleting what a local federation left, and nothing that it did not make.

Theory: `--directory` may be mistyped, and deleting a tree cannot be undone. So only a directory that holds our state file
is touched, only the entries that we make there are removed, and the directory itself goes only if that leaves it empty.
"""

from __future__ import annotations

import os
import shutil

from lab.control import SOCKET
from lab.layout import Layout

FILES = ("history.sqlite", "history.sqlite-wal", "history.sqlite-shm", SOCKET, "state.json")
FOLDERS = ("logs", "etcd", "run", "clusters", "artifacts")


def delete_state(layout: Layout) -> str:
    """Delete it; what is wrong if that cannot be, else an empty text."""
    if not layout.directory.exists():
        return ""
    if not layout.state.exists():
        return f"{layout.directory} holds no local federation; nothing was deleted"
    lock = layout.take_lock()
    if lock is None:
        return f"a federation runs in {layout.directory}; nothing was deleted"
    try:
        for name in FOLDERS:
            shutil.rmtree(layout.directory / name, ignore_errors=True)
        for name in FILES:
            (layout.directory / name).unlink(missing_ok=True)
        layout.lock.unlink()
        if any(layout.directory.iterdir()):
            return f"{layout.directory} holds files that are not ours; they stay"
        layout.directory.rmdir()
    except OSError as error:
        return f"{layout.directory}: {error.strerror}"
    finally:
        os.close(lock)
    return ""
