"""The words in which an attempt's end reaches people."""

from __future__ import annotations

import pytest

from cluster_agent.executors.base import AttemptKey, Cause, Exited, StartRequest
from cluster_agent.executors.wording import worded

KEY = AttemptKey("r", 0, 1, "beef")


def said(cause: Cause, code: int | None = None, number: int | None = None, message: str = "") -> str:
    request = StartRequest(KEY, 1, ("fake",), {}, timeout_seconds=30.0)
    return worded(Exited(KEY, cause, code, number, 0.0, 1.0, message=message), request).message


@pytest.mark.parametrize(
    ("cause", "code", "number", "words"),
    [
        (Cause.EXIT, 0, None, ""),
        (Cause.EXIT, 7, None, "exited with code 7"),
        (Cause.EXIT, None, 11, "ended by SIGSEGV"),
        (Cause.EXIT, None, 40, "ended by signal 40"),
        (Cause.TIMEOUT, None, 15, "timed out after 30s"),
        (Cause.TIMEOUT, 0, None, "timed out after 30s"),
        (Cause.DEADLINE, None, 9, "stopped at the run's deadline"),
        (Cause.STOP, None, 15, "stopped"),
    ],
)
def test_an_end_is_told_by_names(cause: Cause, code: int | None, number: int | None, words: str) -> None:
    assert said(cause, code, number) == words


def test_what_the_executor_found_out_is_kept() -> None:
    assert said(Cause.LIMIT, None, 9, "over its memory limit") == "over its memory limit"
