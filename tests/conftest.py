"""What every test may rely on: the checkout's root, and seeds that do not change from run to run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# A failing example must fail again on the next machine, so examples are derived from the test, not from chance; no
# example database, since the tree under test may be read-only. The simulator explores new seeds, in runs of its own.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
# For a long look by hand: BATON_HYPOTHESIS=explore scripts/test tests/unit
hypothesis.settings.register_profile("explore", derandomize=False, max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("BATON_HYPOTHESIS", "fixed"))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Simulations silence the whole process; the next test may be about log lines."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout under test."""
    return Path(__file__).resolve().parent.parent


SLOWEST_FIRST = ("e2e", "simulation", "integration", "contract", "unit")
"""Folders in order of the time one file takes: begun first, the long ones do not run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests; within a folder as they were."""
    place = {folder: index for index, folder in enumerate(SLOWEST_FIRST)}
    root = Path(__file__).resolve().parent
    items.sort(key=lambda item: place.get(item.path.relative_to(root).parts[0], -1))
