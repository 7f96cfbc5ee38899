"""Members, leases, hand-overs, lapses, feature levels (PROTOCOL O1-O4, J11)."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import ALL_SHARDS
from control_plane.core.ring import owners
from control_plane.ownership import CLOCK_RATE, ELECTION, OwnershipConfig, Tenure
from control_plane.refusals import IncompatibleFederation, NotOwned, OutcomeUnknown
from control_plane.registration import join_federation, raise_feature_level
from control_plane.store import keys
from control_plane.store.base import Lease, Put, Txn
from control_plane.store.memory import CallFault, KeepaliveFault, MemoryEtcd, Outcome
from control_plane.view import OwnerInfo
from tests.unit.journal_world import LOST_REPLY, LOST_REQUEST, Member, Replica, add, names, story, until

EVERYTHING = set(ALL_SHARDS)


def share(name: str, *members: str) -> set[str]:
    return {shard for shard, owner in owners(ALL_SHARDS, dict.fromkeys(members, 1.0)).items() if owner == name}


@story
async def test_o1_the_first_replica_makes_the_federation_and_takes_everything(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    federation = json.loads(server.keyspace.live[keys.FEDERATION].value)
    assert federation == {"uid": a.ownership.federation_uid, "shards": 32}
    assert server.keyspace.live[keys.INCARNATION].value == b"1"
    member = json.loads(server.keyspace.live[keys.member("a")].value)
    assert member["feature_level"] == FEATURE_LEVEL
    lease = server.keyspace.live[keys.member("a")].lease
    assert all(server.keyspace.live[keys.owner(shard)].lease == lease for shard in ALL_SHARDS)


@story
async def test_o1_a_federation_is_made_once_whoever_comes_first(server: MemoryEtcd) -> None:
    a, b = Replica(server, "a"), Replica(server, "b")
    a.faults.plan("txn", keys.FEDERATION, LOST_REPLY)
    first, second = await asyncio.gather(*(join_federation(each.store, each.clock, each.entropy) for each in (a, b)))
    assert first == second


@story
async def test_o1_another_number_of_shards_is_refused(server: MemoryEtcd) -> None:
    value = json.dumps({"uid": "u", "shards": 64}).encode()
    server.txn(Txn((), (Put(keys.FEDERATION, value), Put(keys.INCARNATION, b"1"), Put(keys.FEATURE_LEVEL, b"1"))))
    a = await Member(server, "a").join()
    with pytest.raises(IncompatibleFederation, match="64 shards"):
        await a.serving


@story
async def test_o4_a_second_replica_gets_its_share_one_by_one_and_work_goes_on(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    for shard in ALL_SHARDS[:8]:
        await a.ask(shard, "x")
    joined = asyncio.get_running_loop().time()
    b = await Member(server, "b").join()
    most_free = 0
    while (a.mine(), b.mine()) != (share("a", "a", "b"), share("b", "a", "b")):
        assert not a.mine() & b.mine(), "one owner at a time"
        most_free = max(most_free, len(EVERYTHING - a.mine() - b.mine()))
        assert asyncio.get_running_loop().time() < joined + 120
        await asyncio.sleep(0.02)
    assert most_free <= 2
    for shard in ALL_SHARDS[:8]:
        owner = a if shard in a.mine() else b
        assert await owner.controller.read(shard, names, timeout=5.0) == ["x"]


@story
async def test_o4_nothing_is_handed_over_before_the_minimum_hold(server: MemoryEtcd) -> None:
    config = OwnershipConfig(minimum_hold=20.0)
    a = await Member(server, "a", config).join()
    await until(lambda: a.mine() == EVERYTHING)
    b = await Member(server, "b", config).join()
    await asyncio.sleep(15)
    assert a.mine() == EVERYTHING
    await until(lambda: b.mine() == share("b", "a", "b"))


@story
async def test_o4_a_dead_replicas_shards_are_taken_when_its_lease_ends(server: MemoryEtcd) -> None:
    a, b = await Member(server, "a").join(), await Member(server, "b").join()
    await until(lambda: a.mine() | b.mine() == EVERYTHING and a.mine() == share("a", "a", "b"))
    shard = min(a.mine())
    await a.ask(shard, "x")
    await a.crash()
    await until(lambda: b.mine() == EVERYTHING, 20)
    assert await b.controller.read(shard, names, timeout=5.0) == ["x"]


@story
async def test_o4_leaving_lets_go_of_everything_quickly(server: MemoryEtcd) -> None:
    a, b = await Member(server, "a").join(), await Member(server, "b").join()
    await until(lambda: a.mine() | b.mine() == EVERYTHING and a.mine() == share("a", "a", "b"))
    shard = min(a.mine())
    a.faults.plan("txn", f"shards/{shard}", CallFault(latency=0.5))
    call = asyncio.create_task(a.ask(shard, "x"))
    await asyncio.sleep(0.1)
    await a.ownership.leave()
    assert await call == 1, "flushed"
    await until(lambda: b.mine() == EVERYTHING, 2)
    assert keys.member("a") not in server.keyspace.live
    with pytest.raises(NotOwned):
        await a.ask(shard, "y")


@story
async def test_o4_leaving_does_not_wait_for_ever_for_a_store_that_is_down(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    server.lose_quorum()
    call = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(a.ownership.leave(), 30)
    with pytest.raises(OutcomeUnknown):
        await call


@story
async def test_o1_a_restarted_replica_does_not_take_its_former_lifes_keys_for_its_own(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    await a.ask("00", "x")
    await a.crash()
    again = await Member(server, "a").join()
    await asyncio.sleep(1)
    assert again.mine() == set(), "the old lease lives"
    await until(lambda: again.mine() == EVERYTHING, 20)
    assert await again.controller.read("00", names, timeout=5.0) == ["x"]


@story
async def test_o2_the_lease_is_judged_from_the_send_time(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    await asyncio.sleep(10)
    a.faults.plan("keepalive", "", *[CallFault(Outcome.LOST_REQUEST)] * 1000)
    good_for = 5 * (1 - CLOCK_RATE) - ELECTION
    await asyncio.sleep(good_for + 0.01)
    assert not a.ownership.lease_good()
    assert keys.owner("00") in server.keyspace.live, "before the store would end it"


@story
async def test_o3_a_lapsed_replica_keeps_its_state_and_resumes(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    await a.ask("00", "x")
    machine = a.controller.owned()["00"].machine
    server.lose_quorum()
    await asyncio.sleep(30)
    assert not a.ownership.lease_good()
    call = asyncio.create_task(a.ask("00", "y"))
    await asyncio.sleep(1)
    assert not call.done()
    server.regain_quorum()
    assert await call == 2
    assert a.controller.owned()["00"].machine is machine
    assert ("dropped", "00") not in a.ear.heard


@story
async def test_o3_after_a_pause_that_cost_the_lease_the_shards_are_taken_anew(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    await a.ask("00", "x")
    epoch = a.controller.owned()["00"].epoch_revision
    a.faults.down = True
    await asyncio.sleep(20)
    assert not a.ownership.lease_good()
    a.faults.down = False
    await until(lambda: a.mine() == EVERYTHING and a.controller.owned()["00"].epoch_revision > epoch, 30)
    assert await a.ask("00", "y") == 2


@story
async def test_o3_a_suspended_replica_resumes_after_a_check(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    assert a.ownership.lease_good()
    a.clock.step_boot(4.0)
    assert not a.ownership.lease_good()
    await until(a.ownership.lease_good, 5)
    assert await a.ask("00", "x") == 1


class Acks:
    """A keeper whose acknowledgements are told."""

    def __init__(self) -> None:
        self.last_ack_sent, self.lost = -math.inf, False

    def start(self, lease: Lease) -> None: ...
    def tick(self) -> None: ...
    async def stop(self) -> None: ...


def test_o3_a_lapse_that_nobody_looked_at_is_noticed() -> None:
    """A renewal that was sent after the one before had run out says nothing about the time between."""
    keeper = Acks()
    span = 5 * (1 - CLOCK_RATE) - ELECTION
    tenure = Tenure(Lease(1, 5.0), keeper, since=100.0)
    assert tenure.good(101.0)
    keeper.last_ack_sent = 100.0 + span - 0.1
    assert tenure.good(100.0 + span + 0.1)
    keeper.last_ack_sent += span + 0.1
    assert not tenure.good(keeper.last_ack_sent + 0.1)
    assert tenure.fresh(keeper.last_ack_sent + 0.1), "a resume may be tried"
    keeper.lost = True
    assert not tenure.fresh(keeper.last_ack_sent + 0.1)


@story
async def test_o2_a_lying_keepalive_does_not_make_a_write_pass(server: MemoryEtcd) -> None:
    a, b = await Member(server, "a").join(), Replica(server, "b")
    await until(lambda: a.mine() == EVERYTHING)
    a.faults.keepalives = KeepaliveFault.ACKED_AFTER_REVOKE
    server.revoke(server.keyspace.live[keys.member("a")].lease)
    await b.start("00")
    with pytest.raises(NotOwned):
        await a.ask("00", "x")
    assert await b.ask("00", "y") == 1


@story
async def test_o1_an_owner_key_nobody_uses_is_given_back(server: MemoryEtcd) -> None:
    """The answer to a taking never came, and the write landed after we gave up."""
    a = Member(server, "a")
    a.faults.plan("txn", keys.owner("07"), CallFault(Outcome.LATE, late=8.0), *[LOST_REQUEST] * 60)
    await a.join()
    await until(lambda: a.mine() == EVERYTHING, 60)
    assert await a.ask("07", "x") == 1


@story
async def test_two_processes_of_one_name_do_not_serve_together(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    twin = await Member(server, "a").join()
    await asyncio.sleep(60)
    assert a.mine() == EVERYTHING
    assert twin.mine() == set()


@story
async def test_j11_a_replica_below_the_federations_level_does_not_register(server: MemoryEtcd) -> None:
    server.txn(
        Txn(
            (),
            (
                Put(keys.FEDERATION, json.dumps({"uid": "u", "shards": 32}).encode()),
                Put(keys.INCARNATION, b"1"),
                Put(keys.FEATURE_LEVEL, str(FEATURE_LEVEL + 1).encode()),
            ),
        )
    )
    a = await Member(server, "a").join()
    with pytest.raises(IncompatibleFederation, match="feature level"):
        await a.serving
    assert keys.member("a") not in server.keyspace.live


@story
async def test_j11_the_level_is_raised_only_when_everybody_can_read_it(server: MemoryEtcd) -> None:
    old = await Member(server, "old").join()
    new = await Member(server, "new", feature_level=FEATURE_LEVEL + 1).join()
    await until(lambda: bool(old.mine() and new.mine()))
    with pytest.raises(IncompatibleFederation, match="replica old"):
        await raise_feature_level(new.store, new.clock, FEATURE_LEVEL + 1)
    await old.crash()
    await until(lambda: new.mine() == EVERYTHING)
    assert await raise_feature_level(new.store, new.clock, FEATURE_LEVEL + 1) == FEATURE_LEVEL + 1
    assert await raise_feature_level(new.store, new.clock, FEATURE_LEVEL) == FEATURE_LEVEL + 1, "one way"
    again = await Member(server, "old").join()
    with pytest.raises(IncompatibleFederation):
        await again.serving


@story
async def test_j11_a_registration_in_between_stops_a_raise(server: MemoryEtcd) -> None:
    """Every registration writes the level's key again."""
    new = await Member(server, "new", feature_level=FEATURE_LEVEL + 1).join()
    await until(lambda: bool(new.mine()))
    admin = Replica(server, "admin")
    admin.faults.plan("txn", keys.FEATURE_LEVEL, CallFault(), CallFault(latency=3.0))
    raising = asyncio.create_task(raise_feature_level(admin.store, admin.clock, FEATURE_LEVEL + 1))
    await asyncio.sleep(0.5)
    old = await Member(server, "old").join()
    await until(lambda: keys.member("old") in server.keyspace.live, 2)
    with pytest.raises(IncompatibleFederation, match="replica old"):
        await raising
    assert not old.serving.done()


