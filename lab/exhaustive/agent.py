"""An agent's side of a session, one question at a time: the production `AgentMachine`, its records, and the guard's `Leases`.

Time is events. Every step happens at time 0 of the host's clock; that F has passed is one step at a later time, after which the
machine's clocks are set back by it: cores only look at differences. For the guard's leases the same: "F has passed since the last
renewal of these generations" moves their send times back by F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster_agent.core import commands as do
from cluster_agent.core import events as on
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.core.lease import Action, Bounds, Leases, Reason
from cluster_agent.core.machine import AgentMachine
from cluster_agent.core.model import AgentState, AttemptKey, Demand, Ended, Epoch, Outcome, Phase, WorkSpec
from cluster_agent.core.records import apply, snapshot
from lab.exhaustive.pool import Pool, fields_of, plain

Key = tuple[int, str]

RUN, SHARD, STREAM = "run", "00", 1
FENCE, KILL = 15.0, 4.0
"""F and K. Time is events: only their order matters."""

LATE = 1e6
"""A time at which every F is over."""

ROOM = (NodeSpec(4000),)

NUMBERS = {
    Phase.QUEUED: 1,
    Phase.VOID: 2,
    Phase.STARTING: 3,
    Phase.RUNNING: 3,
    Phase.FINISHED: 4,
    Phase.TOMBSTONED: 5,
    Phase.STOPPING: 6,
}
"""Numbers of baton.v1.AttemptPhase, as `translate` writes them into a Hello."""

Asked = tuple[tuple[Any, ...], ...]
"""What the machine wants done: word first."""


def key_of(key: Key) -> AttemptKey:
    """In the agent's words."""
    return AttemptKey(RUN, 0, *key)


def short(key: AttemptKey) -> Key:
    """In the world's words."""
    return (key.n, key.nonce)


def spec(*, kept: bool) -> WorkSpec:
    """What every attempt runs."""
    return WorkSpec(("work",), {}, Demand(1000), "t", "r", "", 0, keep_at_fence=kept)


class Agents:
    """States of the agent's machine."""

    def __init__(self, *, kept: bool) -> None:
        self._spec = spec(kept=kept)
        self._pool: Pool[AgentMachine] = Pool(identity=_identity, freeze=_freeze, thaw=_thaw)

    def first(self, journal: int, boot: int) -> int:
        """An agent that has never met anybody, joined to its guard."""
        return self._boot(AgentState(f"journal{journal}"), boot)

    def _boot(self, state: AgentState, boot: int) -> int:
        machine = AgentMachine(state, ROOM, fence_seconds=FENCE)
        machine.restore(f"boot{boot}")
        return self._pool.put(machine)

    def restarted(self, number: int, boot: int) -> int:
        """The process died; its records are read again (F4). The host may have booted meanwhile (S6)."""

        def answer() -> int:
            before = self._pool.get(number).state
            state = AgentState(before.journal_uid)
            for record in snapshot(before):
                apply(state, record)
            return self._boot(state, boot)

        return self._pool.once("restarted", number, boot, answer=answer)

    def step(self, number: int, *event: Any) -> tuple[int, Asked]:
        """One thing happens to it."""

        def answer() -> tuple[int, Asked]:
            machine = self._pool.get(number)
            happened = _event(event, self._spec)
            step = machine.step([happened] if happened else [], LATE if event[0] == "late" else 0.0)
            _set_back(machine)
            return self._pool.put(machine), tuple(asked for action in step.actions if (asked := _asked(action)))

        return self._pool.once("step", number, event, answer=answer)

    def attempts(self, number: int) -> dict[Key, tuple[str, int]]:
        """Phase and generation of all it holds."""

        def answer() -> dict[Key, tuple[str, int]]:
            held = self._pool.get(number).state.attempts.values()
            return {short(attempt.key): (attempt.phase.name, attempt.generation) for attempt in held}

        return self._pool.once("attempts", number, answer=answer)

    def received(self, number: int, epoch: int) -> int:
        """The highest dispatch of that owner that came without a gap on this stream (C4)."""

        def answer() -> int:
            held = self._pool.get(number).link.received.get(SHARD)
            return held[1] if held is not None and held[0] == Epoch(1, epoch) else 0

        return self._pool.once("received", number, epoch, answer=answer)

    def heard(self, number: int) -> int:
        """The newest owner it has on its disk (F3), 0 for none."""

        def answer() -> int:
            epoch = self._pool.get(number).state.epochs.get(SHARD)
            return epoch.revision if epoch is not None else 0

        return self._pool.once("heard", number, answer=answer)

    def lease(self, number: int) -> tuple[int, bool, bool]:
        """Generation, whether it has lapsed, whether a heartbeat of the generation was acknowledged."""

        def answer() -> tuple[int, bool, bool]:
            link = self._pool.get(number).link
            return link.generation, link.lapsed, link.leased

        return self._pool.once("lease", number, answer=answer)


