"""The command line as a user meets it: a real process against real gRPC servers; exit codes, output, ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton import contexts, errors
from baton.time_limits import time_limit
from baton.v1 import run_pb2
from tests.integration.small_federation import Fault, Replica, State

GRAPH = """\
apiVersion: baton/v1
kind: Graph
metadata: {name: %s, labels: {outcome: %s}}
spec:
  deadline: 5m
  tasks:
    - {id: a, argv: [echo, hi]}
    - {id: b, argv: [echo], after: [a]}
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


class Shell:
    """Runs `baton` with a home of its own."""

    def __init__(self, folder: Path, replica: Replica) -> None:
        self.folder, self.replica, self.state = folder, replica, replica.state
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}

    async def start(self, *argv: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "baton.cli", *argv]
        return await asyncio.create_subprocess_exec(*command, env=self.env, cwd=self.folder, stdout=pipe, stderr=pipe)

    async def __call__(self, *argv: str) -> Done:
        process = await self.start(*argv)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        done = Done(process.returncode or 0, out.decode(), err.decode())
        assert "Traceback" not in done.err
        assert "\x1b" not in done.out + done.err
        return done

    def graph(self, name: str = "nightly", outcome: str = "SUCCEEDED") -> str:
        (self.folder / "g.yaml").write_text(GRAPH % (name, outcome))
        return "g.yaml"


@pytest.fixture
async def baton(tmp_path: Path) -> AsyncIterator[Shell]:
    replica = Replica(State())
    await replica.start()
    shell = Shell(tmp_path, replica)
    contexts.write_context("local", [replica.address], env=shell.env)
    yield shell
    await replica.stop()


@pytest.mark.parametrize(
    ("outcome", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("DEADLINE_EXCEEDED", 3), ("CANCELLED", 4)]
)
async def test_run_and_wait_ends_with_the_outcomes_code(baton: Shell, outcome: str, code: int) -> None:
    done = await baton("run", baton.graph(outcome=outcome), "--wait")
    assert done.code == code
    assert f"namespaces/default/runs/nightly {outcome}" in done.out
    assert "2 results accepted (at most 1 per task)" in done.out
    assert "a SUCCEEDED" in done.err
    assert "b RUNNING on us" in done.err
    assert (await baton("watch", "nightly")).code == code


async def test_run_as_json(baton: Shell) -> None:
    done = await baton("run", baton.graph(), "--wait", "--json", "--name", "other", "--deadline", "10m")
    data = json.loads(done.out)
    assert data["run"]["name"] == "namespaces/default/runs/other"
    assert data["summary"] == {
        "run_state": "SUCCEEDED",
        "tasks": 2,
        "attempts": 3,
        "accepted_results": 2,
        "max_accepted_per_task": 1,
        "moved_tasks": 1,
        "stale_results_refused": 1,
        "overlap_possible": 0,
        "result_sha256": data["summary"]["result_sha256"],
    }
    assert len(data["summary"]["result_sha256"]) == 64
    timeline = json.loads((await baton("timeline", "other", "--json")).out)
    assert timeline["summary"] == data["summary"]
    assert [task["moved"] for task in timeline["tasks"]] == [True, False]


async def test_run_without_waiting_prints_the_name(baton: Shell) -> None:
    done = await baton("run", baton.graph())
    assert (done.code, done.out) == (0, "namespaces/default/runs/nightly\n")
    assert "baton cancel nightly" in done.err


