"""Graph files: what is right becomes the message it says; what is wrong is told with file, line, field and fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import graphfile, graphfile_yaml, quantity
from baton.v1 import graph_pb2

HEAD = "apiVersion: baton/v1\nkind: Graph\nspec:\n  deadline: 10m\n  tasks:\n"


def tasks(body: str) -> str:
    return HEAD + "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))


def problems(text: str) -> list[graphfile.Problem]:
    with pytest.raises(graphfile.GraphFileError) as caught:
        graphfile.loads(text, path="g.yaml")
    assert caught.value.problems
    return caught.value.problems


def test_everything_that_a_file_can_say() -> None:
    graph = graphfile.loads(
        """\
apiVersion: baton/v1
kind: Graph
metadata: {name: nightly, labels: {team: data}, annotations: {why: because}}
spec:
  deadline: 1h30m
  priority: -5
  defaults:
    env: {A: "1", B: "2"}
    retry: {attempts: 3, backoff: 500ms, max_backoff: 1m, multiplier: 1.5, losses: 7}
  tasks:
    - id: a
      argv: [python3, "${here}/a.py", 5, 0.5]
      env: {B: x, HERE: "${here}"}
    - id: b
      argv: [echo]
      after: [a]
      trigger: all_done
      resources: {cpu: 0.5, memory: 256Mi, disk: 1G, processes: 10, extended: {gpus: 1}}
      retry: {attempts: 5}
      timeout: 90s
      on_cluster_lost: wait
      hedge: true
      clusters: [eu, us]
      selector: {region: eu}
      tolerations: [spot=true]
      require_isolation: true
      expected: 2.5s
      grace: 5s
