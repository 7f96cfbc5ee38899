"""The example is a good graph, and its functions are plain functions."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from baton import validate


def test_the_example_builds_a_good_graph(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checkout / "examples" / "python"))
    words = importlib.import_module("words")
    spec = words.graph.spec()
    assert validate.violations(spec) == []
    assert [task.id for task in spec.tasks] == ["count-0", "count-1", "count-2", "titles", "most_frequent"]
    counts = [words.count(title) for title in words.titles()]
    assert words.most_frequent(counts, known=words.titles()) == {"word": "the", "times": 9, "books": 3}
