"""The stories in tests/simulation/stories/ are what the product does today, word for word, and no checker finds anything in them.

They are played in a process of its own with a fixed hash seed, as `scripts/sim` plays seeds. To change one on purpose see
`tests/simulation/story_scripts.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.simulation.story_scripts import HOME, STORIES


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """Every story, as it goes now."""
    command = [sys.executable, "-m", "tests.simulation.story_scripts"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=HOME.parents[2], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    stories: dict[str, str] = json.loads(done.stdout)
    return stories


@pytest.mark.parametrize("name", STORIES)
def test_a_story_goes_as_it_is_told(told: dict[str, str], name: str) -> None:
    assert "VIOLATED" not in told[name]
    assert told[name] == (HOME / f"{name}.md").read_text(encoding="utf-8"), (
        "the story changed: if that is meant, PYTHONHASHSEED=0 python -m tests.simulation.story_scripts --write"
    )


def test_every_page_has_its_story() -> None:
    assert {path.stem for path in HOME.glob("*.md")} == set(STORIES)
    assert len(STORIES) == 10