def _owned(kind: Callable[..., on.Event], epoch: int, *rest: Any) -> on.Event:
    """A message of the owner with that epoch."""
    return kind(STREAM, SHARD, Epoch(1, epoch), None, *rest)


_EVENTS: dict[str, Callable[..., on.Event | None]] = {
    "late": lambda: None,
    "open": lambda: on.StreamOpened(STREAM),
    "closed": lambda: on.StreamClosed(STREAM),
    "welcome": lambda generation: on.Welcomed(STREAM, generation, False, "c", "f", FENCE, KILL),
    "beat": lambda generation: on.HeartbeatAcked(STREAM, generation, 0.0, 0),
    "number": lambda epoch, generation, number: _owned(on.Dispatched, epoch, generation, number, ()),
    "stop": lambda epoch, key: _owned(on.StopOrdered, epoch, (key_of(key),)),
    "adopted": lambda epoch, generation, key: _owned(on.Adopted, epoch, generation, (key_of(key),)),
    "settled": lambda epoch, key: _owned(on.ReportsSettled, epoch, (key_of(key),)),
    "started": lambda key: on.WorkStarted(key_of(key), 0),
    "refused": lambda key: on.WorkRefused(key_of(key), "the guard refused it"),
    "ended": lambda *exit_: _ended(*exit_),  # noqa: PLW0108 - it is defined below
    "stopped": lambda key: on.WorkStopped(key_of(key)),
    "census": lambda running, ended: on.Census(
        {key_of(key): generation for key, generation in running}, tuple(_ended(*exit_) for exit_ in ended)
    ),
    "lost": on.ExecutorLost,
}
"""Events by their word in the world. "late" is no event: time alone passes."""


def _event(event: tuple[Any, ...], work: WorkSpec) -> on.Event | None:
    """The event of these words; None for a tick."""
    word, *rest = event
    if word == "dispatch":
        epoch, generation, key, number = rest
        return _owned(on.Dispatched, epoch, generation, number, (on.Assignment(key_of(key), work),))
    return _EVENTS[word](*rest)


def _ended(key: Key, outcome: str) -> on.WorkEnded:
    return on.WorkEnded(key_of(key), Ended(Outcome[outcome]))


def _asked(action: do.Action) -> tuple[Any, ...]:  # noqa: PLR0911 - one return a kind of action
    """An action in the world's words; () if it concerns nobody here."""
    match action:
        case do.SendHello():
            held = tuple((short(entry.key), entry.generation, NUMBERS[entry.phase]) for entry in action.inventory)
            return ("hello", held, action.last_generation)
        case do.SendReports():
            finished = tuple(("finished", short(key), ended.outcome.name) for key, ended in action.finished)
            rejected = tuple(("rejected", short(key), reason) for key, reason in action.rejected)
            stopped = tuple(("stopped", short(key), "") for key in action.stopped)
            told = (*finished, *rejected, *stopped)
            return ("reports", action.generation, told) if told else ()
        case do.StartWork():
            return ("start", tuple((short(order.key), order.generation) for order in action.orders))
        case do.StopWork():
            return ("stop", tuple(short(key) for key in action.keys))
        case do.AdoptWork():
            return ("adopt", tuple(short(key) for key in action.keys), action.generation)
        case do.ForgetWork():
            return ("forget", tuple(short(key) for key in action.keys))
        case do.RenewLease():
            return ("renew", action.generation)
        case do.RejoinExecutor():
            return ("rejoin",)
        case do.DropStream():
            return ("drop",)
    return ()


