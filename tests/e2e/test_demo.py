"""`scripts/demo`, as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_the_demo_shows_what_it_promises(checkout: Path) -> None:
    done = subprocess.run(
        [checkout / "scripts" / "demo", "--json"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run_state"] == "SUCCEEDED"
    assert found["accepted_results"] == found["tasks"] == 15
    assert found["max_accepted_per_task"] == 1
    assert found["moved_tasks"] >= 1
    assert found["stale_results_refused"] >= 1
    assert found["result_sha256"] == found["result_sha256_without_faults"]
    assert found["seconds"] < 180
    assert found["etcd_version"]
