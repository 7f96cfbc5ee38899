"""What fits (PROTOCOL C3, C4)."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster_agent.core.capacity import QUEUE_CEILING, QUEUE_FLOOR, Ledger, LocalQueue, NodeSpec
from cluster_agent.core.model import AttemptKey, Demand


def key(task: int) -> AttemptKey:
    return AttemptKey("run", task, 1, "x")


def test_c4_two_tens_are_no_hole_of_twenty() -> None:
    ledger = Ledger([NodeSpec(10_000, count=2)])
    assert not ledger.place(key(0), Demand(20_000))
    assert "20000 > 10000" in ledger.never_fits(Demand(20_000))
    assert ledger.never_fits(Demand(10_000)) == ""
    assert ledger.place(key(0), Demand(10_000))
    assert ledger.place(key(1), Demand(10_000))
    assert not ledger.place(key(2), Demand(1))


def test_c4_equal_nodes_are_one_shape_and_different_ones_are_not() -> None:
    ledger = Ledger([NodeSpec(4000, 1 << 30, extended=(("gpus", 2),), count=3)])
    assert [shape.count for shape in ledger.shapes()] == [3]
    assert ledger.place(key(0), Demand(1000, 1 << 20, 0, (("gpus", 2),)))
    used, free = ledger.shapes()
    assert (used.count, used.cpu_millis, used.memory_bytes, used.extended) == (
        1,
        3000,
        (1 << 30) - (1 << 20),
        (("gpus", 0),),
    )
    assert (free.count, free.cpu_millis, free.total_cpu_millis) == (2, 4000, 4000)


def test_every_dimension_counts_and_unaccounted_ones_do_not() -> None:
    ledger = Ledger([NodeSpec(1000, memory_bytes=100, disk_bytes=0, extended=(("gpus", 1),))])
    assert "memory_bytes" in ledger.never_fits(Demand(0, 101))
    assert "tpus" in ledger.never_fits(Demand(0, 0, 0, (("tpus", 1),)))
    assert ledger.never_fits(Demand(1000, 100, 1 << 50, (("gpus", 1),))) == ""
    assert Ledger([]).never_fits(Demand()) == "no nodes"


def test_c4_what_waits_is_no_free_room() -> None:
    ledger = Ledger([NodeSpec(4000)])
    assert ledger.shapes([Demand(1000), Demand(1000)])[0].cpu_millis == 2000
    assert ledger.shapes([Demand(3000), Demand(3000)])[0].cpu_millis == 0
    assert ledger.shapes()[0].cpu_millis == 4000
    assert ledger.shapes(closed=True)[0].cpu_millis == 0
    assert ledger.shapes(closed=True)[0].total_cpu_millis == 4000


def test_what_already_runs_is_counted_even_without_room() -> None:
    ledger = Ledger([NodeSpec(1000)])
    for task in range(3):
        ledger.claim(key(task), Demand(1000))
    ledger.claim(key(0), Demand(1000))
    assert ledger.shapes()[0].cpu_millis == 0
    for task in range(2):
        ledger.release(key(task))
    assert not ledger.place(key(9), Demand(1000))
    ledger.release(key(2))
    assert ledger.place(key(9), Demand(1000))


def test_the_queue_is_bounded_by_capacity_beyond_its_floor() -> None:
    queue = LocalQueue(cpu_millis=1000 * (QUEUE_FLOOR + 2), memory_bytes=0)
    assert all(queue.offer(key(task), Demand(1000), 0.0) for task in range(QUEUE_FLOOR + 2))
    assert not queue.offer(key(9_999), Demand(1000), 0.0)
    queue.remove(key(0))
    assert queue.offer(key(9_999), Demand(1000), 0.0)
    assert [held.task for held in queue.clear()][-1] == 9_999
    assert len(queue) == 0


def test_the_queue_is_bounded_for_tasks_that_ask_for_nothing() -> None:
    queue = LocalQueue(1000, 0)
    assert sum(queue.offer(key(task), Demand(), 0.0) for task in range(QUEUE_CEILING + 5)) == QUEUE_CEILING


demands = st.builds(Demand, st.integers(0, 3000), st.integers(0, 300))


@given(st.lists(st.tuples(st.integers(0, 9), demands, st.booleans()), max_size=50))
def test_free_room_is_capacity_less_what_is_held(script: Sequence[tuple[int, Demand, bool]]) -> None:
    ledger = Ledger([NodeSpec(4000, 400), NodeSpec(2000, 200)])
    held: dict[int, Demand] = {}
    for task, demand, give_back in script:
        if give_back:
            ledger.release(key(task))
            held.pop(task, None)
        elif task not in held and ledger.place(key(task), demand):
            held[task] = demand
        shapes = ledger.shapes()
        assert sum(s.cpu_millis * s.count for s in shapes) == 6000 - sum(d.cpu_millis for d in held.values())
        assert sum(s.memory_bytes * s.count for s in shapes) == 600 - sum(d.memory_bytes for d in held.values())
