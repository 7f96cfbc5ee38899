"""A warm Python worker: one process that calls one function at a time for its guard. Runs as a script, alone.

It may run under any Python of 3.9 or newer in a virtual environment where nothing of Baton is installed, so it imports the
standard library only. The guard owns it as it owns any workload (keeper, cgroup, lease, G1, G4). Tasks come over its standard
input, a SEQPACKET socket, one message each; answers go back over another one, whose end is its first message. More tasks may
wait in the socket, and the guard may take them out again, at its own copy of this end: a message is received once, so what
the guard got back was never begun (G5). Hence one task is received when the one before is answered, never earlier, and a worker
that is not fit for another one (`soiled`) receives none.

A no-op must cost next to nothing. To make and delete a directory costs 100 us here, to rename one 8: a log and a working directory
that the last task left empty become those of the next one, what is rarely asked for (checkpoints, the file of inputs) is made
when its name is looked up or a child is started, and only what differs from the last task's environment is set.

argv[1] is a JSON object: `code` (archive) and `code_dir` (where it is unpacked), or empty; `requirements`, `venv` and
`venvs` (the folder of them); `packages`: where `baton` lies, for scripts that import it. What becomes of them:
python_environment.py.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import array
import errno
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

MAX_MESSAGE = 1 << 20
"""Largest task message. The guard's socket buffer bounds it anyway; this is only the size of our buffer."""

MAX_RESULT = 1 << 30
"""Bytes of a result that becomes an artifact: whoever uses it has it in memory as one value (baton.artifacts.MAX_RESULT_BYTES)."""

MESSAGE_CHARS = 480
"""Of a failure's sentence: the control plane keeps 500. The whole traceback is in the log."""

encode, decode = json.JSONEncoder().encode, json.JSONDecoder().decode
encode_result = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
"""Made once; `json.dumps` and `json.loads` look at all their options a call."""

RESULT_KEY, RANGE_KEY, ARGS_KEY = "$baton.result", "$baton.results", "$baton.args"


def _beside(name: str) -> Any:
    """A module of this folder, which is not on the path of a task."""
    spec: Any = importlib.util.spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _beside("python_environment")
Unprepared = environment.Unprepared
lazy = _beside("python_lazy")
LAZY = lazy.LAZY


class Unfit(Exception):
    """What the function returned cannot be its result."""

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


# --- one task ---------------------------------------------------------------------------------------------------------


