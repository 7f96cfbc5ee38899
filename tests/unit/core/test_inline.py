"""Weight of inline results: what they take in a dispatch, not what they take alone (DESIGN 14)."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.inline import weight


@given(st.binary(max_size=200))
def test_a_result_weighs_what_it_takes_inside_json(result: bytes) -> None:
    text = json.dumps({"t": result.decode("utf-8", "replace")}, ensure_ascii=False).encode()
    assert weight(result) == (len(text) - len(json.dumps({"t": ""})) + 2 if result else 0)


def test_control_characters_weigh_six_bytes_each() -> None:
    assert weight(b"\x01" * 1000) == 6002
    assert weight(b"x" * 1000) == 1002
