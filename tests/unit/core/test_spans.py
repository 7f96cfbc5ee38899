"""A run's spans follow from its record: the same for every owner, each once, without gaps, both owners of a moved task shown."""

from __future__ import annotations

import itertools

from control_plane import agent_codec
from control_plane.core.commands import Finish, GenerationFenced, SavedCheckpoint, TakeReports
from control_plane.core.model import (
    ArtifactRef,
    AttemptId,
    AttemptState,
    Evidence,
    Outcome,
    RetryPolicy,
    RunState,
    TaskState,
)
from control_plane.core.shard import RunShard
from control_plane.core.span_model import (
    AttemptFacts,
    Change,
    RunFacts,
    Span,
    SpanKind,
    Status,
    TaskFacts,
    run_uid_of,
    trace_id_of,
)
from control_plane.core.span_times import overlapping_owners
from control_plane.core.spans import spans
from control_plane.services import translate
from control_plane.services.trace import Record, changes, facts, spans_of
from tests.unit.core.shard_kit import START, Shard, generation, task
from tests.unit.core.shard_kit import facts as cluster

UID = "0123456789abcdef01234567"
SECOND = 1_000_000_000


def record(machine: RunShard, uid: str = "r1", now: float = 0.0) -> Record:
    view = machine.run_by_uid(uid)
    assert view is not None
    events = machine.kept_events(uid)
    ids = machine.task_ids(uid, {index for event in events for index in event.tasks})
    return Record(
        translate.run(view, "00"),
        [translate.task(each, str.upper) for each in machine.tasks(uid, 0, 1000)],
        [translate.run_event(event, ids.__getitem__, str.upper) for event in events],
        now,
    )


def trace(shard: Shard, machine: RunShard | None = None) -> list[Span]:
    of = record(machine or shard.machine, now=shard.now)
    return list(spans(*facts(of), changes(of.events)))


def report(
    shard: Shard, attempt: AttemptId, took: float, outcome: Outcome = Outcome.SUCCEEDED, skew: float = 0.0
) -> None:
    """The end of an attempt that ran for the last `took` seconds, by a clock that is `skew` seconds ahead."""
    end = shard.now + skew - 0.25
    done = Finish(attempt, outcome, 0, b"", "it broke" if outcome is Outcome.FAILED else "", end - took, end)
    shard.do(TakeReports(shard.cluster_of(attempt), 1, finished=(done,)))
    shard.settled()


def failed_over() -> Shard:
    """a > b; a moves from cluster x to y when x is lost."""
    shard = Shard(cluster("x"))
    shard.create(task("a"), task("b", 0))
    shard.later(2)
    shard.grant("x")
    first = shard.only()
    shard.later(1)
    shard.do(TakeReports("x", 1, started=((first, shard.now),)))
    shard.later(9)
    shard.fleet(cluster("x", generation(1, evidence=Evidence.TIMED)), cluster("y"))
    shard.later(30)
    shard.do(GenerationFenced("x", 1, Evidence.TIMED))
    shard.settled()
    shard.grant("y")
    shard.later(5)
    report(shard, shard.only(), 4)
    shard.later(1)
    shard.grant("y")
    shard.later(4)
    report(shard, shard.only(1), 3)
    return shard


def owners(made: list[Span]) -> list[Span]:
    return [span for span in made if span.kind is SpanKind.ATTEMPT]


def phases(made: list[Span], of: Span) -> list[Span]:
    return [span for span in made if span.parent_id == of.span_id]


def attribute(span: Span, key: str) -> object:
    return dict(span.attributes)[key]


def test_ids_follow_from_identities_and_lead_back() -> None:
    assert run_uid_of(trace_id_of(UID)) == UID
    assert run_uid_of("f" * 8 + UID) is None
    assert len(trace_id_of("r1")) == len(trace_id_of(UID)) == 32
    assert trace_id_of("r1") != trace_id_of("r2")


def test_an_attempts_span_is_the_one_its_workload_was_told() -> None:
    shard = failed_over()
    for span in owners(trace(shard)):
        index = 0 if span.task == "a" else 1
        context = agent_codec.traceparent(span.trace_id, AttemptId("r1", index, span.n, "any"))
        assert context == f"00-{span.trace_id}-{span.span_id}-01"


