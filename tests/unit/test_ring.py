"""The ring: deterministic, fair, and nothing moves that need not (PROTOCOL O1)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.model import ALL_SHARDS
from control_plane.core.ring import owner_of, owners

NAMES = st.text("abcdefgh-0123", min_size=1, max_size=8)
MEMBERS = st.dictionaries(NAMES, st.floats(0.1, 10.0), min_size=1, max_size=8)
MANY = [f"shard-{n}" for n in range(4000)]


@given(MEMBERS, NAMES, st.floats(0.1, 10.0))
def test_o1_a_new_member_only_takes(members: dict[str, float], name: str, weight: float) -> None:
    members.pop(name, None)
    before, after = owners(ALL_SHARDS, members), owners(ALL_SHARDS, {**members, name: weight})
    assert all(after[shard] in (before.get(shard), name) for shard in ALL_SHARDS)


@given(MEMBERS, st.data())
def test_o1_a_member_that_leaves_moves_only_its_own(members: dict[str, float], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(members)))
    before = owners(ALL_SHARDS, members)
    after = owners(ALL_SHARDS, {name: weight for name, weight in members.items() if name != gone})
    assert all(after.get(shard) == before[shard] for shard in ALL_SHARDS if before[shard] != gone)


@given(MEMBERS)
def test_o1_the_order_of_members_does_not_matter(members: dict[str, float]) -> None:
    assert owners(ALL_SHARDS, members) == owners(ALL_SHARDS, dict(reversed(members.items())))


def test_o1_shares_follow_weights() -> None:
    found = owners(MANY, {"a": 1.0, "b": 1.0, "c": 2.0})
    shares = {name: sum(owner == name for owner in found.values()) / len(MANY) for name in "abc"}
    assert abs(shares["a"] - 0.25) < 0.03
    assert abs(shares["c"] - 0.5) < 0.03


def test_nobody_can_own_without_members_or_weight() -> None:
    assert owner_of("00", {}) is None
    assert owners(ALL_SHARDS, {"a": 0.0}) == {}


def test_o1_the_same_in_every_process(checkout: Path) -> None:
    question = "owners(map(str, range(50)), {'a': 1, 'b': 1})"
    script = f"from control_plane.core.ring import owners; print(sorted({question}.items()))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=checkout,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert answers == {f"{sorted(owners(map(str, range(50)), {'a': 1, 'b': 1}).items())}\n"}