async def test_get_in_every_form(baton: Shell) -> None:
    for name in ("r1", "r2", "r3"):
        await baton("run", baton.graph(name))
    table = (await baton("get", "runs")).out.splitlines()
    assert table[0].split()[:2] == ["RUN", "STATE"]
    assert [line.split()[:2] for line in table[1:]] == [["r1", "SUCCEEDED"], ["r2", "SUCCEEDED"], ["r3", "SUCCEEDED"]]
    assert "UID" in (await baton("get", "runs", "-o", "wide")).out
    assert (await baton("get", "runs", "-o", "name")).out == "".join(
        f"namespaces/default/runs/r{n}\n" for n in (1, 2, 3)
    )
    assert len(json.loads((await baton("get", "runs", "-o", "json")).out)["runs"]) == 3
    one = json.loads((await baton("get", "run", "r2", "-o", "json")).out)
    assert (one["name"], one["state"], one["taskCount"]) == ("namespaces/default/runs/r2", "RUN_STATE_SUCCEEDED", 2)
    assert "name: namespaces/default/runs/r2" in (await baton("get", "run", "r2", "-o", "yaml")).out
    assert (await baton("get", "tasks", "r1", "-o", "name")).out.split() == [
        f"namespaces/default/runs/r1/tasks/{t}" for t in "ab"
    ]
    assert "eu > us" in (await baton("get", "tasks", "r1", "-o", "wide")).out
    for what, word in (("clusters", "READY"), ("replicas", "r1"), ("shards", "00")):
        assert word in (await baton("get", what)).out
    assert json.loads((await baton("get", "task", "r1/a", "-o", "json")).out)["id"] == "a"


async def test_describe_timeline_logs_and_result(baton: Shell) -> None:
    await baton("run", baton.graph())
    assert "SUCCEEDED" in (await baton("describe", "run", "nightly")).out
    task = (await baton("describe", "task", "nightly/a")).out
    assert "timed" in task
    assert "result of a" in task
    assert "READY" in (await baton("describe", "cluster", "eu")).out
    timeline = (await baton("timeline", "nightly")).out
    for words in ("moved from eu", "evidence timed", "1 late result(s) refused", "eu > us", "moved tasks:"):
        assert words in timeline
    assert (await baton("logs", "nightly/a", "-f")).out == "line\n" * 10
    assert (await baton("result", "nightly/b")).out == "result of b"


async def test_clusters_and_admin(baton: Shell) -> None:
    assert (await baton("cordon", "eu")).out == "clusters/eu CORDONED\n"
    assert (await baton("drain", "eu")).out == "clusters/eu DRAINING\n"
    assert (await baton("uncordon", "eu")).out == "clusters/eu OPEN\n"
    assert (await baton("admin", "restored", "--yes")).out == "incarnation 2\n"
    assert "default" in (await baton("admin", "namespaces")).out
    told = "b.db: everything up to 2023-11-14T22:13:20Z, revision 2, 16416 bytes\n"
    assert (await baton("admin", "backup", "b.db")).out == told
    saved = baton.folder / "b.db"
    assert (saved.read_bytes(), saved.stat().st_mode & 0o777) == (baton.state.backup, 0o600)
    assert (await baton("admin", "backup", "b.db")).code == 2


async def test_j12_a_confirmed_restore_waits_until_no_old_work_can_live(baton: Shell) -> None:
    early = [Fault(error=errors.WrongState("too early", retry_after=seconds)) for seconds in (0.4, 0.0)]
    baton.replica.faults["ConfirmRestored"] = [*early, Fault(error=errors.WrongState("for good"))]
    done = await baton("admin", "restored", "--yes")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[0].endswith("confirming in 1 s")
    assert done.err.splitlines()[-1] == "error: for good"
    baton.replica.faults["ConfirmRestored"] = early
    assert (await baton("admin", "restored", "--yes")).out == "incarnation 2\n"
    assert (await baton("admin", "restored", "--yes", "--now")).out == "incarnation 3\n"
    too_long = errors.WrongState("too early", retry_after=1e6)
    baton.replica.faults["ConfirmRestored"] = [Fault(error=too_long)]
    assert (await baton("admin", "restored", "--yes")).code == 1


