"""A cluster's host in slice B: agent, guard, processes and stream as one value, and everything that may happen to it.

The agent is the production machine (`agent.Agents`), the guard's clock the production leases (`agent.Timers`). What a guard does
beside them is the executor contract's smallest model (`executors.base`, tests/contract): a key is started at most once for the life of
its disk (F4), a refusal or a stop is a tombstone before it is told (F3, F8), an exit is told when the process is dead and kept until
it is forgotten, a new connection voids unread requests before the census (G3), and a guard that dies takes its work with it (G4).
Requests wait for the guard's turn only if one of them is a start: the order of the others cannot be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from control_plane.core.model import OnClusterLost
from lab.exhaustive.agent import KILLED, Agents, Asked, Key, Timers
from lab.exhaustive.owner import CLUSTERS, Fleets, Shards

UP, DOWN, FROZEN, DEAD = "up", "down", "frozen", "dead"


class Link(NamedTuple):
    """The owner's tie to the current stream: what it sent, in order of dispatch number from 1."""

    generation: int
    sent: tuple[Key, ...]


class Guard(NamedTuple):
    """`known`: started, refused or stopped ever. `lost`: had a process when a guard died. `asked`: unread requests."""

    life: str
    timers: int
    running: tuple[Key, ...] = ()
    known: tuple[Key, ...] = ()
    lost: tuple[Key, ...] = ()
    exits: tuple[tuple[Key, str], ...] = ()
    asked: Asked = ()


class Site(NamedTuple):
    """`session`: generation of the stream, 0 without one. `begun`: the newest generation that had a heartbeat. `held`, `told_boot`:
    what the stream's Hello said. `passed`: since the last heartbeat of generations up to this one L + G have passed (F5)."""

    agent: int
    life: str
    joined: bool
    boot: int
    session: int
    begun: int
    link: Link | None
    held: tuple[tuple[Key, int, int], ...]
    told_boot: int
    fifo: tuple[tuple[Any, ...], ...]
    guard: Guard
    news: tuple[tuple[Any, ...], ...]
    passed: int


@dataclass(frozen=True, slots=True)
class Spawned:
    """A site after a step; what it spawned, and what it reported: (generation, kind, attempt, outcome)."""

    site: Site
    spawned: tuple[Key, ...] = ()
    reports: tuple[tuple[int, str, Key, str], ...] = ()


