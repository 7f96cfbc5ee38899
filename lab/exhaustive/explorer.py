"""Breadth first over every reachable state of a small world, with a shortest story of each promise that is broken.

Theory. A world is a value: nested tuples of plain values. A model says which steps it may take; the explorer takes all of them,
each distinct world once. Breadth first, so the first world in which a promise is broken is reached by a shortest story. Worlds
that differ only in names are one: `canonical` chooses the representative. A world is known by its 64-bit hash; at a million worlds
the chance that two share one is about 3e-8. (Worlds hold no negative numbers: -1 and -2 have one hash.)

Progress is judged afterwards: from every world that was expanded, some goal must be reachable by steps that are no faults.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from baton.clock import Clock

World = tuple[Any, ...]
"""Nested tuples of strings, truths and numbers from 0."""

LOOK = 256
"""Worlds between two looks at the clock: some tens of milliseconds. Fewer costs calls, more overruns the time that was given."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that may happen. `who`: the index of whom it happens to among those that are alike, -1 if nobody is. `broken`: the
    promise that this very step breaks. `fault`: not needed for progress."""

    text: str
    who: int
    world: World
    fault: bool = False
    broken: str = ""


class Model(Protocol):
    """A small world."""

    @property
    def names(self) -> Sequence[str]:
        """Of those that are alike, for stories."""
        ...

    def start(self) -> World:
        """The first world."""
        ...

    def steps(self, world: World) -> Iterable[Step]:
        """All that may happen next; deterministic."""
        ...

    def canonical(self, world: World) -> tuple[World, bool]:
        """The representative of worlds that differ only in names, and whether names were swapped for it."""
        ...

    def broken(self, world: World) -> str:
        """The promise that does not hold in this world; empty if all do."""
        ...

    def goal(self, world: World) -> bool:
        """Nothing more has to happen here."""
        ...


@dataclass(slots=True)
class Report:
    """What an exploration found. `stories`: promise -> the steps that break it, shortest first found."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    complete: bool = False
    seconds: float = 0.0
    goals: int = 0
    stuck: int = 0
    """Worlds from which no goal can be reached without a fault; only judged if complete."""
    stories: dict[str, list[str]] = field(default_factory=dict)


STUCK = "no goal can be reached from here without another fault"


class Exploration:
    """One search. `most`: states after which it stops; `until`: boot time; `first`: stop at the first broken promise."""

    def __init__(self, model: Model, clock: Clock, *, most: int, until: float, first: bool = False) -> None:
        self._model, self._clock = model, clock
        self._most, self._until, self._first = most, until, first
        self._seen: dict[int, int] = {}
        self._parent = array("i")
        self._ordinal = array("H")
        self._origin, self._target = array("i"), array("i")
        """Edges that are no faults."""
        self._goal = bytearray()
        self._found: dict[str, tuple[int, int]] = {}
        """Promise -> (state, ordinal of the step out of it that breaks it, or -1: the state itself)."""
        self.report = Report()

    def run(self) -> Report:
        """Explore until nothing is new or a bound is met."""
        begin, report = self._clock.boot(), self.report
        level: list[tuple[int, World]] = [(0, self._enter(self._model.start(), -1, 0)[1])]
        while level and not self._over():
            following: list[tuple[int, World]] = []
            for place, (index, world) in enumerate(level):
                if place % LOOK == 0 and self._over():
                    break
                self._expand(index, world, following)
            else:
                report.depth += bool(following)
                level = following
                continue
            break
        report.complete = not level
        report.states = len(self._parent)
        report.goals = self._goal.count(1)
        if report.complete:
            self._judge_progress()
        report.stories = {promise: self._story(*where) for promise, where in self._found.items()}
        report.seconds = self._clock.boot() - begin
        return report

    def _over(self) -> bool:
        return (
            len(self._parent) >= self._most or self._clock.boot() >= self._until or (self._first and bool(self._found))
        )

    def _enter(self, world: World, parent: int, ordinal: int) -> tuple[int, World, bool]:
        """Its index, its representative, and whether it is new."""
        world, _ = self._model.canonical(world)
        mark = hash(world)
        index = self._seen.get(mark)
        if index is not None:
            return index, world, False
        index = self._seen[mark] = len(self._parent)
        self._parent.append(parent)
        self._ordinal.append(ordinal)
        self._goal.append(self._model.goal(world))
        broken = self._model.broken(world)
        if broken:
            self._found.setdefault(broken, (index, -1))
        return index, world, True

    def _expand(self, index: int, world: World, following: list[tuple[int, World]]) -> None:
        try:
            self._follow(index, world, following)
        except AssertionError as error:
            self._found.setdefault(f"the product's own invariant fails next: {error}", (index, -1))

    def _follow(self, index: int, world: World, following: list[tuple[int, World]]) -> None:
        for ordinal, step in enumerate(self._model.steps(world)):
            self.report.transitions += 1
            if step.broken:
                self._found.setdefault(step.broken, (index, ordinal))
            target, representative, fresh = self._enter(step.world, index, ordinal)
            if not step.fault:
                self._origin.append(index)
                self._target.append(target)
            if fresh:
                following.append((target, representative))

    def _judge_progress(self) -> None:
        """Backwards from the goals over edges that are no faults; what is not met is stuck."""
        count = len(self._parent)
        first = array("i", bytes(4 * (count + 1)))
        for target in self._target:
            first[target + 1] += 1
        for index in range(count):
            first[index + 1] += first[index]
        place, before = array("i", first), array("i", bytes(4 * len(self._target)))
        for origin, target in zip(self._origin, self._target, strict=True):
            before[place[target]] = origin
            place[target] += 1
        reached = bytearray(self._goal)
        todo = [index for index in range(count) if reached[index]]
        while todo:
            index = todo.pop()
            for edge in range(first[index], first[index + 1]):
                origin = before[edge]
                if not reached[origin]:
                    reached[origin] = 1
                    todo.append(origin)
        self.report.stuck = count - reached.count(1)
        if self.report.stuck:
            self._found.setdefault(STUCK, (reached.index(0), -1))

    def _story(self, index: int, last: int) -> list[str]:
        """The steps from the start to that state (and one more), with names that stay the same all along."""
        path = [] if last < 0 else [last]
        while self._parent[index] >= 0:
            path.append(self._ordinal[index])
            index = self._parent[index]
        model, names = self._model, list(self._model.names)
        world, swapped = model.canonical(model.start())
        if swapped:
            names.reverse()
        lines: list[str] = []
        for ordinal in reversed(path):
            step = next(islice(model.steps(world), ordinal, None))
            lines.append(f"{names[step.who]}: {step.text}" if step.who >= 0 else step.text)
            world, swapped = model.canonical(step.world)
            if swapped:
                names.reverse()
        return lines
