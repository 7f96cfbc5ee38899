"""One machine of the local federation: what a power cut leaves on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)


def test_a_power_cut_leaves_no_control_groups_of_the_killed_guard(tmp_path: Path, checkout: Path) -> None:
    group, foreign = tmp_path / "baton-1", tmp_path / "other"
    for path in (group / "attempt", foreign, tmp_path / "eu" / "guard"):
        path.mkdir(parents=True)
    (tmp_path / "eu" / "guard" / "cgroups").write_text(f"{group}\n{foreign}\n")
    agent = ["/bin/sh", "-c", "sleep 300", "agent", "--directory", str(tmp_path / "eu")]
    machine = [sys.executable, "-m", "lab.machine", *agent]
    done = subprocess.run(machine, input=b"off\n", stdout=subprocess.PIPE, cwd=checkout, timeout=30, check=True)
    assert done.stdout.startswith(b"agent ")
    assert not group.exists()
    assert foreign.exists()
