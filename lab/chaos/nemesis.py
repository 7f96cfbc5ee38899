"""The nemesis of real processes: what it strikes, for how long, and how it mends it.

Theory. One part is struck by one thing at a time: a part that is "frozen and cut off" cannot be mended step by step, and a guard that
is frozen while nobody can see it is beyond what `timed` evidence promises (G2), so it is not struck then. Parts are struck
together freely: that is where the bugs live. Signals go to processes by their number, known from who started them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lab.chaos.ground import Ground
from lab.chaos.network import set_all
from lab.parts import Part, PartFailed
from lab.processes import Identity
from lab.proxy import Mode, Proxy

BRIEF = (1.0, 3.0, 6.0)
"""Seconds: hiccups that leases ride out."""

LONG = (24.0, 28.0, 34.0)
"""Seconds: beyond L + G of the `fast` profile (20 s), so that work starts elsewhere before the part is back."""

SIEGES = (
    "agent frozen",
    "partition of a cluster",
    "power cut",
    "one-way cut of a cluster",
    "agent killed",
    "guard frozen",
)
"""What takes a cluster out of sight for as long as it lasts, and is struck for LONG too."""

GUARD_PAUSE = 1.5
"""Longest freeze of a whole host: below P of the leases (2 s), the stated limit of `timed`, with a half second for this host."""

SLOW = (0.05, 0.2, 0.6)
"""Seconds that a slow line takes, one way."""


class _Missed(Exception):
    """There was nothing to strike: e.g. a guard that is just being replaced. It is not counted."""


Mend = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Strike:
    """One misfortune: what, whom, for how long (seconds)."""

    kind: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind} ({self.target}, {self.seconds:.1f} s)"


class Nemesis:
    """See the module. Everything random comes from `rng`."""

    def __init__(self, ground: Ground, rng: random.Random) -> None:
        self._ground, self._rng = ground, rng
        self.hits: Counter[str] = Counter()
        self._struck: set[str] = set()
        clusters, replicas, members = list(ground.clusters), list(ground.replicas), list(ground.store.members)
        self._kinds: dict[str, tuple[Sequence[str], Callable[[str], Awaitable[Mend]]]] = {
            "agent killed": (clusters, self._kill_agent),
            "agent frozen": (clusters, self._freeze_agent),
            "guard killed": (clusters, self._kill_guard),
            "guard frozen": (clusters, self._freeze_guard),
            "host frozen": (clusters, self._freeze_host),
            "power cut": (clusters, self._cut_power),
            "partition of a cluster": (clusters, self._part_cluster),
            "one-way cut of a cluster": (clusters, self._one_way),
            "slow link of a cluster": (clusters, self._slow_cluster),
            "half-open links of a cluster": (clusters, self._strand_cluster),
            "replica killed": (replicas, self._kill_replica),
            "replica frozen": (replicas, self._freeze_replica),
            "partition of a replica": (replicas, self._part_replica),
            "replica cut off from etcd": (replicas, self._part_store),
            "slow link to etcd": (replicas, self._slow_store),
            "half-open links to etcd": (replicas, self._strand_store),
            "etcd member killed": (members, self._kill_member),
            "etcd member frozen": (members, self._freeze_member),
        }
        if len(members) > 1:
            self._kinds["etcd without quorum"] = (["etcd"], self._lose_quorum)
        self._decks: dict[bool, list[str]] = {True: [], False: []}

    @property
    def kinds(self) -> list[str]:
        """All kinds of strikes."""
        return list(self._kinds)

    def draw(self, *, long: bool) -> Strike | None:
        """The next strike: each kind comes once before any comes again. `long`: one that loses a cluster. None if everything it could
        strike is struck."""
        deck = self._decks[long]
        if not deck:
            kinds = SIEGES if long else tuple(self._kinds)
            deck += self._rng.sample(kinds, len(kinds))
        kind = deck.pop()
        free = [name for name in self._kinds[kind][0] if self._free(name)]
        if not free:
            return None
        target = self._rng.choice(free)
        seconds = self._rng.choice(LONG if long else BRIEF)
        if kind == "host frozen":
            seconds = min(seconds, GUARD_PAUSE)
        return Strike(kind, target, seconds)

    def _free(self, name: str) -> bool:
        """Whether it may be struck. One etcd member at a time: more is a kind of its own."""
        stores = {"etcd", *self._ground.store.members}
        return name not in self._struck and not (name in stores and stores & self._struck)

    async def strike(self, strike: Strike) -> bool:
        """Strike, wait, mend; whether it hit. Cancelled, it mends at once. Raises PartFailed if a part cannot be brought back."""
        self._struck.add(strike.target)
        try:
            mend = await self._kinds[strike.kind][1](strike.target)
            self.hits[strike.kind] += 1
            try:
                await asyncio.sleep(strike.seconds)
            finally:
                await asyncio.shield(mend())
        except _Missed:
            return False
        else:
            return True
        finally:
            self._struck.discard(strike.target)

    # -- clusters --------------------------------------------------------------------------------------------------------

    async def _kill_agent(self, name: str) -> Mend:
        cluster = self._ground.clusters[name]
        await cluster.kill(agent_only=True)
        return cluster.start

    async def _freeze_agent(self, name: str) -> Mend:
        cluster = self._ground.clusters[name]
        await cluster.freeze()
        return cluster.thaw

    async def _kill_guard(self, name: str) -> Mend:
        """Its agent starts another one."""
        os.kill(self._guard(name).pid, signal.SIGKILL)
        return _nothing

    def _guard(self, name: str) -> Identity:
        try:
            return self._ground.clusters[name].guard()
        except PartFailed as error:
            raise _Missed from error

    async def _freeze_guard(self, name: str) -> Mend:
        guard = self._guard(name)
        os.kill(guard.pid, signal.SIGSTOP)

        async def thaw() -> None:
            _continue(guard)

        return thaw

    async def _freeze_host(self, name: str) -> Mend:
        cluster = self._ground.clusters[name]
        await cluster.freeze(everything=True)
        return cluster.thaw

    async def _cut_power(self, name: str) -> Mend:
        cluster = self._ground.clusters[name]
        await cluster.kill()
        return cluster.start

    async def _part_cluster(self, name: str) -> Mend:
        return _ways(self._ground.network.of_cluster(name), Mode.DROP)

    async def _one_way(self, name: str) -> Mend:
        return _ways(self._ground.network.of_cluster(name), self._rng.choice((Mode.DROP_UP, Mode.DROP_DOWN)))

    async def _slow_cluster(self, name: str) -> Mend:
        return _ways(self._ground.network.of_cluster(name), Mode.DELAY, self._rng.choice(SLOW))

    async def _strand_cluster(self, name: str) -> Mend:
        return _strand(self._ground.network.of_cluster(name))

    # -- replicas --------------------------------------------------------------------------------------------------------

    async def _kill_replica(self, name: str) -> Mend:
        replica = self._ground.replicas[name]
        await replica.kill()
        return replica.start

    async def _freeze_replica(self, name: str) -> Mend:
        replica = self._ground.replicas[name]
        await replica.freeze()
        return replica.thaw

    async def _part_replica(self, name: str) -> Mend:
        return _ways(self._ground.network.of_replica(name), Mode.DROP)

    async def _part_store(self, name: str) -> Mend:
        return _ways(self._ground.network.to_store(name), Mode.DROP)

    async def _slow_store(self, name: str) -> Mend:
        return _ways(self._ground.network.to_store(name), Mode.DELAY, self._rng.choice(SLOW))

    async def _strand_store(self, name: str) -> Mend:
        return _strand(self._ground.network.to_store(name))

    # -- etcd ------------------------------------------------------------------------------------------------------------

    async def _kill_member(self, name: str) -> Mend:
        member = self._ground.store.members[name]
        await member.kill()
        return member.start

    async def _freeze_member(self, name: str) -> Mend:
        member = self._ground.store.members[name]
        await member.freeze()
        return member.thaw

    async def _lose_quorum(self, name: str) -> Mend:
        del name
        members = self._rng.sample(list(self._ground.store.members.values()), len(self._ground.store.members) // 2 + 1)
        kill = self._rng.random() < 0.5
        await _together(members, "kill" if kill else "freeze")

        async def mend() -> None:
            await _together(members, "start" if kill else "thaw")

        return mend


async def _nothing() -> None:
    """It mends itself."""


def _continue(identity: Identity) -> None:
    if identity.alive:
        with suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGCONT)


async def _together(parts: Sequence[Part], verb: str) -> None:
    await asyncio.gather(*(getattr(part, verb)() for part in parts))


def _ways(ways: Sequence[Proxy], mode: Mode, delay_seconds: float = 0.0) -> Mend:
    """Set them now; mending lets everything pass."""
    set_all(ways, mode, delay_seconds)

    async def heal() -> None:
        set_all(ways, Mode.PASS)

    return heal


def _strand(ways: Sequence[Proxy]) -> Mend:
    for proxy in ways:
        proxy.strand()
    return _nothing
