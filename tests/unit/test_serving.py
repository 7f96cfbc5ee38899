"""Sessions and dispatcher together, between real controllers: what may leave, when, and on which stream (PROTOCOL J2, J7, S1, S6, F5).

Agents are played by hand; peers are wires on which a message may be lost or late.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from baton.internal import peer_pb2 as peer
from baton.leases import PROFILES, LeaseValues
from baton.v1 import agent_pb2 as pb
from control_plane import agent_codec as codec
from control_plane.controller import CycleConfig
from control_plane.core.commands import CreateRun, Grant, LoseCluster, Request, TakeGrants, TakeTable
from control_plane.core.model import FLEET, AttemptId, Evidence, GraphTask, TaskSpec
from control_plane.core.shard import RunShard
from control_plane.dispatcher import RESEND, Dispatcher
from control_plane.fleet_keys import side_puts
from control_plane.peers import CallContext, Calls, MessageHandler
from control_plane.replica import make_machine
from control_plane.restore import RestoreDetector
from control_plane.router import Router
from control_plane.services.failures import peer_failure
from control_plane.services.fleet_calls import FleetCalls
from control_plane.session_calls import INVENTORY, LOSE
from control_plane.sessions import Sessions, SessionsConfig, StreamClosed
from control_plane.store import keys
from control_plane.store.base import Delete, Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd
from control_plane.view import View
from tests.unit.journal_world import Replica, story, until

NOW = 0.0
LOST = float("inf")


def at_once(_: str, __: str, ___: peer.PeerMessage) -> float:
    return NOW


@dataclass
class Wires:
    """All messages between replicas. `delay(sender, receiver, message)`: seconds, or LOST."""

    handlers: dict[str, MessageHandler] = field(default_factory=dict)
    delay: Callable[[str, str, peer.PeerMessage], float] = at_once


class Wire:
    """One replica's end (`peers.Peers`)."""

    def __init__(self, wires: Wires, name: str) -> None:
        self._wires, self._name = wires, name
        self._last: dict[str, float] = {}

    def send(self, replica: str, message: peer.PeerMessage) -> bool:
        if replica not in self._wires.handlers:
            return False
        copy = peer.PeerMessage.FromString(message.SerializeToString())
        seconds = self._wires.delay(self._name, replica, copy)
        if seconds < LOST:
            loop = asyncio.get_running_loop()
            at = max(loop.time() + seconds, self._last.get(replica, 0.0) + 1e-6)  # in order
            self._last[replica] = at
            loop.call_at(at, self._wires.handlers[replica], self._name, copy)
        return True

    def on_message(self, handler: MessageHandler) -> None:
        self._wires.handlers[self._name] = handler

    def on_break(self, handler: Callable[[str], None]) -> None:
        pass


class AgentEnd:
    """An agent's stream, with the agent's hand on the other end (`sessions.AgentStream`)."""

    peer_cluster: str | None = None

    def __init__(self) -> None:
        self._up: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        self.got: list[pb.SessionResponse] = []

    async def receive(self) -> pb.SessionRequest:
        message = await self._up.get()
        if message is None:
            raise StreamClosed
        return message

    def send(self, message: pb.SessionResponse) -> bool:
        self.got.append(message)
        return True

    def say(self, **message: Any) -> None:
        self._up.put_nowait(pb.SessionRequest(**message))

    def close(self) -> None:
        self._up.put_nowait(None)

    def of(self, kind: Any) -> list[Any]:
        return [getattr(message, kind) for message in self.got if message.HasField(kind)]

    def tasks(self) -> list[int]:
        """Tasks dispatched, in order."""
        return [work.attempt.task for sent in self.of("dispatches") for work in sent.dispatches]

    async def welcomed(self) -> pb.Welcome:
        await until(lambda: bool(self.of("welcome") or self.of("refusal")))
        assert not self.of("refusal"), self.of("refusal")
        return self.of("welcome")[0]  # type: ignore[no-any-return]

    async def refused(self) -> str:
        await until(lambda: bool(self.of("refusal")))
        return str(self.of("refusal")[0].reason)


