"""The memory store's key space keeps its size as it goes; it is what a recount says, whatever was written and forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control_plane.store.base import Delete, Put
from control_plane.store.memory_keyspace import FIRST_REVISION, Keyspace

WRITES = st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.binary(max_size=5)))
STEPS = st.lists(st.one_of(WRITES, st.integers(0, 30)), max_size=40)


@given(STEPS)
def test_the_size_is_that_of_all_kept_versions(steps: list[tuple[str, bytes | None] | int]) -> None:
    space = Keyspace()
    written: list[tuple[int, str, int]] = []
    for step in steps:
        if isinstance(step, int):
            space.compact(min(step, space.revision))
            continue
        key, value = step
        before = space.revision
        space.run([Delete(key) if value is None else Put(key, value)], succeeded=True)
        if space.revision > before:
            written.append((space.revision, key, len(key) + len(value or b"")))
    copy = Keyspace()
    copy.load(space.image(), 0)
    assert space.size() == copy.size()
    if space.compacted <= FIRST_REVISION:
        assert space.size() == sum(size for _, _, size in written)
    space.compact(space.revision)
    assert space.size() == sum(len(kv.key) + len(kv.value) for kv in space.live.values())