""",
        here="/srv",
    )
    assert (graph.name, graph.labels, graph.annotations) == ("nightly", {"team": "data"}, {"why": "because"})
    assert (graph.deadline_seconds, graph.deadline_at, graph.priority) == (5400.0, None, -5)
    first, second = graph.spec.tasks
    assert list(first.process.argv) == ["python3", "/srv/a.py", "5", "0.5"]
    assert dict(first.process.env) == {"A": "1", "B": "x", "HERE": "/srv"}
    assert (first.retry.max_attempts, first.retry.initial_backoff.ToMilliseconds()) == (3, 500)
    assert (second.retry.max_attempts, second.retry.max_infrastructure_losses) == (5, 7)
    assert list(second.parents) == ["a"]
    assert second.trigger_rule == graph_pb2.TRIGGER_RULE_ALL_DONE
    assert second.on_cluster_lost == graph_pb2.ON_CLUSTER_LOST_WAIT
    assert (second.resources.cpu_millis, second.resources.memory_bytes) == (500, 256 * 2**20)
    assert (second.resources.disk_bytes, second.resources.processes) == (10**9, 10)
    assert dict(second.resources.extended) == {"gpus": 1}
    assert (second.timeout.seconds, second.expected_duration.ToMilliseconds()) == (90, 2500)
    assert (second.hedge, second.require_isolation, list(second.clusters)) == (True, True, ["eu", "us"])
    assert (dict(second.cluster_selector), list(second.tolerations)) == ({"region": "eu"}, ["spot=true"])


def test_an_absolute_deadline() -> None:
    text = tasks("- {id: a, argv: [x]}").replace("10m", "2026-11-30T18:00:00Z")
    assert graphfile.loads(text).deadline_at == 1796061600.0
    assert "time zone" in problems(text.replace("00Z", "00"))[0].fix


BAD = [
    # (tasks, line, field, a word of what or fix)
    ("- {id: a, argv: [x], retrry: {}}", 6, "spec.tasks[0].retrry", "did you mean `retry`?"),
    ("- id: a\n  argv: [x]\n  resources: {cpu: -1}", 8, "spec.tasks[0].resources.cpu", "not negative"),
    ("- id: a\n  argv: [x]\n  resources: {cpu: .nan}", 8, "spec.tasks[0].resources.cpu", "finite"),
    ("- id: a\n  argv: [x]\n  resources: {memory: .inf}", 8, "spec.tasks[0].resources.memory", "finite"),
    ("- id: a\n  argv: [x]\n  resources: {processes: .nan}", 8, "spec.tasks[0].resources.processes", "finite"),
    ("- id: a\n  argv: [x]\n  resources: {memory: 1Zi}", 8, "spec.tasks[0].resources.memory", "256Mi"),
    ("- id: a\n  argv: [x]\n  resources: {memory: -1Gi}", 8, "spec.tasks[0].resources.memory", "not negative"),
    ("- id: a\n  argv: [x]\n  resources: {cpu: [1]}", 8, "spec.tasks[0].resources.cpu", "500m"),
    ("- id: a\n  argv: [x]\n  resources: 5", 8, "spec.tasks[0].resources", "mapping"),
    ("- id: a\n  argv: [x]\n  retry: {multiplier: .nan}", 8, "spec.tasks[0].retry.multiplier", "finite"),
    ("- id: a\n  argv: [x]\n  retry: {multiplier: 0.5}", 8, "spec.tasks[0].retry.multiplier", "1 to 10"),
    ("- id: a\n  argv: [x]\n  retry: {attempts: 0}", 8, "spec.tasks[0].retry.attempts", "from 1"),
    ("- id: a\n  argv: [x]\n  retry: {attempts: two}", 8, "spec.tasks[0].retry.attempts", "whole number"),
    ("- id: a\n  argv: [x]\n  timeout: 30", 8, "spec.tasks[0].timeout", "units"),
    ("- id: a\n  argv: [x]\n  timeout: -5s", 8, "spec.tasks[0].timeout", "not negative"),
    ("- id: a\n  argv: [x]\n  timeout: 900d", 8, "spec.tasks[0].timeout", "30 days"),
    ("- id: a\n  argv: echo hi", 7, "spec.tasks[0].argv", "list"),
    ("- id: a\n  argv: []", 7, "spec.tasks[0].argv", "empty"),
    ("- id: a\n  argv: [x, true]", 7, "spec.tasks[0].argv[1]", "quotes"),
    ('- id: a\n  argv: [x, "a\\0b"]', 7, "spec.tasks[0].argv[1]", "NUL"),
    ("- id: a\n  argv:\n    - x\n    - {a: b}", 9, "spec.tasks[0].argv[1]", "text"),
    ("- id: a\n  argv: [x]\n  env: {BATON_X: y}", 8, 'spec.tasks[0].env["BATON_X"]', "BATON_"),
    ("- id: a\n  argv: [x]\n  env: [x]", 8, "spec.tasks[0].env", "mapping"),
    ("- id: a\n  argv: [x]\n  hedge: maybe", 8, "spec.tasks[0].hedge", "true or false"),
    ("- id: a\n  argv: [x]\n  trigger: sometimes", 8, "spec.tasks[0].trigger", "all_done"),
    ("- id: a\n  argv: [x]\n  on_cluster_lost: panic", 8, "spec.tasks[0].on_cluster_lost", "never_rerun"),
    ("- id: a\n  argv: [x]\n  argv: [y]", 8, "spec.tasks[0].argv", "twice"),
    ("- id: a\n  argv: [x]\n  after: [b]", 8, "spec.tasks[0].after[0]", "no task"),
    ("- id: a\n  argv: [x]\n  after: [a]", 8, "spec.tasks[0].after[0]", "itself"),
    (
        "- id: a\n  argv: [x]\n  after: [b]\n- id: b\n  argv: [x]\n  after: [a]",
        8,
        "spec.tasks[0].after[0]",
        "a -> b -> a",
    ),
    ("- {id: a, argv: [x]}\n- {id: a, argv: [x]}", 7, "spec.tasks[1].id", "already"),
    ("- {argv: [x]}", 6, "spec.tasks[0]", "no id"),
    ("- id: a", 6, "spec.tasks[0].process", "missing"),
    ("- id: 5\n  argv: [x]", 6, "spec.tasks[0].id", "quotes"),
    ("- {id: A, argv: [x]}", 6, "spec.tasks[0].id", "a-z"),
    ("- null", 6, "spec.tasks[0]", "mapping"),
    ("- id: a\n  argv: !!python/object:os.system [x]", 7, "spec.tasks[0].argv", "list"),
    ("- &a {id: a, argv: [x]}\n- {<<: *a, id: b}", 7, "spec.tasks[1].<<", "defaults"),
    ("- {id: a, argv: [x], after: [], parents: []}", 6, "spec.tasks[0].after", "keep one"),
    ("- {id: a, ? [x] : y, argv: [x]}", 6, "spec.tasks[0]", "key"),
]


@pytest.mark.parametrize(("body", "line", "field", "word"), BAD, ids=[case[0][-40:] for case in BAD])
def test_bad_tasks(body: str, line: int, field: str, word: str) -> None:
    first = problems(tasks(body))[0]
    assert (first.file, first.line, first.field) == ("g.yaml", line, field)
    assert word in f"{first.what} {first.fix}"
    assert str(first).startswith(f"g.yaml:{line}: {field}: ")


FRAMES = [
    ("", 1, "empty"),
    ("# nothing\n", 1, "empty"),
    ("5", 1, "mapping"),
    ("- a", 1, "mapping"),
    (HEAD.replace("baton/v1", "baton/v2") + "    - {id: a, argv: [x]}", 1, "baton/v1"),
    (HEAD.replace("Graph", "Pod") + "    - {id: a, argv: [x]}", 2, "Graph"),
    (HEAD.replace("10m", "0s") + "    - {id: a, argv: [x]}", 4, "30d"),
    (HEAD.replace("10m", "5") + "    - {id: a, argv: [x]}", 4, "unit"),
    (HEAD.replace("10m", "soon") + "    - {id: a, argv: [x]}", 4, "units"),
    ("apiVersion: baton/v1\nkind: Graph\nspec:\n  tasks: []\n", 4, "at least one"),
    ("apiVersion: baton/v1\nkind: Graph\nspec: {}\n", 3, "at least one"),
    ("apiVersion: baton/v1\nkind: Graph\n", 1, "spec"),
    ("kind: Graph\nspec: {tasks: [{id: a, argv: [x]}]}\n", 1, "apiVersion"),
    ("a:\n\tb: 1\n", 2, "spaces"),
    ("a: [1\nb: 2\n", 2, "brackets"),
    ("a: 1\n---\nb: 2\n", 2, "one graph"),
    ("a: 'x\n", 2, "quotes"),
    ("x: *nowhere\n", 1, "alias"),
    ("a: \x00\n", 1, "character"),
    ("[" * 5_000, 1, "deep"),
    ("%YAML 9.9\n---\na: 1\n", 1, "version"),
]


@pytest.mark.parametrize(("text", "line", "word"), FRAMES, ids=[case[0][:20] or "nothing" for case in FRAMES])
def test_bad_frames(text: str, line: int, word: str) -> None:
    first = problems(text)[0]
    assert (first.file, first.line) == ("g.yaml", line)
    assert word in str(first)


def test_metadata_is_judged() -> None:
    frame = "apiVersion: baton/v1\nkind: Graph\nmetadata: {%s}\nspec: {deadline: 1m, tasks: [{id: a, argv: [x]}]}\n"
    for entry in (
        "name: A",
        "name: [x]",
        "labels: {a b: c}",
        "labels: [a]",
        "annotations: {a: %s}" % ("x" * 20_000),
        "nam: x",
    ):
        first = problems(frame % entry)[0]
        assert first.line == 3
        assert first.field.startswith(f"metadata.{entry.split(':')[0]}")


def test_a_huge_name_makes_a_small_error() -> None:
    text = tasks(f"- {{id: {'a' * 1_000_000}, argv: [x]}}")
    (problem,) = problems(text)
    assert len(str(problem)) < 300


def test_a_fault_in_the_defaults_is_told_once_and_there() -> None:
    text = tasks("- {id: a, argv: [x]}\n- {id: b, argv: [x]}")
    text = text.replace("  tasks:", "  defaults: {retry: {multiplier: 99}}\n  tasks:")
    (problem,) = problems(text)
    assert (problem.line, problem.field) == (5, "spec.defaults.retry.multiplier")


def test_problems_are_told_together_and_bounded() -> None:
    assert len(problems(tasks("- {id: A, argv: [x]}\n- {id: B, argv: [x]}"))) == 2
    assert len(problems(tasks("\n".join(["- {idd: a}"] * 100)))) == graphfile_yaml.MAX_PROBLEMS


def test_an_alias_bomb_is_refused() -> None:
    many = ", ".join(f"t{n}" for n in range(2000))
    bomb = f"- {{id: a, argv: [x], clusters: &c [{many}]}}\n" + "\n".join(["- {argv: [x], id: b, clusters: *c}"] * 2000)
    assert any("alias" in str(problem) for problem in problems(tasks(bomb)))


def test_an_alias_of_itself_is_a_wrong_type() -> None:
    assert problems(tasks("- id: a\n  argv: &a [*a]"))[0].field == "spec.tasks[0].argv[0]"


def test_aliases_are_told_at_the_line_that_uses_them() -> None:
    text = tasks("- id: a\n  argv: [x]\n  env: &e {A: b}\n- id: b\n  argv: [x]\n  resources: *e")
    assert problems(text)[0].line in {8, 11}
    assert problems(text)[0].field == "spec.tasks[1].resources.A"


@given(st.text(max_size=200))
def test_any_text_is_a_graph_or_a_problem(text: str) -> None:
    for whole in (text, tasks(f"- {text}")):
        try:
            told = len(graphfile.loads(whole).spec.tasks)
        except graphfile.GraphFileError as error:
            told = len(error.problems)
        assert told > 0


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(graphfile_yaml.MAX_BYTES + 1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, line, word in (
        (tmp_path, 0, "is a directory. Fix: name a YAML file, or `-`"),
        (tmp_path / "none.yaml", 0, "No such file"),
        (latin, 2, "UTF-8"),
        (large, 0, "larger"),
        (pipe, 0, "regular"),
        (tmp_path / ("x" * 5000), 0, "too long"),
        ("a\0b", 0, "null"),
        ("", 0, "'': names no file"),
    ):
        with pytest.raises(graphfile.GraphFileError) as caught:
            graphfile.load(str(path))
        assert caught.value.problems[0].line == line
        assert word in str(caught.value)
        assert (":1:" in str(caught.value)) is (line == 1)  # a file that cannot be read has no line 1


def test_here_is_the_folder_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(tasks('- {id: a, argv: ["${here}/x", "$HOME", "${other}"]}'))
    graph = graphfile.load(str(file))
    assert list(graph.spec.tasks[0].process.argv) == [f"{tmp_path}/x", "$HOME", "${other}"]


def test_servers_paths_lead_back_to_lines() -> None:
    graph = graphfile.loads(tasks("- id: a\n  argv: [x]\n  retry: {attempts: 2}"), path="g.yaml")
    found = graph.problem("spec.tasks[0].retry.max_attempts", "is too many")
    assert str(found) == "g.yaml:8: spec.tasks[0].retry.attempts: is too many"
    assert graph.problem("deadline_time", "is past").line == 4
    assert graph.problem("priority", "is odd").line == 1


@pytest.mark.parametrize(
    ("text", "nanos"),
    [("500ms", 5 * 10**8), ("1h30m", 5400 * 10**9), ("2.5s", 25 * 10**8), ("1d", 86400 * 10**9), ("-1s", -(10**9))],
)
def test_durations(text: str, nanos: int) -> None:
    assert quantity.duration_nanos(text) == nanos


@pytest.mark.parametrize("text", ["", "5", "s", "1x", "1s2", "1 s", "nan", "1e3s", "٣s", "-"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="units"):
        quantity.duration_nanos(text)


def test_amounts() -> None:
    assert [quantity.cpu_millis(text) for text in ("1", "0.5", "250m", "0")] == [1000, 500, 250, 0]
    assert [quantity.amount_bytes(text) for text in ("1", "1k", "1Ki", "1.5Gi", "1GB")] == [
        1,
        1000,
        1024,
        1610612736,
        10**9,
    ]
    with pytest.raises(ValueError, match="thousandth"):
        quantity.cpu_millis("0.0001")


@given(st.floats(0, 1e7))
def test_spans_are_short(seconds: float) -> None:
    assert len(quantity.format_seconds(seconds)) <= 8


def test_a_bad_name_does_not_hide_the_graphs_own_mistakes() -> None:
    text = tasks("- {id: a, argv: [echo], after: [b]}").replace("kind: Graph\n", "kind: Graph\nmetadata: {name: A B}\n")
    assert [problem.field for problem in problems(text)] == ["metadata.name", "spec.tasks[0].after[0]"]


def test_a_file_that_is_no_graph_is_not_told_back_to_who_named_it() -> None:
    """A wrong path may name a file of secrets: three unknown fields of 40 characters are told, no whole line."""
    lines = [f"user{number}-{'x' * 100}: secret\n" for number in range(9)]
    found = problems("".join(lines))
    unknown = [problem for problem in found if problem.what == "is not a known field"]
    assert [problem.field for problem in unknown] == [f"user{number}-{'x' * 34}..." for number in range(3)]
    assert [(problem.line, problem.what) for problem in found if "more" in problem.what] == [
        (4, "and 6 more unknown fields")
    ]
    assert "secret" not in "".join(map(str, found))
    for text in ("root:hash:19000:0:99999:7:::\nbin:hash:19000:0:99999:7:::\n", "hash of a password\n"):
        assert "hash" not in "".join(map(str, problems(text)))