class Node(Replica):
    """A replica with sessions and dispatcher, without ring, placement and clocks of losses: those are done by hand."""

    def __init__(self, server: MemoryEtcd, name: str, wires: Wires, config: CycleConfig | None = None) -> None:
        super().__init__(server, name, config, make_machine=make_machine, side_puts=side_puts)
        self.view = View(self.store, self.clock)
        self.calls = Calls(Wire(wires, name), self.entropy, peer_failure(self.entropy))
        self.router = Router(name, Wire(wires, name), self.calls, self.view, self.controller)
        self.profiles: dict[str, LeaseValues] = dict(PROFILES)

    async def up(self, *shards: str) -> Node:
        detector = RestoreDetector(self.store, self.clock, self.name)
        await self.start()
        federation = detector.federation_uid = self.controller.restore.federation_uid
        config = SessionsConfig(federation, self.profiles.__getitem__, detector.check_marks)
        self.sessions = Sessions(self.store, self.clock, self.entropy, self.router, self.view, config)
        self.dispatcher = Dispatcher(self.controller, self.router, self.calls, self.view, self.clock)
        self.controller.listen(self.dispatcher)
        self.router.on_from_cluster(self.dispatcher.receive)
        FleetCalls(self.controller, self.calls)
        for loop in (self.view, self.sessions, self.dispatcher):
            self.spawn(loop.run())
        await self.view.ready()
        for shard in shards:
            assert await self.controller.take(shard)
        return self

    def dial(self, name: str = "eu", **hello: Any) -> AgentEnd:
        end = AgentEnd()
        self.spawn(self.sessions.serve(end))
        facts = {"cluster": name, "instance": "i1", "boot_id": "b1", "journal_uid": "j1", "profile": "fast"}
        end.say(hello=pb.Hello(**{**facts, **hello}))
        return end

    def machine(self, shard: str = "00") -> RunShard:
        machine = self.controller.owned()[shard].machine
        assert isinstance(machine, RunShard)
        return machine

    async def submit(self, command: Any, shard: str = "00") -> Any:
        return await self.controller.submit(shard, command, timeout=60.0)

    async def create(self, uid: str, tasks: int) -> None:
        """A run of that many tasks."""
        graph = tuple(GraphTask(f"t{i}", (), TaskSpec(("work",))) for i in range(tasks))
        wall = self.clock.wall()
        await self.submit(CreateRun(Request("", ""), "ns", uid, uid, wall + 3600.0, 0, graph))

    def grant(self, count: int) -> TakeGrants:
        """Permission on the newest generation of the only cluster."""
        ((uid, facts),) = self.view.table.clusters.items()
        (line,) = self.machine().demand()
        return TakeGrants(1, (Grant(uid, facts.generation, line.key, count),))

    async def place(self, count: int) -> None:
        await asyncio.gather(self.submit(TakeTable(self.view.table)), self.submit(self.grant(count)))

    @property
    def cluster(self) -> str:
        (uid,) = self.view.table.clusters
        return uid

    async def lose(self, generation: int) -> None:
        """Fleet commits the loss; this replica has heard of it."""
        await self.submit(LoseCluster(self.cluster, generation, Evidence.TIMED, "no heartbeat"), FLEET)
        await until(lambda: self.view.table.clusters[self.cluster].generations[-1].ended)


def listed(attempts: Iterable[AttemptId], phase: int, generation: int) -> list[pb.ShardInventory]:
    held = list(attempts)
    runs = list(dict.fromkeys(a.run for a in held))
    return [
        pb.ShardInventory(
            shard="00",
            run_uids=runs,
            run=[runs.index(a.run) for a in held],
            task=[a.task for a in held],
            n=[a.n for a in held],
            nonce=[a.nonce for a in held],
            generation=[generation] * len(held),
            phase=[phase] * len(held),  # type: ignore[list-item]
        )
    ]