class Worker:
    """The loop, and what stays warm in it."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._pid = os.getpid()
        self._home = (os.dup(1), os.dup(2))
        self._modules_path = list(sys.path)
        self._env: dict[str, str] = {}
        self._environ: dict[Any, Any] = {}
        """What `_env` made of `os.environ`: what differs from it is what a task did."""
        self._log = self._directory = ""
        """Those of the last task, if it left them empty."""
        os.environ.__class__ = lazy.LazyEnviron

    def serve(self, head: dict[str, Any], text: bytes) -> tuple[bytes, bool]:
        """Call the function of one task; returns the answer, and whether this process is fit for another task."""
        answer: dict[str, Any] = {"key": head["key"], "from": time.time()}  # noqa: TID251 - a script of its own
        result = b""
        args, inputs = text[: head["args"]], text[head["args"] :]
        try:
            self._enter(head, inputs)
            result = self._call(head, args, inputs)
        except Unprepared as error:
            answer.update(fault="spawn", message=str(error)[:MESSAGE_CHARS])
        except Unfit as error:
            answer.update(fault=error.fault, message=str(error)[:MESSAGE_CHARS])
        except BaseException as error:  # noqa: BLE001 - whatever the function raises is its attempt's failure
            answer.update(fault="raised", message=_words(error))
        if os.getpid() != self._pid:
            os._exit(70)  # a fork that the function let return: only its parent answers
        answer["to"] = time.time()  # noqa: TID251 - as above
        self._clean(answer)
        self._leave(head, answer)
        return encode(answer).encode() + b"\n" + result, "soiled" not in answer

    def _enter(self, head: dict[str, Any], inputs: bytes) -> None:
        """Be where the task belongs: its log, its environment, its own directory. Raises Unprepared."""
        try:
            lazy.renamed_or(lazy.open_log, self._log, head["log"])
            lazy.renamed_or(lazy.make_directory, self._directory, head["directory"])
            os.chdir(head["directory"])
        except OSError as error:
            raise Unprepared(f"the executor's disk refused its directories: {error.strerror}") from None
        finally:
            self._log = self._directory = ""
        env = head["env"]
        if os.environ._data != self._environ:  # type: ignore[attr-defined]  # noqa: SLF001 - one comparison, not a copy
            os.environ.clear()
            os.environ.update(env)
        else:
            for name in self._env.keys() - env.keys():
                del os.environ[name]
            for name, value in env.items():
                if self._env.get(name) != value:
                    os.environ[name] = value
        self._env, self._environ = env, dict(os.environ._data)  # type: ignore[attr-defined]  # noqa: SLF001 - as above
        LAZY["BATON_CHECKPOINT_DIR"] = lambda: lazy.make_directory(head["checkpoint"])
        LAZY["BATON_ARTIFACTS_DIR"] = lambda: lazy.make_directory(head["artifacts"])
        if inputs:
            LAZY["BATON_INPUTS"] = lambda: lazy.write(head["inputs"], inputs)

    def _leave(self, head: dict[str, Any], answer: dict[str, Any]) -> None:
        """Be nowhere. `left`: something is in its directories; `log`: bytes of its log."""
        LAZY.clear()
        os.chdir("/")
        try:
            size = os.stat(head["log"]).st_size
            with os.scandir(head["directory"]) as entries:
                empty = next(entries, None) is None
        except OSError:
            size, empty = 0, False
        if size:
            answer["log"] = size
            os.dup2(self._home[0], 1)
            os.dup2(self._home[1], 2)
        else:
            self._log = head["log"]
        if empty:
            self._directory = head["directory"]
        if not empty or os.path.exists(head["checkpoint"]):
            answer["left"] = True
        if not empty and _holds(head["artifacts"]):
            answer["made"] = True

    def _call(self, head: dict[str, Any], args: bytes, inputs: bytes) -> bytes:
        positional, named = arguments(args, inputs, head["inputs"], head["env"].get("BATON_INPUT_DIR", ""))
        value = self._function(head["function"])(*positional, **named)
        if hasattr(value, "__await__"):
            value = importlib.import_module("asyncio").run(value)
        try:
            result = encode_result(value).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise Unfit("result", f"the function returned {type(value).__name__}, not JSON: {error}") from None
        limit = head["result_bytes"]
        if not limit or len(result) <= limit:
            return result
        _leave_result(head["artifacts"], result)
        return b""

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
        if _has_children():
            answer["soiled"] = True
        for number, default in HANDLERS:
            if _signal.getsignal(number) != default:
                signal.signal(number, default)
        signal.alarm(0)
        sys.path[:] = self._modules_path
        os.umask(0o022)


HANDLERS = ((int(signal.SIGTERM), int(signal.SIG_DFL)), (int(signal.SIGINT), signal.default_int_handler))
"""As `_signal` knows them: its wrapper `signal` makes an enumeration's member of each answer."""


def _holds(directory: str) -> bool:
    """Whether it has something in it; an empty one goes."""
    try:
        os.rmdir(directory)
    except OSError as error:
        return error.errno == errno.ENOTEMPTY
    return False


def _leave_result(directory: str, result: bytes) -> None:
    """A result that is too long to travel with the report becomes the artifact `result`. Raises Unfit."""
    if len(result) > MAX_RESULT:
        words = f"the result has {len(result)} bytes, over the limit of 1 GiB"
        raise Unfit("result", f"{words}: write files to the folder $BATON_ARTIFACTS_DIR and return something small")
    os.makedirs(directory, 0o700, exist_ok=True)
    path = os.path.join(directory, "result")
    if os.path.lexists(path):
        words = (
            "the function returned a result that becomes the artifact 'result', and wrote an artifact of that name too"
        )
        raise Unfit("result", words)
    try:
        lazy.write(path, result)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        words = f"no room for a result of {len(result)} bytes on the cluster's disk, at {directory}: free some there"
        raise Unfit("carriage", words) from None


