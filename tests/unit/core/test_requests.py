"""Idempotency of mutations (PROTOCOL O8)."""

from __future__ import annotations

import pytest

from control_plane.core.commands import CreateRun, PutNamespace, Refused, Request, Tick
from control_plane.core.events import RequestRecorded, RequestsPruned
from control_plane.core.requests import KEEP, MAX_AHEAD, PRUNE_EVERY, Requests, seconds_of
from tests.unit.core.shard_kit import START, Shard, request, task


def put(number: int = 1, wall: float = START, digest: str = "d", weight: float = 1.0) -> PutNamespace:
    return PutNamespace(request(number, wall, digest), "ns", weight, 0, 0.0)


def test_an_id_holds_its_time() -> None:
    assert seconds_of(request(1, START + 0.25).id) == START + 0.25
    for wrong in ("x", "", "0" * 36, request(1).id.replace("-7", "-4"), "z" + request(1).id[1:]):
        with pytest.raises(Refused, match="UUIDv7"):
            seconds_of(wrong)


def test_a_repeat_meets_its_first_answer() -> None:
    shard = Shard()
    create = CreateRun(request(1), "ns", "x", "u1", START + 10, 0, (task("a"),))
    assert shard.do(create) == "u1"
    again = CreateRun(request(1), "ns", "x", "u2", START + 10, 0, (task("a"),))
    assert shard.do(again) == "u1"
    assert shard.last() == []


def test_another_digest_under_the_same_id_is_refused() -> None:
    shard = Shard()
    shard.do(put(digest="one"))
    with pytest.raises(Refused) as refused:
        shard.do(put(digest="two"))
    assert refused.value.reason == "REQUEST_ID_REUSED"


def test_an_id_too_far_ahead_is_refused_with_the_servers_time() -> None:
    shard = Shard()
    shard.do(put(1, START + MAX_AHEAD))
    with pytest.raises(Refused, match=f"{START:.3f}") as refused:
        shard.do(put(2, START + MAX_AHEAD + 1))
    assert refused.value.reason == "REQUEST_ID_AHEAD"


def test_expiry_is_state_and_expired_ids_are_never_executed() -> None:
    shard = Shard()
    shard.do(put())
    shard.now = START + KEEP + PRUNE_EVERY - 1
    shard.do(Tick())
    assert shard.do(put()) is None
    assert not shard.events(RequestsPruned)
    shard.later(1.0)
    assert shard.events(RequestsPruned) == [RequestsPruned(request(1).id)]
    for machine in (shard.machine, shard.replayed(), shard.restored()):
        shard.machine = machine
        with pytest.raises(Refused) as refused:
            shard.do(put())
        assert refused.value.reason == "REQUEST_ID_EXPIRED"


def test_a_prune_forgets_only_what_is_old_enough() -> None:
    shard = Shard()
    shard.do(put(1, START))
    shard.do(put(2, START + 200))
    shard.later(KEEP + PRUNE_EVERY)
    assert list(shard.machine._state.requests.records) == [request(2, START + 200).id]
    assert shard.machine.due() == START + 200 + KEEP + PRUNE_EVERY


def test_creations_inside_the_system_are_keyed_by_uid() -> None:
    shard = Shard()
    assert shard.create(task("a")) == "r1"
    assert shard.create(task("a")) == "r1"
    assert shard.last() == []
    assert not shard.events(RequestRecorded)


def test_records_are_bounded() -> None:
    requests = Requests(limit=3)
    for number in range(3):
        requests.apply_recorded(RequestRecorded(request(number).id, "d", "x"))
    with pytest.raises(Refused) as refused:
        requests.known(request(9), START)
    assert refused.value.reason == "LIMIT_EXCEEDED"
    assert requests.known(request(1), START) == "x"
    assert requests.known(Request("", ""), START) is None
