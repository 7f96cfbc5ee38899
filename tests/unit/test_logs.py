"""Log lines: one sentence and fields, as JSON or text, one line each, whatever is put into them; and who writes which."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.telemetry import logs
from baton.telemetry.logs import JsonLines, TextLines, about, trace_of
from cluster_agent import attempt_log as at_agent
from cluster_agent.config import AgentConfig
from cluster_agent.config import BadConfig as BadAgentConfig
from cluster_agent.config import from_arguments as agent_of
from cluster_agent.executors.base import AttemptKey, Cause, Exited, Refused, Started
from cluster_agent.guard.server import Server
from control_plane import attempt_log as at_owner
from control_plane.config import BadConfig
from control_plane.config import from_arguments as replica_of
from control_plane.core.span_model import trace_id_of
from tests.unit.core.test_spans import failed_over

UID = "0123456789abcdef01234567"
KEY = AttemptKey(UID, 0, 2, "nonce")


def record(message: str = "a fixed sentence", **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("baton.agent", logging.WARNING, "x.py", 1, message, (), None)
    vars(made).update(fields)
    return made


def test_json_has_the_sentence_and_the_fields_in_order() -> None:
    line = JsonLines({"cluster": "eu"}).format(record(reason="r", **about(UID, task=0, attempt=2, fence="1.2")))
    said = json.loads(line)
    assert list(said) == [
        "time", "level", "logger", "message", "cluster", "run", "task", "attempt", "fence", "trace", "reason",
    ]  # fmt: skip
    assert (said["level"], said["message"], said["task"], said["fence"]) == ("warning", "a fixed sentence", 0, "1.2")
    assert said["trace"] == trace_of(UID)


def test_text_has_the_same_fields_as_words() -> None:
    line = TextLines({"replica": "r1"}).format(record(error="it broke", empty="", many=[1, 2]))
    assert line.endswith('baton.agent a fixed sentence replica=r1 error="it broke" empty="" many="[1, 2]"')
    assert " WARNING " in line
    assert line[10] == "T"


def test_the_trace_id_is_the_one_of_the_runs_spans() -> None:
    for uid in (UID, "another-uid", "", "0" * 24):
        assert trace_of(uid) == trace_id_of(uid)


def test_what_is_not_known_is_left_out() -> None:
    assert about("r") == {"run": "r", "trace": trace_of("r")}


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_exception_is_told_with_its_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        failed = record()
        failed.exc_info = (ValueError, error, error.__traceback__)
    assert "ValueError: why" in json.loads(JsonLines({}).format(failed))["exception"]
    assert TextLines({}).format(failed).splitlines()[-1] == "ValueError: why"


@given(
    st.text(), st.text(), st.one_of(st.none(), st.integers(), st.floats(), st.binary(), st.text(), st.lists(st.text()))
)
def test_whatever_is_in_it_is_one_line(message: str, text: str, value: object) -> None:
    made = record(message, text=text, value=value, odd=Unprintable())
    for line in (JsonLines({"replica": "r"}).format(made), TextLines({"replica": "r"}).format(made)):
        assert len(line.splitlines()) == 1
        assert line.isprintable()


def test_arguments_that_do_not_fit_are_no_second_failure() -> None:
    made = logging.LogRecord("x", logging.INFO, "x.py", 1, "%d things", ("many",), None)
    assert json.loads(JsonLines({}).format(made))["message"] == "%d things"


def test_a_field_is_bounded() -> None:
    assert len(json.loads(JsonLines({}).format(record(big="x" * 100_000)))["big"]) < 5000


def test_set_up_sends_every_line_there() -> None:
    before = logging.root.handlers[:], logging.root.level
    out = io.StringIO()
    try:
        logs.set_up("json", "warning", {"replica": "r1"}, to=out)
        logging.getLogger("anything").info("not told")
        logging.getLogger("anything").warning("told")
    finally:
        logging.root.handlers[:], level = before
        logging.root.setLevel(level)
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["replica"] == "r1"
    with pytest.raises(ValueError, match="none of json, text"):
        logs.formatter("xml", {})


def test_replicas_and_agents_have_the_same_flag() -> None:
    agent = ["--cluster", "eu", "--endpoint", "127.0.0.1:1", "--directory", "d", "--cpus", "1"]
    replica = ["--replica", "r1", "--history", "h"]
    assert (agent_of(agent).log_format, replica_of(replica).log_format) == ("json", "json")
    assert agent_of([*agent, "--log-format", "text"]).log_format == "text"
    assert replica_of([*replica, "--log-format", "text"]).log_format == "text"
    with pytest.raises(BadAgentConfig, match="none of json, text"):
        agent_of([*agent, "--log-format", "xml"])
    with pytest.raises(BadConfig, match="none of json, text"):
        replica_of([*replica, "--log-format", "xml"])
    assert AgentConfig.__dataclass_fields__["log_format"].default == "json"


def test_a_guard_writes_the_same_lines(capfd: pytest.CaptureFixture[str]) -> None:
    Server._note("A chore was put off.", error="disk full")
    line = json.loads(capfd.readouterr().err)
    assert (line["logger"], line["level"], line["message"], line["error"]) == (
        "baton.guard", "warning", "A chore was put off.", "disk full",
    )  # fmt: skip


# --- lines about single attempts --------------------------------------------------------------------------------------


def exited(cause: Cause, *, late: bool = False) -> Exited:
    return Exited(KEY, cause, None, 9, 1.0, 2.0, message="why", late=late)


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (exited(Cause.FENCE), "An attempt was stopped at its fence."),
        (exited(Cause.LOST), "An attempt was lost with the guard."),
        (exited(Cause.LIMIT), "An attempt was stopped at a limit."),
        (exited(Cause.SPAWN), "An attempt could not be started."),
        (exited(Cause.STOP, late=True), "An attempt was killed later than its lease allowed."),
        (Refused(KEY, "why"), "A start was refused."),
        (exited(Cause.EXIT), None),
        (exited(Cause.STOP), None),
        (Started(KEY, 1, 1.0), None),
    ],
)
def test_an_agent_tells_of_ends_that_were_not_planned(
    caplog: pytest.LogCaptureFixture, event: Exited | Refused | Started, sentence: str | None
) -> None:
    at_agent.tell(event, lambda _key: 3)
    told = [json.loads(JsonLines({"cluster": "eu"}).format(each)) for each in caplog.records]
    if sentence is None:
        assert told == []
        return
    (line,) = told
    assert line["message"] == sentence
    assert {name: line[name] for name in ("run", "task", "attempt", "fence", "cluster", "reason")} == {
        "run": UID, "task": 0, "attempt": 2, "fence": "3.2", "cluster": "eu", "reason": "why",
    }  # fmt: skip


def test_the_owner_of_a_run_tells_of_lost_attempts_with_their_fence(caplog: pytest.LogCaptureFixture) -> None:
    shard = failed_over()
    events = list(shard.machine.run_events("r1", 0) or ())
    for event in events:
        at_owner.tell("r1", event, shard.machine)
    (line,) = (json.loads(JsonLines({"replica": "r1"}).format(each)) for each in caplog.records)
    assert line["message"] == "an attempt was lost with its cluster"
    assert (line["run"], line["attempt"], line["fence"], line["trace"]) == ("r1", 1, "1.1", trace_of("r1"))
    assert line["task"] in {task.id for task in shard.machine.tasks("r1", 0, 10)}
    assert "evidence" in line["reason"]


def test_a_large_loss_is_told_by_its_first_attempts_and_their_number(caplog: pytest.LogCaptureFixture) -> None:
    shard = failed_over()
    lost = next(event for event in shard.machine.run_events("r1", 0) or () if event.kind == "lost")
    columns = {name: getattr(lost, name) * 500 for name in ("tasks", "states", "ns", "clusters", "reasons")}
    at_owner.tell("r1", replace(lost, **columns), shard.machine)
    assert len(caplog.records) == at_owner.TOLD
    assert vars(caplog.records[-1])["not_told"] == 500 - at_owner.TOLD
