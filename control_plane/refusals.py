"""What a shard's owner may answer instead of a reply, told apart by the only question that matters: did it happen?

PROTOCOL J6, I5: every failure says NOT applied or UNKNOWN. `Refused` (core.commands) is a decision, not a failure.
"""

from __future__ import annotations


class NotOwned(Exception):
    """This replica does not own the shard, or lost it before anything was decided, or one read proved that the decision
    was not committed: NOT applied. `owner` is the replica that is believed to own it, None if unknown."""

    def __init__(self, shard: str, owner: str | None = None) -> None:
        super().__init__(f"shard {shard} is not owned here" + (f" but by {owner}" if owner else ""))
        self.shard = shard
        self.owner = owner


class OutcomeUnknown(Exception):
    """It was decided, and whether the decision was committed is not known (PROTOCOL J6): UNKNOWN."""


class StoreDown(Exception):
    """Nothing was decided in time, because the store does not answer or the shard is too busy: NOT applied."""


class ConditionFailed(Exception):
    """The condition of a batch no longer held, and never will again (PROTOCOL J5): NOT applied; decide anew."""


class TooNew(Exception):
    """A stored value is of a later version than this program understands; its shard stops (PROTOCOL J11)."""


class Corrupt(Exception):
    """The stored log or snapshot contradicts itself; its shard stops rather than guess."""


class IncompatibleFederation(Exception):
    """The federation in the store is not one this program may join: another shard count (PROTOCOL O1) or a higher
    feature level (PROTOCOL J11). The text says what to do."""