def finished(*attempts: AttemptId, shard: str = "00") -> pb.Reports:
    reports = [pb.FinishedReport(attempt=codec.ref(a), outcome=pb.OUTCOME_SUCCEEDED) for a in attempts]
    return pb.Reports(shard=shard, finished=reports)


async def alone(server: MemoryEtcd, config: CycleConfig | None = None) -> Node:
    return await Node(server, "a", Wires(), config).up(FLEET, "00")


async def linked(node: Node, end: AgentEnd) -> None:
    """The agent is welcome, and its inventory was taken by shard 00 of `node`."""
    await end.welcomed()
    await until(lambda: ("00", node.cluster) in node.dispatcher._links)


@story
async def test_j7_nothing_leaves_that_is_decided_but_not_committed(server: MemoryEtcd) -> None:
    """The inventory's answer meets a machine that is one batch ahead of the log: what that batch placed must wait for it."""
    a = await alone(server)
    first = a.dial()
    await linked(a, first)
    await a.create("r", 2)
    await a.place(1)
    await until(lambda: first.tasks() == [0])
    (running,) = a.machine().live_on(a.cluster)
    await a.lose(1)
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0), CallFault(latency=5.0))
    again = a.dial(inventory=listed([running], pb.ATTEMPT_PHASE_RUNNING, 1), last_generation=1)
    await again.welcomed()
    await until(lambda: a.view.table.clusters[a.cluster].generation == 2)
    placing = asyncio.create_task(a.place(1))
    await until(lambda: len(again.of("adoptions")) == 1)
    await asyncio.sleep(1.0)
    assert not placing.done()
    assert 1 not in again.tasks(), "its placement is not in the log yet"
    await placing
    await until(lambda: 1 in again.tasks())
    await a.crash()


@story
async def test_s6_an_agent_that_missed_its_adoption_is_told_again(server: MemoryEtcd) -> None:
    """J7: the adoption was committed, its message lost with the stream. The agent lists the attempt under the old generation."""
    a = await alone(server)
    await linked(a, a.dial())
    await a.create("r", 1)
    await a.place(1)
    (running,) = a.machine().live_on(a.cluster)
    await a.lose(1)
    second = a.dial(inventory=listed([running], pb.ATTEMPT_PHASE_RUNNING, 1), last_generation=1)
    await until(lambda: len(second.of("adoptions")) == 1)
    third = a.dial(inventory=listed([running], pb.ATTEMPT_PHASE_RUNNING, 1), last_generation=2)
    assert (await third.welcomed()).resumed
    await until(lambda: third.tasks() == [0])
    fourth = a.dial(inventory=listed([running], pb.ATTEMPT_PHASE_RUNNING, 2), last_generation=2)
    await fourth.welcomed()
    await asyncio.sleep(RESEND)
    assert fourth.tasks() == [], "it knows"
    await a.crash()


@story
async def test_j7_a_dispatch_lost_between_replicas_goes_again_under_its_number(server: MemoryEtcd) -> None:
    """C4: agents receipt the highest number without a gap, so a new number would leave the gap for ever."""
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET, "00")
    b = await Node(server, "b", wires).up()
    await until(lambda: set(b.view.owners) >= {FLEET, "00"})
    end = b.dial()
    await linked(a, end)
    await a.create("r", 3)
    await a.place(1)
    await until(lambda: end.tasks() == [0])
    wires.delay = lambda sender, _, m: LOST if sender == "a" and m.to_cluster.message.HasField("dispatches") else NOW
    await a.place(1)
    wires.delay = at_once
    await a.place(1)
    await until(lambda: end.tasks() == [0, 2])
    end.say(receipt=pb.DispatchReceipt(shard="00", epoch=end.of("dispatches")[0].epoch, dispatch_no=1))
    await until(lambda: 1 in end.tasks())
    numbers = {work.attempt.task: sent.dispatch_no for sent in end.of("dispatches") for work in sent.dispatches}
    assert numbers == {0: 1, 1: 2, 2: 3}
    end.say(receipt=pb.DispatchReceipt(shard="00", epoch=end.of("dispatches")[0].epoch, dispatch_no=3))
    await asyncio.sleep(RESEND / 2)
    quiet = len(end.of("dispatches"))
    await asyncio.sleep(3 * RESEND)
    assert len(end.of("dispatches")) == quiet
    await asyncio.gather(a.crash(), b.crash())


