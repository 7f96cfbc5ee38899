"""Slice A: one shard, two replicas, one request, one agent's memory, one store (PROTOCOL J1-J8, J12, O1-O3, O8).

The client tries its request through either replica, at most twice. Transactions travel by themselves: each may be lost, come late,
be applied with the answer lost, or be applied twice. A replica believes in its lease as long as it likes, but etcd ends the lease
only when the replica has stopped to believe (O2, which numbers keep: `Tenure`). What replicas do is the product's doing (`desk`).

The world: what is in the store, what travels, two replicas, the client, the agent's mark, what is left of the bounds, the backup.
"""

from __future__ import annotations

from collections.abc import Iterator

from lab.exhaustive.desk import NAMES, OTHER, PRUNE, REQUEST, Desk, Memory, Resolved, entries
from lab.exhaustive.explorer import Step, World
from lab.exhaustive.journal_facts import (
    AGAIN,
    COMMITTING,
    DENIED,
    DONE,
    EXPIRED,
    IDLE,
    NEW,
    NOBODY,
    OPEN,
    WAITING,
    Client,
    Flight,
    JournalBounds,
    JWorld,
    Left,
    Rep,
    cost,
    memory_of,
    put,
    refused,
    store_of,
    swapped,
    tell,
    unheard,
    with_store,
)


