"""`scripts/sim --exhaustive`: which small worlds are explored, and what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from baton.clock import SystemClock
from lab.apart import each
from lab.exhaustive.explorer import Exploration, Model, Report
from lab.exhaustive.journal_facts import JournalBounds
from lab.exhaustive.journal_world import JournalWorld
from lab.exhaustive.removals import REMOVALS, Missing
from lab.exhaustive.session_world import SessionBounds, SessionWorld
from lab.simulation.removal import swapped

Bounds = JournalBounds | SessionBounds

MOST = 3_000_000
"""States of one world: about 1 GB. More would not fit beside a second process on a small machine; fewer end a world too early."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A world to explore."""

    name: str
    bounds: Bounds


WORLDS: dict[str, tuple[Plan, ...]] = {
    "a": (
        Plan("journal", JournalBounds(faults=3, tries=3, takings=3, prune=True)),
        Plan("restore", JournalBounds(faults=1, takings=3, batches=4, seqs=4, doubles=0, restore=True)),
    ),
    "b": (
        Plan("cut and killed", SessionBounds(faults=2, kinds=("cut", "crash"))),
        Plan("every fault once", SessionBounds(faults=1)),
        Plan("kept work", SessionBounds(faults=1, kinds=("cut", "crash", "loss", "boot", "cancel"), kept=True)),
        Plan(
            "owner changes, one attempt", SessionBounds(owners=1, faults=1, kinds=("cut", "loss", "cancel"), attempts=1)
        ),
        Plan("owner changes", SessionBounds(owners=1, faults=1, kinds=("loss",))),
    ),
}
"""By slice, the largest first: two processes then end at about the same time."""


def model_of(bounds: Bounds, without: tuple[str, ...] = ()) -> Model:
    """The world with these bounds. `without`: a removal of what is modelled."""
    return JournalWorld(bounds) if isinstance(bounds, JournalBounds) else SessionWorld(bounds, without)


def explore(bounds: Bounds, until: float, most: int = MOST) -> Report:
    """All of one world, or what can be seen of it until boot time `until`."""
    logging.disable(logging.CRITICAL)
    return Exploration(model_of(bounds), SystemClock(), most=most, until=until).run()


def hunt(name: str, until: float) -> Report:
    """One world without one mechanism, up to the first promise that is broken."""
    logging.disable(logging.CRITICAL)
    missing = next(missing for missing in REMOVALS if missing.name == name)
    with swapped(missing.swaps):
        model = model_of(missing.bounds, (missing.name,))
        return Exploration(model, SystemClock(), most=MOST, until=until, first=True).run()


def run(slices: str, minutes: float, jobs: int) -> int:
    """Explore and print. The exit code: 1 if a promise was broken or a world has no way on."""
    clock = SystemClock()
    begin = clock.boot()
    plans = [plan for letter in WORLDS if letter in slices for plan in WORLDS[letter]]
    plans.sort(key=lambda plan: plan not in [worlds[0] for worlds in WORLDS.values()])
    reports: list[Report] = []
    for plan, report in _all(plans, begin + 60 * minutes, jobs):
        reports.append(report)
        print("\n".join(lines_of(plan, report)), flush=True)
    states, transitions = sum(r.states for r in reports), sum(r.transitions for r in reports)
    seconds = clock.boot() - begin
    broken = sum(len(report.stories) for report in reports)
    print(
        f"exhaustive: {states} states, {transitions} transitions in {len(reports)} worlds, {seconds:.0f} s "
        f"({states / max(seconds, 1e-9):.0f} states/s, {jobs} processes), {broken} violations"
    )
    return 1 if broken else 0


def _all(plans: Sequence[Plan], until: float, jobs: int) -> Iterator[tuple[Plan, Report]]:
    """As they come to their end."""
    for place, report in each((partial(explore, plan.bounds, until) for plan in plans), jobs):
        yield plans[place], report


def lines_of(plan: Plan, report: Report) -> list[str]:
    """What is said of one world."""
    whole = "complete" if report.complete else "NOT complete: its time was over"
    size = f"{report.states} states, {report.transitions} transitions, depth {report.depth}"
    lines = [
        f"{plan.name}: {size}, {whole}, {report.seconds:.0f} s",
        f"    bounds: {plan.bounds.text()}",
    ]
    if report.complete:
        lines.append(
            f"    progress: {report.goals} goals, {report.stuck} worlds that cannot reach one without another fault"
        )
    for promise, story in report.stories.items():
        lines += told(promise, story)
    return lines


def told(promise: str, story: Sequence[str]) -> list[str]:
    """A story for people."""
    return [
        f"    BROKEN {promise} ({len(story)} steps)",
        *(f"    {place:>3}. {step}" for place, step in enumerate(story, 1)),
    ]


def run_removals(names: str, minutes: float, jobs: int) -> int:
    """Show what happens without each of these mechanisms. The exit code: 1 if one is not missed, 2 if there is none of that name."""
    chosen = [missing for missing in REMOVALS if names == "all" or missing.name in names.split(",")]
    if not chosen or (names != "all" and len(chosen) < len(names.split(","))):
        print(f"sim: there are these removals: {', '.join(missing.name for missing in REMOVALS)}")
        return 2
    clock = SystemClock()
    begin = clock.boot()
    until = begin + 60 * minutes
    found = 0
    for place, report in each((partial(hunt, missing.name, until) for missing in chosen), jobs):
        found += bool(report.stories)
        print("\n".join(_missed(chosen[place], report)), flush=True)
    print(f"exhaustive: {found} of {len(chosen)} removals shown, {clock.boot() - begin:.0f} s")
    return 0 if found == len(chosen) else 1


def _missed(missing: Missing, report: Report) -> list[str]:
    where = " and the ".join(["product"] * bool(missing.swaps) + ["model"] * missing.modelled)
    lines = [
        f"{missing.name} ({missing.rule}, taken out of the {where}): {missing.text}",
        f"    world: {missing.bounds.text()}",
    ]
    if not report.stories:
        lines.append(f"    NOT shown in {report.states} states")
    for promise, story in report.stories.items():
        lines += told(promise, story)
    return lines