@story
async def test_j7_reports_are_settled_again_after_the_shard_was_too_busy_for_them(server: MemoryEtcd) -> None:
    a = await alone(server, CycleConfig(inbox=1))
    end = a.dial()
    await linked(a, end)
    await a.create("r", 1)
    await a.submit(TakeTable(a.view.table))
    await a.submit(a.grant(1))
    await until(lambda: end.tasks() == [0])
    (done,) = a.machine().live_on(a.cluster)
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    busy = asyncio.create_task(a.create("x", 1))
    await asyncio.sleep(0.1)
    a.controller.post("00", TakeTable(a.view.table))
    end.say(reports=finished(done))
    await busy
    assert end.of("report_acks") == []
    end.say(reports=finished(done))
    await until(lambda: len(end.of("report_acks")) == 1)
    await a.crash()


@story
async def test_reports_that_are_addressed_to_fleet_do_not_reach_it(server: MemoryEtcd) -> None:
    """A run shard's command breaks fleet's machine: no agent may have that power."""
    a = await alone(server)
    end = a.dial()
    await linked(a, end)
    machine = a.controller.owned()[FLEET].machine
    end.say(reports=finished(AttemptId("r", 0, 1, "n"), shard=FLEET))
    await asyncio.sleep(1.0)
    assert a.controller.owned()[FLEET].machine is machine
    await a.crash()


@story
async def test_j7_a_shard_that_moves_while_its_old_owner_answers_is_told_the_inventory_too(server: MemoryEtcd) -> None:
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET, "00")
    b = await Node(server, "b", wires).up()
    c = await Node(server, "c", wires).up()
    await until(lambda: set(b.view.owners) >= {FLEET, "00"})
    asked: set[int] = set()

    def late(sender: str, receiver: str, message: peer.PeerMessage) -> float:
        if message.call.method == INVENTORY and message.call.shard == "00":
            asked.add(message.call.id)
        return 3.0 if sender == "a" and message.reply.id in asked else NOW

    wires.delay = late
    end = b.dial()
    await linked(a, end)
    await a.create("r", 1)
    await a.controller.release("00")
    assert await c.controller.take("00")
    await asyncio.sleep(4.0)
    await until(lambda: ("00", c.cluster) in c.dispatcher._links, 10.0)
    await c.place(1)
    await until(lambda: end.tasks() == [0])
    await asyncio.gather(a.crash(), b.crash(), c.crash())


@story
async def test_j7_a_former_owner_that_has_not_noticed_is_not_taken_for_the_owner(server: MemoryEtcd) -> None:
    """Seed 7014: the serving replica itself was the owner before, and answered before it knew that its lease was gone."""
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET, "00")
    c = await Node(server, "c", wires).up()
    await until(lambda: set(c.view.owners) >= {FLEET, "00"})
    end = a.dial()
    await linked(a, end)
    server.txn(Txn((), (Delete(keys.owner("00")),)))
    assert await c.controller.take("00")
    await until(lambda: "00" in a.view.owners and a.view.owners["00"].replica == "c")
    await asyncio.sleep(1.0)
    assert "00" in a.controller.owned(), "it has asked itself by now"
    a.controller.drop("00")
    await until(lambda: ("00", c.cluster) in c.dispatcher._links, 10.0)
    await asyncio.gather(a.crash(), c.crash())


