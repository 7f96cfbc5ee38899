"""The environment of a warm Python worker: a virtual environment for its requirements, its packed code on the path.

Loaded by python_worker.py from beside it, under any Python of 3.9 or newer: the standard library only.

Before the first task the environment is made, its words going to that task's log. Environments are shared by workers: a
lock file per environment is held exclusively while it is made and shared while it is used, so the oldest unused one can
be deleted safely. A failure is remembered for a moment, so that a wide graph does not install the same mistake a
thousand times.
"""

from __future__ import annotations

import fcntl
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Any

INSTALL_SECONDS = 600
"""For pip to install all requirements. Smaller fails big wheels on slow lines; larger keeps a stuck attempt waiting."""

MAX_ENVIRONMENTS = 8
"""Virtual environments kept. Each may have hundreds of MB; fewer would make two alternating graphs install for ever."""

FAILURE_SECONDS = 30
"""For so long a failed installation is answered from memory. Longer would ignore that an index is back."""


class Unprepared(Exception):
    """The environment or the function cannot be had; the words say who is at fault."""


def prepare(plan: dict[str, Any], control: int, script: str) -> None:
    """Be in the right interpreter with the right path; may exec `script` anew, with `control` as its standard input. Raises
    Unprepared."""
    if plan["requirements"] and os.path.realpath(sys.prefix) != os.path.realpath(plan["venv"]):
        lock = _environment(plan)
        for fd in (lock, plan["answers"]):  # the lock is held, shared, by the worker that comes after the exec
            os.set_inheritable(fd, True)
        python = os.path.join(plan["venv"], "bin", "python")
        os.dup2(control, 0)
        os.execv(python, [python, "-I", "-u", script, json.dumps({**plan, "lock": lock})])
    if "lock" in plan:
        os.set_inheritable(plan["lock"], False)
    if plan["code"]:
        sys.path.insert(0, _unpack(plan["code"], plan["code_dir"]))
    sys.meta_path.append(BatonFinder(plan["packages"]))


def _environment(plan: dict[str, Any]) -> int:
    """Make the virtual environment unless it is there; returns a descriptor with a shared lock on it."""
    os.makedirs(plan["venvs"], exist_ok=True)
    lock = os.open(plan["venv"] + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    done = os.path.join(plan["venv"], ".complete")
    fcntl.flock(lock, fcntl.LOCK_SH)
    while not os.path.exists(done):
        fcntl.flock(lock, fcntl.LOCK_EX)  # not atomic: somebody may have made it meanwhile
        if not os.path.exists(done):
            _known_failure(plan["venv"] + ".failed")
            _make_room(plan)
            _install(plan)
            with open(done, "w"):
                pass
        fcntl.flock(lock, fcntl.LOCK_SH)
    os.utime(done)
    return lock


def _known_failure(path: str) -> None:
    """Raises Unprepared with the words of a failure that is younger than FAILURE_SECONDS."""
    try:
        age = time.time() - os.stat(path).st_mtime  # noqa: TID251 - a script of its own, compared with a file's time
        if 0 <= age < FAILURE_SECONDS:
            with open(path) as file:
                raise Unprepared(file.read())
    except FileNotFoundError:
        return


def _make_room(plan: dict[str, Any]) -> None:
    """Delete the environments longest unused, except those in use."""
    made = []
    for entry in os.scandir(plan["venvs"]):
        if entry.is_dir() and entry.path != plan["venv"]:
            mark = os.path.join(entry.path, ".complete")
            made.append((os.stat(mark).st_mtime if os.path.exists(mark) else 0.0, entry.path))
    for _used, path in sorted(made)[: max(0, len(made) - MAX_ENVIRONMENTS + 1)]:
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _install(plan: dict[str, Any]) -> None:
    shutil.rmtree(plan["venv"], ignore_errors=True)
    try:
        _run([sys.executable, "-I", "-m", "venv", plan["venv"]], "a virtual environment cannot be made here")
        pip = [os.path.join(plan["venv"], "bin", "python"), "-I", "-m", "pip", "--disable-pip-version-check", "install"]
        words = plan["requirements"]
        what = f"package {words[0]} does" if len(words) == 1 else f"packages {', '.join(words)} do"
        _run([*pip, "--no-input", "--progress-bar", "off", *words], f"{what} not install")
    except Unprepared as error:
        shutil.rmtree(plan["venv"], ignore_errors=True)
        with open(plan["venv"] + ".failed", "w") as file:
            file.write(str(error))
        raise


def _run(argv: list[str], fault: str) -> None:
    """Run a step, its output in the log too. Raises Unprepared with the step's own last words."""
    try:
        step = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unprepared(f"{fault}: not done in {INSTALL_SECONDS} s") from None
    os.write(1, step.stdout)
    if step.returncode:
        lines = [line.strip() for line in step.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        words = (errors or lines or [f"exit code {step.returncode}"])[-1]
        raise Unprepared(f"{fault}: {words}")


def _unpack(archive: str, folder: str) -> str:
    """The unpacked code; made once, by renaming, so that it is never seen half."""
    if not os.path.isdir(folder):
        draft = tempfile.mkdtemp(prefix=f"{os.path.basename(folder)}.", dir=os.path.dirname(folder))
        try:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(draft)
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            raise Unprepared(f"the packed code cannot be unpacked: {error}") from None
        try:
            os.rename(draft, folder)
        except OSError:  # another worker was faster
            shutil.rmtree(draft, ignore_errors=True)
    return folder


class BatonFinder(importlib.abc.MetaPathFinder):
    """Finds the package `baton`, and nothing else beside it, for scripts whose environment does not have it."""

    def __init__(self, packages: str) -> None:
        self._path = [packages]

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:  # noqa: ARG002 - importlib's own
        """As importlib asks."""
        if name != "baton":
            return None
        return importlib.machinery.PathFinder.find_spec(name, self._path)
