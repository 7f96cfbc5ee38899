"""Request ids are UUIDv7 (PROTOCOL O8): their time is read back, and they sort by it."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import requestid
from baton.clock import SystemClock, SystemEntropy

walls = st.floats(min_value=0, max_value=4e9, allow_nan=False)
chance = st.text("0123456789abcdef", min_size=20, max_size=20)


@given(walls, chance)
def test_is_a_uuid_of_version_7_that_holds_its_time(wall: float, digits: str) -> None:
    made = uuid.UUID(requestid.compose(wall, digits))
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert requestid.time_of(str(made)) == pytest.approx(int(wall * 1000) / 1000)


@given(walls, walls, chance, chance)
def test_later_ids_sort_later(one: float, other: float, a: str, b: str) -> None:
    if int(one * 1000) < int(other * 1000):
        assert requestid.compose(one, a) < requestid.compose(other, b)


@given(chance, chance)
def test_74_bits_of_chance_are_kept(a: str, b: str) -> None:
    same = requestid.compose(1.0, a) == requestid.compose(1.0, b)
    kept = [(int(x, 16) >> 68, int(x, 16) & ((1 << 62) - 1)) for x in (a, b)]
    assert same == (kept[0] == kept[1])


def test_new_ids_differ_and_are_of_now() -> None:
    clock = SystemClock()
    made = {requestid.new(clock, SystemEntropy()) for _ in range(100)}
    assert len(made) == 100
    assert abs(requestid.time_of(made.pop()) - clock.wall()) < 60


@pytest.mark.parametrize(
    "text", ["", "x", str(uuid.UUID(int=0)), "0" * 36, "018f0000-0000-4000-8000-000000000000", "A" * 36]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="UUIDv7"):
        requestid.time_of(text)


@pytest.mark.parametrize(("wall", "digits"), [(-1.0, "0" * 20), (1e15, "0" * 20), (1.0, "0" * 19)])
def test_what_does_not_fit_is_refused(wall: float, digits: str) -> None:
    with pytest.raises(ValueError, match=r"fit|digits"):
        requestid.compose(wall, digits)