def test_a_failover_shows_both_owners_and_links_them() -> None:
    made = trace(failed_over())
    first, second, child = owners(made)
    assert (first.task, first.cluster, first.status) == ("a", "X", Status.ERROR)
    assert (second.task, second.cluster, second.status) == ("a", "Y", Status.OK)
    assert [(link.span_id, link.relation) for link in second.links] == [(first.span_id, "replaces")]
    assert attribute(first, "baton.evidence") == "timed"
    assert attribute(first, "baton.outcome") == "LOST"
    assert attribute(second, "baton.moved_from") == "X"
    assert (attribute(second, "baton.losses"), attribute(second, "baton.retries")) == (1, 0)
    assert attribute(second, "baton.overlap_possible") is False
    assert attribute(second, "baton.fence") == "1.2"
    assert [event.name for event in first.events] == ["lost"]
    assert first.end == second.start, "the task is somebody's at any moment"
    assert child.links == ()


def test_no_span_twice_and_no_gap() -> None:
    made = trace(failed_over())
    assert made[0].start == int(START) * SECOND
    assert len({span.span_id for span in made}) == len(made)
    root = made[0]
    known = {span.span_id for span in made}
    assert (root.parent_id, root.kind, root.open) == ("", SpanKind.RUN, False)
    assert all(span.parent_id in known for span in made[1:])
    for owner in owners(made):
        tiles = phases(made, owner)
        assert (tiles[0].start, tiles[-1].end) == (owner.start, owner.end)
        assert all(before.end == after.start for before, after in itertools.pairwise(tiles))
    a, b, c = owners(made)
    assert (root.start, a.end, b.end, root.end) == (a.start, b.start, c.start, c.end)
    assert [span.kind for span in phases(made, b)] == [
        SpanKind.QUEUE,
        SpanKind.DISPATCH,
        SpanKind.EXECUTE,
        SpanKind.REPORT,
    ]
    assert [(span.end - span.start) / SECOND for span in phases(made, b)] == [0, 0.75, 4, 0.25]


def test_the_same_for_the_next_owner() -> None:
    shard = failed_over()
    made = trace(shard)
    assert trace(shard, shard.replayed()) == made
    assert trace(shard, shard.restored()) == made
    assert spans_of(record(shard.machine)) == spans_of(record(shard.restored()))


def test_a_takeover_in_the_middle_changes_nothing() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("a"), task("b", 0))
    shard.grant("x")
    shard.later(3)
    before = trace(shard)
    shard.take_over(snapshot=True)
    assert trace(shard) == before
    shard.later(1)
    report(shard, shard.only(), 2)
    assert owners(trace(shard))[0].span_id == owners(before)[0].span_id
    assert len(owners(trace(shard))) == len(owners(before)) + len(shard.live(1))


def test_retries_say_so_and_wait_for_their_backoff() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("a", retry=RetryPolicy(max_attempts=3)))
    shard.grant("x")
    shard.later(2)
    report(shard, shard.only(), 1, Outcome.FAILED)
    shard.later(30)
    shard.grant("x")
    shard.later(2)
    report(shard, shard.only(), 1)
    first, second = owners(trace(shard))
    assert (first.status, first.message) == (Status.ERROR, "it broke")
    assert second.links[0].relation == "retries"
    assert attribute(second, "baton.retries") == 1
    assert first.end == second.start


def test_clocks_of_clusters_cannot_break_the_order() -> None:
    for skew in (-3600.0, 3600.0):
        shard = Shard(cluster("x"))
        shard.create(task("a"))
        shard.grant("x")
        shard.later(5)
        report(shard, shard.only(), 2, skew=skew)
        made = trace(shard)
        assert all(span.start <= span.end for span in made)
        assert all(made[0].start <= span.start and span.end <= made[0].end for span in made)


def test_the_critical_path_is_the_chain_that_decided() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("root"), task("short", 0), task("long", 0), task("join", 1, 2))
    shard.grant("x")
    shard.later(1)
    report(shard, shard.only(), 0.5)
    shard.grant("x", 2)
    shard.later(2)
    report(shard, shard.only(1), 1)
    shard.later(8)
    report(shard, shard.only(2), 9)
    shard.grant("x")
    shard.later(1)
    report(shard, shard.only(3), 0.5)
    made = trace(shard)
    assert [span.task for span in owners(made) if span.critical] == ["root", "long", "join"]
    spent = sum(span.end - span.start for span in made if span.critical and span.kind > SpanKind.ATTEMPT)
    assert spent == made[0].end - made[0].start, "it accounts for the whole run"


