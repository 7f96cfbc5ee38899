"""What the guard's modules share: one directory, its guards and its agents."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.guard_bench import Bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Deep enough that a socket's path would not fit its address (108 bytes)."""
    made = Bench(tmp_path / ("d" * 60) / ("e" * 60))
    yield made
    await made.close()
    assert made.living() == set()
