"""Names: what is printed can be read back, what is wrong is said shortly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import names

ids = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
task_ids = st.from_regex(r"[a-z0-9]([-a-z0-9_.]{0,61}[a-z0-9])?", fullmatch=True)


@given(ids, ids, task_ids)
def test_names_read_back(namespace: str, run: str, task: str) -> None:
    name = names.TaskName(namespace, run, task)
    assert names.parse_task(str(name)) == name
    assert names.parse_run(str(name.parent)) == name.parent
    assert names.parse_graph(f"namespaces/{namespace}/graphs/{run}") == names.GraphName(namespace, run)
    assert names.parse_cluster(f"clusters/{run}") == names.ClusterName(run)
    assert names.short_task(f"{run}/{task}", namespace) == name
    assert names.short_run(run, namespace) == names.short_run(str(name.parent), "other") == name.parent


@given(st.text(max_size=200))
def test_any_text_is_a_name_or_is_refused(text: str) -> None:
    for parse in (names.parse_run, names.parse_graph, names.parse_task, names.parse_cluster, names.short_cluster):
        try:
            told = str(parse(text))
        except names.InvalidName as error:
            told = f"{error}{text}"
        assert told.endswith(text)
        assert len(told) > len(text)


@pytest.mark.parametrize(
    "text", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", "a" * 64, "a\n", " a", "a\0", "../a", "a" * 1_000_000]
)
def test_bad_ids_are_refused_in_few_words(text: str) -> None:
    problem = names.id_problem(text)
    assert problem is not None
    assert len(problem) < 250


@pytest.mark.parametrize("text", ["a", "0", "a-b", "a" * 63])
def test_good_ids(text: str) -> None:
    assert names.id_problem(text) is None


def test_task_ids_may_look_like_functions_and_modules() -> None:
    assert names.task_id_problem("pkg.mod_fn-1") is None
    assert names.task_id_problem("pkg.") is not None
    assert names.task_id_problem("a\n") is not None


@pytest.mark.parametrize(
    ("kind", "text", "full"),
    [
        ("run", "r", "namespaces/team/runs/r"),
        ("run", "namespaces/x/runs/r", "namespaces/x/runs/r"),
        ("task", "r/a.b", "namespaces/team/runs/r/tasks/a.b"),
        ("task", "namespaces/x/runs/r/tasks/t", "namespaces/x/runs/r/tasks/t"),
        ("graph", "g", "namespaces/team/graphs/g"),
        ("graph", "namespaces/x/graphs/g", "namespaces/x/graphs/g"),
        ("cluster", "eu", "clusters/eu"),
        ("cluster", "clusters/eu", "clusters/eu"),
        ("cluster", "clusters", "clusters/clusters"),
    ],
)
def test_a_short_name_is_completed_and_a_full_one_stays(kind: names.Kind, text: str, full: str) -> None:
    assert names.full_name(kind, text, "team") == full


@pytest.mark.parametrize(
    ("kind", "texts", "forms"),
    [
        (
            "run",
            ["", "A b", "a/b", "clusters/eu", "namespaces/x/run/y", "a" * 64],
            "RUN or namespaces/NAMESPACE/runs/RUN",
        ),
        ("task", ["r", "r/", "/t", "r/t/u", "r/T"], "RUN/TASK or namespaces/NAMESPACE/runs/RUN/tasks/TASK"),
        ("graph", ["a_b", "namespaces/x/runs/y"], "GRAPH or namespaces/NAMESPACE/graphs/GRAPH"),
        ("cluster", ["a.b", "clusters/a/b", "x" * 1_000_000], "CLUSTER or clusters/CLUSTER"),
    ],
)
def test_what_is_no_name_is_answered_with_the_forms_that_are(kind: names.Kind, texts: list[str], forms: str) -> None:
    for text in texts:
        with pytest.raises(names.InvalidName, match=f"names no {kind}") as caught:
            names.full_name(kind, text, "team")
        assert str(caught.value).endswith(f"write {forms}")
        assert len(str(caught.value)) < 400


def test_wrong_collections_are_refused() -> None:
    for text in ("namespaces/a/graphs/b", "runs/b", "namespaces/a/runs", "namespaces/a/runs/b/tasks/c", "/" * 5_000):
        with pytest.raises(names.InvalidName):
            names.parse_run(text)


def test_reserved_environment() -> None:
    assert names.env_problem("BATON_RUN") is not None
    assert names.env_problem("1A") is not None
    assert names.env_problem("A=B") is not None
    assert names.env_problem("PATH") is None


def test_labels_and_annotations_are_limited() -> None:
    assert names.labels_problem({f"k{n}": "" for n in range(64)}) is None
    assert names.labels_problem({f"k{n}": "" for n in range(65)}) is not None
    assert names.labels_problem({"a": "b c"}) is not None
    assert names.labels_problem({"example.com/tier": "eu-west.1"}) is None
    assert names.annotations_problem({"a": "x" * (16 * 1024 - 1)}) is None
    assert names.annotations_problem({"a": "x" * 16 * 1024}) is not None
