"""The exhaustive exploration itself: small bounds to their end, removals that it must miss, and the explorer on a toy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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


def test_removals_have_names_of_their_own() -> None:
    names = [removal.name for removal in REMOVALS]
    assert len(set(names)) == len(names)


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
