"""`baton init`, `validate`, `schema`, `doctor`, `completion`, `diff`: real processes against real gRPC servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton import contexts
from baton.cli import INTERRUPTED, checks, doctor
from baton.contexts import Context
from baton.time_limits import time_limit
from baton.v1 import cluster_pb2
from control_plane.config import TlsPaths
from tests.certificates import Authority
from tests.integration.small_federation import Fault, Replica, State
from tests.integration.test_cli import Shell


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Shell]:
    replica = Replica(State())
    await replica.start()
    shell = Shell(tmp_path, replica)
    shell.env["BATON_COMPLETION_SECONDS"] = "30"  # the machine may be busy
    contexts.write_context("local", [replica.address], env=shell.env)
    yield shell
    await replica.stop()


# --- writing graphs ---------------------------------------------------------------------------------------------------


async def test_init_writes_a_graph_that_runs_and_never_overwrites(cli: Shell) -> None:
    done = await cli("init", "new.yaml")
    assert (done.code, "baton run new.yaml --wait" in done.out) == (0, True)
    assert (await cli("validate", "new.yaml")).out == "new.yaml: good, 5 tasks\n"
    before = (cli.folder / "new.yaml").read_text()
    again = await cli("init", "new.yaml")
    assert (again.code, "is there already" in again.err) == (2, True)
    assert (cli.folder / "new.yaml").read_text() == before
    assert (await cli("init", "-")).out == before
    assert (await cli("init", "no/such/folder.yaml")).code == 2
    assert (await cli("run", "new.yaml", "--wait")).code == 0


async def test_an_init_that_could_not_write_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """The same limit of a file's size that a full disk is to a writer."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    line = f'trap "" XFSZ; ulimit -f 0; "{sys.executable}" -B -m baton.cli init new.yaml'
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", line, env=env, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, b"new.yaml cannot be written: File too large" in err) == (2, True), err
    assert not (tmp_path / "new.yaml").exists()


async def test_validate_as_json_names_line_field_and_fix(cli: Shell) -> None:
    good, bad = cli.graph(), cli.folder / "bad.yaml"
    bad.write_text("apiVersion: baton/v1\nkind: Graph\nspec: {tasks: [{id: a, argv: [x], retyr: 1}]}\n")
    done = await cli("validate", good, "-o", "json")
    assert json.loads(done.out) == {"good": True, "tasks": 2, "problems": []}
    (missing,) = json.loads((await cli("validate", "none.yaml", "--json")).out)["problems"]
    assert (missing["line"], missing["file"], missing["fix"]) == (None, "none.yaml", "check the path")
    done = await cli("validate", "bad.yaml", "--json")
    assert done.code == 2
    (problem,) = json.loads(done.out)["problems"]
    assert (problem["line"], problem["field"]) == (3, "spec.tasks[0].retyr")
    assert "retry" in problem["fix"]


async def test_schema_is_json(cli: Shell) -> None:
    assert json.loads((await cli("schema")).out)["properties"]["kind"]["const"] == "Graph"


# --- doctor -----------------------------------------------------------------------------------------------------------


def status_of(out: str) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(out)["checks"]}


async def test_doctor_of_a_federation(cli: Shell) -> None:
    done = await cli("doctor", "--server", "--json")
    found = status_of(done.out)
    assert found["reachable"] == found["shards"] == found["clusters"] == found["tls"] == "ok"
    assert found["replicas"] == found["storm guard"] == "warn"
    assert (done.code, json.loads(done.out)["verdict"]) == (0, "warn")
    text = await cli("doctor")
    assert "ok    shards" in text.out
    assert "fix: start a second one" in text.out
    assert "python" in text.out