@story
async def test_f3_an_older_streams_inventory_that_comes_late_does_not_take_the_link_back(server: MemoryEtcd) -> None:
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET, "00")
    b = await Node(server, "b", wires).up()
    c = await Node(server, "c", wires).up()
    await until(lambda: all(set(node.view.owners) >= {FLEET, "00"} for node in (b, c)))

    def late(sender: str, _: str, message: peer.PeerMessage) -> float:
        return 2.0 if sender == "b" and message.call.method == INVENTORY else NOW

    wires.delay = late
    first = b.dial()
    await first.welcomed()
    await until(lambda: a.cluster in c.view.sessions)
    second = c.dial()
    await linked(a, second)
    stream = a.dispatcher._links["00", a.cluster].stream
    await asyncio.sleep(3.0)
    assert a.dispatcher._links["00", a.cluster].stream == stream
    await a.create("r", 1)
    await a.place(1)
    await until(lambda: second.tasks() == [0], 1.0)
    await asyncio.gather(a.crash(), b.crash(), c.crash())


@story
async def test_j12_while_a_restore_is_suspected_nothing_is_sent_or_acknowledged(server: MemoryEtcd) -> None:
    a = await alone(server)
    end = a.dial()
    await linked(a, end)
    await a.create("r", 2)
    await a.place(1)
    await until(lambda: end.tasks() == [0])
    (done,) = a.machine().live_on(a.cluster)
    end.say(reports=finished(done))
    await until(lambda: len(end.of("report_acks")) == 1 and end.tasks() == [0, 1])  # the slot served the next one (C2)
    await a.store.txn(Txn([], [Put(keys.RESTORED_SUSPECTED, b"?")]), timeout=5.0)
    await until(lambda: a.view.restore_suspected != "")
    before = len(end.got)
    end.say(reports=finished(done))
    end.say(heartbeat=pb.Heartbeat(seq=1, generation=1))
    await asyncio.sleep(3 * RESEND)
    assert len(end.got) == before
    await a.crash()


@story
async def test_o3_a_lapsed_owner_sends_nothing_again(server: MemoryEtcd) -> None:
    a = await alone(server)
    end = a.dial()
    await linked(a, end)
    await a.create("r", 1)
    await a.place(1)
    await until(lambda: end.tasks() == [0])
    a.good = False
    await asyncio.sleep(3 * RESEND)
    assert end.tasks() == [0]
    a.good = True
    await until(lambda: end.tasks() == [0, 0])
    await a.crash()


@story
async def test_f5_a_resumed_session_lives_by_the_lease_that_fleet_waits_for(server: MemoryEtcd) -> None:
    a = await alone(server)
    assert (await a.dial().welcomed()).lease.profile == "fast"
    again = await a.dial(profile="patient", last_generation=1).welcomed()
    assert (again.resumed, again.lease.profile, again.lease.fence_ms) == (True, "fast", 9000)
    a.profiles["fast"] = replace(PROFILES["fast"], lost=16.0)
    assert await a.dial(last_generation=1).refused() == "GENERATION_ENDING", "this replica would promise more"
    await a.crash()


@story
async def test_s1_a_second_instance_is_refused_by_any_replica(server: MemoryEtcd) -> None:
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET)
    b = await Node(server, "b", wires).up()
    await until(lambda: FLEET in b.view.owners)
    first = a.dial()
    await first.welcomed()
    await until(lambda: bool(b.view.table.clusters) and a.cluster in b.view.sessions)
    assert await b.dial(instance="i2").refused() == "SECOND_INSTANCE"
    assert (await b.dial().welcomed()).resumed, "the same one moved"
    second = b.dial()
    await second.welcomed()
    second.close()
    await until(lambda: b.sessions.serving() == {})
    assert (await b.dial(instance="i2").welcomed()).resumed, "it was restarted"
    await asyncio.gather(a.crash(), b.crash())


@story
async def test_j12_marks_without_their_federation_are_refused(server: MemoryEtcd) -> None:
    a = await alone(server)
    marks = [pb.ShardMark(shard="00", incarnation=1, seq=7, nonce="n")]
    assert await a.dial(marks=marks).refused() == "INVALID_ARGUMENT"
    uid = a.controller.restore.federation_uid
    assert await a.dial(marks=marks, federation_uid=uid).refused() == "RESTORE_SUSPECTED"
    await a.crash()


