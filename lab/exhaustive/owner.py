"""The owner's side of a session, one question at a time: the production run shard, fleet, and the rules that lie between them.

Machines are `core.shard.RunShard` and `core.fleet.Fleet`, driven by `Batch` as the controller does. Who may be told a fence is said
by `guard_wait`, what a link may carry by `Dispatcher._write`. Slice A shows that what is decided is committed or thrown away; here
every decision is committed at once. After each decision the shard's own invariants are checked, and that its log tells its state:
the events folded into the former state, and the new state's dump folded into an empty machine, give the same dump (J1, J9).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from control_plane import dispatcher, guard_wait
from control_plane.core import commands as c
from control_plane.core.events import AttemptsFinished, AttemptsPlaced, StopsConfirmed
from control_plane.core.fleet import Fleet
from control_plane.core.machine import Batch
from control_plane.core.model import (
    AttemptId,
    AttemptState,
    Evidence,
    FleetTable,
    GraphTask,
    OnClusterLost,
    Outcome,
    RetryPolicy,
    Stamp,
    TaskSpec,
)
from control_plane.core.shard import RunShard
from lab.exhaustive.pool import Pool, fields_of, plain

START = 1_800_000_000.0
RUN = "run"
CLUSTERS = ("ca", "cb")
LOST_SECONDS, GUARD_SECONDS = 20.0, 5.0
"""L and G, as sessions say them. Time is events here: only whether G is zero matters."""

Key = tuple[int, str]
"""An attempt: its n, and the nonce of its placing (F1)."""

RESTED = START + 600.0
"""When places are granted: every backoff is over by then."""

SETTLES = 8
"""Batches after which a shard must have nothing left to do at once. More means that it spins."""


def attempt_id(key: Key) -> AttemptId:
    """In the owner's words."""
    return AttemptId(RUN, 0, *key)


class Fleets:
    """States of the fleet shard."""

    def __init__(self) -> None:
        self._pool: Pool[Fleet] = Pool(identity=lambda fleet: list(fleet.dump()), freeze=lambda f: f, thaw=lambda f: f)

    def first(self) -> int:
        """A fleet without clusters."""
        return self._pool.put(Fleet())

    def _stamp(self, fleet: Fleet) -> Stamp:
        return Stamp(START, "f", fleet.table().seq + 1, 1)

    def open(self, number: int, site: int, boot: int, journal: int, last: int) -> tuple[int, int]:
        """A Hello (S1, S6): the fleet after it, and the generation; 0 if it is refused."""

        def answer() -> tuple[int, int]:
            fleet = self._pool.get(number)
            batch = Batch(self._stamp(fleet), fleet.apply)
            command = c.OpenSession(
                cluster_name=CLUSTERS[site],
                cluster_uid=CLUSTERS[site],
                instance="agent",
                boot_id=f"boot{boot}",
                journal_uid=f"journal{journal}",
                replica="r0",
                profile="balanced",
                lost_seconds=LOST_SECONDS,
                guard_seconds=GUARD_SECONDS,
                orphan_killer=True,
                last_generation=last,
            )
            try:
                grant = cast(c.SessionGrant, fleet.handle(command, batch))
            except c.Refused:
                return number, 0
            return self._done(fleet, batch), grant.generation

        return self._pool.once("open", number, site, boot, journal, last, answer=answer)

    def lose(self, number: int, site: int, generation: int, *, begun: bool) -> int:
        """A ClusterLost by the clock (S4)."""

        def answer() -> int:
            fleet = self._pool.get(number)
            batch = Batch(self._stamp(fleet), fleet.apply)
            fleet.handle(c.LoseCluster(CLUSTERS[site], generation, Evidence.TIMED, "silence", begun), batch)
            return self._done(fleet, batch)

        return self._pool.once("lose", number, site, generation, begun, answer=answer)

    def _done(self, fleet: Fleet, batch: Batch) -> int:
        fleet.settle(batch)
        fleet.validate()
        fleet.outbox = c.Outbox()
        return self._pool.put(fleet)

    def table(self, number: int) -> FleetTable:
        """What all may know."""
        return self._pool.once("table", number, answer=lambda: self._pool.get(number).table())

    def generations(self, number: int, site: int) -> tuple[tuple[int, bool], ...]:
        """(number, ended) of a cluster's generations."""
        facts = self.table(number).clusters.get(CLUSTERS[site])
        return tuple((g.number, g.ended) for g in facts.generations) if facts else ()