async def test_cancel(baton: Shell) -> None:
    await baton("run", baton.graph(outcome="HANG"))
    assert (await baton("cancel", "nightly", "--wait")).out == "namespaces/default/runs/nightly CANCELLED\n"
    await baton("run", baton.graph("done"))
    assert (await baton("cancel", "done")).code == 1


async def test_ctrl_c_detaches_and_says_how_to_go_on(baton: Shell) -> None:
    process = await baton.start("run", baton.graph(outcome="HANG"), "--wait")
    async with time_limit(60):
        await baton.replica.called("WatchRun")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130
    assert b"baton watch nightly" in err
    assert b"baton cancel nightly" in err
    assert b"Traceback" not in err
    (record,) = baton.state.records.values()
    assert record.run.state == run_pb2.RUN_STATE_RUNNING


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (("get", "run", "none"), 5, "no run"),
        (("watch", "none"), 5, "no run"),
        (("timeline", "none"), 5, "no run"),
        (("describe", "cluster", "none"), 5, "no clusters/none"),
        (("get", "run", "A b"), 2, "a-z"),
        (("get", "run"), 2, "which run"),
        (("get", "tasks"), 2, "RUN"),
        (("logs", "nightly"), 2, "RUN/TASK"),
        (("get", "nonsense"), 2, "clusters"),
        (("nonsense",), 2, "nonsense"),
        (("run", "none.yaml"), 2, "none.yaml: cannot be read: No such file or directory. Fix: check the path"),
        (("run", ""), 2, "names no file"),
        (("init", ""), 2, "FILE is empty"),
        (("get",), 2, "Name one of runs, run"),
        (("submit", "g.yaml"), 2, " run FILE`"),
        (("status",), 2, "describe RUN"),
        (("help",), 2, "--help"),
        (("describe", "cluster", "a/b"), 2, "write CLUSTER or clusters/CLUSTER"),
        (("run", "."), 2, "directory"),
        (("run", "g.yaml", "--deadline", "5"), 2, "units"),
        (("run", "g.yaml", "--deadline", "2020-01-01T00:00:00Z"), 2, "past"),
        (("run", "g.yaml", "--deadline", "-5m"), 2, "past"),
        (("run", "g.yaml", "--name", "A"), 2, "--name"),
        (("run", "g.yaml", "--priority", "5000"), 2, "1000"),
        (("--endpoint", "127.0.0.1:1", "get", "runs"), 6, "--endpoint"),
        (("get", "runs", "--endpoint", "example.com:80"), 1, "mutual TLS"),
        (("get", "runs", "--endpoint", "nonsense"), 2, "host:port"),
        (("get", "runs", "--context", "none"), 2, "local"),
        (("get", "runs", "-n", "A"), 2, "namespace"),
    ],
)
async def test_failures_have_their_code_and_a_word_to_go_on(
    baton: Shell, argv: tuple[str, ...], code: int, word: str
) -> None:
    baton.graph()
    done = await baton(*argv)
    assert (done.code, done.out) == (code, "")
    assert word in done.err
    assert baton.state.records == {}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (("after: [a]", "after: [b]"), "g.yaml:8: spec.tasks[1].after[0]"),
        (("after: [a]", "aftr: [a]"), "g.yaml:8: spec.tasks[1].aftr"),
        (("id: b", "id: a"), "g.yaml:8: spec.tasks[1].id"),
        (("deadline: 5m", "deadline: 2020-01-01T00:00:00Z"), "g.yaml:5: spec.deadline"),
        (("  deadline: 5m\n", ""), "g.yaml:4: spec"),
        (("  tasks", "\ttasks"), "g.yaml:6"),
    ],
)
async def test_bad_files_are_told_by_line_and_change_nothing(baton: Shell, change: tuple[str, str], where: str) -> None:
    baton.graph()
    file = baton.folder / "g.yaml"
    file.write_text(file.read_text().replace(*change))
    done = await baton("run", "g.yaml", "--wait")
    assert done.code == 2
    assert done.err.startswith(where)
    assert baton.replica.calls == []


