"""The checks are checked (DESIGN 12.3): with a safety mechanism taken out, a checker must notice.

`scripts/sim --sabotage all` hunts for every removal; here the cheapest ones are tried from their known seeds on. A seed counts only if
nothing is broken at it with the mechanism in place.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import pytest

from lab.simulation.removal import Removal, Swap, swapped
from lab.simulation.sabotage import REMOVALS, chosen

QUICK = (
    "owner-compare",
    "effects-after-commit",
    "lease-of-reads",
    "restore-detection",
    "generation-check",
    "live-set",
    "fence-on-accept",
    "self-fence",
    "guard-process",
)
"""Removals that their known seeds catch in a second or two each."""

SURE = "effects-after-commit"
"""A removal that nearly every seed catches: for a fresh one."""


def sim(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "lab.simulation", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_removals_are_caught_from_their_known_seeds_on() -> None:
    done = sim("--sabotage", ",".join(QUICK), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in QUICK:
        assert re.search(rf"^{name} .*\b[FIJS]\d+ ", done.stdout, re.MULTILINE), (
            f"{name} names its invariant\n{done.stdout}"
        )


def test_a_removal_is_caught_from_a_fresh_seed_on() -> None:
    base = random.SystemRandom().randrange(10**9)
    print(f"fresh seeds: scripts/sim --sabotage {SURE} --seed-base {base}")
    done = sim("--sabotage", SURE, "--seed-base", str(base), "--jobs", "1")
    assert done.returncode == 0, f"from seed {base}\n{done.stdout}{done.stderr}"


def test_the_story_of_a_removal_names_the_violation() -> None:
    done = sim("--sabotage", SURE, "--seed", str(REMOVALS[SURE].seed))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "!!! J7 effects after commit" in done.stdout
    *_, last = done.stdout.splitlines()
    assert "J7 effects after commit" in last
    assert "AttemptId(" not in done.stdout, "a story has short names"
    assert re.search(r"^broken promises: \d+$", done.stdout, re.MULTILINE)


def test_an_unknown_removal_is_refused() -> None:
    done = sim("--sabotage", f"{SURE},no-such")
    assert done.returncode == 2
    assert "--sabotage: no removal 'no-such'; there are: owner-compare" in done.stderr


def test_what_is_asked_for_is_chosen() -> None:
    assert chosen("all") == list(REMOVALS)
    assert chosen(f"{SURE},live-set") == [SURE, "live-set"]


def test_what_was_removed_is_put_back_whatever_happens() -> None:
    before = {name: [vars_of(swap) for swap in removal.swaps] for name, removal in REMOVALS.items()}
    for removal in REMOVALS.values():
        with pytest.raises(ZeroDivisionError):
            fail_with(removal)
    assert before == {name: [vars_of(swap) for swap in removal.swaps] for name, removal in REMOVALS.items()}


def fail_with(removal: Removal) -> None:
    with swapped((*removal.setting, *removal.swaps)):
        assert all(vars_of(swap) is swap.part for swap in removal.swaps)
        raise ZeroDivisionError


def vars_of(swap: Swap) -> object:
    return swap.where[swap.name] if isinstance(swap.where, dict) else vars(swap.where)[swap.name]


def test_every_rule_that_must_be_removable_is() -> None:
    """Issue 5.3's list."""
    wanted = {
        "J4",
        "J6",
        "J7",
        "J8",
        "J9",
        "J12",
        "O8",
        "S2",
        "S4",
        "S5",
        "S6",
        "F1",
        "F2",
        "F3",
        "F4",
        "F5",
        "G1",
        "G3",
    }
    rules = {rule for removal in REMOVALS.values() for rule in removal.rule.split(", ")}
    assert wanted <= rules
