"""The checker of mixed versions (PROTOCOL J11), on histories written by hand."""

from __future__ import annotations

from control_plane.core import events as ev
from control_plane.core.model import Stamp
from lab.checking.history import Levelled, Record, Restored, Violation, Written
from lab.checking.judging import judge
from lab.checking.versions import nobody_writes_above

OLD_JOINS = (Levelled(1.0, 1, "", 1), Levelled(2.0, 2, "old", 1), Levelled(2.0, 2, "", 1))
"""A federation at level 1, and a replica that reads no more."""


def batch(at: int, level: int) -> Written:
    event = ev.RunSealed("run")
    return Written(float(at), at, "00", Stamp(0.0, "n", at, 1), event, level=level)


def found(*levels: Levelled, journal: tuple[Written, ...] = (), restored: tuple[Restored, ...] = ()) -> list[Violation]:
    record = Record(list(journal), [], [], {}, healed=50.0, ended=50.0, died=(), levels=levels, restored=restored)
    return judge(record, (nobody_writes_above,))


def test_an_upgrade_in_order_is_lawful() -> None:
    gone, new = Levelled(3.0, 3, "old", 0), Levelled(4.0, 4, "new", 2)
    raised = Levelled(5.0, 5, "", 2)
    assert found(*OLD_JOINS, gone, new, raised, journal=(batch(3, 1), batch(6, 2))) == []


def test_a_batch_above_the_level_is_seen() -> None:
    assert [each.at for each in found(*OLD_JOINS, journal=(batch(3, 1), batch(4, 2)))] == [4.0]


def test_a_level_above_a_registered_replica_is_seen() -> None:
    assert "old reads less" in found(*OLD_JOINS, Levelled(3.0, 3, "", 2))[0].text


def test_a_replica_that_comes_in_below_the_level_is_seen() -> None:
    assert "old reads less" in found(Levelled(1.0, 1, "", 2), Levelled(2.0, 2, "old", 1))[0].text


def test_a_level_that_falls_is_seen_unless_the_store_was_restored() -> None:
    levels = (Levelled(1.0, 1, "", 2), Levelled(6.0, 6, "", 1))
    assert "fell" in found(*levels)[0].text
    assert found(*levels, restored=(Restored(5.0, 1),)) == []