async def test_what_the_server_refuses_is_told_by_line(baton: Shell) -> None:
    fields = [errors.FieldViolation("spec.tasks[1].process.argv", "is not to my taste")]
    baton.replica.faults["CreateRun"] = [Fault(error=errors.InvalidField("refused", field_violations=fields))]
    done = await baton("run", baton.graph())
    assert (done.code, done.err) == (2, "g.yaml:8: spec.tasks[1].argv: is not to my taste\n")


async def test_validate_needs_no_federation(baton: Shell) -> None:
    baton.graph()
    (baton.folder / ".config/baton/contexts.toml").unlink()
    assert (await baton("validate", "g.yaml")).out == "g.yaml: good, 2 tasks\n"
    done = await baton("get", "runs")
    assert (done.code, "baton local up" in done.err) == (2, True)


async def test_environment_wins_over_the_file_and_flags_over_both(baton: Shell) -> None:
    baton.env["BATON_ENDPOINT"] = baton.replica.address
    baton.env["BATON_CONFIG"] = str(baton.folder / "none.toml")
    assert (await baton("get", "clusters")).code == 0
    baton.env["BATON_ENDPOINT"] = "127.0.0.1:1"
    assert (await baton("get", "clusters", "--endpoint", baton.replica.address)).code == 0
    (baton.folder / "none.toml").write_text("contexts = 5")
    done = await baton("get", "clusters")
    assert (done.code, "none.toml" in done.err) == (2, True)


async def test_a_reader_that_has_gone_is_no_error(baton: Shell) -> None:
    baton.state.backup = b""
    await baton("run", baton.graph())
    record = next(iter(baton.state.records.values()))
    record.log = b"x" * 200_000
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", f'"{sys.executable}" -m baton.cli get shards -o json | true',
        env=baton.env, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert err == b""


async def test_help_everywhere_with_an_example(baton: Shell) -> None:
    commands = [
        [],
        ["run"],
        ["validate"],
        ["watch"],
        ["cancel"],
        ["logs"],
        ["result"],
        ["get"],
        ["describe"],
        ["timeline"],
    ]
    commands += [["describe", what] for what in ("run", "task", "cluster")]
    commands += [["cordon"], ["uncordon"], ["drain"], ["version"], ["admin"]]
    commands += [["init"], ["schema"], ["doctor"], ["completion"], ["diff"], ["trace"]]
    commands += [["admin", what] for what in ("restored", "namespaces", "backup")]
    for done in await asyncio.gather(*(baton(*command, "--help") for command in commands[:10])):
        assert done.code == 0
        assert "Example:" in done.out
    for done in await asyncio.gather(*(baton(*command, "--help") for command in commands[10:])):
        assert done.code == 0
        assert "Example:" in done.out


async def test_version(baton: Shell) -> None:
    assert (await baton("version")).out.startswith("baton ")


def test_ctrl_c_while_the_command_is_being_loaded_is_quiet(tmp_path: Path) -> None:
    """The signal comes at the first import of gRPC, in the middle of the command's start."""
    program = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'grpc':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from baton.cli import main\n"
        "main()\n"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, "version"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


async def test_a_taken_name_is_answered_with_the_two_places_where_another_can_be_given(baton: Shell) -> None:
    taken = errors.NameTaken("namespaces/default/runs/nightly is the name of a finished run; choose another run_id")
    baton.replica.faults["CreateRun"] = [Fault(error=taken)]
    done = await baton("run", baton.graph())
    assert done.code == 2
    assert "finished run; choose another: --name NEW, or `metadata.name` in g.yaml" in done.err
    assert "run_id" not in done.err


async def test_hints_are_written_as_the_command_was(baton: Shell) -> None:
    baton.env["BATON_COMMAND"] = "scripts/baton"
    assert "scripts/baton watch nightly" in (await baton("run", baton.graph())).err