async def test_doctor_fails_with_a_fix_when_nobody_listens_or_nothing_is_ready(cli: Shell) -> None:
    for each in cli.state.clusters.values():
        each.health = cluster_pb2.CLUSTER_HEALTH_LOST
    done = await cli("doctor", "--server", "-o", "json")
    assert (done.code, status_of(done.out)["clusters"]) == (1, "fail")
    await cli.replica.stop()
    done = await cli("doctor", "--server", "-o", "json")
    assert (done.code, status_of(done.out)["reachable"]) == (1, "fail")
    assert all(check["fix"] for check in json.loads(done.out)["checks"] if check["status"] != "ok")
    cli.env["BATON_CONFIG"] = str(cli.folder / "none.toml")
    assert (await cli("doctor", "--server")).code == 1
    assert (await cli("doctor")).code == 0


async def test_doctor_of_one_dead_endpoint_among_two(cli: Shell) -> None:
    done = await cli("--endpoint", cli.replica.address, "--endpoint", "127.0.0.1:1", "doctor", "--server", "--json")
    assert done.code == 0
    assert [c["status"] for c in json.loads(done.out)["checks"] if c["name"] == "reachable"] == ["ok", "warn"]


# --- diff -------------------------------------------------------------------------------------------------------------


async def test_diff_exits_as_diff_does(cli: Shell) -> None:
    for name in ("one", "two", "bad"):
        await cli("run", cli.graph(outcome="FAILED" if name == "bad" else "SUCCEEDED"), "--name", name)
    cli.state.records["namespaces/default/runs/bad"].tasks[1].result = b"odd"
    same = await cli("diff", "one", "two")
    assert (same.code, same.out) == (0, "the same: 2 tasks, SUCCEEDED\n")
    other = await cli("diff", "one", "bad", "-o", "json")
    assert other.code == 1
    told = json.loads(other.out)
    assert (told["same"], [run["state"] for run in told["runs"]]) == (False, ["SUCCEEDED", "FAILED"])
    assert told["tasks"] == [{"task": "b", "changed": {"result": ["result of b", "odd"]}}]
    text = await cli("diff", "one", "bad")
    assert "b      result   result of b   odd" in text.out
    assert (await cli("diff", "one", "bad", "--only", "clusters")).code == 0
    assert (await cli("diff", "one", "nothing")).code == 5


# --- completion -------------------------------------------------------------------------------------------------------