def _has_children() -> bool:
    """Whether a process of the task is left. The keeper made this process a subreaper (keeper.py): whatever it was to, an orphan
    is a child of ours, and one call tells. Collects the dead."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def arguments(text: bytes, inputs: bytes, path: str, files: str = "") -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments, with the results of parents in their places: of `inputs`, or long ones in a file, or each
    in its own below `files`. Raises Unprepared."""
    value = decode(text.decode())
    if RESULT_KEY.encode() in text:
        results = json.loads(inputs) if inputs else {}
        if not inputs and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                results = json.load(file)
        value = _fill(value, results, files)
    if isinstance(value, list):
        return value, {}
    if not isinstance(value, dict):
        raise Unprepared("the arguments are neither a JSON array nor an object")
    return value.pop(ARGS_KEY, []), value


def _fill(value: Any, results: dict[str, str], files: str) -> Any:
    if isinstance(value, list):
        return [_fill(each, results, files) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and RANGE_KEY in value:
        prefix, first, end = value[RANGE_KEY]
        return [_fill({RESULT_KEY: f"{prefix}{number}"}, results, files) for number in range(first, end)]
    if len(value) == 1 and RESULT_KEY in value:
        text = results.get(value[RESULT_KEY])
        if text is None and files:
            text = _large(os.path.join(files, value[RESULT_KEY], "result"))
        if text is None:
            return None  # the parent has no result: skipped or failed
        try:
            return json.loads(text)
        except ValueError:
            return text  # a program's result that is no JSON
    return {key: _fill(each, results, files) for key, each in value.items()}


def _large(path: str) -> Any:
    """A parent's result that is an artifact; None if it has none. Raises Unprepared."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except ValueError:
        raise Unprepared(f"{path} is no text: its task wrote other bytes; read them with baton.input_path") from None


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


def _hello() -> int:
    """The guard's first message: our end of the socket for answers."""
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    _data, ancillary, _flags, _address = CONTROL.recvmsg(1, room)  # `socket.recv_fds` of Python 3.11 drops its flags
    fds = array.array("i")
    for _level, _type, content in ancillary:
        fds.frombytes(content)
    return fds[0]


def _prepare_for_first(plan: dict[str, Any]) -> str:
    """Make the environment, its words going to the first task's log; returns why that failed, if it did."""
    data = CONTROL.recv(
        MAX_MESSAGE, socket.MSG_PEEK
    )  # whoever serves the task, perhaps after an exec, takes it once more
    if not data:
        sys.exit()
    kept = os.dup(1), os.dup(2)
    failure = ""
    try:
        lazy.open_log(json.loads(data.partition(b"\n")[0])["log"])
        environment.prepare(plan, CONTROL.fileno(), __file__)
    except Unprepared as error:
        failure = str(error)
    except OSError as error:
        failure = f"the worker's environment cannot be made: {error}"
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    for fd in kept:
        os.close(fd)
    return failure


def main() -> None:
    """Prepare, then serve until the guard is gone."""
    plan = json.loads(sys.argv[1])
    if "answers" not in plan:
        plan["answers"] = _hello()
    failure = _prepare_for_first(plan)
    answers = socket.socket(fileno=plan["answers"])
    answers.set_inheritable(False)
    worker = Worker()
    sys.addaudithook(lazy.before_children)
    ready, fit = not plan["requirements"], True
    while fit:
        data = CONTROL.recv(MAX_MESSAGE)
        if not data:
            return
        line, _, args = data.partition(b"\n")
        head = decode(line.decode())
        if failure:
            said = {"key": head["key"], "fault": "spawn", "message": failure, "soiled": True, "left": True}
            answers.send(json.dumps(said).encode() + b"\n")
            break
        if not ready:
            ready = True
            answers.send(json.dumps({"ready": head["key"]}).encode() + b"\n")
        answer, fit = worker.serve(head, args)
        answers.send(answer)
    signal.pause()  # unfit: the guard ends this process, and what the task left with it


if __name__ == "__main__":
    CONTROL = socket.socket(fileno=os.dup(0))
    CONTROL.set_inheritable(False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    main()
