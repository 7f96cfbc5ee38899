"""A warm Python worker: one process that calls one function at a time for its guard. Runs as a script, alone.

It may run under any Python of 3.9 or newer in a virtual environment where nothing of Baton is installed, so it imports the
standard library only. The guard owns it as it owns any workload (keeper, cgroup, lease, G1, G4) and talks to it over its
standard input, a SEQPACKET socket: a task comes as one message with the descriptor of its log, an answer goes back as
one message. There is never more than one task here (no prefetch, hence no recall: G5 holds trivially).

argv[1] is a JSON object: `code` (archive) and `code_dir` (where it is unpacked), or empty; `requirements`, `venv` and
`venvs` (the folder of them); `packages`: where `baton` lies, for scripts that import it.

Before the first task the environment is made, its words going to that task's log. Environments are shared by workers: a
lock file per environment is held exclusively while it is made and shared while it is used, so the oldest unused one can
be deleted safely. A failure is remembered for a moment, so that a wide graph does not install the same mistake a
thousand times.
"""

from __future__ import annotations

import array
import fcntl
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from typing import Any

MAX_MESSAGE = 1 << 20
"""Largest task message. The guard's socket buffer bounds it anyway; this is only the size of our buffer."""

INSTALL_SECONDS = 600
"""For pip to install all requirements. Smaller fails big wheels on slow lines; larger keeps a stuck attempt waiting."""

MAX_ENVIRONMENTS = 8
"""Virtual environments kept. Each may have hundreds of MB; fewer would make two alternating graphs install for ever."""

FAILURE_SECONDS = 30
"""For so long a failed installation is answered from memory. Longer would ignore that an index is back."""

MESSAGE_CHARS = 480
"""Of a failure's sentence: the control plane keeps 500. The whole traceback is in the log."""

RESULT_KEY, ARGS_KEY = "$baton.result", "$baton.args"


class Unprepared(Exception):
    """The environment or the function cannot be had; the words say who is at fault."""


# --- the environment --------------------------------------------------------------------------------------------------


def prepare(plan: dict[str, Any]) -> None:
    """Be in the right interpreter with the right path; may exec this script anew. Raises Unprepared."""
    if plan["requirements"] and os.path.realpath(sys.prefix) != os.path.realpath(plan["venv"]):
        lock = _environment(plan)
        os.set_inheritable(lock, True)  # held, shared, by the worker that comes after the exec
        python = os.path.join(plan["venv"], "bin", "python")
        os.dup2(CONTROL.fileno(), 0)
        os.execv(python, [python, "-I", "-u", __file__, json.dumps({**plan, "lock": lock})])
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


# --- one task ---------------------------------------------------------------------------------------------------------


class Worker:
    """The loop, and what stays warm in it."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._pid = os.getpid()
        self._home = (os.dup(1), os.dup(2))
        self._modules_path = list(sys.path)

    def serve(self, head: dict[str, Any], args: bytes, log: int) -> bytes:
        """Call the function of one task; returns the answer."""
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(head["env"])
        os.chdir(head["directory"])
        answer: dict[str, Any] = {"key": head["key"]}
        result = b""
        try:
            result = self._call(head, args, answer)
        except Unprepared as error:
            answer.update(fault="spawn", message=str(error)[:MESSAGE_CHARS])
        except BaseException as error:  # noqa: BLE001 - whatever the function raises is its attempt's failure
            answer.update(fault="raised", message=_words(error))
        if os.getpid() != self._pid:
            os._exit(70)  # a fork that the function let return: only its parent answers
        self._clean(answer)
        return json.dumps(answer).encode() + b"\n" + result

    def _call(self, head: dict[str, Any], args: bytes, answer: dict[str, Any]) -> bytes:
        positional, named = arguments(args, head["inputs"])
        value = self._function(head["function"])(*positional, **named)
        if hasattr(value, "__await__"):
            value = importlib.import_module("asyncio").run(value)
        try:
            result = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            answer.update(fault="result", message=f"the function returned {type(value).__name__}, not JSON: {error}")
            return b""
        limit = head["result_bytes"]
        if limit and len(result) > limit:
            size = f"{limit // 1024} KiB" if limit % 1024 == 0 else f"{limit} bytes"
            answer.update(
                fault="result",
                message=f"the result has {len(result)} bytes, over the limit of {size} for inline results; store it "
                "elsewhere and return its name",
            )
            return b""
        return result

    def _function(self, name: str) -> Any:
        """The function, imported once. Raises Unprepared, saying what is missing where."""
        known = self._functions.get(name)
        if known is not None:
            return known
        module, _, qualname = name.partition(":")
        os.environ["BATON_IMPORTING"] = "1"
        try:
            found: Any = importlib.import_module(module)
            for part in qualname.split("."):
                found = getattr(found, part)
        except BaseException as error:  # noqa: BLE001 - a script may raise anything, SystemExit too, while it is imported
            traceback.print_exc()
            raise Unprepared(
                f"{name} is not importable: {_words(error)}; is its file packed with the graph, or its package among the "
                "requirements?"
            ) from None
        finally:
            os.environ.pop("BATON_IMPORTING", None)
        found = getattr(found, "baton_function", found)  # what @task wrapped
        if not callable(found):
            raise Unprepared(f"{name} is {type(found).__name__}, not a function")
        self._functions[name] = found
        return found

    def _clean(self, answer: dict[str, Any]) -> None:
        """Undo what a task may have changed; what cannot be undone costs this worker its life (`soiled`)."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                answer["soiled"] = True
        threading = sys.modules.get("threading")
        if threading is not None and threading.active_count() > 1:
            answer["soiled"] = True
        for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) is not default:
                signal.signal(number, default)
        signal.alarm(0)
        sys.path[:] = self._modules_path
        os.umask(0o022)
        os.chdir("/")
        os.dup2(self._home[0], 1)
        os.dup2(self._home[1], 2)


