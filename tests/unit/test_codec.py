"""Stored forms: every event there and back, parts, versions (PROTOCOL J1, J11)."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.internal import events_pb2 as pb
from control_plane.batches import BatchReader, BatchWriter, nonce_of, open_envelope, seal, unpack
from control_plane.codec import FEATURE_LEVEL, Interned, read_event, write_event
from control_plane.core import events as ev
from control_plane.core.model import GraphTask, Resources, RetryPolicy, Stamp, TaskSpec
from control_plane.manifest import KEPT_NONCES, NONCE_BYTES, Manifest, keep_nonces
from control_plane.recovery import snapshot_content, snapshot_events
from control_plane.refusals import Corrupt, TooNew

KINDS: tuple[type, ...] = typing.get_args(ev.Event)

INTS = st.integers(0, 2**31 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple)
FLOATS = st.floats(allow_nan=False)
SPECS = st.builds(
    TaskSpec,
    argv=st.lists(TEXT, max_size=3).map(tuple),
    env=PAIRS,
    resources=st.builds(
        Resources,
        cpu_millis=INTS,
        memory_bytes=st.integers(0, 2**62),
        extended=st.lists(st.tuples(TEXT, INTS), max_size=2).map(tuple),
    ),
    retry=st.builds(RetryPolicy, max_attempts=INTS, initial_backoff=FLOATS),
    timeout=FLOATS,
    hedge=st.booleans(),
    selector=PAIRS,
)
TASKS = st.lists(
    st.builds(GraphTask, id=TEXT, parents=st.lists(INTS, max_size=3).map(tuple), spec=SPECS), max_size=4
).map(tuple)


def strategy_of(hint: Any) -> st.SearchStrategy[Any]:
    if hint == tuple[GraphTask, ...]:
        return TASKS
    if hint == tuple[int | None, ...]:
        return st.lists(st.none() | st.integers(-(2**31) + 1, 2**31 - 1), max_size=4).map(tuple)
    if hint == tuple[tuple[str, str], ...]:
        return PAIRS
    if typing.get_origin(hint) is tuple:
        return st.lists(strategy_of(typing.get_args(hint)[0]), max_size=4).map(tuple)
    known = {str: TEXT, int: INTS, float: FLOATS, bool: st.booleans(), bytes: st.binary(max_size=8)}
    return known[hint] if hint in known else st.sampled_from(hint)


def events_of(kind: type) -> st.SearchStrategy[ev.Event]:
    return st.builds(kind, **{name: strategy_of(hint) for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_j1_every_event_comes_back_equal(kind: type, data: st.DataObject) -> None:
    event = data.draw(events_of(kind))
    message = pb.Event()
    write_event(event, message, FEATURE_LEVEL)
    back = read_event(pb.Event.FromString(message.SerializeToString()), Interned())
    assert back == event
    for field in dataclasses.fields(back):
        assert type(getattr(back, field.name)) is type(getattr(event, field.name))


@given(st.lists(st.one_of([events_of(kind) for kind in KINDS]), max_size=6))
def test_j9_the_content_of_a_snapshot_comes_back_equal(events: list[ev.Event]) -> None:
    assert list(snapshot_events(snapshot_content(events), Interned())) == events


def test_equal_specs_become_one_object() -> None:
    def spec() -> TaskSpec:
        return TaskSpec(argv=("sleep", "1"))

    interned = Interned()
    back: list[GraphTask] = []
    for start in (0, 2):
        tasks = (GraphTask(f"t{start}", (), spec()), GraphTask(f"t{start + 1}", (start,), spec()))
        message = pb.Event()
        write_event(ev.TasksAdded("r", tasks), message, FEATURE_LEVEL)
        assert len(message.tasks_added.tasks.specs) == 1
        event = read_event(message, interned)
        assert isinstance(event, ev.TasksAdded)
        back += event.tasks
    assert len({id(task.spec) for task in back}) == 1


def test_j11_an_event_nobody_knows_is_too_new() -> None:
    with pytest.raises(TooNew, match="run a version that does"):
        read_event(pb.Event(), Interned())


def test_j11_a_number_nobody_knows_is_too_new() -> None:
    message = pb.Event(health_changed=pb.HealthChanged(cluster="c", health=99))
    with pytest.raises(TooNew, match="HealthChanged"):
        read_event(message, Interned())


def test_j11_nothing_above_the_federations_level_is_written() -> None:
    with pytest.raises(TooNew, match="feature level 1, the federation is at 0"):
        write_event(ev.RunSealed("r"), pb.Event(), 0)


STAMP = Stamp(wall=5.0, nonce="00" * NONCE_BYTES, seq=7, incarnation=2)


def written(*events: ev.Event, most: int = 1 << 18) -> list[bytes]:
    writer = BatchWriter(STAMP, FEATURE_LEVEL)
    writer.add(events, "", "")
    return writer.values(most)


def test_a_batch_keeps_who_asked_for_what() -> None:
    writer = BatchWriter(STAMP, FEATURE_LEVEL)
    writer.add([ev.RunSealed("a")], "ann", "id-1")
    writer.add([ev.RunSealed("b")], "", "")
    writer.add([ev.RunSealed("c")], "", "")
    (value,) = writer.values(1 << 18)
    batch = BatchReader().take(value)
    assert batch is not None
    assert batch.stamp == STAMP
    assert [(event.run, stamp.actor) for event, stamp in batch.stamped() if isinstance(event, ev.RunSealed)] == [
        ("a", "ann"),
        ("b", ""),
        ("c", ""),
    ]
    assert [(author.request_id, author.events) for author in batch.authors] == [("id-1", 1), ("", 2)]
    assert nonce_of(value) == STAMP.nonce


@given(st.binary(max_size=5000), st.integers(1, 700))
def test_sealed_content_comes_back(content: bytes, most: int) -> None:
    envelopes = [open_envelope(value) for value in seal(content, "aa", most)]
    assert all(len(envelope.payload) <= most for envelope in envelopes)
    assert unpack(envelopes[0], b"".join(envelope.payload for envelope in envelopes)) == content


def test_a_large_batch_has_no_effect_before_its_last_part() -> None:
    values = written(*(ev.RunCancelRequested(f"run-{n}", "x" * n) for n in range(200)), most=300)
    assert len(values) > 2
    reader = BatchReader()
    for value in values[:-1]:
        assert reader.take(value) is None
        assert not reader.between
    batch = reader.take(values[-1])
    assert batch is not None
    assert len(batch.events) == 200
    assert reader.between


def test_parts_whose_rest_never_came_are_forgotten() -> None:
    values = written(*(ev.RunCancelRequested(f"run-{n}", "x" * n) for n in range(200)), most=300)
    reader = BatchReader()
    assert reader.take(values[0]) is None
    batch = reader.take(written(ev.RunSealed("next owner's"))[0])
    assert batch is not None
    assert batch.events == (ev.RunSealed("next owner's"),)
    with pytest.raises(Corrupt, match="part 1"):
        reader.take(values[1])


def test_j11_versions_of_envelope_batch_and_manifest() -> None:
    with pytest.raises(TooNew):
        BatchReader().take(pb.Envelope(format=2).SerializeToString())
    with pytest.raises(TooNew):
        BatchReader().take(pb.Envelope(format=1, key_id="k").SerializeToString())
    batch = pb.StoredBatch(feature_level=FEATURE_LEVEL + 1).SerializeToString()
    with pytest.raises(TooNew, match=f"feature level {FEATURE_LEVEL + 1}"):
        BatchReader().take(pb.Envelope(format=1, payload=batch, parts=1).SerializeToString())
    with pytest.raises(TooNew):
        Manifest.parse(pb.SnapshotManifest(format=1, feature_level=FEATURE_LEVEL + 1).SerializeToString())
    for value in (b"\xff", pb.Envelope(format=1, compression=1, payload=b"no zlib").SerializeToString()):
        with pytest.raises(Corrupt):
            BatchReader().take(value)


def test_j12_the_manifest_keeps_the_nonces_of_trimmed_seqs() -> None:
    def nonces(first: int, last: int) -> bytes:
        return b"".join(seq.to_bytes(NONCE_BYTES, "big") for seq in range(first, last + 1))

    def manifest(seq: int, first_kept: int, kept: bytes) -> Manifest:
        return Manifest(seq, seq.to_bytes(NONCE_BYTES, "big").hex(), 1, 10, b"d", 1, first_kept, kept, 2.0)

    first = manifest(5, *keep_nonces(None, nonces(1, 5), 5))
    assert Manifest.parse(first.encode()) == first
    second = manifest(KEPT_NONCES + 3, *keep_nonces(first, nonces(6, KEPT_NONCES + 3), KEPT_NONCES + 3))
    assert second.first_kept == 4
    assert second.nonce_at(3) == ""
    assert second.nonce_at(4) == (4).to_bytes(NONCE_BYTES, "big").hex()
    assert second.nonce_at(second.seq) == second.nonce
    assert second.nonce_at(second.seq + 1) == ""
