"""The fleet shard: the only writer of clusters, generations and verdicts (PROTOCOL O6, S1, S3-S8).

Theory. A cluster is known by name; what lives is its current *generation*, one session of its agent. Everything dangerous
hangs on how generations end: **each ends by exactly one ClusterLost, committed no later than the batch that opens the
next** (S5), and the evidence in it says how sure the old work's death is (F6). So an agent that says Hello meets one of
four answers (S6), tried in this order:

1. another instance's stream is alive                -> SECOND_INSTANCE: two agents may not share a name (S1);
2. another journal uid than the living generation's  -> GENERATION_ENDING: a reinstalled agent, or another host, proves
   nothing about what the old one runs; it waits for the loss by the clock (S4);
3. the same journal uid, another boot id             -> the same host booted: nothing survives that. The generation ends at
   once, evidence REPORTED, and the next one opens in the same batch;
4. both the same                                     -> the generation goes on, with the lease it was opened with: that is
   what fleet and owners wait for, so the grant says it, whatever the agent asks for now (F5, S8).

Why 2 comes before 3: a boot id proves death only *of the same host*, and the journal on its disk is what names the host.

Losses by the clock come from outside (`fleet_watch`), conditioned on the unchanged session key (S4). Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from control_plane.core import events as ev
from control_plane.core.commands import (
    Command,
    FleetTick,
    LoseCluster,
    ObserveHealth,
    OpenSession,
    Outbox,
    Refused,
    SessionGrant,
    SetAdmission,
)
from control_plane.core.events import Event
from control_plane.core.fleet_image import facts_from_json, facts_to_json
from control_plane.core.fleet_requests import RequestLedger
from control_plane.core.machine import Batch
from control_plane.core.model import (
    FLEET,
    Admission,
    ClusterFacts,
    Evidence,
    FleetTable,
    Generation,
    Health,
    Stamp,
)
from control_plane.core.storm import Loss, Storm

KEPT_GENERATIONS = 32
"""Generations kept per cluster. Owners take a generation that is gone from the table for ended without evidence, so too few
would forget a proof of death before a slow owner saw it; too many make the table, which every replica gets, heavy."""


@dataclass(slots=True)
class _Row:
    """A cluster: what all may know, and what only fleet needs of its current generation."""

    facts: ClusterFacts
    instance: str = ""
    lost_seconds: float = 0.0

    @property
    def current(self) -> Generation | None:
        """The generation that has not ended, if there is one."""
        last = self.facts.generations[-1] if self.facts.generations else None
        return None if last is None or last.ended else last


@dataclass(frozen=True, slots=True)
class LiveSession:
    """A generation that has not ended, for those who watch its renewals (S3, S4). `lost_seconds` is L."""

    cluster: str
    name: str
    generation: int
    profile: str
    lost_seconds: float
    health: Health
    orphan_killer: bool


class Fleet:
    """The state of the fleet shard and its rules. Implements `core.machine.Machine`."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self._rows: dict[str, _Row] = {}
        self._uids: dict[str, str] = {}
        self._storm = Storm()
        self._requests = RequestLedger()
        self._seq = 0
        self._table: FleetTable | None = None
        self._idle: frozenset[str] = frozenset()
        """What the newest loss said of who lives without a heartbeat; an observation, so it is no state and not folded."""

    # -- reading ------------------------------------------------------------------------------------------------------

    def table(self) -> FleetTable:
        """The level that owners compare their attempts with (S5). Immutable; a new object after each change."""
        if self._table is None:
            clusters = {uid: row.facts for uid, row in self._rows.items()}
            self._table = FleetTable(self._seq, clusters, self._storm.until)
        return self._table

    def live(self) -> tuple[LiveSession, ...]:
        """All generations that have not ended."""
        return tuple(
            LiveSession(
                cluster=uid,
                name=row.facts.name,
                generation=row.facts.generation,
                profile=row.facts.profile,
                lost_seconds=row.lost_seconds,
                health=row.facts.health,
                orphan_killer=row.facts.orphan_killer,
            )
            for uid, row in self._rows.items()
            if row.current is not None
        )

    def due(self) -> float | None:
        """When the oldest request record may be forgotten; the storm's end needs no event (it is a time in the table)."""
        return self._requests.due()

    # -- deciding -----------------------------------------------------------------------------------------------------

    def handle(self, command: Command, batch: Batch) -> object:
        """Decide (see `core.machine.Machine`). Raises Refused; TypeError for a run shard's command."""
        match command:
            case OpenSession():
                return self._open(command, batch)
            case SetAdmission():
                return self._admit(command, batch)
            case LoseCluster():
                self._lose(command, batch)
            case ObserveHealth():
                self._observe(command, batch)
            case FleetTick():
                floor = self._requests.floor_at(batch.now)
                if floor:
                    batch.emit(ev.RequestsPruned(floor))
            case _:
                raise TypeError(f"{type(command).__name__} is no command of the fleet shard")
        return None

    def settle(self, batch: Batch) -> None:
        """A storm begins when enough losses have come together, in one batch or in several (S7)."""
        if not any(isinstance(event, ev.ClusterLost) for event in batch.events):
            return
        serving = [uid for uid, row in self._rows.items() if row.current is not None and uid not in self._idle]
        until = self._storm.verdict(batch.now, serving)
        if until is not None:
            batch.emit(ev.StormHeld(until))

    def _open(self, command: OpenSession, batch: Batch) -> SessionGrant:
        """S1, S6: resume, end and open, or refuse."""
        if not command.cluster_name or not command.boot_id or not command.journal_uid:
            raise Refused("DENIED", "a session needs a cluster name, a boot id and a journal uid")
        uid = self._uids.get(command.cluster_name)
        if uid is None:
            if command.cluster_uid in self._rows:
                raise Refused("NAME_TAKEN", f"cluster uid {command.cluster_uid} is in use")
            batch.emit(ev.ClusterAdded(command.cluster_uid, command.cluster_name))
            return self._start(command.cluster_uid, command, batch)
        row = self._rows[uid]
        current = row.current
        if current is None:
            return self._start(uid, command, batch)
        if command.first_session_alive and command.instance != row.instance:
            raise Refused("SECOND_INSTANCE", f"another agent serves cluster {command.cluster_name} right now")
        if command.journal_uid != current.journal_uid:
            raise Refused(
                "GENERATION_ENDING",
                f"generation {current.number} of {command.cluster_name} was another agent journal's; "
                f"it ends {row.lost_seconds:.0f} s after its last heartbeat",
            )
        if command.boot_id != current.boot_id:
            batch.emit(ev.ClusterLost(uid, current.number, Evidence.REPORTED, "the host booted; nothing survives that"))
            return self._start(uid, command, batch)
        if command.last_generation > current.number:
            # The agent has lived in a generation that this history never opened: the store was restored (J12).
            reason = f"the agent was in generation {command.last_generation} already: the store was restored"
            batch.emit(ev.ClusterLost(uid, current.number, Evidence.NONE, reason))
            return self._start(uid, command, batch)
        return self._grant(uid, resumed=True)

    def _start(self, uid: str, command: OpenSession, batch: Batch) -> SessionGrant:
        """S5: the next generation; its predecessor has ended. Never a number that the agent has seen before."""
        number = max(self._rows[uid].facts.generation, command.last_generation) + 1
        batch.emit(
            ev.SessionOpened(
                cluster=uid,
                generation=number,
                boot_id=command.boot_id,
                journal_uid=command.journal_uid,
                instance=command.instance,
                replica=command.replica,
                profile=command.profile,
                lost_seconds=command.lost_seconds,
                guard_seconds=command.guard_seconds,
                labels=command.labels,
                taints=command.taints,
                isolation=command.isolation,
                orphan_killer=command.orphan_killer,
                namespaces=command.namespaces,
                agent_version=command.agent_version,
            )
        )
        return self._grant(uid, resumed=False)

    def _grant(self, uid: str, *, resumed: bool) -> SessionGrant:
        row = self._rows[uid]
        opened = row.facts.generations[-1]
        return SessionGrant(uid, opened.number, resumed, row.facts.profile, row.lost_seconds + opened.guard_seconds)

    def _lose(self, command: LoseCluster, batch: Batch) -> None:
        """S4, S5, F6: one ClusterLost per generation, with no more evidence than its guard can carry (G4)."""
        row = self._rows.get(command.cluster)
        current = row.current if row else None
        if row is None or current is None or current.number != command.generation:
            raise Refused("WRONG_STATE", f"generation {command.generation} is not a living one of {command.cluster}")
        self._idle = command.idle
        evidence = command.evidence
        if not command.begun and started_nothing(row.facts):
            evidence = Evidence.REPORTED
        if evidence is not Evidence.REPORTED and not (evidence is Evidence.TIMED and row.facts.orphan_killer):
            evidence = Evidence.NONE
        batch.emit(ev.ClusterLost(command.cluster, command.generation, evidence, command.reason))

    def _observe(self, command: ObserveHealth, batch: Batch) -> None:
        """S3. What is said of an ended generation, or changes nothing, is dropped."""
        row = self._rows.get(command.cluster)
        current = row.current if row else None
        if row is None or current is None or current.number != command.generation:
            return
        before, after = (Health.READY, Health.SUSPECT) if command.suspect else (Health.SUSPECT, Health.READY)
        if row.facts.health is before:
            batch.emit(ev.HealthChanged(command.cluster, after))

    def _admit(self, command: SetAdmission, batch: Batch) -> str:
        """O6, O8: cordon, uncordon or drain; the word stays over generations."""
        known = self._requests.find(command.request, batch.now)
        if known is not None:
            return known
        uid = self._uids.get(command.cluster_name)
        if uid is None:
            raise Refused("NOT_FOUND", f"there is no cluster {command.cluster_name}")
        if command.request.id:
            batch.emit(ev.RequestRecorded(command.request.id, command.request.digest, uid))
        if self._rows[uid].facts.admission is not command.admission:
            batch.emit(ev.AdmissionSet(uid, command.admission))
        return uid

    # -- folding ------------------------------------------------------------------------------------------------------

    def apply(self, event: Event, stamp: Stamp) -> None:
        """Fold one event (see `core.machine.Machine`). Raises TypeError for a run shard's event."""
        match event:
            case ev.RequestRecorded():
                self._requests.record(event, stamp.wall)
                return
            case ev.RequestsPruned():
                self._requests.prune(event.floor)
                return
            case ev.RunImage():
                self._restore(json.loads(event.image))
            case ev.ClusterAdded():
                facts = ClusterFacts(event.uid, event.name, Health.LOST, Admission.OPEN, (), create_wall=stamp.wall)
                self._rows[event.uid] = _Row(facts)
                self._uids[event.name] = event.uid
            case ev.SessionOpened():
                self._opened(event)
            case ev.ClusterLost():
                self._lost(event, stamp)
            case ev.HealthChanged():
                self._change(event.cluster, health=event.health)
            case ev.AdmissionSet():
                self._change(event.cluster, admission=event.admission)
            case ev.StormHeld():
                self._storm.held(event.until)
            case _:
                raise TypeError(f"{type(event).__name__} is no event of the fleet shard")
        self._seq = max(self._seq, stamp.seq)
        self._table = None
        self.outbox.table = True

    def _opened(self, event: ev.SessionOpened) -> None:
        row = self._rows[event.cluster]
        opened = Generation(
            event.generation, event.boot_id, event.journal_uid, Evidence.UNSPECIFIED, event.guard_seconds
        )
        row.facts = replace(
            row.facts,
            health=Health.READY,
            generations=(*row.facts.generations, opened)[-KEPT_GENERATIONS:],
            labels=event.labels,
            taints=event.taints,
            isolation=event.isolation,
            orphan_killer=event.orphan_killer,
            namespaces=event.namespaces,
            profile=event.profile,
            agent_version=event.agent_version,
        )
        row.instance = event.instance
        row.lost_seconds = event.lost_seconds

    def _lost(self, event: ev.ClusterLost, stamp: Stamp) -> None:
        row = self._rows[event.cluster]
        ended = replace(row.facts.generations[-1], evidence=event.evidence)
        row.facts = replace(row.facts, health=Health.LOST, generations=(*row.facts.generations[:-1], ended))
        self._storm.lost(Loss(stamp.wall, event.cluster, row.lost_seconds + ended.guard_seconds), event.evidence)

    def _change(self, cluster: str, *, health: Health | None = None, admission: Admission | None = None) -> None:
        row = self._rows[cluster]
        row.facts = replace(row.facts, health=health or row.facts.health, admission=admission or row.facts.admission)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def dump(self) -> Iterable[Event]:
        """One image for the shard, then one per cluster (J9). Image keys are read by `_restore` only."""
        shard = {
            "seq": self._seq,
            "until": self._storm.until,
            "losses": [[loss.wall, loss.cluster, loss.recovery] for loss in self._storm.losses],
            "requests": self._requests.to_json(),
        }
        yield ev.RunImage(FLEET, _compact(shard))
        for uid, row in self._rows.items():
            image = {"facts": facts_to_json(row.facts), "instance": row.instance, "lost_seconds": row.lost_seconds}
            yield ev.RunImage(uid, _compact(image))

    def _restore(self, image: dict[str, Any]) -> None:
        if "facts" in image:
            row = _Row(facts_from_json(image["facts"]), image["instance"], image["lost_seconds"])
            self._rows[row.facts.uid] = row
            self._uids[row.facts.name] = row.facts.uid
            return
        self._seq = image["seq"]
        self._storm = Storm([Loss(*loss) for loss in image["losses"]], image["until"])
        self._requests = RequestLedger.from_json(image["requests"])

    def validate(self) -> None:
        """S5 and the indices; raises AssertionError with the story."""
        _must(self._uids == {row.facts.name: uid for uid, row in self._rows.items()}, "names and rows disagree")
        for uid, row in self._rows.items():
            generations = row.facts.generations
            numbers = [generation.number for generation in generations]
            story = f"cluster {row.facts.name}: {generations}"
            _must(row.facts.uid == uid, story)
            _must(numbers == sorted(set(numbers)), f"generations must rise: {story}")
            _must(len(numbers) <= KEPT_GENERATIONS, f"too many generations: {story}")
            _must(all(g.ended for g in generations[:-1]), f"an earlier generation has not ended: {story}")
            _must((row.facts.health is Health.LOST) == (row.current is None), f"LOST means ended: {story}")
        cached, self._table = self._table, None
        _must(cached is None or cached == self.table(), "the published table is stale")
        self._requests.validate()


def started_nothing(facts: ClusterFacts) -> bool:
    """Whether nothing can run in the newest generation, given that no heartbeat was ever committed in it. An agent starts nothing
    before its first acknowledged heartbeat, and nothing is placed before one (F3, C4); so only adopted work could run (S6), and that
    is dead too if every earlier generation ended with evidence REPORTED."""
    return all(generation.evidence is Evidence.REPORTED for generation in facts.generations[:-1])


def _must(holds: bool, story: str) -> None:
    if not holds:
        raise AssertionError(story)


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
