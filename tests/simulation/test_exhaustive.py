"""The exhaustive exploration itself: small bounds to their end, removals that it must miss, and the explorer on a toy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from baton.clock import SystemClock
from lab.exhaustive import hunt
from lab.exhaustive.explorer import STUCK, Exploration, Report, Step, World
from lab.exhaustive.journal_facts import JournalBounds, JWorld, swapped
from lab.exhaustive.journal_world import JournalWorld
from lab.exhaustive.removals import REMOVALS
from lab.exhaustive.session_world import SessionBounds

PATIENCE = 600.0
"""Seconds: no bound of a test, only an end for a machine that stands still."""


def explored(bounds: hunt.Bounds) -> Report:
    """All of a world."""
    return hunt.explore(bounds, SystemClock().boot() + PATIENCE)


def missed(name: str) -> Report:
    """What happens without a mechanism."""
    return hunt.hunt(name, SystemClock().boot() + PATIENCE)


# -- the product ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [
        JournalBounds(faults=2, doubles=1, tries=2, takings=2),
        JournalBounds(faults=1, doubles=0, tries=2, takings=2, prune=True),
        JournalBounds(faults=0, doubles=0, takings=3, restore=True),
        SessionBounds(faults=1, kinds=("cut",)),
        SessionBounds(faults=1, kinds=("crash",), attempts=1),
    ],
    ids=["journal", "prune", "restore", "cut stream", "killed agent"],
)
def test_no_interleaving_breaks_a_promise(bounds: hunt.Bounds) -> None:
    report = explored(bounds)
    assert report.stories == {}
    assert report.complete
    assert report.stuck == 0
    assert report.goals > 0
    assert report.states > 100


def test_the_replicas_names_do_not_count() -> None:
    model = JournalWorld(JournalBounds())
    world = model.start()
    for _ in range(6):
        world = next(iter(model.steps(world))).world
        assert isinstance(world, JWorld)
        assert model.canonical(swapped(world))[0] == model.canonical(world)[0]
        assert swapped(swapped(world)) == world


# -- the checks are checked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("owner-compare", "J4"),
        ("lease-of-reads", "J8"),
        ("restore-detection", "J12"),
        ("guard-time", "I9"),
        ("stop-confirmation", "F8"),
    ],
)
def test_a_removal_is_shown_by_a_story(name: str, promise: str) -> None:
    report = missed(name)
    assert next(iter(report.stories)).partition(":")[0] == promise
    assert all(story for story in report.stories.values())


def test_a_removal_is_put_back() -> None:
    removal = next(removal for removal in REMOVALS if removal.name == "owner-compare")
    missed(removal.name)
    assert isinstance(removal.bounds, JournalBounds)
    assert explored(replace(removal.bounds, faults=1, tries=1)).stories == {}


def test_a_removal_is_shown_with_a_control_of_the_same_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert hunt.run_removals("guard-time, stop-confirmation,guard-time,", None, 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("guard-time (F5") for line in lines) == 1
    assert sum(line.startswith("control of guard-time: clean ") for line in lines) == 1
    assert sum(line.startswith("control of stop-confirmation: clean ") for line in lines) == 1
    assert lines[-1].startswith("exhaustive: 2 of 2 removals shown, 2 of 2 controls clean, ")


def test_the_story_without_guard_time_says_whose_wait_is_left_out() -> None:
    ((_, story),) = missed("guard-time").stories.items()
    assert "ca: the owner waits no G after it saw the end of generation 1" in story


@pytest.mark.parametrize(
    ("states", "complete", "says"), [(9, False, False), (10, False, True), (300, False, True), (9, True, True)]
)
def test_a_control_has_to_see_as_much_as_the_story_needed_or_all(states: int, complete: bool, says: bool) -> None:
    report = Report(states=states, complete=complete)
    assert hunt.controlled(report, {"a": 7, "b": 10}) == says
    assert not hunt.controlled(replace(report, stories={"J4": ["a step"]}), {"a": 7, "b": 10})


def test_a_control_that_is_not_clean_or_not_far_enough_is_told() -> None:
    bounds = SessionBounds()
    assert hunt.control_lines(bounds, Report(states=400, complete=True), {"a": 300, "b": 20})[0] == (
        "control of a, b: clean to its end, 400 states (the stories needed up to 300), 0 s"
    )
    far = hunt.control_lines(bounds, Report(states=400), {"a": 300})[0]
    assert far == "control of a: clean in 400 states, at least as many as any story needed (300), NOT to its end, 0 s"
    near = hunt.control_lines(bounds, Report(states=299), {"a": 300})[0]
    assert near == "control of a: NOT judged: 299 states before its time was over, and a story needed 300, 0 s"
    broken = hunt.control_lines(bounds, Report(states=5, stories={"J4": ["a step"]}), {"a": 300})
    assert broken[0] == "control of a: BROKEN with every mechanism in place, 0 s"
    assert broken[-1] == "      1. a step"


def test_removals_have_names_of_their_own() -> None:
    names = [removal.name for removal in REMOVALS]
    assert len(set(names)) == len(names)


# -- what is said, and refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [partial(hunt.run, "a"), partial(hunt.run_removals, "all")])
@pytest.mark.parametrize(
    ("minutes", "jobs", "said"),
    [
        (-1.0, 1, "--minutes is -1; it must be more than 0"),
        (0.0, 1, "--minutes is 0; it must be more than 0"),
        (float("nan"), 1, "--minutes is nan; it must be more than 0"),
        (None, 0, "--jobs is 0; it must be 1 or more"),
    ],
)
def test_a_limit_without_sense_is_refused(
    run: Callable[[float | None, int], int],
    minutes: float | None,
    jobs: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(minutes, jobs) == 2
    assert capsys.readouterr() == ("", f"sim: {said}\n")


@pytest.mark.parametrize(
    ("names", "said"),
    [("owner-compare,nope,none", "no removal nope, none; there are: all, "), (",", "--remove names no removal; ")],
)
def test_a_removal_that_is_not_known_is_named(names: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hunt.run_removals(names, None, 1) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sim: {said}")
    assert "guard-time" in err


def test_a_removal_that_is_named_twice_is_one() -> None:
    twice, unknown = hunt.chosen("guard-time,owner-compare,guard-time")
    assert [each.name for each in twice] == ["guard-time", "owner-compare"]
    assert unknown == []
    assert hunt.chosen("all,guard-time")[0][0].name == "guard-time"
    assert len(hunt.chosen("guard-time,all")[0]) == len(REMOVALS)


def test_worlds_that_were_not_explored_to_their_end_are_told_and_fail_unless_time_was_limited() -> None:
    whole, part = Report(states=10, complete=True), Report(states=20)
    assert "in 3 worlds, 2 of them NOT complete, " in hunt.summary([whole, part, part], 1.0, 1)
    assert "in 1 worlds, all complete, " in hunt.summary([whole], 1.0, 1)
    assert hunt.verdict([whole, part], limited=False) == 1
    assert hunt.verdict([whole, part], limited=True) == 0
    assert hunt.verdict([whole], limited=False) == 0
    assert hunt.verdict([replace(whole, stories={"J4": []})], limited=True) == 1


def test_a_time_that_a_person_gave_and_that_is_over_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert hunt.run("a", 1e-9, 1) == 0
    assert "2 of them NOT complete" in capsys.readouterr().out.splitlines()[-1]


# -- the explorer ----------------------------------------------------------------------------------------------------------


class Walk:
    """A walker on a line of five places, who may fall down a hole that nothing leads out of."""

    names = ("walker",)

    def __init__(self, *, rope: bool) -> None:
        self.rope = rope

    def start(self) -> World:
        return (0,)

    def steps(self, world: World) -> Iterator[Step]:
        place = world[0]
        if place == "hole":
            if self.rope:
                yield Step("climbs out", 0, (0,))
            return
        if place < 4:
            yield Step("steps", 0, (place + 1,))
        if place < 3:
            yield Step("jumps", 0, (place + 2,), broken="no jumping" if place == 2 else "")
        if place == 3:
            yield Step("falls", 0, ("hole",), fault=True)

    def canonical(self, world: World) -> tuple[World, bool]:
        return world, False

    def broken(self, world: World) -> str:
        return ""

    def goal(self, world: World) -> bool:
        return bool(world[0] == 4)


def walk(*, rope: bool, most: int = 100) -> Report:
    clock = SystemClock()
    return Exploration(Walk(rope=rope), clock, most=most, until=clock.boot() + PATIENCE).run()


def test_stories_are_shortest() -> None:
    report = walk(rope=True)
    assert report.states == 6
    assert report.complete
    assert report.stories == {"no jumping": ["walker: jumps", "walker: jumps"]}


def test_what_has_no_way_on_is_stuck() -> None:
    report = walk(rope=False)
    assert report.stuck == 1
    assert report.stories[STUCK] == ["walker: steps", "walker: jumps", "walker: falls"]


def test_a_bound_that_is_met_is_said() -> None:
    report = walk(rope=False, most=3)
    assert not report.complete
    assert STUCK not in report.stories