async def completed(cli: Shell, line: str) -> list[str]:
    """What the command offers for a line that ends where the cursor is."""
    words = line.split(" ")
    cli.env |= {"_BATON_COMPLETE": "zsh_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = await cli()
    for name in ("_BATON_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        del cli.env[name]
    return done.out.strip().split("\n")[1::3]


async def test_names_are_completed_from_the_federation(cli: Shell) -> None:
    for name in ("nightly", "nothing", "other"):
        await cli("run", cli.graph(name))
    assert await completed(cli, "baton watch n") == ["nightly", "nothing"]
    assert await completed(cli, "baton logs nightly/") == ["nightly/a", "nightly/b"]
    assert await completed(cli, "baton cordon ") == ["eu", "us"]
    assert await completed(cli, "baton get task other/b") == ["other/b"]
    assert await completed(cli, "baton get clusters u") == ["us"]
    assert "schema" in await completed(cli, "baton s")
    assert "local" in await completed(cli, "baton lo")  # a plug-in's
    assert "--deadline" in await completed(cli, "baton run --d")


async def test_no_federation_or_a_slow_one_means_no_names_and_no_noise(cli: Shell) -> None:
    cli.replica.faults["ListRuns"] = [Fault(silent=True)]
    del cli.env["BATON_COMPLETION_SECONDS"]
    assert await completed(cli, "baton watch ") == []
    await cli.replica.stop()
    assert await completed(cli, "baton watch ") == []


async def test_the_script_works_in_bash(cli: Shell) -> None:
    await cli("run", cli.graph("nightly"))
    baton = cli.folder / "bin" / "baton"
    baton.parent.mkdir()
    baton.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m baton.cli "$@"\n')
    baton.chmod(0o755)
    story = """
        eval "$(baton completion bash)"
        complete -p baton > /dev/null || exit 1
        COMP_WORDS=(baton cancel ni); COMP_CWORD=2; _baton_completion baton; echo "${COMPREPLY[@]}"
    """
    env = {**cli.env, "PATH": f"{baton.parent}{os.pathsep}{cli.env['PATH']}"}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("bash", "-c", story, env=env, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert (process.returncode, out.decode(), err) == (0, "nightly\n", b"")
    for shell, mark in (("zsh", "#compdef baton"), ("fish", "complete --no-files --command baton")):
        assert mark in (await cli("completion", shell)).out


# --- every command ----------------------------------------------------------------------------------------------------


async def test_a_wrong_flag_names_the_right_one(cli: Shell) -> None:
    for argv, right in (
        (["init", "--json"], "No such option"),
        (["get", "runs", "-o", "jsn"], "'table', 'wide', 'json', 'yaml', 'name'"),
        (["describe", "x", "-o", "wide"], "'text', 'json'"),
        (["run", "x", "--server", "y"], "use --endpoint"),
        (["run", "x", "--watch"], "use --wait"),
        (["timeline", "x", "--format", "json"], "use --json"),
        (["run", "x", "--prioritty", "3"], "--priority"),
        (["admin", "restored", "--force"], "use --yes"),
    ):
        done = await cli(*argv)
        assert (done.code, right in done.err) == (2, True), done.err


async def test_what_prints_data_prints_it_as_json(cli: Shell) -> None:
    await cli("run", cli.graph("nightly"))
    await cli("run", cli.graph("hanging", outcome="HANG"))
    for argv, key in (
        (["describe", "nightly"], "state"),
        (["describe", "task", "nightly/a"], "attempts"),
        (["describe", "cluster", "eu"], "health"),
        (["cordon", "eu"], "admission"),
        (["uncordon", "eu"], "admission"),
        (["cancel", "hanging"], "state"),
        (["timeline", "nightly"], "summary"),
        (["version"], "version"),
        (["admin", "backup", "copy.db"], "bytes"),
        (["admin", "restored", "--yes"], "incarnation"),
    ):
        done = await cli(*argv, "-o", "json")
        assert key in json.loads(done.out), argv
    for argv in (["get", "runs"], ["get", "clusters"], ["get", "task", "nightly/a"], ["admin", "namespaces"]):
        same = [json.loads((await cli(*argv, *form)).out) for form in (["-o", "json"], ["--json"], ["-ojson"])]
        assert same[0] == same[1] == same[2], argv


async def test_ctrl_c_ends_a_command_as_shells_expect(cli: Shell) -> None:
    cli.replica.faults["ListRuns"] = [Fault(silent=True)]
    process = await cli.start("get", "runs")
    async with time_limit(60):
        await cli.replica.called("ListRuns")
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, out, err) == (INTERRUPTED, b"", b"interrupted\n")


# --- certificates -----------------------------------------------------------------------------------------------------


async def test_doctor_shakes_hands_and_reads_when_a_certificate_ends(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    ours, others = Authority(tmp_path / "own"), Authority(tmp_path / "other")
    server, client, stranger = (
        ours.issue("r1", "127.0.0.1"),
        ours.issue("me", "baton://user/me"),
        others.issue("me", "baton://user/me"),
    )
    demands = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server.ca))
    demands.load_cert_chain(server.cert, server.key)
    demands.set_alpn_protocols(["h2"])
    listening = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=demands)
    address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"

    async def seen(paths: TlsPaths) -> checks.Check:
        to = Context((address,), ca=str(paths.ca), certificate=str(paths.cert), key=str(paths.key))
        return await asyncio.to_thread(doctor._certificate, to, address)

    async with listening:
        soon = await seen(client)  # the test's certificates are good for an hour
        wrong = await seen(stranger)
    assert (soon.status, soon.detail) == (checks.WARN, "the replica's certificate is good for 0 days")
    assert (wrong.status, "no handshake" in wrong.detail) == (checks.FAIL, True)