@story
async def test_drifting_clocks_and_a_busy_ring_lose_nothing(server: MemoryEtcd) -> None:
    members = [await Member(server, name).join() for name in "abc"]
    members[1].clock.set_rate(1 + CLOCK_RATE)
    members[2].clock.set_rate(1 - CLOCK_RATE)
    acked: list[str] = []
    for number in range(60):
        name = f"n{number}"
        if number == 20:
            await members[2].crash()
        if number == 40:
            await members[1].ownership.leave()
        for member in members * 40:
            if "05" in member.mine():
                try:
                    await member.controller.submit("05", add(name), timeout=2.0)
                    acked.append(name)
                    break
                except NotOwned:
                    pass
            await asyncio.sleep(0.1)
    await until(lambda: members[0].mine() == EVERYTHING)
    assert await members[0].controller.read("05", names, timeout=5.0) == acked
    assert len(acked) == 60


# -- nudges: what is heard of the small keys makes the next survey come soon --------------------------------------------------

DROWSY = OwnershipConfig(poll=60.0, eager_poll=60.0)


def told(server: MemoryEtcd) -> dict[str, OwnerInfo]:
    """Owner keys as a view hears of them."""
    found = {shard: server.keyspace.live.get(keys.owner(shard)) for shard in ALL_SHARDS}
    values = {shard: json.loads(kv.value) for shard, kv in found.items() if kv is not None}
    return {shard: OwnerInfo(value["replica"], value["nonce"], 1) for shard, value in values.items()}


