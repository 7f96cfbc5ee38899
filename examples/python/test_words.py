"""How a graph is tested: `python -m pytest examples/python`. A whole federation in memory, virtual time, real functions."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # this folder's modules, however pytest was started
from words import answer, graph

from baton.testing import Federation


def test_the_most_frequent_word() -> None:
    with Federation(clusters=["eu", "us"]) as fed:
        done = fed.run(graph)
    assert done.state == "SUCCEEDED"
    assert done.results[answer] == {"word": "the", "times": 9, "books": 3}


def test_the_loss_of_a_cluster_changes_nothing() -> None:
    with Federation(clusters=["eu", "us"], seconds={"count": 10}) as fed:
        fed.lose(when="count-1")  # whichever cluster runs it, half a second after it starts there
        done = fed.run(graph)
    assert done.results[answer] == {"word": "the", "times": 9, "books": 3}
    assert len(set(done.clusters("count-1"))) == 2, "it was moved"
    assert done.seconds > 20, "its work waited until the lost cluster's could not run any more"


def test_a_network_cut_shorter_than_the_fence_moves_nothing() -> None:
    with Federation(clusters=["eu", "us"], seconds={"count": 10}) as fed:
        fed.cut(when="count-1", seconds=4)
        done = fed.run(graph)
    assert all(len(task.attempts) == 1 for task in done.tasks.values())
