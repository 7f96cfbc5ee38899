"""README.md, as a newcomer reads it: its commands are run as written, its graph is the one that is run, its SQL does what it says.

Each block of commands is given whole to bash in an empty folder, with hello.yaml taken from the README beside it, and a state folder
and contexts of its own. `scripts/` there leads to the scripts of this checkout, so that nothing is installed twice. One
script leads elsewhere: `scripts/test` is what runs this test, and would run it again for ever; its stand-in is `scripts/test` with the
argument that makes pytest find all tests and run none.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.layout import Layout

FIND_BUT_DO_NOT_RUN = "--collect-only -q"
"""Arguments that scripts/test is given on top of what the README says; with any, it wants the tests named too."""


def blocks(checkout: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of the list they may stand in."""
    text = (checkout / "README.md").read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


@dataclass(frozen=True)
class Newcomer:
    """Somebody in an empty folder, with a home of his own."""

    folder: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "state" / "baton" / "local")

    def types(self, commands: str, seconds: float) -> subprocess.CompletedProcess[str]:
        """Runs a block; the first command that fails ends it."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("BATON_") or name == "BATON_ETCD"
        }
        env = {**kept, "XDG_STATE_HOME": str(self.folder / "state"), "BATON_CONFIG": str(self.folder / "contexts")}
        return subprocess.run(
            [shutil.which("bash") or "bash", "-euxo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )


@pytest.fixture
def newcomer(checkout: Path, tmp_path: Path) -> Iterator[Newcomer]:
    (tmp_path / "scripts").mkdir()
    for script in (checkout / "scripts").iterdir():
        if os.access(script, os.X_OK):
            lead = tmp_path / "scripts" / script.name
            more = f"{FIND_BUT_DO_NOT_RUN} {checkout / 'tests'}" if script.name == "test" else ""
            lead.write_text(f'#!/bin/sh\nexec "{script}" {more} "$@"\n')
            lead.chmod(0o755)
    found = Newcomer(tmp_path)
    yield found
    found.types("scripts/baton local down", 60)
    assert not found.layout.is_live()


def test_there_are_two_blocks_of_commands_and_all_their_scripts_exist(checkout: Path, newcomer: Newcomer) -> None:
    demo, first = blocks(checkout, "sh")
    assert demo == "scripts/demo\nscripts/test\n"
    assert "local up" in first
    for command in (demo + first).splitlines():
        assert (newcomer.folder / command.split()[0]).exists()


@pytest.mark.timeout(360)
def test_the_two_commands(checkout: Path, newcomer: Newcomer) -> None:
    done = newcomer.types(blocks(checkout, "sh")[0], 330)
    assert done.returncode == 0, done.stdout + done.stderr
    shown, _, tests = done.stdout.partition("\ndemo: ")
    assert "moved from" in shown
    assert "late result(s) refused" in shown
    assert re.match(r"SUCCEEDED, 15 tasks, 15 results accepted \(at most 1 per task\)", tests)
    assert "tests/e2e/test_readme.py" in tests
    assert tests.splitlines()[-1].startswith("test: ")


@pytest.mark.timeout(180)
def test_the_first_graph(checkout: Path, newcomer: Newcomer) -> None:
    (graph,) = [block for block in blocks(checkout, "yaml") if block.startswith("# hello.yaml\n")]
    (newcomer.folder / "hello.yaml").write_text(graph)
    done = newcomer.types(blocks(checkout, "sh")[1], 150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "namespaces/default/runs/hello SUCCEEDED" in done.stdout
    assert "4 tasks, 4 results accepted (at most 1 per task)" in done.stdout
    for cluster in ("eu", "us", "ap"):
        assert re.search(rf"^{cluster} +READY", done.stdout, re.MULTILINE)
    assert not newcomer.layout.is_live()


def test_the_sink_takes_no_stale_attempt(checkout: Path) -> None:
    (statement,) = blocks(checkout, "sql")
    sink = sqlite3.connect(":memory:")
    sink.execute("CREATE TABLE sink (task TEXT PRIMARY KEY, incarnation INTEGER, attempt INTEGER, value TEXT)")
    fences = [
        ("1.1", "first"),
        ("1.3", "third"),
        ("1.2", "late"),
        ("1.3", "again"),
        ("2.1", "restored"),
        ("1.9", "stale"),
    ]
    seen = []
    for fence, value in fences:
        incarnation, attempt = map(int, fence.split("."))
        row = {"task": "t", "incarnation": incarnation, "attempt": attempt, "value": value}
        sink.execute(statement, row)
        seen.append(sink.execute("SELECT value FROM sink").fetchall())
    sink.close()
    assert seen == [[("first",)], [("third",)], [("third",)], [("again",)], [("restored",)], [("restored",)]]
