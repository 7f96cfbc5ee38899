"""The collector's settings for long-lived processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from baton import collector


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_loaded_is_never_walked_again_and_cycles_still_go() -> None:
    collector.tune()
    assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_threshold() == (collector.YOUNG, collector.MIDDLE, collector.OLD)
    cycle: list[object] = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() >= 1
