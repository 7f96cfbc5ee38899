"""The key layout: what goes in comes out, order of keys is order of numbers, and no prefix covers a sibling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.model import ALL_SHARDS, FLEET
from control_plane.store import keys

shards = st.sampled_from(ALL_SHARDS)
seqs = st.integers(0, keys.MAX_SEQ)
chunks = st.integers(0, keys.MAX_CHUNK)
names = st.from_regex(r"[A-Za-z0-9_.\-]{1,40}", fullmatch=True)

PARSERS = (
    keys.parse_owner,
    keys.parse_head,
    keys.parse_log,
    keys.parse_snapshot_manifest,
    keys.parse_snapshot_chunk,
    keys.parse_member,
    keys.parse_session,
)


def test_the_layout() -> None:
    assert keys.shard_id(7) == "07"
    assert keys.owner("07") == "owners/07"
    assert keys.head(FLEET) == "shards/fleet/head"
    assert keys.log("31", 12) == "shards/31/log/0000000000000012"
    assert keys.snapshot_manifest("00") == "shards/00/snapshot/manifest"
    assert keys.snapshot_chunk("00", 12, 3) == "shards/00/snapshot/0000000000000012/000003"
    assert keys.member("replica-1") == "members/replica-1"
    assert keys.session_owner("c1") == "sessions/c1/owner"
    assert keys.session_beat("c1") == "sessions/c1/beat"
    assert len(ALL_SHARDS) == keys.RUN_SHARD_COUNT + 1 == 33


@given(shards, seqs, chunks)
def test_shard_keys_come_back(shard: str, seq: int, chunk: int) -> None:
    assert keys.parse_owner(keys.owner(shard)) == shard
    assert keys.parse_head(keys.head(shard)) == shard
    assert keys.parse_log(keys.log(shard, seq)) == (shard, seq)
    assert keys.parse_snapshot_manifest(keys.snapshot_manifest(shard)) == shard
    assert keys.parse_snapshot_chunk(keys.snapshot_chunk(shard, seq, chunk)) == (shard, seq, chunk)


@given(names)
def test_named_keys_come_back(name: str) -> None:
    assert keys.parse_member(keys.member(name)) == name
    assert keys.parse_session(keys.session_owner(name)) == (name, "owner")
    assert keys.parse_session(keys.session_beat(name)) == (name, "beat")


@given(shards, seqs, chunks, names)
def test_a_key_has_one_meaning(shard: str, seq: int, chunk: int, name: str) -> None:
    some = (
        keys.owner(shard),
        keys.head(shard),
        keys.log(shard, seq),
        keys.snapshot_manifest(shard),
        keys.snapshot_chunk(shard, seq, chunk),
        keys.member(name),
        keys.session_beat(name),
    )
    for place, key in enumerate(some):
        assert [parse(key) is not None for parse in PARSERS] == [n == place for n in range(len(PARSERS))]


@given(shards, st.lists(seqs, min_size=2, max_size=20))
def test_order_of_keys_is_order_of_numbers(shard: str, some: list[int]) -> None:
    assert sorted(keys.log(shard, seq) for seq in some) == [keys.log(shard, seq) for seq in sorted(some)]


@given(names, names)
def test_prefixes_never_cover_a_sibling(one: str, other: str) -> None:
    if one != other:
        assert not keys.session_beat(other).startswith(keys.session_prefix(one))


@given(shards, shards, seqs, seqs)
def test_shard_and_snapshot_prefixes_never_cover_a_sibling(one: str, other: str, seq: int, next_seq: int) -> None:
    assert keys.log(other, seq).startswith(keys.shard_prefix(one)) == (one == other)
    assert keys.log(one, seq).startswith(keys.log_prefix(one))
    inside = keys.snapshot_chunk(one, next_seq, 0).startswith(keys.snapshot_chunk_prefix(one, seq))
    assert inside == (seq == next_seq)
    assert not keys.snapshot_manifest(one).startswith(keys.snapshot_chunk_prefix(one, seq))


@pytest.mark.parametrize(
    "key",
    [
        "",
        "owners/32",
        "owners/1",
        "owners/00/x",
        "shards/00/owner",
        "shards/32/head",
        "shards/00/log/12",
        "shards/00/log/000000000000001x",
        "shards/99/log/0000000000000012",
        "shards/99/snapshot/manifest",
        "shards/00/snapshot/0000000000000012/3",
        "members/",
        "members/a/b",
        "members/a b",
        "sessions/c1/other",
        "sessions//beat",
        "incarnation",
    ],
)
def test_other_keys_mean_nothing(key: str) -> None:
    assert all(parse(key) is None for parse in PARSERS)


def test_what_is_no_part_of_a_key_is_refused() -> None:
    refused: tuple[Callable[[], str], ...] = (
        lambda: keys.owner("32"),
        lambda: keys.owner("../x"),
        lambda: keys.shard_id(32),
        lambda: keys.shard_id(-1),
        lambda: keys.log("00", -1),
        lambda: keys.log("00", keys.MAX_SEQ + 1),
        lambda: keys.snapshot_chunk("00", 0, keys.MAX_CHUNK + 1),
        lambda: keys.member(""),
        lambda: keys.member("a/b"),
        lambda: keys.session_beat("a" * 254),
    )
    for make in refused:
        with pytest.raises(ValueError, match=r"not|no "):
            make()