async def test_hints_lead_to_the_federation_that_the_command_was_told(baton: Shell) -> None:
    (baton.folder / ".config/baton/contexts.toml").unlink()
    done = await baton("--endpoint", baton.replica.address, "run", baton.graph(), "-n", "team")
    hint = next(line for line in done.err.splitlines() if "watch:" in line)
    words = hint.partition("watch nightly ")[2].split()
    assert words == ["-n", "team", "--endpoint", baton.replica.address]
    assert (await baton("watch", "nightly", *words)).code == 0


async def test_streams_that_are_closed_or_full_end_in_words(baton: Shell) -> None:
    async def in_shell(line: str) -> Done:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f'"{sys.executable}" -m baton.cli {line}', env=baton.env, cwd=baton.folder,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return Done(process.returncode or 0, out.decode(), err.decode())

    baton.graph()
    full = "error: the output cannot be read or written: No space left on device\n"
    for line in ("version", "get runs", "get clusters -o json", "init -", "--help"):
        assert await in_shell(f"{line} >/dev/full") == Done(6, "", full)
        assert await in_shell(f"{line} >&-") == Done(0, "", "")
    assert await in_shell("get run none 2>&-") == Done(5, "", "")
    assert await in_shell("nonsense 2>&-") == Done(2, "", "")
    done = await in_shell("validate - <&-")
    assert (done.code, "-:1: is empty" in done.err) == (2, True)


async def test_ctrl_c_in_a_watch_as_json_is_not_told_to_look_before_repeating(baton: Shell) -> None:
    await baton("run", baton.graph(outcome="HANG"))
    process = await baton.start("watch", "nightly", "--json")
    async with time_limit(60):
        await baton.replica.called("WatchRun")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"interrupted\n")


async def test_o8_a_run_of_unknown_effect_can_be_repeated_as_the_error_says(baton: Shell) -> None:
    baton.replica.faults["CreateRun"] = [Fault(error=errors.Internal("lost", applied=errors.UNKNOWN), after=True)]
    done = await baton("run", baton.graph())
    assert done.code == 6
    options = done.err.splitlines()[-1].partition("add ")[2].split()
    assert [options[0], options[2]] == ["--request-id", "--deadline"]
    again = await baton("run", "g.yaml", *options)
    assert (again.code, again.out) == (0, "namespaces/default/runs/nightly\n")
    assert baton.state.requests[0] == baton.state.requests[1]
    assert (await baton("run", "g.yaml", "--request-id", "mine")).code == 2


async def test_o8_a_cancel_of_unknown_effect_can_be_repeated_as_the_error_says(baton: Shell) -> None:
    await baton("run", baton.graph(outcome="HANG"))
    baton.replica.faults["CancelRun"] = [Fault(error=errors.Internal("lost", applied=errors.UNKNOWN))]
    done = await baton("cancel", "nightly")
    options = done.err.splitlines()[-1].partition("add ")[2].split()
    assert (done.code, options[0]) == (6, "--request-id")
    assert (await baton("cancel", "nightly", *options)).code == 0


async def test_describe_guesses_the_kind(baton: Shell) -> None:
    await baton("run", baton.graph())
    assert (await baton("describe", "nightly")).out == (await baton("describe", "run", "nightly")).out
    assert "result of a" in (await baton("describe", "nightly/a")).out
    assert "READY" in (await baton("describe", "clusters/eu")).out
    assert (await baton("describe", "none")).code == 5


async def test_what_the_message_says_is_not_said_again_as_a_field(baton: Shell) -> None:
    field = errors.FieldViolation("name", "is SUCCEEDED")
    refused = errors.WrongState("the run is SUCCEEDED", field_violations=[field])
    baton.replica.faults["CancelRun"] = [Fault(error=refused)]
    done = await baton("cancel", "nightly")
    assert (done.code, done.err) == (1, "error: the run is SUCCEEDED\n")