class Hosts:
    """See the module. Without `voiding` (G3), `killing` while the agent does not run (G1), or `once` (F4, F8): removals of what is
    modelled here."""

    def __init__(self, *, kept: bool, voiding: bool = True, killing: bool = True, once: bool = True) -> None:
        self._kept, self._voiding, self._killing, self._once = kept, voiding, killing, once
        self.agents, self.timers, self.fleets = Agents(kept=kept), Timers(), Fleets()
        self.shards = Shards(self.fleets, keeps=OnClusterLost.WAIT if kept else OnClusterLost.RERUN_AFTER_FENCE)

    def serving(self, generation: int) -> Site:
        """An agent that has met its guard and the federation, and had its first heartbeat acknowledged."""
        guard = Guard(UP, self.timers.first())
        site = Site(self.agents.first(0, 0), UP, False, 0, 0, 0, None, (), 0, (), guard, (), 0)
        site = self.join(site).site
        agent, _ = self.agents.step(site.agent, "open")
        site = self.welcomed(site._replace(agent=agent), generation, ()).site
        site = self.agent(site, "beat", generation).site
        return site._replace(begun=generation, link=Link(generation, ()))

    # -- the agent -----------------------------------------------------------------------------------------------------

    def agent(self, site: Site, *event: Any) -> Spawned:
        """Something happens to the agent; what it wants is done."""
        number, asked = self.agents.step(site.agent, *event)
        return self._carry_out(site._replace(agent=number), asked)

    def _carry_out(self, site: Site, asked: Asked) -> Spawned:
        reports: list[tuple[int, str, Key, str]] = []
        dropped = False
        for words in asked:
            match words:
                case ("reports", generation, told):
                    reports += [(generation, *what) for what in told]
                case ("start", orders):
                    site = _ask(site, *(("start", key, generation) for key, generation in orders))
                case ("stop" | "forget", keys):
                    site = _ask(site, (words[0], keys))
                case ("adopt", _, _) | ("renew", _):
                    site = _ask(site, words)
                case ("rejoin",):
                    site = site._replace(joined=False)
                case ("drop",):
                    dropped = True
        result = Spawned(site, (), tuple(reports))
        if dropped:
            result = _then(result, self.cut(site))
        guard = result.site.guard
        if guard.life == UP and guard.asked and all(request[0] != "start" for request in guard.asked):
            result = _then(result, self.guard_reads(result.site))
        return result

    def welcomed(self, site: Site, generation: int, held: tuple[tuple[Key, int, int], ...]) -> Spawned:
        """Fleet has answered its Hello."""
        site = site._replace(session=generation, held=held, told_boot=site.boot, link=None, fifo=())
        return self.agent(site, "welcome", generation)

    def cut(self, site: Site) -> Spawned:
        """Its stream ends, and what was on it."""
        return self.agent(site._replace(session=0, fifo=(), link=None), "closed")

    def crash(self, site: Site) -> Spawned:
        """The agent is killed. Its records stay; what it had asked its guard is still in the socket."""
        return Spawned(site._replace(life=DOWN, joined=False, session=0, fifo=(), link=None, news=()))

    def restart(self, site: Site, boot: int) -> Spawned:
        """Its records are read."""
        return Spawned(site._replace(agent=self.agents.restarted(site.agent, boot), boot=boot, life=UP, joined=False))

    def thaw(self, site: Site) -> Spawned:
        """A stopped agent goes on: it looks at the clock first, which says what its guard's clock says."""
        site = site._replace(life=UP)
        result = Spawned(site)
        generation, _, leased = self.agents.lease(site.agent)
        over = site.guard.life == UP and generation not in self.timers.fresh(site.guard.timers)
        if leased and (over or site.passed >= generation):
            result = self.lapse(site)
        if not result.site.joined:
            result = _then(result, self.agent(result.site, "lost"))
        return result

    def may_lapse(self, site: Site) -> bool:
        """Whether F is a thing that it waits for."""
        _, lapsed, _ = self.agents.lease(site.agent)
        return not lapsed and self.agents.step(site.agent, "late")[0] != site.agent

    def lapse(self, site: Site) -> Spawned:
        """F is over at the agent (F5)."""
        return self.agent(site, "late")

    def hear(self, site: Site) -> Spawned:
        """What its guard told meanwhile."""
        result = Spawned(site._replace(news=()))
        for event in site.news:
            result = _then(result, self.agent(result.site, *event))
        return result

    # -- the guard -----------------------------------------------------------------------------------------------------

    def join(self, site: Site) -> Spawned:
        """The agent connects to its guard, or starts one, and takes the census (G3, F4)."""
        guard = site.guard
        if guard.life == DEAD:
            exits = {key: "LOST" for key in guard.lost if self._once} | dict(guard.exits)
            guard = guard._replace(life=UP, timers=self.timers.first(), lost=(), exits=tuple(sorted(exits.items())))
        unread = guard.asked
        guard = guard._replace(asked=())
        running = tuple((key, self.timers.generation(guard.timers, key)) for key in guard.running)
        result = self.agent(site._replace(guard=guard, joined=True, news=()), "census", running, guard.exits)
        if unread and not self._voiding:
            after = result.site.guard
            late = result.site._replace(guard=after._replace(asked=(*after.asked, *unread)))
            result = Spawned(late, result.spawned, result.reports)
        return result

    def guard_reads(self, site: Site) -> Spawned:
        """All that was asked, in order; what follows is told."""
        guard, asked = site.guard._replace(asked=()), site.guard.asked
        news: list[tuple[Any, ...]] = []
        spawned: list[Key] = []
        for request in asked:
            match request:
                case ("start", key, generation) if key not in guard.running:
                    refused = (self._once and key in guard.known) or self.timers.refusal(guard.timers, generation)
                    guard = guard._replace(known=_with(guard.known, key))
                    if not refused:
                        guard = self._clock(
                            guard._replace(running=_with(guard.running, key)), "add", key, generation, self._kept
                        )
                        spawned.append(key)
                    news.append(("refused" if refused else "started", key))
                case ("stop", keys):
                    for key in keys:
                        guard = guard._replace(known=_with(guard.known, key))
                        if key in guard.running:
                            guard = _ended(self._clock(guard, "remove", key), key, "STOPPED")
                            news.append(("ended", key, "STOPPED"))
                        news.append(("stopped", key))
                case ("adopt", keys, generation):
                    for key in keys:
                        guard = self._clock(guard, "adopt", key, generation)
                case ("forget", keys):
                    guard = guard._replace(exits=tuple(exit_ for exit_ in guard.exits if exit_[0] not in keys))
                case ("renew", generation) if (
                    generation > site.passed
                ):  # else it was sent too long ago to renew anything
                    guard = self._clock(guard, "renew", generation)
        result = self._tell(site._replace(guard=guard), news)
        return Spawned(result.site, (*spawned, *result.spawned), result.reports)

    def _clock(self, guard: Guard, *what: Any) -> Guard:
        return guard._replace(timers=self.timers.do(guard.timers, *what)[0])

    def _tell(self, site: Site, news: list[tuple[Any, ...]]) -> Spawned:
        """Its agent hears at once if it can; a stopped one later; after a crash the census says it."""
        site = site._replace(news=(*site.news, *news) if site.joined else ())
        return self.hear(site) if site.life == UP and site.joined else Spawned(site)

    def work_ends(self, site: Site, key: Key, outcome: str) -> Spawned:
        """The process is over by itself."""
        return self._tell(
            site._replace(guard=_ended(self._clock(site.guard, "remove", key), key, outcome)), [("ended", key, outcome)]
        )

    def guard_may_lapse(self, site: Site) -> tuple[int, ...]:
        """Generations whose F may pass at the guard now: not before it passes at an agent that looks at its clock."""
        if site.guard.life != UP or (not self._killing and site.life != UP):
            return ()
        generation, _, leased = self.agents.lease(site.agent)
        held = generation if site.life == UP and leased else 0
        return tuple(of for of in self.timers.fresh(site.guard.timers) if not held or of < held)

    def guard_lapse(self, site: Site, generation: int) -> Spawned:
        """F has passed since the last heartbeats of these generations (F5): TERM."""
        return Spawned(site._replace(guard=self._clock(site.guard, "fence", generation)))

    def guard_may_kill(self, site: Site) -> bool:
        """Whether something waits for K."""
        looks = site.guard.life == UP and (self._killing or site.life == UP)
        return looks and bool(self.timers.ending(site.guard.timers))

    def guard_kill(self, site: Site) -> Spawned:
        """And K: KILL."""
        timers, orders = self.timers.do(site.guard.timers, "kill")
        guard = site.guard._replace(timers=timers)
        killed = [key for action, key in orders if action == KILLED]
        for key in killed:
            guard = _ended(self._clock(guard, "remove", key), key, "FENCED")
        return self._tell(site._replace(guard=guard), [("ended", key, "FENCED") for key in killed])

    def guard_dies(self, site: Site) -> Spawned:
        """SIGKILL of the guard: its work dies with it (G4)."""
        site = site._replace(guard=_dead(site.guard, self.timers.first()), news=())
        if site.life == UP and site.joined:
            return self.agent(site, "lost")
        return Spawned(site._replace(joined=False))

    def reboot(self, site: Site) -> Spawned:
        """The host boots: no process is left, the disks are."""
        site = self.crash(site._replace(guard=_dead(site.guard, self.timers.first()))).site
        return self.restart(site, site.boot + 1)

    def safe(self, site: Site, generation: int) -> bool:
        """F5, as an assumption about time: when L + G are over since the last heartbeat of `generation`, F has passed at the agent,
        and
        F and K at the guard, if they look at their clocks: whether its work is dead then is what the exploration asks."""
        of, _, leased = self.agents.lease(site.agent)
        if site.life == UP and leased and of <= generation:
            return False
        guard = site.guard
        if guard.life == DEAD:
            return True
        if not self._killing and site.life != UP:
            return True
        fresh = any(number <= generation for number in self.timers.fresh(guard.timers))
        return not fresh and not self.timers.ending(guard.timers)