@story
async def test_o1_a_nudge_is_enough_and_nothing_else_surveys_the_store(server: MemoryEtcd) -> None:
    a = await Member(server, "a", DROWSY).join()
    await until(lambda: a.mine() == EVERYTHING)
    b = await Member(server, "b", DROWSY).join()
    await until(lambda: keys.member("b") in server.keyspace.live)
    await asyncio.sleep(10)
    assert a.mine() == EVERYTHING, "nobody told it"
    a.ownership.nudge()
    await until(lambda: a.mine() == share("a", "a", "b"), 10)
    assert b.mine() == set()
    b.ownership.heard(told(server))
    await until(lambda: b.mine() == share("b", "a", "b"), 3)


@story
async def test_o3_a_lapse_is_not_left_until_the_next_poll(server: MemoryEtcd) -> None:
    a = await Member(server, "a", DROWSY).join()
    await until(lambda: a.mine() == EVERYTHING)
    a.faults.plan("keepalive", "", *[CallFault(Outcome.LOST_REQUEST)] * 6)
    await until(lambda: not a.ownership.lease_good(), 10)
    await until(a.ownership.lease_good, 5)
    assert a.mine() == EVERYTHING


@story
async def test_o1_only_what_concerns_us_is_a_nudge(server: MemoryEtcd) -> None:
    a, b = await Member(server, "a", DROWSY).join(), await Member(server, "b", DROWSY).join()
    for _ in range(60):
        await asyncio.sleep(0.5)
        a.ownership.nudge()
        b.ownership.nudge()
    assert a.mine() == share("a", "a", "b")
    await asyncio.sleep(2)
    reads = a.faults.calls.count(("range", keys.MEMBERS_PREFIX))
    theirs = min(b.mine())
    a.ownership.heard({shard: info for shard, info in told(server).items() if shard != theirs})
    await asyncio.sleep(5)
    assert a.faults.calls.count(("range", keys.MEMBERS_PREFIX)) == reads, "b's shard is free: that is b's business"
    mine = min(a.mine())
    a.ownership.heard({shard: info for shard, info in told(server).items() if shard != mine})
    await asyncio.sleep(5)
    assert a.faults.calls.count(("range", keys.MEMBERS_PREFIX)) > reads


