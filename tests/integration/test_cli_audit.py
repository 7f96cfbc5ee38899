"""`baton audit` and `baton admin restore` as processes: what they print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton import contexts
from baton.v1 import run_pb2
from tests.integration.small_federation import Record, Replica, State
from tests.integration.test_cli import Shell


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Shell]:
    replica = Replica(State())
    await replica.start()
    shell = Shell(tmp_path, replica)
    contexts.write_context("local", [replica.address], env=shell.env)
    yield shell
    await replica.stop()


async def finished(cli: Shell) -> Record:
    """A run `nightly` of two tasks, the first of which was moved; its record, to be falsified."""
    done = await cli("run", cli.graph(), "--name", "nightly", "--wait")
    assert done.code == 0, done.err
    record = cli.state.record("namespaces/default/runs/nightly")
    record.run.accepted_results = 2
    record.events[0].kind = record.events[1].kind = "placed"
    record.events.insert(1, run_pb2.RunEvent(kind="lost", changes=[run_pb2.TaskChange(index=0, id="a", attempt=1)]))
    for number, event in enumerate(record.events, 1):
        event.number = number
    record.run.event_number = len(record.events)
    return record


async def test_a_run_that_kept_its_promise_is_proven(cli: Shell) -> None:
    await finished(cli)
    done = await cli("audit", "nightly")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "namespaces/default/runs/nightly: proven"
    assert "2 tasks, 3 attempts, 2 results accepted, 1 stale results refused" in done.out
    assert "no overlap while the bounds of its lease held (F5)" in done.out
    plain = json.loads((await cli("audit", "nightly", "-o", "json")).out)
    assert (plain["verdict"], plain["handovers"], plain["findings"]) == ("proven", {"timed": 1}, [])


async def test_what_is_declared_or_cannot_be_known_is_said_and_is_no_failure(cli: Shell) -> None:
    record = await finished(cli)
    record.tasks[0].attempts[0].evidence = run_pb2.EVIDENCE_NONE
    record.tasks[0].attempts[1].overlap_possible = True
    done = await cli("audit", "nightly")
    assert done.code == 0
    assert done.out.splitlines()[0].endswith(": declared")
    assert "declared (F6): task a: attempt 2 was placed with overlap_possible" in done.out


async def test_a_broken_promise_is_exit_code_1(cli: Shell) -> None:
    record = await finished(cli)
    record.tasks[0].attempts[0].evidence = run_pb2.EVIDENCE_NONE
    done = await cli("audit", "nightly", "-o", "json")
    assert done.code == 1
    found = json.loads(done.out)
    assert (found["verdict"], found["findings"][0]["rule"]) == ("violated", "F6")
    record.tasks[1].accepted_results = 2
    assert "2 results were accepted" in (await cli("audit", "nightly")).out


async def test_a_run_that_goes_on_is_audited_so_far(cli: Shell) -> None:
    assert (await cli("run", cli.graph(outcome="HANG"), "--name", "nightly")).code == 0
    done = await cli("audit", "nightly")
    assert (done.code, done.out.splitlines()[0]) == (
        0,
        "namespaces/default/runs/nightly: proven so far (the run goes on)",
    )
    assert (await cli("audit", "nobody")).code == 5


async def test_restore_says_what_is_wrong_with_its_words(cli: Shell) -> None:
    backup, target = cli.folder / "f.db", cli.folder / "etcd"
    command = ("admin", "restore", str(backup), "--data-dir", str(target))
    assert "does not exist" in (await cli(*command)).err
    backup.write_bytes(b"nothing")
    cli.env["PATH"] = str(cli.folder / "empty")
    missing = await cli(*command)
    assert (missing.code, "put it on PATH or name it with --etcdutl" in missing.err) == (2, True)
    tool = cli.folder / "etcdutl"
    tool.write_text("#!/bin/sh\necho 'Error: snapshot missing hash' >&2\nexit 1\n")
    tool.chmod(0o755)
    broken = await cli(*command, "--etcdutl", str(tool))
    assert (broken.code, "is no whole backup: Error: snapshot missing hash" in broken.err) == (2, True)
    target.mkdir()
    (target / "member").touch()
    refused = await cli(*command, "--etcdutl", str(tool))
    assert (refused.code, "never touches an old one" in refused.err) == (2, True)
