"""Production objects as values: an object is known by a number, the same number for the same state.

Theory. A production core is a mutable object; a world is a value. So an object lives here as bytes, is brought to life for one
question, and what it has become is put back. Two that would answer alike must have one `identity`, or worlds are counted twice;
two that would not must never share one, or worlds are missed. Each question is asked once: cores are deterministic.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar, cast

M = TypeVar("M")
A = TypeVar("A")


class Pool(Generic[M]):
    """Objects of one kind. `freeze` gives what is kept of one, `thaw` makes it again, `identity` tells states apart."""

    def __init__(
        self, *, identity: Callable[[M], object], freeze: Callable[[M], object], thaw: Callable[[Any], M]
    ) -> None:
        self._identity, self._freeze, self._thaw = identity, freeze, thaw
        self._numbers: dict[str, int] = {}
        self._kept: list[bytes] = []
        self._answers: dict[tuple[Any, ...], Any] = {}

    def put(self, machine: M) -> int:
        """The number of its state."""
        name = repr(self._identity(machine))
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._kept)
            self._kept.append(pickle.dumps(self._freeze(machine), pickle.HIGHEST_PROTOCOL))
        return number

    def get(self, number: int) -> M:
        """A copy of its own for the caller."""
        return self._thaw(pickle.loads(self._kept[number]))  # noqa: S301 - our own bytes

    def once(self, *question: object, answer: Callable[[], A]) -> A:
        """The answer to a question, asked once."""
        if question not in self._answers:
            self._answers[question] = answer()
        return cast(A, self._answers[question])

    def __len__(self) -> int:
        return len(self._kept)


def plain(value: object) -> object:
    """Its state as plain values, dicts in their order; for trees of dataclasses and simple objects."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, (tuple, list, deque)):
        return tuple(plain(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted((plain(item) for item in value), key=repr))
    if isinstance(value, Mapping):
        return tuple((plain(key), plain(item)) for key, item in value.items())
    return (type(value).__name__, *((name, plain(item)) for name, item in fields_of(value).items()))


def fields_of(value: object) -> dict[str, Any]:
    """Everything that an object holds."""
    found: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    return found