class JournalWorld:
    """The model of slice A (`explorer.Model`)."""

    names = NAMES

    def __init__(self, bounds: JournalBounds, desk: Desk | None = None) -> None:
        self.bounds = bounds
        self._desk = desk or Desk()

    def start(self) -> World:
        """An empty store and two idle replicas."""
        bounds = self.bounds
        left = Left(bounds.faults, bounds.doubles, bounds.takings, bounds.batches)
        client = Client(NEW, 0, 0, False, False)
        return JWorld((), 1, False, (), (), (NOBODY, NOBODY), client, (), left, (), False)

    def canonical(self, world: World) -> tuple[World, bool]:
        """Of a world and the one with the replicas swapped, the smaller one. Takings are numbered, so one look at them is mostly
        enough."""
        assert isinstance(world, JWorld)  # noqa: S101
        first, second = (rep.taking[1] if rep.taking else 0 for rep in world.reps)
        if first != second:
            return (world, False) if first < second else (swapped(world), True)
        other = swapped(world)
        return (other, True) if other < world else (world, False)

    # -- judging -------------------------------------------------------------------------------------------------------

    def broken(self, world: World) -> str:
        """See Model."""
        w = world
        assert isinstance(w, JWorld)  # noqa: S101
        if self._desk.versions(w.log) > 1:
            return "O8: the request was executed twice"
        if w.restored:
            return ""
        if w.suspected:
            return "J12: a restore is suspected, and there was none"
        if w.client.state == DONE and not entries(w.log):
            return "J7: an acknowledged request is not in the log"
        if w.client.state == DENIED and entries(w.log):
            return "J6: told NOT applied, but it is in the log"
        if w.told and w.log[w.told[1] - 1 : w.told[1]] != (w.told[2],):
            return "J7: an effect left, and its batch is not in the log"
        for rep in w.reps:
            if rep.role == OPEN and rep.taking == w.owner and rep.log != w.log:
                return "J4: the owner's state is not its log"
        return ""

    def goal(self, world: World) -> bool:
        """The client knows, the agent got the effect, nothing is in flight; or a bound was met."""
        w, bounds = world, self.bounds
        assert isinstance(w, JWorld)  # noqa: S101
        knows = w.client.state in (DONE, DENIED, EXPIRED)
        effect = w.restored or not entries(w.log) or bool(w.told) or w.client.state == EXPIRED
        quiet = all(rep.role != COMMITTING for rep in w.reps)
        exhausted = (
            w.left.takings == 0 or len(w.log) == bounds.seqs or w.left.batches == 0 or w.client.tries >= bounds.tries
        )
        return (knows and effect and quiet) or (exhausted and quiet)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def steps(self, world: World) -> Iterator[Step]:
        """See Model."""
        w = world
        assert isinstance(w, JWorld)  # noqa: S101
        yield from self._client(w)
        for index, rep in enumerate(w.reps):
            if rep.role == IDLE:
                yield from self._take(w, index, rep)
                continue
            yield from self._lease(w, index, rep)
            if rep.role == OPEN and not rep.lapsed:
                yield from self._decide(w, index, rep)
                yield from self._effects(w, index, rep)
            if rep.role == OPEN:
                yield from self._read(w, index, rep)
            if rep.role == COMMITTING:
                yield from self._send(w, index, rep)
        for place in range(len(w.flights)):
            yield from self._travel(w, place)
        holders = [rep.taking for rep in w.reps if rep.role != IDLE]
        if w.owner and w.owner not in holders:
            yield Step("etcd ends the lease of an owner that is gone", w.owner[0], w._replace(owner=()))
        if self.bounds.restore:
            yield from self._restore(w)

    def _client(self, w: JWorld) -> Iterator[Step]:
        client = w.client
        if client.state in (NEW, AGAIN) and client.tries < self.bounds.tries:
            for index, rep in enumerate(w.reps):
                if rep.role != IDLE:
                    sent = Client(WAITING, index, client.tries + 1, client.unclear, True)
                    yield Step("gets the client's request", index, w._replace(client=sent))
        if client.state == WAITING and w.left.faults:
            gone = client._replace(state=AGAIN, at=0, unclear=True, waits=False)
            yield Step("the client's call times out", client.at, cost(w._replace(client=gone)), fault=True)

    def _take(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        if w.owner or not w.left.takings:
            return
        taking = (index, self.bounds.takings - w.left.takings + 1)
        memory, store = self._desk.take(taking, rep.mark, store_of(w))
        after = with_store(w, store)._replace(left=w.left._replace(takings=w.left.takings - 1))
        if memory is None:
            yield Step("takes the shard, and finds it gone", index, after)
            return
        taken = Rep(OPEN, taking, memory.log, (), memory.incarnation, False, memory.mark, 0)
        yield Step(f"takes the shard and folds {len(memory.log)} batches", index, put(after, index, taken))

    def _lease(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        mine = w.owner == rep.taking
        if not rep.lapsed and w.left.faults:
            yield Step(
                "is not sure of its lease any more", index, cost(put(w, index, rep._replace(lapsed=True))), fault=True
            )
        if mine and rep.lapsed:
            yield Step("etcd ends its lease", index, w._replace(owner=()))
        if w.left.faults:
            crashed = unheard(put(w, index, NOBODY), index)
            yield Step("crashes", index, cost(crashed), fault=True)
        if rep.role == OPEN and (rep.lapsed or not mine or rep.incarnation != w.incarnation):
            kept, store = self._desk.look(memory_of(rep), store_of(w))
            after = with_store(w, store)
            if kept:
                yield Step(
                    "its lease is good again and the shard still its own",
                    index,
                    put(after, index, rep._replace(lapsed=False)),
                )
            else:
                owner = () if mine else after.owner
                after = put(after._replace(owner=owner), index, NOBODY._replace(mark=rep.mark))
                yield Step("sees that the shard is lost", index, refused(after, index))

    def _decide(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        client, memory = w.client, memory_of(rep)
        room = w.left.batches > 0 and len(rep.log) < self.bounds.seqs
        spent = w.left._replace(batches=w.left.batches - 1)
        if client.state == WAITING and client.at == index and client.waits:
            decided = self._desk.decide(memory, REQUEST)
            if not decided.batch:
                yield Step(
                    f"answers the request from its state: {decided.answer}", index, tell(w, index, decided.answer)
                )
            elif room:
                after = w._replace(client=client._replace(waits=False), left=spent)
                after = put(after, index, rep._replace(role=COMMITTING, fly=decided.batch))
                if decided.answer:
                    after = tell(after, index, decided.answer)
                if decided.early and not w.told:
                    after = after._replace(told=(rep.incarnation, len(rep.log) + 1, decided.batch))
                yield Step("decides the request", index, after)
        if room and (w.left.faults or w.restored):
            decided = self._desk.decide(memory, OTHER)
            after = put(w._replace(left=spent), index, rep._replace(role=COMMITTING, fly=decided.batch))
            if decided.early and not w.told:
                after = after._replace(told=(rep.incarnation, len(rep.log) + 1, decided.batch))
            if decided.batch:
                yield Step("decides something else", index, after if w.restored else cost(after), fault=True)
        if room and self.bounds.prune and entries(rep.log) and all(batch[3] != PRUNE for batch in rep.log):
            decided = self._desk.decide(memory, PRUNE)
            if decided.batch:
                after = put(w._replace(left=spent), index, rep._replace(role=COMMITTING, fly=decided.batch))
                yield Step("an hour later, decides to forget the request's id", index, after, fault=True)

    def _effects(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        if entries(rep.log) and not w.told and not w.suspected:
            told = (rep.incarnation, len(rep.log), rep.log[-1])
            yield Step("its dispatch reaches the agent, with its mark (J7, J12)", index, w._replace(told=told))
        if (
            w.told
            and self.bounds.restore
            and w.owner == rep.taking
            and w.incarnation == rep.incarnation
            and not w.suspected
        ):
            lost = w.told[0] == w.incarnation and w.log[w.told[1] - 1 : w.told[1]] != (w.told[2],)
            found, store = self._desk.hello(memory_of(rep), w.told, store_of(w))
            after = with_store(w, store)
            if found:
                yield Step("the agent's Hello proves a restore", index, after)
            elif lost:
                yield Step(
                    "the agent's Hello cites what is lost",
                    index,
                    after,
                    broken="J12: a restore is not seen, though a Hello proves it",
                )

    def _read(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        missed = w.client.state == DONE and not w.restored and not entries(rep.log)
        if missed and self._desk.reads(memory_of(rep)) == "yes False":
            yield Step(
                "answers a read as if the request had not been",
                index,
                w,
                fault=True,
                broken="J8: a read misses what was acknowledged",
            )

    def _send(self, w: JWorld, index: int, rep: Rep) -> Iterator[Step]:
        flight = Flight(rep.taking, rep.log, rep.incarnation, rep.fly)
        copies = w.flights.count(flight)
        if len(w.flights) < self.bounds.flights and (not copies or w.left.doubles):
            left = w.left._replace(doubles=w.left.doubles - bool(copies))
            after = w._replace(flights=tuple(sorted((*w.flights, flight))), left=left)
            yield Step(f"sends its batch{' again' if copies else ''}", index, after, fault=bool(copies))
            unclear = self._desk.answered(memory_of(rep), rep.fly, store_of(w), clear=False)
            if unclear.state != "again" and copies:
                yield Step("the time-out of its batch comes", index, self._resolved(w, index, rep, unclear), fault=True)

    def _travel(self, w: JWorld, place: int) -> Iterator[Step]:
        flight = w.flights[place]
        index = flight.taking[0]
        rest = w._replace(flights=w.flights[:place] + w.flights[place + 1 :])
        rep = w.reps[index]
        hears = (
            rep.role == COMMITTING and rep.fly == flight.batch and rep.log == flight.log and rep.taking == flight.taking
        )
        yield Step("its transaction is lost on its way", index, rest, fault=hears)
        sender = Memory(flight.taking, flight.log, flight.incarnation, (), flight.batch[2])
        done, store = self._desk.apply(sender, flight.batch, store_of(w))
        after = with_store(rest, store)
        word = "is applied" if done else "is refused"
        broken = "J12: a batch is committed under the suspicion of a restore" if done and w.suspected else ""
        yield Step(f"its transaction {word}, and nobody hears so", index, after, fault=hears, broken=broken)
        if hears:
            resolved = self._desk.answered(memory_of(rep), rep.fly, store_of(w), clear=True)
            if resolved.state != "again" or resolved.store != store:
                fork = resolved.state == "open" and resolved.store.log[: len(rep.log) + 1] != (*rep.log, rep.fly)
                text = f"its transaction {word}, and it hears so: {resolved.state}"
                broken = "J4: it believes committed what is not in the log" if fork and not w.restored else ""
                yield Step(text, index, self._resolved(rest, index, rep, resolved), broken=broken)

    def _resolved(self, w: JWorld, index: int, rep: Rep, resolved: Resolved) -> JWorld:
        after, memory = with_store(w, resolved.store), resolved.memory
        if resolved.state == "again":
            return after
        if resolved.state == "rebuild":
            # Nothing else can happen between: it reads its log anew at once, and decides anew what it had decided.
            anew = rep._replace(role=OPEN, fly=(), log=after.log, given_up=memory.given_up)
            if after.owner != rep.taking:
                anew = NOBODY._replace(mark=rep.mark)
            client = after.client
            if client.state == WAITING and client.at == index:
                after = after._replace(client=client._replace(waits=True))
            return put(after, index, anew)
        if resolved.state == "open":
            after = put(after, index, rep._replace(role=OPEN, fly=(), log=memory.log, mark=memory.mark))
        else:
            owner = () if after.owner == rep.taking else after.owner
            after = put(after._replace(owner=owner), index, NOBODY._replace(mark=memory.mark))
        if rep.fly[3] != REQUEST:
            return refused(after, index) if resolved.state == "gone" else after
        return tell(after, index, resolved.answer)

    def _restore(self, w: JWorld) -> Iterator[Step]:
        if not w.backup and not w.restored:
            yield Step(
                "a backup of the store is made", -1, w._replace(backup=(w.owner, w.incarnation, w.log)), fault=True
            )
        if w.backup and not w.restored:
            owner, incarnation, log = w.backup
            if (owner, log) != (w.owner, w.log):
                back = w._replace(owner=owner, incarnation=incarnation, log=log, flights=(), backup=(), restored=True)
                yield Step("the store is restored from the backup", -1, back, fault=True)
        if w.restored and w.suspected:
            yield Step("an operator says `baton admin restored`", -1, with_store(w, self._desk.confirm(store_of(w))))
