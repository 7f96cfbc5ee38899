"""Slice B: one task, two clusters with an agent and a guard each, fleet, and the task's owner (PROTOCOL S1-S6, F1-F8, G1-G4, J7).

Down: one first-in-first-out a stream, dropped with it. Up: reports may come any time, any number of times, in any order; an
inventory comes late. What agents, guards' timers, the owner's shard and fleet do is the product's doing (`agent`, `owner`).

Time is events, and F5 is assumed as its inequality says: "L + G have passed since the last heartbeat of g" comes only when the agent
has lapsed (or is down, frozen, in a later session) and the guard, if it lives, has ended what ran under g. A guard that died took its
work with it (G4). The first attempt goes to the first cluster: the other worlds are these with the names swapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lab.exhaustive.agent import Key
from lab.exhaustive.explorer import Step, World
from lab.exhaustive.hosts import CLUSTERS, DEAD, DOWN, FROZEN, UP, Hosts, Link, Site, Spawned


@dataclass(frozen=True, slots=True)
class SessionBounds:
    """How much may happen. `faults`: of all kinds named; `owners`: changes of owner; `everywhere`: on the second cluster too."""

    attempts: int = 2
    generations: int = 2
    faults: int = 2
    owners: int = 0
    fifo: int = 1
    kinds: tuple[str, ...] = ("cut", "crash", "pause", "guard", "boot", "loss", "cancel")
    everywhere: bool = False
    kept: bool = False
    """The task waits for its cluster (`on_cluster_lost: wait`, F7)."""

    def text(self) -> str:
        """For people."""
        where = "either cluster" if self.everywhere else "the first cluster"
        return (
            f"1 task{' that waits for its cluster' if self.kept else ''}, 2 clusters, {self.attempts} attempts, {self.generations} "
            f"generations, {self.fifo} message(s) under way a stream, {self.owners} change(s) of owner, "
            f"{self.faults} fault(s) on {where} of: {', '.join(self.kinds)}"
        )


class SWorld(NamedTuple):
    """See the module. `old`: what a former owner still may send, once (its shard, its links); () if nobody does."""

    fleet: int
    shard: int
    epoch: int
    old: tuple[Any, ...]
    sites: tuple[Site, ...]
    reports: tuple[tuple[int, int, str, Key, str], ...]
    """(site, generation, kind, attempt, outcome)"""
    spawned: tuple[Key, ...]
    confirmed: tuple[Key, ...]
    """Attempts whose stop the owner holds for confirmed."""
    overlap: bool
    accepted: int
    faults: int
    owners: int
    cancelled: bool


class SessionWorld:
    """The model of slice B (`explorer.Model`). `without`: names of removals that concern what is modelled here."""

    names = CLUSTERS

    def __init__(self, bounds: SessionBounds, without: tuple[str, ...] = ()) -> None:
        self.bounds, self._without = bounds, without
        self._hosts = Hosts(
            kept=bounds.kept,
            voiding="late-requests" not in without,
            killing="guard-process" not in without,
            once="at-most-one-spawn" not in without,
        )
        self._fleets, self._shards = self._hosts.fleets, self._hosts.shards

    def start(self) -> World:
        """Both agents serve; nothing is placed."""
        fleet = self._fleets.first()
        sites = []
        for site in (0, 1):
            fleet, generation = self._fleets.open(fleet, site, 0, 0, 0)
            sites.append(self._hosts.serving(generation))
        shard = self._shards.see(self._shards.first(), fleet)
        for site in (0, 1):
            shard, _, _ = self._shards.inventory(shard, site, 1, 0, 0, (), fleet)
        bounds = self.bounds
        return SWorld(fleet, shard, 1, (), tuple(sites), (), (), (), False, 0, bounds.faults, bounds.owners, False)

    def canonical(self, world: World) -> tuple[World, bool]:
        """Names differ from the first attempt on (see the module). What can have no effect any more is left out: reports that neither
        the owner nor the agent has a use for, and a former owner whose messages every agent would refuse."""
        w = world
        assert isinstance(w, SWorld)  # noqa: S101
        reports = tuple(report for report in w.reports if self._matters(w, *report))
        old = w.old if w.old and any(self._trusts(w, *pair) for pair in zip(w.sites, w.old[1], strict=True)) else ()
        return (w._replace(reports=reports, old=old) if old != w.old or len(reports) < len(w.reports) else w), False

    def _matters(self, w: SWorld, index: int, generation: int, kind: str, key: Key, outcome: str) -> bool:
        """A stop may be armed again, so its confirmation always does."""
        if kind == "stopped" or key in self._hosts.agents.attempts(w.sites[index].agent):
            return True
        return self._shards.report(w.shard, index, generation, kind, key, outcome)[0] != w.shard

    def _trusts(self, w: SWorld, site: Site, link: Link | None) -> bool:
        """Whether the agent may still take something of a former owner on this stream (F3)."""
        here = link is not None and link.generation == site.session and bool(link.sent)
        return here and self._hosts.agents.heard(site.agent) < w.epoch

    # -- judging -------------------------------------------------------------------------------------------------------

    def broken(self, world: World) -> str:
        """See Model."""
        w = world
        assert isinstance(w, SWorld)  # noqa: S101
        running = [key for site in w.sites for key in site.guard.running]
        if len(running) > 1 and not w.overlap:
            return "I9: two copies run, and no overlap was said"
        if len(set(w.spawned)) < len(w.spawned):
            return "F4: an attempt was started twice"
        if w.accepted > 1:
            return "I3: two results were accepted"
        if set(running) & set(w.confirmed):
            return "F8: a stop is confirmed, and the work runs"
        return "F2: two live attempts, and the task is not hedged" if len(self._shards.live(w.shard)) > 1 else ""

    def goal(self, world: World) -> bool:
        """The task has its end, nothing runs, no stop is open; or the bounds leave no more attempts or generations."""
        w = world
        assert isinstance(w, SWorld)  # noqa: S101
        if any(self._level(w, site) >= self.bounds.generations for site in (0, 1)):
            return True
        if self._shards.over(w.shard):
            return not any(site.guard.running for site in w.sites) and not self._shards.stops(w.shard)
        live = self._shards.live(w.shard)
        spent = self._shards.placed(w.shard) >= self.bounds.attempts
        return spent and (not live or all(self._ended(w, site, generation) for _, site, generation in live))

    def _ended(self, w: SWorld, site: int, generation: int) -> bool:
        return generation <= self._level(w, site)

    def _level(self, w: SWorld, site: int) -> int:
        """The newest generation of the cluster that has ended."""
        return max((number for number, ended in self._fleets.generations(w.fleet, site) if ended), default=0)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def steps(self, world: World) -> Iterator[Step]:
        """See Model."""
        w = world
        assert isinstance(w, SWorld)  # noqa: S101
        if (
            self._shards.over(w.shard)
            and not self._shards.stops(w.shard)
            and not any(s.guard.running or s.guard.asked for s in w.sites)
        ):
            return
        yield from self._owner(w)
        for index, site in enumerate(w.sites):
            yield from self._fleet(w, index, site)
            yield from self._reach(w, index, site)
            yield from self._time(w, index, site)
            yield from self._work(w, index, site)
            if w.faults and (index == 0 or self.bounds.everywhere) and self._shards.placed(w.shard):
                yield from self._faults(w, index, site)

    def _owner(self, w: SWorld) -> Iterator[Step]:
        shards = self._shards
        if shards.knows(w.shard) < self._fleets.table(w.fleet).seq:
            yield Step("the owner reads fleet's table", -1, w._replace(shard=shards.see(w.shard, w.fleet)))
        placed = shards.placed(w.shard)
        if placed < self.bounds.attempts:
            for index in (0, 1) if placed else (0,):
                generation, ended = self._fleets.generations(w.fleet, index)[-1]
                shard, done, overlap = shards.grant(w.shard, index, generation)
                if done and not ended:
                    after = w._replace(shard=shard, overlap=w.overlap or overlap)
                    key = next(key for key, site, _ in shards.live(shard) if site == index and key[0] == placed + 1)
                    after = self._number(after, index, (key,))
                    yield Step(f"the owner places attempt {placed + 1} there", index, after)
        for index in (0, 1):
            for generation, waits in shards.waits(w.shard, index):
                timed = waits and generation <= self._level(w, index) and "loss-condition" not in self._without
                if not timed or w.sites[index].passed >= generation:
                    how = "has waited G since it saw" if waits else "waits no G after it saw"
                    yield Step(
                        f"the owner {how} the end of generation {generation}",
                        index,
                        w._replace(shard=shards.fence(w.shard, index, generation)),
                    )
        for report in w.reports:
            yield from self._report(w, *report)
        if "cancel" in self.bounds.kinds and w.faults and placed and not w.cancelled and not shards.over(w.shard):
            after = w._replace(shard=shards.cancel(w.shard), cancelled=True, faults=w.faults - 1)
            yield Step("the run is cancelled", -1, after, fault=True)
        if w.owners and placed:
            links = tuple(site.link for site in w.sites)
            sites = tuple(site._replace(link=None) for site in w.sites)
            after = w._replace(
                shard=shards.refold(w.shard), epoch=w.epoch + 1, old=(w.shard, links), sites=sites, owners=w.owners - 1
            )
            yield Step("another replica takes the shard", -1, after, fault=True)

    def _report(self, w: SWorld, index: int, generation: int, kind: str, key: Key, outcome: str) -> Iterator[Step]:
        live = {k for k, _, _ in self._shards.live(w.shard)}
        shard, settled, accepted, confirmed = self._shards.report(w.shard, index, generation, kind, key, outcome)
        site = w.sites[index]
        after = w._replace(
            shard=shard, accepted=w.accepted + len(accepted), confirmed=tuple(sorted({*w.confirmed, *confirmed}))
        )
        held = self._hosts.agents.attempts(site.agent)
        if site.link is not None:
            for done in settled:
                if done in held and held[done][0] in ("FINISHED", "TOMBSTONED"):
                    after = self._push(after, index, ("settled", w.epoch, done))
        broken = "F2: a result is accepted from an attempt that is not live" if set(accepted) - live else ""
        if after != w or broken:
            yield Step(
                f"the owner takes its report: attempt {key[0]} {kind} {outcome}".rstrip(), index, after, broken=broken
            )

    def _number(self, w: SWorld, index: int, keys: tuple[Key, ...]) -> SWorld:
        """Dispatches get their numbers when they are committed, if there is a link (Dispatcher.committed)."""
        link = w.sites[index].link
        return (
            w if link is None else _put(w, index, w.sites[index]._replace(link=link._replace(sent=(*link.sent, *keys))))
        )

    def _push(self, w: SWorld, index: int, message: tuple[object, ...]) -> SWorld:
        """A message down the current stream; it waits outside if there is no room, or is under way already (J7: it comes again)."""
        site = w.sites[index]
        if site.session == 0 or message in site.fifo or len(site.fifo) >= self.bounds.fifo:
            return w
        return _put(w, index, site._replace(fifo=(*site.fifo, message)))

    def _fleet(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        generation, ended = self._fleets.generations(w.fleet, index)[-1]
        free = site.session == 0
        if not ended and (
            free or ("loss" in self.bounds.kinds and w.faults and (index == 0 or self.bounds.everywhere))
        ):
            fleet = self._fleets.lose(w.fleet, index, generation, begun=site.begun == generation)
            after = w._replace(fleet=fleet, faults=w.faults - (not free))
            yield Step(f"fleet commits ClusterLost of generation {generation}", index, after, fault=not free)
        level = self._level(w, index)
        if site.passed < level and self._hosts.safe(site, site.passed + 1):
            passed = site._replace(passed=site.passed + 1)
            yield Step(
                f"L + G have passed since the last heartbeat of generation {site.passed + 1}",
                index,
                _put(w, index, passed),
            )

    def _reach(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        """Streams: Hello, inventory, messages, heartbeats."""
        hosts, shards = self._hosts, self._shards
        if site.life == UP and site.session == 0 and site.joined:
            agent, asked = hosts.agents.step(site.agent, "open")
            hello = next(words for words in asked if words[0] == "hello")
            fleet, generation = self._fleets.open(w.fleet, index, site.boot, 0, hello[2])
            if generation and generation <= self.bounds.generations:
                met = hosts.welcomed(site._replace(agent=agent), generation, hello[1])
                yield from self._told(
                    w._replace(fleet=fleet), index, f"says Hello, and is in generation {generation}", met
                )
        if site.session and site.link is None:
            shard, adopted, confirmed = shards.inventory(
                w.shard, index, site.session, site.told_boot, 0, site.held, w.fleet
            )
            link = Link(site.session, shards.missing(shard, index, site.session, site.held))
            after = _put(
                w._replace(shard=shard, confirmed=tuple(sorted({*w.confirmed, *confirmed}))),
                index,
                site._replace(link=link),
            )
            for key in adopted:
                after = self._push(after, index, ("adopted", w.epoch, site.session, key))
            yield Step("the owner takes its inventory", index, after)
        if site.link is not None:
            yield from self._down(w, index, site, site.link)
        yield from self._late(w, index, site)
        if site.life == UP and site.fifo:
            message = site.fifo[0]
            heard = hosts.agent(site._replace(fifo=site.fifo[1:]), *message)
            yield from self._told(w, index, f"hears: {message[0]}", heard)
        if site.life == UP and site.session:
            generation, ended = self._fleets.generations(w.fleet, index)[-1]
            if ended or generation != site.session:
                yield from self._told(w, index, "its stream ends, for its generation has", hosts.cut(site))
            else:
                beaten = hosts.agent(site._replace(begun=generation), "beat", generation)
                if beaten.site != site:
                    yield from self._told(w, index, "has a heartbeat acknowledged", beaten)

    def _down(self, w: SWorld, index: int, site: Site, link: Link) -> Iterator[Step]:
        """What the owner sends, once and again (J7)."""
        hosts, shards = self._hosts, self._shards
        count = hosts.agents.received(site.agent, w.epoch)
        if count < len(link.sent):
            key = link.sent[count]
            if key in shards.carries(w.shard, index, link.generation):
                sent = self._push(w, index, ("dispatch", w.epoch, link.generation, key, count + 1))
            else:  # its number goes out without it: a gap would keep all later ones waiting
                sent = self._push(w, index, ("number", w.epoch, link.generation, count + 1))
            if sent != w:
                yield Step(f"the owner sends attempt {key[0]}", index, sent)
        for of, key in shards.stops(w.shard):
            sent = self._push(w, index, ("stop", w.epoch, key))
            if of == index and sent != w and hosts.agents.attempts(site.agent).get(key, ("",))[0] != "STOPPING":
                yield Step(f"the owner sends the stop of attempt {key[0]}", index, sent)

    def _late(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        """What a former owner had sent on this very stream."""
        if w.old and site.session:
            shard, links = w.old
            link = links[index]
            if link is not None and link.generation == site.session:
                for place, key in enumerate(link.sent):
                    if key in self._shards.carries(shard, index, link.generation):
                        sent = self._push(w, index, ("dispatch", w.epoch - 1, link.generation, key, place + 1))
                        if sent != w:
                            sent = sent._replace(old=())
                            yield Step(
                                f"the former owner's dispatch of attempt {key[0]} comes late", index, sent, fault=True
                            )

    def _time(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        hosts = self._hosts
        generation, ended = self._fleets.generations(w.fleet, index)[-1]
        silent = site.session == 0 or ended or site.session != generation
        if site.life == UP and hosts.may_lapse(site) and silent:
            yield from self._told(w, index, "F has passed at its agent", hosts.lapse(site))
        for of in hosts.guard_may_lapse(site):
            yield from self._told(
                w, index, f"F of generation {of} has passed at its guard", hosts.guard_lapse(site, of)
            )
        if hosts.guard_may_kill(site):
            yield from self._told(w, index, "K has passed at its guard, which kills", hosts.guard_kill(site))

    def _work(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        hosts = self._hosts
        if site.guard.life == UP and site.guard.asked:
            yield from self._told(w, index, "its guard reads what it was asked", hosts.guard_reads(site))
        if site.guard.life != DEAD:
            for key in site.guard.running:
                yield from self._told(w, index, f"attempt {key[0]} succeeds", hosts.work_ends(site, key, "SUCCEEDED"))
        if site.life == UP and not site.joined:
            yield from self._told(w, index, "its agent joins its guard", hosts.join(site))
        if site.life == UP and site.news:
            yield from self._told(w, index, "its agent hears its guard", hosts.hear(site))
        if site.life == DOWN:
            yield from self._told(w, index, "its agent starts again", hosts.restart(site, site.boot))
        if site.life == FROZEN:
            yield from self._told(w, index, "its agent goes on", hosts.thaw(site))

    def _faults(self, w: SWorld, index: int, site: Site) -> Iterator[Step]:
        hosts, kinds, cost = self._hosts, self.bounds.kinds, w._replace(faults=w.faults - 1)
        if "cut" in kinds and site.session and site.life == UP:
            yield from self._told(cost, index, "its stream breaks", hosts.cut(site), fault=True)
        if "crash" in kinds and site.life != DOWN:
            yield from self._told(cost, index, "its agent is killed", hosts.crash(site), fault=True)
        if "pause" in kinds and site.life == UP:
            yield from self._told(cost, index, "its agent is stopped", Spawned(site._replace(life=FROZEN)), fault=True)
        if "guard" in kinds and site.guard.life != DEAD:
            yield from self._told(
                cost, index, "its guard is killed, and its work with it", hosts.guard_dies(site), fault=True
            )
        if "boot" in kinds and site.boot == 0:
            yield from self._told(cost, index, "its host boots", hosts.reboot(site), fault=True)

    def _told(self, w: SWorld, index: int, text: str, result: Spawned, *, fault: bool = False) -> Iterator[Step]:
        """The step after which the site is as `result` says: what it spawned and reported joins the world."""
        reports = {*w.reports, *((index, *report) for report in result.reports)}
        after = _put(w, index, result.site)._replace(
            spawned=tuple(sorted((*w.spawned, *result.spawned))), reports=tuple(sorted(reports))
        )
        broken = "F8: an attempt starts after its stop was confirmed" if set(result.spawned) & set(w.confirmed) else ""
        yield Step(text, index, after, fault=fault, broken=broken)


def _put(w: SWorld, index: int, site: Site) -> SWorld:
    return w._replace(sites=(site, w.sites[1]) if index == 0 else (w.sites[0], site))
