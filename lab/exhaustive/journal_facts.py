"""The world of slice A as a value: what is in the store, what travels, two replicas, the client, the agent's mark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lab.exhaustive.desk import Batch, Log, MarkOf, Memory, StoreFacts, Taking

IDLE, OPEN, COMMITTING = 0, 1, 2

NEW, WAITING, DONE, DENIED, AGAIN, EXPIRED = range(6)
"""What the client knows: nothing; it waits; OK; surely NOT applied; it will try again; its id is too old."""


@dataclass(frozen=True, slots=True)
class JournalBounds:
    """How much may happen. `flights`: transactions under way at once."""

    seqs: int = 3
    batches: int = 3
    takings: int = 2
    faults: int = 1
    doubles: int = 1
    tries: int = 2
    flights: int = 2
    prune: bool = False
    restore: bool = False

    def text(self) -> str:
        """For people."""
        return (
            f"1 shard, 2 replicas, 1 request tried {self.tries} times at most, log of {self.seqs} at most, "
            f"{self.batches} batches decided, "
            f"{self.takings} takings, {self.flights} transactions under way, {self.doubles} doubled, "
            f"{self.faults} of: crash, lapse of a lease, client's time-out, another's batch"
            + (", 1 prune of request ids" if self.prune else "")
            + (", 1 restore of the store" if self.restore else "")
        )


class Rep(NamedTuple):
    """A replica. `fly`: the batch in flight. `mark` outlives a loss of the shard, not a crash."""

    role: int
    taking: Taking
    log: Log
    fly: Batch
    incarnation: int
    lapsed: bool
    mark: MarkOf
    given_up: int


class Flight(NamedTuple):
    """A transaction under way: whose, and after which log."""

    taking: Taking
    log: Log
    incarnation: int
    batch: Batch


class Client(NamedTuple):
    """`at`: where its newest try is. `unclear`: an earlier try has no clear answer (J6). `waits`: the try is not decided yet."""

    state: int
    at: int
    tries: int
    unclear: bool
    waits: bool


class Left(NamedTuple):
    """What is left of the bounds. `takings` also numbers them."""

    faults: int
    doubles: int
    takings: int
    batches: int


class JWorld(NamedTuple):
    """See the module."""

    owner: Taking
    incarnation: int
    suspected: bool
    log: Log
    flights: tuple[Flight, ...]
    reps: tuple[Rep, ...]
    client: Client
    told: MarkOf
    """What the agent was told: the seq and nonce with which the request's effect came to it (J7, J12)."""
    left: Left
    backup: tuple[Any, ...]
    """(owner, incarnation, log), () before and after."""
    restored: bool


NOBODY = Rep(IDLE, (), (), (), 0, False, (), 0)


def store_of(w: JWorld) -> StoreFacts:
    """What the desk is told of the store."""
    return StoreFacts(w.owner, w.incarnation, w.suspected, w.log)


def with_store(w: JWorld, store: StoreFacts) -> JWorld:
    """The store is so now."""
    return w._replace(owner=store.owner, incarnation=store.incarnation, suspected=store.suspected, log=store.log)


def memory_of(rep: Rep) -> Memory:
    """What the desk is told of a replica."""
    return Memory(rep.taking, rep.log, rep.incarnation, rep.mark, rep.given_up, not rep.lapsed)


def put(w: JWorld, index: int, rep: Rep) -> JWorld:
    """The replica is so now."""
    return w._replace(reps=(rep, w.reps[1]) if index == 0 else (w.reps[0], rep))


def cost(w: JWorld) -> JWorld:
    """One fault less may happen."""
    return w._replace(left=w.left._replace(faults=w.left.faults - 1))


def tell(w: JWorld, index: int, answer: str) -> JWorld:
    """The client hears an answer, if it still listens. NOT_APPLIED speaks of one try (J6)."""
    client = w.client
    if client.state != WAITING or client.at != index or not answer:
        return w
    if answer == "OK":
        return w._replace(client=Client(DONE, 0, client.tries, False, False))
    if answer == "REQUEST_ID_EXPIRED":
        return w._replace(client=Client(EXPIRED, 0, client.tries, False, False))
    if answer == "NOT_APPLIED" and not client.unclear:
        return w._replace(client=Client(DENIED, 0, client.tries, False, False))
    return w._replace(client=Client(AGAIN, 0, client.tries, True, False))


def refused(w: JWorld, index: int) -> JWorld:
    """What waits, undecided, at a replica that lost the shard is told NOT applied (`Slot.fail_all`)."""
    return tell(w, index, "NOT_APPLIED") if w.client.waits else w


def unheard(w: JWorld, index: int) -> JWorld:
    """The replica is dead: a client that waits there hears nothing (J6: unclear)."""
    client = w.client
    if client.state == WAITING and client.at == index:
        return w._replace(client=Client(AGAIN, 0, client.tries, True, False))
    return w


def swapped(w: JWorld) -> JWorld:
    """The same world with the replicas' names exchanged."""

    def taking(of: Taking) -> Taking:
        return (1 - of[0], *of[1:]) if of else of

    def log(of: Log) -> Log:
        return tuple(taking(batch) for batch in of)

    def mark(of: MarkOf) -> MarkOf:
        return (of[0], of[1], taking(of[2])) if of else of

    def rep(of: Rep) -> Rep:
        return of._replace(taking=taking(of.taking), log=log(of.log), fly=taking(of.fly), mark=mark(of.mark))

    flights = tuple(sorted(Flight(taking(f.taking), log(f.log), f.incarnation, taking(f.batch)) for f in w.flights))
    client = w.client._replace(at=1 - w.client.at) if w.client.state == WAITING else w.client
    backup = (taking(w.backup[0]), w.backup[1], log(w.backup[2])) if w.backup else ()
    return w._replace(
        owner=taking(w.owner),
        log=log(w.log),
        flights=flights,
        reps=(rep(w.reps[1]), rep(w.reps[0])),
        client=client,
        told=mark(w.told),
        backup=backup,
    )
