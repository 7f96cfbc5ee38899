"""Work that waits on a cluster whose tasks turned slow goes to one that is free: production replica and agents, virtual time (C3)."""

from __future__ import annotations

from baton import Graph
from baton.testing import Call, Ended, Federation, Finished
from baton.v1 import run_pb2

SLOTS = 230
"""Of each cluster. More than wait: a twentieth of all slots is kept for urgent work."""
QUEUED = 200
"""Tasks beyond eu's slots; fewer than an agent lets wait."""

SLOW = 60.0


def same(count: int) -> Graph:
    """Tasks of one program."""
    graph = Graph()
    for number in range(count):
        graph.task(f"t{number}", argv=["work"])
    return graph


def waited(done: Finished) -> list[str]:
    """Tasks that came back from a queue."""
    return [
        name
        for name, task in done.tasks.items()
        if any(attempt.state == run_pb2.ATTEMPT_STATE_REJECTED for attempt in task.attempts)
    ]


def test_200_tasks_queued_on_eu_move_to_an_idle_us_after_the_program_turned_slow() -> None:
    lasts = 0.01

    def work(_call: Call) -> Ended:
        return Ended(seconds=lasts)

    with Federation(["eu", "us"], programs=work, cpus=SLOTS) as fed:
        fed.cut("us")
        fed.sleep(60)
        assert fed.run(same(SLOTS)).state == "SUCCEEDED"  # teaches that the program is short
        lasts = SLOW
        fed.heal("us", at=1.0)
        done = fed.run(same(SLOTS + QUEUED))
    assert done.state == "SUCCEEDED"
    moved = waited(done)
    assert len(moved) == QUEUED
    assert {tuple(done.clusters(name)) for name in moved} == {("eu", "us")}, "each moved once: no ping-pong"
    assert done.seconds < 1.5 * SLOW, "nobody waited for the end of the first ones"


def test_alone_a_slow_cluster_gets_back_what_fits_and_no_more() -> None:
    lasts = 0.01

    def work(_call: Call) -> Ended:
        return Ended(seconds=lasts)

    with Federation(["eu"], programs=work, cpus=4) as fed:
        assert fed.run(same(40)).state == "SUCCEEDED"
        lasts = 20.0
        done = fed.run(same(40))
    assert done.state == "SUCCEEDED"
    assert len(waited(done)) >= 30
    assert max(len(done.clusters(name)) for name in done.tasks) == 2, "what came back once is not queued again"
