"""The production replica, asked one question at a time: what would it do in this state of its memory and of the store?

Theory. A replica's part in the journal protocol is `Controller`, `Cycle`, `Journal`, `Decider`, `RestoreDetector` and `Ownership`'s
look at its own keys, over a `Store`. All of it is deterministic code between two waits; so a world need not hold objects, only the
facts that such a replica is made of: its taking, the log that it folded, what it has in flight, its mark. For each question the
desk takes the shard with the production code from such a store, runs the production coroutine, and answers every store call from
the production key space at once. Answers are remembered: the same question has the same answer.

A batch is (replica, taking, number, kind), a taking (replica, number): nonces are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from control_plane import cycle as cycle_module
from control_plane import journal
from control_plane.batches import nonce_of
from control_plane.controller import Controller
from control_plane.core.commands import Command, CreateRun, PutGraph, Request
from control_plane.core.model import GraphTask, TaskSpec
from control_plane.core.requests import KEEP, PRUNE_EVERY
from control_plane.core.shard import RunShard
from control_plane.journal import Entry, Head, owner_value
from control_plane.machines import make_machine
from control_plane.manifest import NONCE_BYTES
from control_plane.ownership import Ownership
from control_plane.restore import Mark
from control_plane.slots import Item, Phase, Read, Slot
from control_plane.store import keys
from control_plane.store.base import Ambiguous, Put, Txn
from control_plane.store.memory_keyspace import Keyspace
from lab.exhaustive.doubles import Door, Ear, Reply, Time, finish

T = TypeVar("T")

Taking = tuple[int, ...]
"""(replica, number of the taking); () is none."""

Batch = tuple[int, ...]
"""(replica, number of its taking, decisions that this taking gave up before it, kind); () is none."""

Log = tuple[Batch, ...]

MarkOf = tuple[Any, ...]
"""(incarnation, seq, batch) that somebody was told of; () is none."""

REQUEST, OTHER, PRUNE = 1, 2, 3
"""Kinds of batches: the client's request, somebody else's, the prune of old requests (O8)."""

SHARD = "00"
NAMES = ("r0", "r1")
START = 1_800_000_000.0
LATER = KEEP + PRUNE_EVERY + 60.0
"""Seconds after START at which the request's record may be forgotten."""

_ID = f"{int(START * 1000):012x}"
PUT = PutGraph(
    Request(f"{_ID[:8]}-{_ID[8:]}-7000-8000-000000000001", "digest"),
    "n",
    "g",
    "graph",
    (GraphTask("t", (), TaskSpec(("x",))),),
)
"""The client's request. Each execution makes one more version, so a second one shows."""

SOMETHING = CreateRun(Request("", ""), "n", "r", "run", START + 1e9, 0, (GraphTask("t", (), TaskSpec(("x",))),))
"""Somebody else's request: a run, whose effects leave by the outbox (J7)."""

COMMANDS: dict[int, Command] = {REQUEST: PUT, OTHER: SOMETHING}
"""A prune has none: it is due by itself."""


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What is in the store about the shard. `owner`: whose key it is."""

    owner: Taking
    incarnation: int
    suspected: bool
    log: Log


@dataclass(frozen=True, slots=True)
class Memory:
    """What an owner remembers: its taking, the log it folded, its mark, the decisions it gave up; whether it believes its lease."""

    taking: Taking
    log: Log
    incarnation: int
    mark: MarkOf
    given_up: int = 0
    leased: bool = True


@dataclass(frozen=True, slots=True)
class Decided:
    """`batch` goes to the store, () if none does. `answer` is what the client is told now, "" if nothing. `early`: effects have
    left already (J7)."""

    batch: Batch
    answer: str
    early: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a replica makes of an answer of the store. `state`: again, open, gone, or rebuild."""

    state: str
    answer: str
    memory: Memory
    store: StoreFacts


def _nonce(letter: str, *numbers: int) -> str:
    return (letter + "".join(f"{number:02x}" for number in numbers)).ljust(2 * NONCE_BYTES, "0")