def _set_back(machine: AgentMachine) -> None:
    """Its clocks stand at 0 again."""
    machine._now, machine._told = 0.0, float("-inf")  # noqa: SLF001
    link, outbox = machine.link, machine._held.outbox  # noqa: SLF001
    link.opened_at = None if link.opened_at is None else 0.0
    outbox._sent = dict.fromkeys(outbox._sent, 0.0)  # noqa: SLF001
    machine._held.step = do.Step()  # noqa: SLF001


def _freeze(machine: AgentMachine) -> dict[str, Any]:
    kept = {name: value for name, value in vars(machine).items() if name not in ("_handlers", "_held")}
    return {"machine": kept, "held": vars(machine._held)}  # noqa: SLF001


def _thaw(kept: dict[str, Any]) -> AgentMachine:
    machine = AgentMachine(kept["machine"]["state"], ROOM, fence_seconds=FENCE)
    vars(machine._held).update(kept["held"])  # noqa: SLF001 - the handlers hold this very object
    vars(machine).update(kept["machine"])
    return machine


def _identity(machine: AgentMachine) -> object:
    held = {name: value for name, value in fields_of(machine._held).items() if name not in ("step", "state")}  # noqa: SLF001
    frozen = _freeze(machine)["machine"]
    return plain(frozen), plain(held)


class Timers:
    """States of a guard's leases (F5, G1)."""

    def __init__(self) -> None:
        self._pool: Pool[Leases[Key]] = Pool(
            identity=_lease_identity, freeze=lambda leases: leases, thaw=lambda leases: leases
        )

    def first(self) -> int:
        """A new guard, told F and K."""
        leases: Leases[Key] = Leases()
        leases.configure(FENCE, KILL)
        return self._pool.put(leases)

    def do(self, number: int, *what: Any) -> tuple[int, tuple[tuple[str, Key], ...]]:
        """Something happens to its timers; what the clock then orders."""

        def answer() -> tuple[int, tuple[tuple[str, Key], ...]]:
            leases, now = self._pool.get(number), 0.0
            match what:
                case ("renew", generation):
                    leases.renew(generation, 0.0, 0.0)
                case ("add", key, generation, kept):
                    leases.add(key, Bounds(generation, 0.0, keep_at_fence=kept))
                case ("adopt", key, generation):
                    leases.adopt(key, generation)
                case ("cut", key):
                    leases.cut(key, Reason.STOP, 0.0, 0.0)
                case ("remove", key):
                    leases.remove(key, 0.0)
                case ("fence", generation):
                    sent = leases._sent  # noqa: SLF001
                    leases._sent = {g: -FENCE if g <= generation else at for g, at in sent.items()}  # noqa: SLF001
                    for entry in leases._entries.values():  # noqa: SLF001
                        if entry.inherited is not None:
                            entry.inherited = -FENCE
                case ("kill",):
                    now = KILL
            orders = tuple((order.action.name, order.key) for order in leases.due(now))
            return self._pool.put(leases), orders

        return self._pool.once("do", number, what, answer=answer)

    def refusal(self, number: int, generation: int) -> bool:
        """Whether nothing of that generation may start (G1)."""
        return self._pool.once(
            "refusal", number, generation, answer=lambda: bool(self._pool.get(number).refusal(generation, 0.0))
        )

    def fresh(self, number: int) -> tuple[int, ...]:
        """Generations whose lease has not passed."""

        def answer() -> tuple[int, ...]:
            leases = self._pool.get(number)
            return tuple(sorted(g for g in leases._sent if leases.refusal(g, 0.0) is None))  # noqa: SLF001

        return self._pool.once("fresh", number, answer=answer)

    def ending(self, number: int) -> tuple[Key, ...]:
        """What was told to end because its lease passed."""

        def answer() -> tuple[Key, ...]:
            entries = self._pool.get(number)._entries.items()  # noqa: SLF001
            return tuple(key for key, entry in entries if entry.reason is Reason.FENCE)

        return self._pool.once("ending", number, answer=answer)

    def generation(self, number: int, key: Key) -> int:
        """The generation that it lives under; 0 if it does not run."""
        return self._pool.once("generation", number, key, answer=lambda: self._pool.get(number).generation(key) or 0)


def _lease_identity(leases: Leases[Key]) -> object:
    return plain({name: value for name, value in vars(leases).items() if name not in ("_earliest", "_stale")})


KILLED = Action.KILL.name
