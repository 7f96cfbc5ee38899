"""The nemesis of real processes: how it strikes, and how it mends (what it strikes is drawn in `lab.chaos.strikes`).

Theory. Signals go to processes by their number, known from who started them. A part that is still being mended when its next turn
comes is waited for: the order of strikes is drawn, their moments are not.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from lab.chaos.ground import Ground
from lab.chaos.network import set_all
from lab.chaos.strikes import Strike, Targets
from lab.parts import Part, PartFailed
from lab.processes import Identity
from lab.proxy import Mode, Proxy

SLOW = (0.05, 0.2, 0.6)
"""Seconds that a slow line takes, one way."""


class _Missed(Exception):
    """There was nothing to strike: e.g. a guard that is just being replaced. It is not counted."""


Mend = Callable[[], Awaitable[None]]


class Nemesis:
    """See the module."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.targets = Targets(tuple(ground.clusters), tuple(ground.replicas), tuple(ground.store.members))
        self.hits: Counter[str] = Counter()
        self._struck: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._acts: dict[str, Callable[[Strike], Awaitable[Mend]]] = {
            "agent killed": self._kill_agent,
            "agent frozen": self._freeze_agent,
            "guard killed": self._kill_guard,
            "guard frozen": self._freeze_guard,
            "host frozen": self._freeze_host,
            "power cut": self._cut_power,
            "partition of a cluster": self._part_cluster,
            "one-way cut of a cluster": self._one_way,
            "slow link of a cluster": self._slow_cluster,
            "half-open links of a cluster": self._strand_cluster,
            "replica killed": self._kill_replica,
            "replica frozen": self._freeze_replica,
            "partition of a replica": self._part_replica,
            "replica cut off from etcd": self._part_store,
            "slow link to etcd": self._slow_store,
            "half-open links to etcd": self._strand_store,
            "etcd member killed": self._kill_member,
            "etcd member frozen": self._freeze_member,
            "etcd without quorum": self._lose_quorum,
        }

    @property
    def kinds(self) -> list[str]:
        """All kinds of strikes that it knows."""
        return list(self._acts)

    async def strike(self, strike: Strike) -> bool:
        """Strike, wait, mend; whether it hit. Raises PartFailed if a part cannot be brought back. Cancelled, it mends nothing: only
        who ends the federation cancels, and mending would bring back what is being ended."""
        async with self._struck[self.targets.group(strike.target)]:
            try:
                mend = await self._acts[strike.kind](strike)
            except _Missed:
                return False
            self.hits[strike.kind] += 1
            await asyncio.sleep(strike.seconds)
            await mend()
            return True

    # -- clusters --------------------------------------------------------------------------------------------------------

    async def _kill_agent(self, strike: Strike) -> Mend:
        cluster = self._ground.clusters[strike.target]
        await cluster.kill(agent_only=True)
        return cluster.start

    async def _freeze_agent(self, strike: Strike) -> Mend:
        cluster = self._ground.clusters[strike.target]
        await cluster.freeze()
        return cluster.thaw

    async def _kill_guard(self, strike: Strike) -> Mend:
        """Its agent starts another one."""
        os.kill(self._guard(strike.target).pid, signal.SIGKILL)
        return _nothing

    def _guard(self, name: str) -> Identity:
        try:
            return self._ground.clusters[name].guard()
        except PartFailed as error:
            raise _Missed from error

    async def _freeze_guard(self, strike: Strike) -> Mend:
        guard = self._guard(strike.target)
        os.kill(guard.pid, signal.SIGSTOP)

        async def thaw() -> None:
            _continue(guard)

        return thaw

    async def _freeze_host(self, strike: Strike) -> Mend:
        cluster = self._ground.clusters[strike.target]
        await cluster.freeze(everything=True)
        return cluster.thaw

    async def _cut_power(self, strike: Strike) -> Mend:
        cluster = self._ground.clusters[strike.target]
        await cluster.kill()
        return cluster.start

    async def _part_cluster(self, strike: Strike) -> Mend:
        return _ways(self._ground.network.of_cluster(strike.target), Mode.DROP)

    async def _one_way(self, strike: Strike) -> Mend:
        return _ways(
            self._ground.network.of_cluster(strike.target), _chance(strike).choice((Mode.DROP_UP, Mode.DROP_DOWN))
        )

    async def _slow_cluster(self, strike: Strike) -> Mend:
        return _ways(self._ground.network.of_cluster(strike.target), Mode.DELAY, _chance(strike).choice(SLOW))

    async def _strand_cluster(self, strike: Strike) -> Mend:
        return _strand(self._ground.network.of_cluster(strike.target))

    # -- replicas --------------------------------------------------------------------------------------------------------

    async def _kill_replica(self, strike: Strike) -> Mend:
        replica = self._ground.replicas[strike.target]
        await replica.kill()
        return replica.start

    async def _freeze_replica(self, strike: Strike) -> Mend:
        replica = self._ground.replicas[strike.target]
        await replica.freeze()
        return replica.thaw

    async def _part_replica(self, strike: Strike) -> Mend:
        return _ways(self._ground.network.of_replica(strike.target), Mode.DROP)

    async def _part_store(self, strike: Strike) -> Mend:
        return _ways(self._ground.network.to_store(strike.target), Mode.DROP)

    async def _slow_store(self, strike: Strike) -> Mend:
        return _ways(self._ground.network.to_store(strike.target), Mode.DELAY, _chance(strike).choice(SLOW))

    async def _strand_store(self, strike: Strike) -> Mend:
        return _strand(self._ground.network.to_store(strike.target))

    # -- etcd ------------------------------------------------------------------------------------------------------------

    async def _kill_member(self, strike: Strike) -> Mend:
        member = self._ground.store.members[strike.target]
        await member.kill()
        return member.start

    async def _freeze_member(self, strike: Strike) -> Mend:
        member = self._ground.store.members[strike.target]
        await member.freeze()
        return member.thaw

    async def _lose_quorum(self, strike: Strike) -> Mend:
        rng, everyone = _chance(strike), list(self._ground.store.members.values())
        members = rng.sample(everyone, len(everyone) // 2 + 1)
        kill = rng.random() < 0.5
        await _together(members, "kill" if kill else "freeze")

        async def mend() -> None:
            await _together(members, "start" if kill else "thaw")

        return mend


def _chance(strike: Strike) -> random.Random:
    return random.Random(strike.luck)  # noqa: S311 - it has to come again


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