def _ask(site: Site, *requests: tuple[Any, ...]) -> Site:
    """Requests that wait in the guard's socket; a dead guard has none. A renewal that waits already says no more the second time."""
    guard = site.guard
    fresh = tuple(request for request in requests if request[0] != "renew" or request not in guard.asked)
    return site if guard.life == DEAD else site._replace(guard=guard._replace(asked=(*guard.asked, *fresh)))


def _then(before: Spawned, after: Spawned) -> Spawned:
    return Spawned(after.site, (*before.spawned, *after.spawned), (*before.reports, *after.reports))


def _with(keys: tuple[Key, ...], key: Key) -> tuple[Key, ...]:
    return tuple(sorted({*keys, key}))


def _ended(guard: Guard, key: Key, outcome: str) -> Guard:
    running = tuple(other for other in guard.running if other != key)
    return guard._replace(running=running, exits=tuple(sorted({*guard.exits, (key, outcome)})))


def _dead(guard: Guard, timers: int) -> Guard:
    lost = tuple(sorted({*guard.lost, *guard.running}))
    return guard._replace(life=DEAD, timers=timers, running=(), lost=lost, asked=())


__all__ = ["CLUSTERS", "DEAD", "DOWN", "FROZEN", "UP", "Guard", "Hosts", "Link", "Site", "Spawned"]