def wall_of(log: Log) -> float:
    """The time at which this log goes on: a prune comes an hour later."""
    return START + LATER * any(batch[3] == PRUNE for batch in log)


class Desk:
    """See the module. One for each exploration: what it remembers is true of the product as it is loaded."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}
        self._batches: dict[str, Batch] = {}
        self._takings: dict[bytes, Taking] = {}

    def _once(self, *question: Any, answer: Callable[[], T]) -> T:
        found = self._known.get(question)
        if found is None:
            found = self._known[question] = answer()
        return cast(T, found)

    # -- the store -----------------------------------------------------------------------------------------------------

    def keyspace(self, store: StoreFacts) -> Keyspace:
        """The production key space with these facts."""
        puts = [Put(keys.INCARNATION, str(store.incarnation).encode())]
        if store.suspected:
            puts.append(Put(keys.RESTORED_SUSPECTED, b"{}"))
        if store.owner:
            puts.append(Put(keys.owner(SHARD), self.owner_value(store.owner)))
        for place, batch in enumerate(store.log):
            puts.append(Put(keys.log(SHARD, place + 1), self.value(store.log[:place], batch)))
        if store.log:
            puts.append(Put(keys.head(SHARD), self.head(store.log).encode()))
        space = Keyspace()
        space.commit(Txn((), tuple(puts)))
        return space

    def facts(self, space: Keyspace) -> StoreFacts:
        """Inverse of `keyspace`."""
        live = space.live
        owner = live.get(keys.owner(SHARD))
        head = Head.parse(live.get(keys.head(SHARD)))
        log = tuple(self._batches[nonce_of(live[keys.log(SHARD, seq)].value)] for seq in range(1, head.seq + 1))
        return StoreFacts(
            self._takings[owner.value] if owner else (),
            int(live[keys.INCARNATION].value),
            keys.RESTORED_SUSPECTED in live,
            log,
        )

    def owner_value(self, taking: Taking) -> bytes:
        """The value of an owner key."""
        value = owner_value(NAMES[taking[0]], _nonce("a", *taking))
        self._takings[value] = taking
        return value

    def head(self, log: Log) -> Head:
        """The head that this log ends with."""
        return Head(len(log), _nonce("b", *log[-1])) if log else Head()

    def value(self, before: Log, batch: Batch) -> bytes:
        """What that batch wrote after `before`, as the replica that decided it serialized it."""
        memory = Memory((batch[0], batch[1]), before, 1, (), batch[2])
        return self._once("value", before, batch, answer=lambda: self._entry(memory, batch).value)

    def versions(self, log: Log) -> int:
        """How often the request was executed in this log."""

        def count() -> int:
            machine = self._machine(Memory((0, 0), log, 1, ()))
            graph = machine.graph("n", "g")
            return graph.version if graph is not None else 0

        return self._once("versions", log, answer=count)

    # -- a replica -----------------------------------------------------------------------------------------------------

    def _owner(self, memory: Memory, kind: int = 0) -> tuple[Controller, Door]:
        """A production controller with this memory: it takes the shard from a store that holds just its log."""
        space = self.keyspace(StoreFacts((), memory.incarnation, False, memory.log))
        door = Door(space)
        time = Time(wall_of(memory.log) + LATER * (kind == PRUNE), _nonce("a", *memory.taking))
        name = NAMES[memory.taking[0]]
        controller = Controller(
            store=cast(Any, door),
            clock=cast(Any, time),
            entropy=cast(Any, time),
            replica=name,
            make_machine=make_machine,
        )
        controller.attach(7, lambda: True)
        controller.listen(Ear())
        self.owner_value(memory.taking)
        if not finish(controller.take(SHARD)):
            raise AssertionError(f"{name} could not take a free shard")
        controller.attach(7, _belief(leased=memory.leased))
        if memory.mark:
            controller.restore.marks.observe(self._mark(memory.mark))
        time.nonce = _nonce("b", *memory.taking, memory.given_up, kind)
        self._batches[time.nonce] = (*memory.taking, memory.given_up, kind)
        return controller, door

    def _machine(self, memory: Memory) -> RunShard:
        return cast(RunShard, _slot(self._owner(memory)[0]).owned.machine)

    def _decide(self, memory: Memory, kind: int) -> tuple[Controller, Door, Reply]:
        controller, door = self._owner(memory, kind)
        reply = Reply()
        slot = _slot(controller)
        if kind in COMMANDS:
            slot.inbox.append(Item(COMMANDS[kind], "", cast(Any, reply)))
        _cycle(controller)._decide(slot)  # noqa: SLF001 - the cycle without its loop
        return controller, door, reply

    def _entry(self, memory: Memory, batch: Batch) -> Entry:
        return _slot(self._decide(memory, batch[3])[0]).entry()

    def decide(self, memory: Memory, kind: int) -> Decided:
        """The owner decides: J2."""

        def answer() -> Decided:
            controller, _, reply = self._decide(memory, kind)
            batch = (*memory.taking, memory.given_up, kind) if _slot(controller).decision is not None else ()
            heard = cast(Ear, _cycle(controller).listeners[0]).heard
            return Decided(batch, reply.word, heard and bool(batch))

        return self._once("decide", memory, kind, answer=answer)

    def apply(self, memory: Memory, batch: Batch, store: StoreFacts) -> tuple[bool, StoreFacts]:
        """The batch's transaction reaches the store (J4): whether it was applied, and the store after it."""

        def answer() -> tuple[bool, StoreFacts]:
            space = self.keyspace(store)
            done = space.commit(journal.transaction([self._entry(memory, batch)])).succeeded
            return done, self.facts(space)

        return self._once("apply", memory, batch, store, answer=answer)

    def answered(self, memory: Memory, batch: Batch, store: StoreFacts, *, clear: bool) -> Resolved:
        """The batch's transaction reaches the store, and its answer the replica (J6); or, if not `clear`, a time-out does."""
        return self._once(
            "answered", memory, batch, store, clear, answer=lambda: self._answered(memory, batch, store, clear)
        )

    def _answered(self, memory: Memory, batch: Batch, store: StoreFacts, clear: bool) -> Resolved:
        controller, door, reply = self._decide(memory, batch[3])
        cycle, slot, space = _cycle(controller), _slot(controller), self.keyspace(store)
        rebuilding: list[Slot] = []
        setattr(cycle, "_start_rebuild", rebuilding.append)  # noqa: B010 - a rebuild needs a loop
        door.asking = True
        work = cycle._commit(cycle._next_group())  # noqa: SLF001
        again = False
        try:
            first = work.send(None).ask
            wait = work.send(space.commit(first)) if clear else work.throw(Ambiguous("no answer"))
            while wait.ask is not None:
                wait = work.send(space.commit(wait.ask))
            if work.send(None).ask != first:
                raise AssertionError("what goes again is not byte-identical (J6)")
            again = True
        except StopIteration:
            pass
        after = self.facts(space)
        if again:
            return Resolved("again", "", memory, after)
        if rebuilding:
            return Resolved("rebuild", "", replace(memory, given_up=memory.given_up + 1), after)
        if cycle.slots.get(SHARD) is not slot or slot.phase is not Phase.OPEN:
            return Resolved("gone", reply.word, replace(memory, mark=self._observed(controller)), after)
        log = (*memory.log, batch)
        return Resolved("open", reply.word, replace(memory, log=log, mark=self._observed(controller)), after)

    def take(self, taking: Taking, mark: MarkOf, store: StoreFacts) -> tuple[Memory | None, StoreFacts]:
        """Take and recover a free shard (O1, J12); None if that fails."""

        def answer() -> tuple[Memory | None, StoreFacts]:
            space = self.keyspace(store)
            time = Time(START, _nonce("a", *taking))
            controller = Controller(
                store=cast(Any, Door(space)),
                clock=cast(Any, time),
                entropy=cast(Any, time),
                replica=NAMES[taking[0]],
                make_machine=make_machine,
            )
            controller.attach(7, lambda: True)
            self.owner_value(taking)
            if mark:
                controller.restore.marks.observe(self._mark(mark))
            if not finish(controller.take(SHARD)):
                return None, self.facts(space)
            after = self.facts(space)
            return Memory(taking, after.log, after.incarnation, self._observed(controller)), after

        return self._once("take", taking, mark, store, answer=answer)

    def look(self, memory: Memory, store: StoreFacts) -> tuple[bool, StoreFacts]:
        """A lapsed or doubting replica reads its owner key and head (O3, J12): whether it keeps the shard."""

        def answer() -> tuple[bool, StoreFacts]:
            controller, door = self._owner(memory)
            space = door.keyspace = self.keyspace(store)
            finish(controller.restore.check_own([SHARD]))
            owner, head = space.live.get(keys.owner(SHARD)), Head.parse(space.live.get(keys.head(SHARD)))
            survey = SimpleNamespace(owners={SHARD: owner}, heads={SHARD: head}, incarnation=store.incarnation)
            Ownership._drop_lost(cast(Any, SimpleNamespace(_controller=controller)), cast(Any, survey))  # noqa: SLF001
            return SHARD in controller.owned(), self.facts(space)

        return self._once("look", memory, store, answer=answer)

    def hello(self, memory: Memory, mark: MarkOf, store: StoreFacts) -> tuple[bool, StoreFacts]:
        """An agent cites a mark to this replica (J12): whether a restore is proved by it."""

        def answer() -> tuple[bool, StoreFacts]:
            controller, door = self._owner(memory)
            space = door.keyspace = self.keyspace(store)
            found = finish(controller.restore.check_marks([self._mark(mark)], ""))
            return found, self.facts(space)

        return self._once("hello", memory, mark, store, answer=answer)

    def confirm(self, store: StoreFacts) -> StoreFacts:
        """`baton admin restored`."""
        space = self.keyspace(store)
        time = Time(START, "")
        door = cast(Any, Door(space))
        controller = Controller(
            store=door, clock=cast(Any, time), entropy=cast(Any, time), replica="cli", make_machine=make_machine
        )
        finish(controller.restore.confirm_restored())
        return self.facts(space)

    def reads(self, memory: Memory) -> str:
        """What a reader of the request's effect is told (J8): "yes True", "yes False", or "" if nothing is."""

        def answer() -> str:
            slot, reply = _slot(self._owner(replace(memory, leased=True))[0]), Reply()
            read = Read(lambda machine: machine.graph("n", "g") is not None, cast(Any, reply))
            cycle_module._answer(read, slot.owned.machine, _belief(leased=memory.leased))  # noqa: SLF001
            return reply.word

        return self._once("reads", memory, answer=answer)

    def _mark(self, mark: MarkOf) -> Mark:
        return Mark(SHARD, mark[0], mark[1], _nonce("b", *mark[2]))

    def _observed(self, controller: Controller) -> MarkOf:
        marks = controller.restore.marks.of([SHARD])
        return (marks[0].incarnation, marks[0].seq, self._batches[marks[0].nonce]) if marks else ()


def _belief(*, leased: bool) -> Callable[[], bool]:
    """`Ownership.lease_good` of a replica whose tenure is good or not (O2)."""
    tenure = SimpleNamespace(good=lambda _: leased)
    ownership = cast(Any, SimpleNamespace(_tenure=tenure, _clock=Time(START, "")))
    return lambda: Ownership.lease_good(ownership)


def _cycle(controller: Controller) -> cycle_module.Cycle:
    return controller._cycle  # noqa: SLF001 - a replica without its loop


def _slot(controller: Controller) -> Slot:
    return _cycle(controller).slots[SHARD]


def entries(batches: Sequence[Batch]) -> int:
    """Batches that carry the client's request."""
    return sum(batch[3] == REQUEST for batch in batches)