@story
async def test_s5_a_goodbye_is_said_again_until_fleet_has_decided(server: MemoryEtcd) -> None:
    a = await alone(server)
    end = a.dial()
    await end.welcomed()
    a.good = False
    end.say(goodbye=pb.Goodbye(generation=1))
    await asyncio.sleep(7.0)
    assert end.of("refusal") == [], "nothing is decided yet"
    a.good = True
    assert await end.refused() == "GENERATION_ENDED"
    await until(lambda: a.view.table.clusters[a.cluster].generations[-1].evidence is Evidence.REPORTED)
    await a.crash()


@story
async def test_s5_a_goodbye_that_comes_late_does_not_end_what_the_agent_came_back_into(server: MemoryEtcd) -> None:
    """F6: evidence REPORTED would let copies start beside the work that it was given since."""
    wires = Wires()
    a = await Node(server, "a", wires).up(FLEET)
    b = await Node(server, "b", wires).up()
    c = await Node(server, "c", wires).up()
    await until(lambda: all(FLEET in node.view.owners for node in (b, c)))
    first = b.dial()
    await first.welcomed()
    wires.delay = lambda sender, _, message: 3.0 if sender == "b" and message.call.method == LOSE else NOW
    first.say(goodbye=pb.Goodbye(generation=1))
    await asyncio.sleep(1.0)
    second = c.dial(last_generation=1)
    assert (await second.welcomed()).resumed
    await asyncio.sleep(5.0)
    assert not a.view.table.clusters[a.cluster].generations[-1].ended
    second.say(heartbeat=pb.Heartbeat(seq=1, generation=1))
    await until(lambda: len(second.of("heartbeat_ack")) == 1)
    await asyncio.gather(a.crash(), b.crash(), c.crash())


@story
async def test_f8_a_stop_of_an_unknown_run_is_sent_until_the_agent_tells_its_end(server: MemoryEtcd) -> None:
    """Nothing in the shard remembers an orphan, so a stop that is lost on the way must be remembered by the link."""
    a = await alone(server)
    orphan = AttemptId("gone", 0, 1, "n")
    end = a.dial(inventory=listed([orphan], pb.ATTEMPT_PHASE_RUNNING, 1))
    await linked(a, end)
    await until(lambda: len(end.of("stops")) >= 3)
    assert all(list(stops.attempts) == [codec.ref(orphan)] for stops in end.of("stops"))
    end.say(reports=pb.Reports(shard="00", stopped=[codec.ref(orphan)]))
    await until(lambda: len(end.of("report_acks")) == 1)
    told = len(end.of("stops"))
    await asyncio.sleep(3 * RESEND)
    assert len(end.of("stops")) == told
    await a.crash()


@story
async def test_f8_a_new_inventory_says_anew_which_unknown_attempts_are_there(server: MemoryEtcd) -> None:
    a = await alone(server)
    orphan = AttemptId("gone", 0, 1, "n")
    await linked(a, a.dial(inventory=listed([orphan], pb.ATTEMPT_PHASE_RUNNING, 1)))
    again = a.dial(last_generation=1)
    await again.welcomed()
    await asyncio.sleep(3 * RESEND)
    assert again.of("stops") == []
    await a.crash()


@story
async def test_j7_an_owner_that_fails_on_an_inventory_is_told_it_again(server: MemoryEtcd) -> None:
    """Whatever is wrong there, it must not leave the shard without a link until somebody else owns it."""
    a = await alone(server)
    failures = [ValueError("a fault"), KeyError("another")]
    serving = a.dispatcher._inventory

    async def faulty(payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        if peer.FromCluster.FromString(payload.partition(b"\n")[2]).shard == "00" and failures:
            raise failures.pop()
        async for answer in serving(payload, context):
            yield answer

    a.calls.register(INVENTORY, faulty)
    await linked(a, a.dial())
    assert failures == []
    await a.crash()
