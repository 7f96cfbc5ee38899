"""Removing one safety mechanism from the simulated product, for as long as a simulation lasts.

Theory. A check that never failed proves little; so each mechanism is taken out, one at a time, and some checker must notice. What is
taken out is a collaborator: a function or method object of the loaded product is replaced in this process, and put back after
the run. The product has no flag, variable or branch for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lab.simulation.world import Shape


@dataclass(frozen=True, slots=True)
class Swap:
    """Put `part` in the place of what `where` (a module, a class or a table) has as `name`."""

    where: Any
    name: Any
    part: Any

    def put(self, part: Any) -> Any:
        """Put `part` there; what was there before."""
        if isinstance(self.where, dict):
            before, self.where[self.name] = self.where[self.name], part
        else:
            before = vars(self.where)[self.name]
            setattr(self.where, self.name, part)
        return before


@dataclass(frozen=True, slots=True)
class Removal:
    """One mechanism that is taken out. `swaps` do it; `shape` is the world whose seeds attack the rule most."""

    name: str
    rule: str
    text: str
    swaps: tuple[Swap, ...]
    shape: Shape
    setting: tuple[Swap, ...] = field(default=())
    """Swaps that make the targeted world (constants, slower ways): there with the mechanism as well as without it."""
    seed: int = 0
    """A seed at which it is caught, and at which nothing is broken with the mechanism in place."""


@contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Do the swaps; undo them at the end, whatever happens."""
    kept: list[tuple[Swap, Any]] = []
    try:
        kept.extend((swap, swap.put(swap.part)) for swap in swaps)
        yield
    finally:
        for swap, part in reversed(kept):
            swap.put(part)
