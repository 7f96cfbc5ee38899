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
