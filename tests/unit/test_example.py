"""The shipped example, run by hand as Baton would: graph order, BATON_INPUTS in, BATON_RESULT out, no Baton."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton import graphfile

FOLDER = Path(__file__).parents[2] / "examples" / "timezones"
INLINE_RESULT_BYTES = 16 * 1024


def run_by_hand(folder: Path) -> dict[str, bytes]:
    graph = graphfile.load(str(FOLDER / "graph.yaml"))
    results: dict[str, bytes] = {}
    for task in graph.spec.tasks:  # the file lists parents first
        given = folder / f"{task.id}.inputs"
        given.write_text(json.dumps({parent: results[parent].decode() for parent in task.parents}))
        out = folder / f"{task.id}.result"
        env = {**task.process.env, "PACE_MS": "0", "BATON_INPUTS": str(given), "BATON_RESULT": str(out)}
        argv = [sys.executable, *task.process.argv[1:]]
        subprocess.run(argv, check=True, env=env, cwd=folder, timeout=60, capture_output=True)
        results[task.id] = out.read_bytes()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run_by_hand(tmp_path_factory.mktemp("example"))


def test_report_agrees_with_one_shell_command(results: dict[str, bytes]) -> None:
    table = FOLDER / "tzdata.zi"
    command = (
        "awk '/^Z/{z++;e++} /^R/{r++} /^L/{l++} /^[-0-9]/{e++}"
        ' END{print "zones=" z " eras=" e " rules=" r " links=" l}\' "$TABLE"'
    )
    assert command.replace('"$TABLE"', "examples/timezones/tzdata.zi") in (FOLDER.parent / "README.md").read_text()
    checked = subprocess.run(
        ["sh", "-c", command],
        env={"TABLE": str(table), "PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
        timeout=30,
    ).stdout
    assert results["report"].splitlines()[0] == checked.strip()


def test_report_is_the_documented_one(results: dict[str, bytes]) -> None:
    readme = (FOLDER.parent / "README.md").read_text()
    assert hashlib.sha256(results["report"]).hexdigest() in readme
    assert results["report"].decode().splitlines()[0] in readme


def test_results_fit_inline_and_do_not_depend_on_chance(results: dict[str, bytes], tmp_path: Path) -> None:
    assert max(len(result) for result in results.values()) < INLINE_RESULT_BYTES
    assert run_by_hand(tmp_path) == results


def test_parts_cover_the_table_and_split_no_zone(results: dict[str, bytes]) -> None:
    lines = (FOLDER / "tzdata.zi").read_text().splitlines()
    ranges = json.loads(results["split"])["ranges"]
    assert len(ranges) == 12
    assert [first for first, _ in ranges] == [0, *[end for _, end in ranges[:-1]]]
    assert ranges[-1][1] == len(lines)
    assert all(lines[first][:2] in {"R ", "Z ", "L "} for first, _ in ranges[1:])


def test_table_is_the_public_domain_one() -> None:
    data = (FOLDER / "tzdata.zi").read_bytes()
    assert b"public domain" in data[:200]
    assert hashlib.sha256(data).hexdigest() in (FOLDER.parent / "README.md").read_text()
