"""`scripts/sim --sabotage`: every removal must be caught by a checker (DESIGN 12.3: the checks are checked).

Theory. A removal is caught at a seed if its judged record has a violation, and the same seed of the same world has none with the
mechanism in place: else the seed shows a weak world and not the removal. A hunt begins at the removal's known seed, or anywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lab.apart import apart, each
from lab.checking.history import Violation
from lab.checking.judging import judge
from lab.simulation import removals_agent, removals_fleet, removals_store
from lab.simulation.removal import Removal, swapped
from lab.simulation.world import simulate

REMOVALS: dict[str, Removal] = {
    removal.name: removal for removal in (*removals_store.REMOVALS, *removals_fleet.REMOVALS, *removals_agent.REMOVALS)
}

SEEDS = 5000
"""Seeds tried for all removals together, at most (issue 5)."""

SECONDS = 1200.0
"""Time for all of them together, on two cores (issue 5)."""


AT_ONCE = 8
"""Seeds that one child tries: see `lab.apart`."""


@dataclass(frozen=True, slots=True)
class Caught:
    """What became of one removal."""

    name: str
    seed: int
    tried: int
    violation: Violation | None
    seconds: float


def verdict(name: str, seed: int, *, removed: bool) -> Violation | None:
    """The first violation of a seed in a removal's world, with the mechanism `removed` or in place."""
    removal = REMOVALS[name]
    logging.disable(logging.CRITICAL)
    with swapped((*removal.setting, *(removal.swaps if removed else ()))):
        try:
            record = simulate(seed, removal.shape).record
        except Exception as error:  # noqa: BLE001 - whatever stops a simulation is a finding
            return Violation("the simulation stopped", 0.0, repr(error))
    found = judge(record)
    return found[0] if found else None


def hunt(name: str, base: int | None, tries: int, until: float) -> Caught:
    """Try `tries` seeds from `base`, or from the known one, until the removal is caught. `until`: monotonic time of giving up."""
    begin, tried = time.monotonic(), 0
    first = REMOVALS[name].seed if base is None else base
    seeds = range(first, first + tries)
    while tried < tries and time.monotonic() < until:
        more, seed, found = apart(partial(_try, name, seeds[tried : tried + AT_ONCE], until))
        tried += more
        if found is not None:
            return Caught(name, seed, tried, found, time.monotonic() - begin)
    return Caught(name, -1, tried, None, time.monotonic() - begin)


def _try(name: str, seeds: range, until: float) -> tuple[int, int, Violation | None]:
    """How many of these seeds were tried, and the one that catches the removal."""
    tried = 0
    for seed in seeds:
        if time.monotonic() > until:
            break
        tried += 1
        found = verdict(name, seed, removed=True)
        if found is not None and verdict(name, seed, removed=False) is None:
            return tried, seed, found
    return tried, -1, None


def chosen(words: str) -> list[str]:
    """The removals that `--sabotage` asks for: `all`, or known names separated by commas."""
    return list(REMOVALS) if words == "all" else words.split(",")


def listing() -> Iterator[str]:
    """What can be removed, a line each."""
    for removal in REMOVALS.values():
        yield f"{removal.name:<26} {removal.rule:<8} {removal.text}"


def hunt_all(names: Sequence[str], base: int | None, jobs: int) -> int:
    """Hunt for them, `jobs` at a time, and print a table. The exit code: 1 if one was not caught."""
    begin = time.monotonic()
    print(f"{'removed':<26} {'rule':<8} {'seed':>6} {'tried':>6} {'seconds':>8}  caught by")
    missed: list[str] = []
    tried = 0
    for caught in _hunts(names, base, begin + SECONDS, jobs):
        tried += caught.tried
        removal = REMOVALS[caught.name]
        found = caught.violation
        seed, by = (str(caught.seed), f"{found.invariant}: {found.text[:120]}") if found else ("-", "NOT CAUGHT")
        print(
            f"{removal.name:<26} {removal.rule:<8} {seed:>6} {caught.tried:>6} {caught.seconds:>8.1f}  {by}", flush=True
        )
        if found is None:
            missed.append(caught.name)
    caught_text = f"{len(names) - len(missed)} of {len(names)} removals caught"
    print(
        f"sim: {caught_text} with {tried} seeds in {time.monotonic() - begin:.1f} s"
        + "".join(f", not {m}" for m in missed)
    )
    return 1 if missed else 0


def _hunts(names: Sequence[str], base: int | None, until: float, jobs: int) -> Iterator[Caught]:
    """Hunts as they end."""
    tries = max(1, SEEDS // len(names))
    for _, caught in each((partial(hunt, name, base, tries, until) for name in names), jobs):
        yield caught