@story
async def test_j12_a_registration_that_a_restore_took_away_is_made_anew_though_its_lease_id_lives(
    server: MemoryEtcd,
) -> None:
    b = await Member(server, "b").join()
    await until(lambda: b.mine() == EVERYTHING)
    backup = server.snapshot()
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == share("a", "a", "b"))
    server.restore(backup)
    server.grant(5.0)  # somebody else's, with the id that was a's
    await until(lambda: keys.member("a") in server.keyspace.live, 10)


@story
async def test_j12_two_replicas_under_one_lease_id_part(server: MemoryEtcd) -> None:
    """A lease that was granted before a restore, used after it, when its id had been given to another replica: both keep it alive,
    and each takes the other's owner keys for its own leftovers."""
    a = await Member(server, "a").join()
    await until(lambda: a.mine() == EVERYTHING)
    server._next_lease = server.keyspace.live[keys.member("a")].lease
    b = Member(server, "b")
    await b.join()
    await until(lambda: a.mine() == share("a", "a", "b") and b.mine() == share("b", "a", "b"), 30)
    leases = {name: server.keyspace.live[keys.member(name)].lease for name in "ab"}
    assert leases["a"] != leases["b"]
    await asyncio.sleep(10)
    assert a.mine() == share("a", "a", "b")
    assert b.mine() == share("b", "a", "b")
