"""Python tasks of the fake executor: the function is really called, in this process, at the moment its attempt starts.

Theory. What a user's test wants to see of a function is its value, its exceptions and how often it was called; what takes
time is scripted. So a call takes no time of the host's clock (its `Script` says how long the attempt is to last), and an
attempt that is lost later has called its function all the same, as a real one may have. What a worker of the guard says about a
function that raises, or whose value is no JSON (guard/python_worker.py), is said here in the same words.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from cluster_agent.executors.base import Cause, PythonCall, StartRequest
from cluster_agent.executors.fake_workload import Script

RESULT_KEY, RANGE_KEY, ARGS_KEY = "$baton.result", "$baton.results", "$baton.args"
"""How arguments name a parent's result, and where positional ones are: baton/pythontask.py has the same words."""

MESSAGE_CHARS = 480
"""Of a failure's sentence, as of a worker: the control plane keeps 500."""


def call(request: StartRequest) -> Script:
    """Calls the function of a python task. Its value, or why there is none, is what the attempt ends with, after 0 s."""
    python = request.python
    if python is None:
        raise ValueError("this attempt runs a program, not a function")
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), _environment(request.env):
            value = _call(python, request.inputs)
    except ImportError as error:
        return Script(cause=Cause.SPAWN, message=f"{python.function} is not importable: {error}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the function raises is its attempt's failure
        return Script(exit_code=1, message=_words(error), output=said.getvalue().encode() + _trace(error))
    output = said.getvalue().encode()
    try:
        result = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        why = f"the function returned {type(value).__name__}, not JSON: {error}"
        return Script(cause=Cause.RESULT, message=why, output=output)
    return Script(result=result, output=output)


def _call(python: PythonCall, inputs: bytes) -> Any:
    """Raises ImportError, and what the function raises."""
    value = _fill(json.loads(python.args_json), json.loads(inputs or b"{}"))
    positional, named = (value, {}) if isinstance(value, list) else (value.pop(ARGS_KEY, []), value)
    function = _function(python.function)
    loop = asyncio.events._get_running_loop()  # noqa: SLF001 - as event loops do; the function may run one of its own
    asyncio.events._set_running_loop(None)  # noqa: SLF001 - as above
    try:
        found = function(*positional, **named)
        return asyncio.run(found) if hasattr(found, "__await__") else found
    finally:
        asyncio.events._set_running_loop(loop)  # noqa: SLF001 - as above


def _function(name: str) -> Any:
    """The function as this process has it: a script that is being run is `__main__`, whatever its file is called."""
    module, _, qualname = name.partition(":")
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if module not in sys.modules and main is not None and Path(main).stem == module:
        module = "__main__"
    found: Any = importlib.import_module(module)
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ImportError(str(error)) from None
    return getattr(found, "baton_function", found)  # what @task wrapped


def _fill(value: Any, results: Mapping[str, str]) -> Any:
    """Arguments with the results of parents in their places, as a worker puts them there."""
    if isinstance(value, list):
        return [_fill(each, results) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and RANGE_KEY in value:
        prefix, first, end = value[RANGE_KEY]
        return [_fill({RESULT_KEY: f"{prefix}{number}"}, results) for number in range(first, end)]
    if len(value) == 1 and RESULT_KEY in value:
        text = results.get(value[RESULT_KEY])
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return text
    return {key: _fill(each, results) for key, each in value.items()}


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """The attempt's environment on top of this process's own, and back. PATH stays: the test's programs are found on it."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in env.items() if name != "PATH"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _words(error: BaseException) -> str:
    said = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    if not frames:
        return said[:MESSAGE_CHARS]
    last = frames[-1]
    place = f"({os.path.basename(last.filename)}:{last.lineno} in {last.name}: {last.line or ''})"
    return f"{said[: MESSAGE_CHARS - 200]} {place}"[:MESSAGE_CHARS]


def _trace(error: BaseException) -> bytes:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).encode()
