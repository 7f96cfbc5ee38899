"""`scripts/sim --exhaustive`: which small worlds are explored, and what is said of them.

Theory. Green must come from having looked. A world that was not explored to its end proves little, so it is told, and unless somebody
said how much time there is, it fails the whole. And a story without a mechanism proves something about the mechanism only if the same
world with it has no such story: so each removal has a control of the same bounds, that sees as many states at least.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
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

MINUTES = 9.0
"""Unless somebody says otherwise: twice what both slices take on two idle cores, and still below ten."""

MOST = 3_000_000
"""States of one world: about 1 GB. More would not fit beside a second process on a small machine; fewer end a world too early."""


LEAST = 20_000
"""States that a control sees if there are so many, also where the story needed few: some seconds. Less would judge the smallest worlds
by a few hundred states."""


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


def control(bounds: Bounds, most: int, until: float) -> Report:
    """The same world with every mechanism in place, as far as `most` states at least, or to its end."""
    logging.disable(logging.CRITICAL)
    return Exploration(model_of(bounds), SystemClock(), most=most, until=until, first=True).run()


def run(slices: str, minutes: float | None, jobs: int) -> int:
    """Explore and print. `minutes`: as a person said, None if nobody did. The exit code: 1 if a promise was broken, a world has no
    way on, or one was not explored to its end though nobody limited the time; 2 if that limit makes no sense."""
    if problem := _problem(minutes, jobs):
        return _refused(problem)
    clock = SystemClock()
    begin = clock.boot()
    plans = [plan for letter in WORLDS if letter in slices for plan in WORLDS[letter]]
    plans.sort(key=lambda plan: plan not in [worlds[0] for worlds in WORLDS.values()])
    reports: list[Report] = []
    for plan, report in _all(plans, begin + 60 * (MINUTES if minutes is None else minutes), jobs):
        reports.append(report)
        print("\n".join(lines_of(plan, report)), flush=True)
    seconds = clock.boot() - begin
    print(summary(reports, seconds, jobs))
    return verdict(reports, limited=minutes is not None)


def verdict(reports: Sequence[Report], *, limited: bool) -> int:
    """The exit code of an exploration. `limited`: somebody said how much time there was."""
    broken = any(report.stories for report in reports)
    return 1 if broken or not (limited or all(report.complete for report in reports)) else 0


def summary(reports: Sequence[Report], seconds: float, jobs: int) -> str:
    """The last line."""
    states, transitions = sum(r.states for r in reports), sum(r.transitions for r in reports)
    partial_ones = sum(not report.complete for report in reports)
    whole = f"{partial_ones} of them NOT complete" if partial_ones else "all complete"
    return (
        f"exhaustive: {states} states, {transitions} transitions in {len(reports)} worlds, {whole}, {seconds:.0f} s "
        f"({states / max(seconds, 1e-9):.0f} states/s, {jobs} processes), {sum(len(r.stories) for r in reports)} violations"
    )


def _problem(minutes: float | None, jobs: int) -> str:
    """What is wrong with these flags; empty if nothing is."""
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        return f"--minutes is {minutes:g}; it must be more than 0"
    return f"--jobs is {jobs}; it must be 1 or more" if jobs < 1 else ""


def _refused(problem: str) -> int:
    print(f"sim: {problem}", file=sys.stderr)
    return 2


def _all(plans: Sequence[Plan], until: float, jobs: int) -> Iterator[tuple[Plan, Report]]:
    """As they come to their end."""
    for place, report in each((partial(explore, plan.bounds, until) for plan in plans), jobs):
        yield plans[place], report


def lines_of(plan: Plan, report: Report) -> list[str]:
    """What is said of one world."""
    whole = "complete" if report.complete else f"NOT complete: {_limit(report)}"
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


def _limit(report: Report) -> str:
    return f"{MOST} states are the most" if report.states >= MOST else "its time was over"


def told(promise: str, story: Sequence[str]) -> list[str]:
    """A story for people."""
    return [
        f"    BROKEN {promise} ({len(story)} steps)",
        *(f"    {place:>3}. {step}" for place, step in enumerate(story, 1)),
    ]


# -- removals --------------------------------------------------------------------------------------------------------------


def chosen(names: str) -> tuple[list[Missing], list[str]]:
    """The removals of these names, each once, and the names of which there is none. `all` is every one."""
    known = {missing.name: missing for missing in REMOVALS}
    wanted = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    if "all" in wanted:
        del wanted["all"]
        wanted |= dict.fromkeys(known)
    return [known[name] for name in wanted if name in known], [name for name in wanted if name not in known]


def run_removals(names: str, minutes: float | None, jobs: int) -> int:
    """Show what happens without each of these mechanisms, and that it does not with them. The exit code: 1 if one is not missed or a
    control is not clean as far as it has to be seen, 2 for a flag that makes no sense or a name of no removal."""
    if problem := _problem(minutes, jobs):
        return _refused(problem)
    missing, unknown = chosen(names)
    if unknown or not missing:
        what = f"no removal {', '.join(unknown)}" if unknown else "--remove names no removal"
        return _refused(f"{what}; there are: all, {', '.join(each.name for each in REMOVALS)}")
    clock = SystemClock()
    begin = clock.boot()
    until = begin + 60 * (MINUTES if minutes is None else minutes)
    found: dict[str, Report] = {}
    for place, report in each((partial(hunt, one.name, until) for one in missing), jobs):
        print("\n".join(_missed(missing[place], report)), flush=True)
        if report.stories:
            found[missing[place].name] = report
    controls = list(dict.fromkeys(one.bounds for one in missing if one.name in found))
    needs = {
        bounds: {m.name: found[m.name].states for m in missing if m.name in found and m.bounds == bounds}
        for bounds in controls
    }
    works = (partial(control, bounds, max(LEAST, *needs[bounds].values()), until) for bounds in controls)
    clean = 0
    for place, report in each(works, jobs):
        needed = needs[controls[place]]
        clean += controlled(report, needed)
        print("\n".join(control_lines(controls[place], report, needed)), flush=True)
    print(
        f"exhaustive: {len(found)} of {len(missing)} removals shown, {clean} of {len(controls)} controls clean, "
        f"{clock.boot() - begin:.0f} s"
    )
    return 0 if len(found) == len(missing) and clean == len(controls) else 1


def controlled(report: Report, needed: Mapping[str, int]) -> bool:
    """Whether a control says something: nothing is broken in it, to its end or in as many states as any removal's story needed."""
    return not report.stories and (report.complete or report.states >= max(needed.values()))


