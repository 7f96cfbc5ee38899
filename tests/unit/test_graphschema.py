"""The JSON Schema of graph files: one source with the reader, and never against a file that is good."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no stubs
import pytest
from ruamel.yaml import YAML

from baton import graphfile, graphschema
from baton.cli.authoring import EXAMPLE
from baton.graphfile_yaml import Reader

JUDGE = jsonschema.Draft202012Validator(graphschema.schema())

EVERYTHING = """\
apiVersion: baton/v1
kind: Graph
metadata: {name: nightly, labels: {team: data, year: 2026}, annotations: {why: because}}
spec:
  deadline: 1h30m
  priority: -5
  defaults:
    env: {A: "1", B: 2}
    retry: {attempts: 3, backoff: 500ms, max_backoff: 1m, multiplier: 1.5, losses: 7}
  tasks:
    - {id: a, argv: [python3, "${here}/a.py", 5, 0.5]}
    - id: b
      argv: [echo]
      after: [a]
      trigger: all_done
      resources: {cpu: 0.5, memory: 256Mi, disk: 1G, processes: 10, extended: {gpus: 1}}
      timeout: 90s
      on_cluster_lost: wait
      hedge: true
      clusters: [eu, us]
      selector: {region: eu}
      tolerations: [spot=true]
      require_isolation: true
      expected: 2.5s
      grace: 5s
    - id: c
      parents: [a, b]
      python: {function: "steps:run", args: [1, {result: a}], kwargs: {deep: {x: [null, 1.5]}}, requirements: [numpy==2.1.0]}
"""


def plain(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def faults(text: str) -> list[str]:
    return [error.message for error in JUDGE.iter_errors(plain(text))]


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(graphschema.schema())
    assert json.loads(json.dumps(graphschema.schema())) == graphschema.schema()


def test_the_reader_and_the_schema_know_the_same_fields() -> None:
    reading = graphfile._Loading(Reader("x"), "")
    assert set(reading._setters) == set(graphschema.TASK)


def test_every_field_says_what_it_is() -> None:
    tables = (graphschema.TOP, graphschema.METADATA, graphschema.SPEC, graphschema.TASK, graphschema.RETRY)
    for name, part in itertools.chain(
        *(table.items() for table in (*tables, graphschema.RESOURCES, graphschema.PYTHON))
    ):
        assert len(part["description"]) > 5, name


def test_good_files_are_good(checkout: Path) -> None:
    files = sorted((checkout / "examples").rglob("*.yaml"))
    assert files
    readme = re.findall(r"```yaml\n(.*?)```", (checkout / "README.md").read_text(), re.DOTALL)
    texts = [EVERYTHING, EXAMPLE, *(file.read_text() for file in files), *(t for t in readme if "kind: Graph" in t)]
    assert len(texts) >= 4
    for text in texts:
        graphfile.loads(text)
        assert faults(text) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("kind: Graph", "kind: Graf"),
        ("deadline: 1h30m", "dead_line: 1h30m"),
        ("priority: -5", "priority: 5000"),
        ("attempts: 3", "attempts: 0"),
        ("backoff: 500ms", "backoff: 500"),
        ("trigger: all_done", "trigger: sometimes"),
        ("cpu: 0.5", "cpu: half"),
        ("memory: 256Mi", "memory: 256Mib"),
        ("hedge: true", "hedge: 3"),
        ("clusters: [eu, us]", "clusters: eu"),
        ("id: b", "id: B!"),
        ("timeout: 90s", "timeout: 90"),
        ("{id: a, argv", "{argv"),
        ('function: "steps:run", ', ""),
    ],
)
def test_what_an_editor_underlines_the_judge_refuses_too(good: str, bad: str) -> None:
    assert good in EVERYTHING
    text = EVERYTHING.replace(good, bad, 1)
    assert faults(text)
    with pytest.raises(graphfile.GraphFileError):
        graphfile.loads(text)


def test_the_commented_example_shows_what_exists() -> None:
    live = re.sub(r"^(\s*)# (name|clusters|selector|on_cluster_lost|hedge):", r"\1\2:", EXAMPLE, flags=re.MULTILINE)
    live = re.sub(r"^    # (- id: report|  after|  python)", r"    \1", live, flags=re.MULTILINE)
    graph = graphfile.loads(live)
    assert graph.name == "nightly"
    assert [task.id for task in graph.spec.tasks][-1] == "report"
    assert faults(live) == []
