"""A campaign: rounds of harm and healing against one federation, judged after each round by the checkers of `lab.checking`.

Theory. A round is: users want graphs, the nemesis strikes a few times, everything is mended, and then every run must end by its own
success within a stated patience, with nothing left behind. Safety is judged over the whole history after each round, so what is
found is found in the round that broke it. Graphs and strikes of a round are drawn before it, each from a generator of its own.

Whoever cancels a campaign, in whatever phase, gets it back with every process ended and every task of it awaited.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.audit import Verdict
from baton.client import AsyncClient
from baton.clock import SystemClock
from baton.errors import BatonError
from baton.v1 import cluster_pb2, run_pb2
from control_plane.core.events import AttemptsLost
from lab.chaos.effects import Effects
from lab.chaos.ground import Ground
from lab.chaos.nemesis import Nemesis
from lab.chaos.offsets import why_not
from lab.chaos.recorder import Recorder
from lab.chaos.strikes import Deck, Strike
from lab.chaos.users import LIFETIME, Users, graph, marathon
from lab.checking.history import Record, Violation
from lab.checking.judging import LIVENESS, SAFETY, Checker, judge
from lab.layout import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE = 150.0
"""Seconds after healing within which every run of a round must have succeeded: a storm hold of 2 (L + G) = 40 s, a recovery of
20 s, the work itself, and twice that for a host that has much to do."""

SETTLE = 60.0
"""Seconds after the last run of a round within which every cluster is READY and every process gone."""

SKEW = 0.5
"""Seconds by which this host's date may be set during a campaign. More: times of decisions cannot be compared with those of
processes, and the campaign says so instead of accusing anybody."""

REST = 60.0
"""Seconds after the last round within which every stop is confirmed: L + G of the leases, and that again for a busy host."""

LOOK, POLL = 0.2, 1.0
"""Seconds between looks: at processes and clusters; at the whole history."""

AT_WORK = 20.0
"""Seconds to wait for work at a cluster that is to be lost. A marathon's tasks start within three; a busy host needs more. Without
the wait a strike can come before the work, and an idle cluster has nothing that could move."""

OFFSETS = (0, 7_200, 86_400)
"""Seconds that clusters' boot clocks are ahead, in turn."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a campaign is made of."""

    seed: int
    replicas: int = 3
    clusters: int = 3
    members: int = 3
    """Of etcd."""
    rounds: int = 0
    """0: as many as fit in `seconds`, and one at least."""
    seconds: float = 600.0
    brief: bool = False
    """No round loses a cluster for longer than its leases: rounds of some twenty seconds."""
    strikes: tuple[int, int] = (2, 5)
    """Strikes of a round, least and most."""
    cpus: int = 4


@dataclass(slots=True)
class Result:
    """What came of it."""

    rounds: int = 0
    """Without a violation."""
    hits: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    """Kind of fact -> how many the checkers compared."""
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    moved: int = 0
    """Attempts that were lost, and placed again."""
    violations: list[Violation] = field(default_factory=list)
    clocks: str = ""
    """Why clusters had no clocks of their own; empty if they had."""