def test_a_run_that_goes_on_is_open() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("a"), task("b", 0), task("c"))
    shard.grant("x", 1)
    shard.later(3)
    made = trace(shard)
    assert made[0].open
    (owner,) = owners(made)
    assert owner.open
    waiting = [span for span in made if span.kind is SpanKind.QUEUE and not span.n]
    assert [(span.task, span.open) for span in waiting] == [("c", True)]


def test_what_got_no_place_shows_as_waiting() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("a"), deadline=20)
    shard.later(60)
    assert shard.outcome() is RunState.DEADLINE_EXCEEDED
    root, waiting = trace(shard)
    assert (waiting.kind, waiting.parent_id, waiting.start, waiting.end) == (
        SpanKind.QUEUE,
        root.span_id,
        root.start,
        root.end,
    )
    assert root.status is Status.ERROR


def test_without_kept_events_the_attempts_own_times_serve() -> None:
    shard = failed_over()
    run, tasks = facts(record(shard.machine))
    made = list(spans(run, tasks, ()))
    assert [(span.task, span.n) for span in owners(made)] == [("a", 1), ("a", 2), ("b", 1)]
    assert [span.span_id for span in owners(made)] == [span.span_id for span in owners(trace(shard))]
    for owner in owners(made):
        tiles = phases(made, owner)
        assert (tiles[0].start, tiles[-1].end) == (owner.start, owner.end)


def test_a_hedge_is_linked_to_what_it_copies() -> None:
    attempts = (
        AttemptFacts(1, "1.1", "x", 1, AttemptState.STOPPED, placed=10, start=12, end=40),
        AttemptFacts(2, "1.2", "y", 1, AttemptState.SUCCEEDED, placed=30, start=31, end=40, hedge=True),
    )
    run = RunFacts("r1", "namespaces/ns/runs/r", RunState.SUCCEEDED, "", 5, 40, 99, 1)
    made = list(spans(run, [TaskFacts(0, "a", TaskState.SUCCEEDED, "", (), attempts)], ()))
    primary, hedge = owners(made)
    assert [(link.span_id, link.relation) for link in hedge.links] == [(primary.span_id, "hedges")]
    assert (primary.critical, hedge.critical) == (True, True)


def test_two_owners_at_once_are_counted_by_the_order_of_the_journal() -> None:
    def row(kind: str, n: int, state: TaskState = TaskState.PLACED) -> Change:
        return Change(0, kind, 7, n, state)

    won = row("finished", 2, TaskState.SUCCEEDED)
    assert overlapping_owners([row("placed", 1), row("lost", 1), row("placed", 2), won]) == 0
    assert overlapping_owners([row("placed", 1), row("placed", 2), row("lost", 1), won]) == 1
    assert overlapping_owners([row("placed", 1), row("hedged", 2), won]) == 0
    assert overlapping_owners([row("placed", 1), row("failed", 1, TaskState.FAILED), row("placed", 2)]) == 0
    shard = failed_over()
    assert overlapping_owners(changes(record(shard.machine).events)) == 0


def test_a_trace_shows_what_was_saved_and_from_where_it_went_on() -> None:
    shard = Shard(cluster("x"))
    shard.create(task("a"))
    shard.grant("x")
    first = shard.only()
    for number in (39, 40):
        shard.later(20)
        ref = ArtifactRef(f"checkpoint-{number}", 7, bytes(32))
        shard.do(TakeReports("x", 1, checkpoints=(SavedCheckpoint(first, ref),)))
    shard.fleet(cluster("x", generation(1, evidence=Evidence.TIMED)), cluster("y"))
    shard.do(GenerationFenced("x", 1, Evidence.TIMED))
    shard.settled()
    shard.grant("y")
    report(shard, shard.only(), 1)
    one, two = owners(trace(shard))
    assert [(e.name, e.detail) for e in one.events][:2] == [
        ("checkpoint", "saved checkpoint-39, 7 bytes"),
        ("checkpoint", "saved checkpoint-40, 7 bytes"),
    ]
    assert dict(one.attributes)["baton.checkpoint"] == "checkpoint-40"
    assert dict(two.attributes)["baton.resumed_from_checkpoint"] == "1/checkpoint-40"
    assert trace(shard, shard.restored()) == trace(shard, shard.replayed()) == trace(shard)
