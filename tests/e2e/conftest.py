"""End-to-end tests: whole federations of real processes over a real etcd (tests/e2e/federation.py).

Each test has a federation of its own in its own directory and leaves nothing running. Nothing is skipped: without a supported
etcd the federation falls back to what there is, and every test prints the version that it ran on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.federation import Fed, federation

MakeFederation = Callable[..., AbstractAsyncContextManager[Fed]]


@pytest.fixture
def fed_here(tmp_path: Path) -> MakeFederation:
    """`async with fed_here(profile="fast") as fed:`: a federation in this test's directory."""
    return partial(federation, tmp_path)