class Campaign:
    """See the module. `tell` is given lines for a person."""

    def __init__(self, plan: Plan, directory: Path, tell: Callable[[str], None]) -> None:
        """Raises EtcdNotFound."""
        self._plan, self._tell = plan, tell
        self._clock = SystemClock()
        self.result = Result(clocks=why_not())
        names = tuple(f"c{number}" for number in range(1, plan.clusters + 1))
        offsets = {name: 0 if self.result.clocks else OFFSETS[place % len(OFFSETS)] for place, name in enumerate(names)}
        self._ground = Ground(
            directory / "fed", Settings(plan.replicas, names, "fast", plan.cpus), plan.members, offsets
        )
        self._zero = self._clock.boot()
        self._effects = Effects(directory / "effects", offsets, self._zero)
        self._healed = 0.0

    @property
    def etcd_version(self) -> str:
        """Of the store that is used."""
        return self._ground.binary.version

    def _now(self) -> float:
        return self._clock.boot() - self._zero

    async def run(self) -> Result:
        """All rounds. Raises PartFailed if a part cannot be started; violations are in the result."""
        async with self._living() as (recorder, users, nemesis):
            deck = Deck(self._plan.seed, nemesis.targets)
            end = self._clock.boot() + self._plan.seconds
            while self._goes_on(end):
                await self._round(recorder, users, nemesis, deck)
                if self.result.violations:
                    break
            else:
                self.result.violations += await self._rest(recorder, users)
        return self.result

    def _goes_on(self, end: float) -> bool:
        rounds = self._plan.rounds
        return self.result.rounds < rounds if rounds else not self.result.rounds or self._clock.boot() < end

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[tuple[Recorder, Users, Nemesis]]:
        ground = self._ground
        await ground.start()
        recorder = Recorder(ground.store.endpoints, self._zero)
        recording = asyncio.create_task(recorder.run())
        whole = False
        try:
            yield recorder, Users(ground.endpoints, self._zero), Nemesis(ground)
            if recording.done():
                recording.result()
            whole = True
        finally:
            await _ended([recording])
            await recorder.close()
            if not whole:
                await ground.kill_everything()  # an orderly end waits for what may be frozen or cut off
            await ground.stop()

    # -- one round -------------------------------------------------------------------------------------------------------

    async def _round(self, recorder: Recorder, users: Users, nemesis: Nemesis, deck: Deck) -> None:
        number, begin = self.result.rounds + 1, self._now()
        long = number % 2 == 1 and not self._plan.brief
        strikes = deck.deal(number, *self._plan.strikes, long=long)
        work = self._want(users, number, long=long)
        try:
            hits = await self._harm(nemesis, strikes, long=long)
            self._healed = self._now()
            await asyncio.wait(work.values(), timeout=PATIENCE)
            found = [
                Violation("I15 progress", self._now(), f"run {run} is not final {PATIENCE:.0f} s after healing")
                for run, task in work.items()
                if not task.done()
            ]
        finally:
            crashed = await _ended(work.values())
        found += [Violation("a client failed", self._now(), repr(each)) for each in crashed]
        left = await self._settle()
        found += [Violation("I15 convergence", self._now(), text) for text in left]
        found += await self._ends(users, list(work))
        found += await self._judge(recorder, users, SAFETY)
        self.result.rounds += not found
        self.result.hits = nemesis.hits
        self.result.violations += found
        told = ", ".join(map(str, hits)) or "nothing was hit"
        self._tell(
            f"round {number}: {told}: {len(work)} runs in {self._now() - begin:.0f} s, {self.result.moved} attempts moved so "
            f"far, {len(found)} violations"
        )

    def _want(self, users: Users, number: int, *, long: bool) -> dict[str, asyncio.Task[None]]:
        """Run id -> who fulfils it. A long round has work that outlives a recovery."""
        rng = random.Random(f"chaos/{self._plan.seed}/{number}/graphs")  # noqa: S311 - it has to come again
        where = self._effects.directory
        specs = {f"run-{number}-{each}": graph(rng, where, longest=8.0 if long else 3.0) for each in range(3)}
        width = max(2, self._plan.clusters)
        specs[f"marathon-{number}"] = marathon(where, 14.0 if long else 4.0, width)
        return {run: asyncio.create_task(users.fulfil(run, spec)) for run, spec in specs.items()}

    async def _harm(self, nemesis: Nemesis, strikes: list[Strike], *, long: bool) -> list[Strike]:
        """Strike, over a few seconds; returns when all is mended, with what hit."""
        mending: list[asyncio.Task[bool]] = []
        try:
            for place, strike in enumerate(strikes):
                await asyncio.sleep(strike.after)
                if long and place == 0:
                    await self._at_work(strike.target)
                mending.append(asyncio.create_task(nemesis.strike(strike)))
            await asyncio.wait(mending)
        finally:
            failed = await _ended(mending)
        if failed:
            raise failed[0]
        return [strike for strike, mended in zip(strikes, mending, strict=True) if mended.result()]

    async def _at_work(self, cluster: str) -> None:
        """Wait until the cluster has work, or long enough."""
        end = self._clock.boot() + AT_WORK
        while self._clock.boot() < end:
            living = await asyncio.to_thread(self._effects.living)
            if any(each.startswith(f"{cluster}: ") for each in living):
                return
            await asyncio.sleep(LOOK)

    async def _settle(self) -> list[str]:
        """Wait until nothing is left of the round; what is."""
        end, left = self._clock.boot() + SETTLE, ["?"]
        while left and self._clock.boot() < end:
            left = [*self._ground.failed(), *await self._unready(), *await asyncio.to_thread(self._effects.living)]
            await asyncio.sleep(LOOK)
        return left

    async def _unready(self) -> list[str]:
        try:
            async with AsyncClient(self._ground.endpoints, timeout=5.0) as client:
                clusters = [each async for each in client.list_clusters()]
        except BatonError as error:
            return [f"the clusters are not told: {error}"]
        ready = {each.name for each in clusters if each.health == cluster_pb2.CLUSTER_HEALTH_READY}
        return [f"clusters/{name} is not READY" for name in self._ground.clusters if f"clusters/{name}" not in ready]

    async def _ends(self, users: Users, runs: list[str]) -> list[Violation]:
        """Every run has succeeded, and the product's own audit finds nothing wrong with it (issue 5, point 5)."""
        found: list[Violation] = []
        for run in runs:
            state = users.ended.get(run)
            if state is None:
                continue
            if state != run_pb2.RUN_STATE_SUCCEEDED:
                text = f"run {run} ended in state {state} though its deadline was {LIFETIME:.0f} s away"
                found.append(Violation("I15 progress", self._now(), text))
            try:
                verdict, broken = await users.audit(run)
            except BatonError as error:
                found.append(Violation("I15 progress", self._now(), f"run {run} cannot be audited: {error}"))
                continue
            self.result.verdicts[verdict] += 1
            found += [Violation("baton audit", self._now(), f"{run}: {text}") for text in broken]
        return found

    async def _rest(self, recorder: Recorder, users: Users) -> list[Violation]:
        """At the very end: every stop is confirmed and every reservation released, within REST."""
        end = self._clock.boot() + REST
        while True:
            found = await self._judge(recorder, users, LIVENESS)
            if not found or self._clock.boot() > end:
                return found
            await asyncio.sleep(POLL)

    async def _judge(self, recorder: Recorder, users: Users, checkers: tuple[Checker, ...]) -> list[Violation]:
        """The whole history so far."""
        if not await recorder.caught_up(PATIENCE):
            return [Violation("the recorder is behind", self._now(), "it cannot read etcd: nothing can be judged")]
        if recorder.skew() > SKEW:
            return [
                Violation("the date was set", self._now(), f"by {recorder.skew():.1f} s: this host cannot be judged")
            ]
        journal = recorder.journal()
        ran = self._effects.ran(journal)
        record = Record(
            journal=journal,
            ran=ran,
            said=users.said,
            deadlines=users.deadlines,
            healed=self._healed,
            ended=self._now(),
            died=(),
            watched=users.watched,
            owners=recorder.owners(),
            capacity=dict.fromkeys(self._ground.clusters, self._plan.cpus),
        )
        self.result.checked = Counter(
            {
                "journal events": len(journal),
                "processes": len(ran),
                "answers": len(users.said),
                "watch events": len(users.watched),
            }
        )
        self.result.moved = sum(len(each.event.tasks) for each in journal if isinstance(each.event, AttemptsLost))
        return judge(record, checkers)


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> list[BaseException]:
    """Cancel what still runs of them and wait for all; how they failed otherwise."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    return [each for each in failed if not isinstance(each, asyncio.CancelledError)]
