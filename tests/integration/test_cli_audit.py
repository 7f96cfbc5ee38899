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
    # It rests on a guard's clock, and says so.
    assert done.out.splitlines()[0] == "namespaces/default/runs/nightly: proven, as far as the bounds of F5 held"
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


async def test_restore_says_what_is_wrong_in_one_line(cli: Shell) -> None:
    backup, target = cli.folder / "f.db", cli.folder / "etcd"
    command = ("admin", "restore", str(backup), "--data-dir", str(target))
    assert "does not exist" in (await cli(*command)).err
    backup.write_bytes(cli.state.backup)
    cli.env |= {"PATH": str(cli.folder / "empty"), "XDG_CACHE_HOME": str(cli.folder / "cache")}
    cli.env.pop("BATON_ETCD", None)
    missing = await cli(*command)
    assert (missing.code, "`scripts/tools etcd` builds it" in missing.err) == (2, True)
    nowhere = await cli(*command, "--etcdutl", "/nope/etcdutl")
    assert (nowhere.code, nowhere.err) == (2, "error: --etcdutl /nope/etcdutl does not exist\n")
    tool = cli.folder / "etcdutl"
    tool.write_text("#!/bin/sh\necho half >&2; echo 'Error: no space' >&2; /bin/mkdir -p \"$5/member\"; exit 1\n")
    tool.chmod(0o755)
    broken = await cli(*command, "--etcdutl", str(tool))
    assert (broken.code, broken.err) == (2, "error: etcdutl could not restore it: no space\n")
    left = {each.name for each in cli.folder.iterdir() if "etcd" in each.name and each != tool}
    assert not left, "nothing half made stays"
    backup.write_bytes(cli.state.backup[:-5_000])
    cut = await cli(*command, "--etcdutl", str(tool))
    assert (cut.code, len(cut.err.splitlines()), "is not whole" in cut.err) == (2, 1, True)
    lone = await cli(*command, "--etcdutl", str(tool), "--name", "n1")
    assert (lone.code, "--initial-cluster n1=" in lone.err) == (2, True)
    target.mkdir()
    (target / "member").touch()
    backup.write_bytes(cli.state.backup)
    refused = await cli(*command, "--etcdutl", str(tool))
    assert (refused.code, "never touches an old one" in refused.err) == (2, True)


async def test_a_restored_directory_is_there_at_once_and_whole(cli: Shell) -> None:
    backup, target, tool = cli.folder / "f.db", cli.folder / "deep" / "etcd", cli.folder / "etcdutl"
    backup.write_bytes(cli.state.backup)
    tool.write_text('#!/bin/sh\n/bin/mkdir -p "$5/member"\n')
    tool.chmod(0o755)
    done = await cli("admin", "restore", str(backup), "--data-dir", str(target), "--etcdutl", str(tool))
    assert (done.code, done.out.splitlines()[0].endswith("revision 2, 16416 bytes")) == (0, True), done.err
    assert [each.name for each in target.parent.iterdir()] == ["etcd"]
    assert [each.name for each in target.iterdir()] == ["member"]


async def test_restored_refuses_what_is_no_backup_and_says_when_there_is_nothing_to_do(cli: Shell) -> None:
    bad = cli.folder / "bad.db"
    bad.write_bytes(bytes(range(256)) * 64)
    refused = await cli("admin", "restored", "--yes", "--backup", str(bad))
    assert (refused.code, refused.err.splitlines()) == (2, [refused.err.strip()])
    assert "is no backup" in refused.err
    nothing = await cli("admin", "restored")
    assert (nothing.code, nothing.out) == (0, "nothing is suspected, and nothing was changed: incarnation 1\n")


async def test_a_plug_in_that_does_not_load_says_why_whatever_it_is_given(cli: Shell) -> None:
    site = cli.folder / "site" / "lame-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: lame\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[baton.commands]\nlame = lame.nowhere:command\n")
    cli.env["PYTHONPATH"] += f":{site.parent}"
    for words in (("--help",), ("up", "--detach", "--replicas", "3"), ()):
        done = await cli("lame", *words)
        assert (done.code, "the command 'lame' cannot be loaded (No module named 'lame')" in done.err) == (2, True)