def arguments(text: bytes, inputs: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments, with the results of parents in their places. Raises Unprepared."""
    value = json.loads(text)
    if RESULT_KEY.encode() in text:
        results = {}
        if os.path.exists(inputs):
            with open(inputs, encoding="utf-8") as file:
                results = json.load(file)
        value = _fill(value, results)
    if isinstance(value, list):
        return value, {}
    if not isinstance(value, dict):
        raise Unprepared("the arguments are neither a JSON array nor an object")
    return value.pop(ARGS_KEY, []), value


def _fill(value: Any, results: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_fill(each, results) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and RESULT_KEY in value:
        text = results.get(value[RESULT_KEY])
        if text is None:
            return None  # the parent has no result: skipped or failed
        try:
            return json.loads(text)
        except ValueError:
            return text  # a program's result that is no JSON
    return {key: _fill(each, results) for key, each in value.items()}


def _words(error: BaseException) -> str:
    """The exception and the user's innermost line, in one sentence; the whole traceback goes to the log."""
    traceback.print_exception(type(error), error, error.__traceback__)
    said = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename not in (__file__, "<frozen importlib._bootstrap>")
    ]
    if not frames:
        return said[:MESSAGE_CHARS]
    last = frames[-1]
    return f"{said[: MESSAGE_CHARS - 200]} ({os.path.basename(last.filename)}:{last.lineno} in {last.name}: {last.line or ''})"[
        :MESSAGE_CHARS
    ]


def _receive(flags: int) -> tuple[bytes, int]:
    """A message and the descriptor that came with it. (`socket.recv_fds` of Python 3.11 drops its flags.)"""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    data, ancillary, _flags, _address = CONTROL.recvmsg(MAX_MESSAGE, room, flags)
    fds = array.array("i")
    for _level, _type, content in ancillary:
        fds.frombytes(content)
    return data, fds[0] if fds else -1


def main() -> None:
    """Prepare, then serve until the guard is gone."""
    plan = json.loads(sys.argv[1])
    data, log = _receive(socket.MSG_PEEK)  # whoever serves the task, perhaps after an exec, takes it once more
    if not data:
        return
    kept = os.dup(1), os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    failure = ""
    try:
        prepare(plan)
    except Unprepared as error:
        failure = str(error)
    except OSError as error:
        failure = f"the worker's environment cannot be made: {error}"
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    for fd in kept:
        os.close(fd)
    worker = Worker()
    ready = not plan["requirements"]
    while True:
        data, log = _receive(0)
        if not data:
            return
        line, _, args = data.partition(b"\n")
        head = json.loads(line)
        if failure:
            CONTROL.send(
                json.dumps({"key": head["key"], "fault": "spawn", "message": failure, "soiled": True}).encode() + b"\n"
            )
            return
        if not ready:
            ready = True
            CONTROL.send(json.dumps({"ready": head["key"]}).encode() + b"\n")
        CONTROL.send(worker.serve(head, args, log))


if __name__ == "__main__":
    CONTROL = socket.socket(fileno=os.dup(0))
    CONTROL.set_inheritable(False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    main()
