"""Python tasks of the fake executor: real calls, in the words of a real worker."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from baton import task
from baton.pythontask import ARGS_KEY, RANGE_KEY, RESULT_KEY
from cluster_agent.executors import fake_python
from cluster_agent.executors.base import AttemptKey, Cause, Exited, PythonCall, StartRequest
from cluster_agent.executors.fake import FakeExecutor, FakeHost
from lab import virtual_time
from lab.virtual_time import VirtualClock

KEY = AttemptKey("run", 0, 1, "nonce")


def add(*numbers: int, scale: int = 1) -> int:
    return sum(numbers) * scale


@task
def wrapped(value: Any) -> Any:
    print("seen", value, os.environ["BATON_TASK"])
    return value


def fail(word: str) -> None:
    raise ValueError(f"bad {word}")


def leave() -> None:
    sys.exit(3)


def request(function: str, args: object, inputs: dict[str, str] | None = None, module: str = __name__) -> StartRequest:
    call = PythonCall(f"{module}:{function}", json.dumps(args))
    env = {"BATON_TASK": "t", "PATH": "/nowhere"}
    return StartRequest(KEY, 1, (), env, inputs=json.dumps(inputs or {}).encode(), python=call)


def test_the_words_of_arguments_are_those_of_the_sdk() -> None:
    assert (fake_python.RESULT_KEY, fake_python.RANGE_KEY, fake_python.ARGS_KEY) == (RESULT_KEY, RANGE_KEY, ARGS_KEY)


def test_arguments_and_results_of_parents() -> None:
    assert fake_python.call(request("add", [1, 2])).result == b"3"
    assert fake_python.call(request("add", {ARGS_KEY: [1, 2], "scale": 10})).result == b"30"
    nested = [{"deep": [{RESULT_KEY: "a"}, {RESULT_KEY: "text"}, {RESULT_KEY: "none"}]}]
    script = fake_python.call(request("wrapped", nested, {"a": "[1]", "text": "no json"}))
    assert json.loads(script.result) == {"deep": [[1], "no json", None]}
    assert script.output.startswith(b"seen {'deep'")
    assert "BATON_TASK" not in os.environ


@pytest.mark.parametrize(
    ("function", "args", "cause", "words"),
    [
        ("fail", ["x"], Cause.EXIT, 'in fail: raise ValueError(f"bad {word}"))'),
        ("leave", [], Cause.EXIT, "SystemExit: 3"),
        ("add", ["x"], Cause.EXIT, "TypeError"),
        ("nothing", [], Cause.SPAWN, "nothing is not importable"),
        ("wrapped", [{"a": float("nan")}], Cause.RESULT, "the function returned dict, not JSON"),
    ],
)
def test_failures_say_who_is_at_fault(function: str, args: object, cause: Cause, words: str) -> None:
    script = fake_python.call(request(function, args))
    assert (script.cause, script.result) == (cause, b"")
    assert words in script.message


def test_a_module_that_is_not_there() -> None:
    script = fake_python.call(request("run", [], module="no_such_module"))
    assert (script.cause, "No module named" in script.message) == (Cause.SPAWN, True)


def test_a_host_calls_functions_that_nobody_scripted() -> None:
    async def story() -> Exited:
        host = FakeHost(VirtualClock())
        executor = FakeExecutor(host)
        await executor.connect()
        await executor.configure(30.0, 4.0)
        await executor.renew(1, host.clock.boot())
        await executor.start([request("add", [2, 3])])
        async for batch in executor.events():
            for event in batch:
                if isinstance(event, Exited):
                    await executor.close()
                    await host.close()
                    return event
        raise AssertionError("it never ended")

    ended = virtual_time.run(story())
    assert (ended.succeeded, ended.result) == (True, b"5")