class Shards:
    """States of the run shard."""

    def __init__(self, fleets: Fleets, *, keeps: OnClusterLost) -> None:
        self._fleets, self._keeps = fleets, keeps
        self._pool: Pool[RunShard] = Pool(identity=_identity, freeze=lambda shard: shard, thaw=lambda shard: shard)

    def first(self) -> int:
        """A shard with one run of one task."""
        shard = RunShard()
        spec = TaskSpec(("work",), retry=RetryPolicy(initial_backoff=0.0), on_cluster_lost=self._keeps)
        run = c.CreateRun(c.Request("", ""), "n", "r", RUN, START + 1e9, 0, (GraphTask("t", (), spec),))
        batch = Batch(Stamp(START, "create", 1, 1), shard.apply)
        shard.handle(run, batch)
        shard.settle(batch)
        return self._pool.put(_bare(shard))

    def _do(self, number: int, *orders: c.Command, now: float = START) -> tuple[int, tuple[Any, ...], Any]:
        """Commands as one batch, and what has to follow at once: the shard after it, its events, the first reply."""
        shard, before = self._pool.get(number), self._pool.get(number)
        events: list[tuple[Any, Stamp]] = []
        reply: Any = None
        for turn in range(SETTLES):
            stamp = Stamp(now, f"x{_next_n(shard)}", 1, 1)
            batch = Batch(stamp, shard.apply)
            for place, order in enumerate(orders if turn == 0 else ()):
                answer = shard.handle(order, batch)
                reply = answer if place == 0 else reply
            shard.settle(batch)
            events += [(event, stamp) for event in batch.events]
            due = shard.due()
            if due is None or due > now:
                break
        shard.handle(c.DropGrants(1), Batch(Stamp(START, "drop", 1, 1), shard.apply))
        shard.validate()
        for event, stamp in events:
            before.apply(event, stamp)
        folded = RunShard()
        for event in shard.dump():
            folded.apply(event, Stamp(START, "dump", 1, 1))
        if _dumped(before) != _dumped(shard) or _dumped(folded) != _dumped(shard):
            raise AssertionError("the log does not tell the state (J1, J9)")
        return self._pool.put(_bare(shard)), tuple(event for event, _ in events), reply

    def see(self, number: int, fleet: int) -> int:
        """The owner reads fleet's table (S5)."""
        table = self._fleets.table(fleet)
        return self._pool.once("see", number, fleet, answer=lambda: self._do(number, c.TakeTable(table))[0])

    def knows(self, number: int) -> int:
        """The table's seq that it knows."""
        return self._pool.once("knows", number, answer=lambda: self._pool.get(number)._state.table.seq)  # noqa: SLF001

    def waits(self, number: int, site: int) -> tuple[tuple[int, bool], ...]:
        """(generation, whether G counts) of ended generations in which attempts live and that it was told no fence of (GuardWait)."""

        def answer() -> tuple[tuple[int, bool], ...]:
            shard = self._pool.get(number)
            state = shard._state  # noqa: SLF001
            facts = state.table.clusters.get(CLUSTERS[site])
            found = []
            for generation in sorted(guard_wait._generations_on(shard, CLUSTERS[site])):  # noqa: SLF001
                if facts is None or (CLUSTERS[site], generation) in state.fenced:
                    continue
                evidence, guard = guard_wait._end_of(facts, generation)  # noqa: SLF001
                if evidence is not Evidence.UNSPECIFIED:
                    found.append((generation, guard > 0.0))
            return tuple(found)

        return self._pool.once("waits", number, site, answer=answer)

    def fence(self, number: int, site: int, generation: int) -> int:
        """G is over at the owner (S5, F5)."""

        def answer() -> int:
            facts = self._pool.get(number)._state.table.clusters[CLUSTERS[site]]  # noqa: SLF001
            evidence, _ = guard_wait._end_of(facts, generation)  # noqa: SLF001
            return self._do(number, c.GenerationFenced(CLUSTERS[site], generation, evidence))[0]

        return self._pool.once("fence", number, site, generation, answer=answer)

    def grant(self, number: int, site: int, generation: int) -> tuple[int, bool, bool]:
        """The leader grants one place: the shard after it, whether it placed, whether it said that copies may overlap (F6)."""

        def answer() -> tuple[int, bool, bool]:
            groups = self._pool.get(number)._state.lanes  # noqa: SLF001 - also those whose tasks wait for their backoff
            grants = tuple(c.Grant(CLUSTERS[site], generation, key, 1) for key in groups)
            after, events, _ = self._do(number, c.Tick(), c.TakeGrants(1, grants), now=RESTED)
            placed = [event for event in events if isinstance(event, AttemptsPlaced)]
            return (after if placed else number), bool(placed), any(event.overlap for event in placed)

        return self._pool.once("grant", number, site, generation, answer=answer)

    def inventory(
        self,
        number: int,
        site: int,
        generation: int,
        boot: int,
        journal: int,
        held: tuple[tuple[Key, int, int], ...],
        fleet: int,
    ) -> tuple[int, tuple[Key, ...], tuple[Key, ...]]:
        """A Hello's inventory (S6): the shard after it, what was adopted, whose stops are confirmed."""

        def answer() -> tuple[int, tuple[Key, ...], tuple[Key, ...]]:
            listed = tuple(c.Held(attempt_id(key), of, phase) for key, of, phase in held)
            order = c.TakeInventory(
                CLUSTERS[site],
                generation,
                f"boot{boot}",
                f"journal{journal}",
                listed,
                self._fleets.table(fleet),
                incarnation=1,
            )
            after, events, reply = self._do(number, order)
            return after, tuple((a.n, a.nonce) for a in reply.adopted), self._confirmed(number, events)

        question = ("inventory", number, site, generation, boot, journal, held, fleet)
        return self._pool.once(*question, answer=answer)

    def report(
        self, number: int, site: int, generation: int, kind: str, key: Key, outcome: str
    ) -> tuple[int, tuple[Key, ...], tuple[Key, ...], tuple[Key, ...]]:
        """One report (F2, F8): the shard after it; what is acknowledged; whose success is accepted; whose stops are confirmed."""

        def answer() -> tuple[int, tuple[Key, ...], tuple[Key, ...], tuple[Key, ...]]:
            id_, cluster = attempt_id(key), CLUSTERS[site]
            if kind == "finished":
                finish = c.Finish(id_, Outcome[outcome], None, b"", "", 0.0, 0.0)
                order = c.TakeReports(cluster, generation, finished=(finish,))
            elif kind == "rejected":
                order = c.TakeReports(cluster, generation, rejected=((id_, outcome),))
            else:
                order = c.TakeReports(cluster, generation, stopped=(id_,))
            after, events, reply = self._do(number, order)
            accepted = tuple(
                key_
                for event in events
                if isinstance(event, AttemptsFinished)
                for key_ in [key] * event.states.count(AttemptState.SUCCEEDED)
            )
            return after, tuple((a.n, a.nonce) for a in reply), accepted, self._confirmed(number, events)

        question = ("report", number, site, generation, kind, key, outcome)
        return self._pool.once(*question, answer=answer)

    def _confirmed(self, number: int, events: tuple[Any, ...]) -> tuple[Key, ...]:
        ns = {n for event in events if isinstance(event, StopsConfirmed) for n in event.ns}
        return tuple(key for _, key in self.stops(number) if key[0] in ns)

    def cancel(self, number: int) -> int:
        """The client cancels the run."""
        order = c.CancelRun(c.Request("", ""), "n", "r", "enough")
        return self._pool.once("cancel", number, answer=lambda: self._do(number, order)[0])

    def live(self, number: int) -> tuple[tuple[Key, int, int], ...]:
        """Live attempts: key, site, generation (F2)."""

        def answer() -> tuple[tuple[Key, int, int], ...]:
            shard = self._pool.get(number)
            found = []
            for site, cluster in enumerate(CLUSTERS):
                for id_ in shard.live_on(cluster):
                    place = shard.place_of(id_)
                    found.append(((id_.n, id_.nonce), site, place[1] if place else 0))
            return tuple(found)

        return self._pool.once("live", number, answer=answer)

    def carries(self, number: int, site: int, generation: int) -> tuple[Key, ...]:
        """Attempts that a link of that generation may carry (J7, F3): `Dispatcher._write`."""

        def answer() -> tuple[Key, ...]:
            shard, found = self._pool.get(number), []
            for id_ in shard.live_on(CLUSTERS[site]):
                writer = SimpleNamespace(add=lambda attempt, _: found.append((attempt.n, attempt.nonce)))
                link = SimpleNamespace(cluster=CLUSTERS[site], generation=generation)
                owned = SimpleNamespace(machine=shard)
                dispatcher.Dispatcher._write(cast(Any, owned), cast(Any, link), cast(Any, writer), id_)  # noqa: SLF001
            return tuple(found)

        return self._pool.once("carries", number, site, generation, answer=answer)

    def missing(
        self, number: int, site: int, generation: int, held: tuple[tuple[Key, int, int], ...]
    ) -> tuple[Key, ...]:
        """What a new link sends, given what the agent listed: `dispatcher._missing` and `Dispatcher._write`."""

        def answer() -> tuple[Key, ...]:
            link = SimpleNamespace(cluster=CLUSTERS[site], generation=generation)
            listed = {attempt_id(key): c.Held(attempt_id(key), of, phase) for key, of, phase in held}
            wanted = {(i.n, i.nonce) for i in dispatcher._missing(self._pool.get(number), cast(Any, link), listed)}  # noqa: SLF001
            return tuple(key for key in self.carries(number, site, generation) if key in wanted)

        return self._pool.once("missing", number, site, generation, held, answer=answer)

    def stops(self, number: int) -> tuple[tuple[int, Key], ...]:
        """Outstanding stops (F8): site, key."""

        def answer() -> tuple[tuple[int, Key], ...]:
            shard = self._pool.get(number)
            return tuple(
                (site, (i.n, i.nonce)) for site, cluster in enumerate(CLUSTERS) for i in shard.stops_on(cluster)
            )

        return self._pool.once("stops", number, answer=answer)

    def placed(self, number: int) -> int:
        """Attempts placed so far."""
        return self._pool.once("placed", number, answer=lambda: _next_n(self._pool.get(number)) - 1)

    def over(self, number: int) -> bool:
        """The task is final."""

        def answer() -> bool:
            view = self._pool.get(number).task_at(RUN, 0)
            return view is not None and view.state.final

        return self._pool.once("over", number, answer=answer)

    def refold(self, number: int) -> int:
        """Another replica takes the shard: what was only known for now is gone (J7, S5)."""

        def answer() -> int:
            folded = RunShard()
            for event in self._pool.get(number).dump():
                folded.apply(event, Stamp(START, "dump", 1, 1))
            batch = Batch(Stamp(START, "taken", 1, 1), folded.apply)
            folded.settle(batch)
            if batch.events:
                raise AssertionError("a takeover by itself decides something")
            return self._pool.put(_bare(folded))

        return self._pool.once("refold", number, answer=answer)


def _next_n(shard: RunShard) -> int:
    return shard._state.runs[RUN].next_n[0]  # noqa: SLF001


def _dumped(shard: RunShard) -> str:
    _bare(shard)
    return repr(list(shard.dump()))


def _bare(shard: RunShard) -> RunShard:
    """Without what only tells watchers how it came to be, and without hints that were carried out (J7: state says it all)."""
    run = shard._state.runs[RUN]  # noqa: SLF001
    run.events.clear()
    run.changes = run.event_number = 0
    shard.outbox = c.Outbox()
    return shard


def _identity(shard: RunShard) -> object:
    """What is folded, what is known for now, and who waits."""
    state = shard._state  # noqa: SLF001
    known = (
        state.table.seq,
        sorted(map(repr, state.fenced.items())),
        state.term,
        list(state.grants),
        list(state.review),
    )
    run = state.runs[RUN]
    return [
        list(shard.dump()),
        known,
        sorted(run.tickets),
        sorted(timer[0] for timer in state.timers),
        plain(fields_of(run)["states"]),
    ]
