"""Programs of two versions in one federation (PROTOCOL J11), judged from registrations, the level's key and the log."""

from __future__ import annotations

from collections.abc import Iterator

from lab.checking.fold import Fold
from lab.checking.history import Levelled, Record, Violation, Written

INVARIANT = "J11 versions"


def nobody_writes_above(record: Record, fold: Fold) -> Iterator[Violation]:
    """J11: no batch above the federation's level, no level above a registered replica's, and none that falls."""
    del fold
    allowed, members = 0, dict[str, int]()
    before, restores = 0, sorted(restored.at for restored in record.restored)
    for each in _merged(record):
        if each.revision < before or (restores and each.at > restores[0]):
            restores = restores[1:]  # what the backup held is not known: wait to be told
            allowed, members = 0, {}
        before = each.revision
        if isinstance(each, Written):
            if allowed and each.level > allowed:
                yield Violation(
                    INVARIANT, each.at, f"{each.shard} has a batch of level {each.level}, allowed is {allowed}"
                )
            continue
        if each.member:
            members[each.member] = each.level
            if not each.level:
                del members[each.member]
        else:
            if each.level < allowed:
                yield Violation(INVARIANT, each.at, f"the level fell from {allowed} to {each.level}")
            allowed = each.level
        behind = sorted(name for name, level in members.items() if level < allowed)
        if behind:
            yield Violation(INVARIANT, each.at, f"the level is {allowed}, but {', '.join(behind)} reads less")


def _merged(record: Record) -> list[Levelled | Written]:
    """In the order of time; within one revision the level comes before those who register at it."""
    told: list[Levelled | Written] = [*record.levels, *record.journal]
    return sorted(told, key=lambda each: (each.at, each.revision, not isinstance(each, Levelled) or bool(each.member)))