def control_lines(bounds: Bounds, report: Report, needed: Mapping[str, int]) -> list[str]:
    """What is said of a control. `needed`: removal -> states in which its story was found."""
    most = max(needed.values())
    if report.stories:
        said = "BROKEN with every mechanism in place"
    elif report.complete:
        said = f"clean to its end, {report.states} states (the stories needed up to {most})"
    elif report.states >= most:
        said = f"clean in {report.states} states, at least as many as any story needed ({most}), NOT to its end"
    else:
        said = f"NOT judged: {report.states} states before its time was over, and a story needed {most}"
    lines = [
        f"control of {', '.join(needed)}: {said}, {report.seconds:.0f} s",
        f"    world: {bounds.text()}",
    ]
    for promise, story in report.stories.items():
        lines += told(promise, story)
    return lines


def _missed(missing: Missing, report: Report) -> list[str]:
    """What is said of a removal."""
    where = " and the ".join(["product"] * bool(missing.swaps) + ["model"] * missing.modelled)
    lines = [
        f"{missing.name} ({missing.rule}, taken out of the {where}): {missing.text}",
        f"    world: {missing.bounds.text()}",
    ]
    if not report.stories:
        whole = "the whole of it" if report.complete else _limit(report)
        lines.append(f"    NOT shown in {report.states} states: {whole}")
    for promise, story in report.stories.items():
        lines += told(promise, story)
    return lines
