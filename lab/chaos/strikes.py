"""What a round does to a federation, drawn before any of it is done: a pure function of the campaign's seed and the round's number.

Theory. A campaign is worth its seed only if the seed says what happens. So all strikes of a round are drawn at once, and nothing
that a machine's speed decides has a say: whether a part is free is judged by the drawn times, not by what is struck when its turn
comes. When a strike begins, and so what it meets, remains the machine's.

One part is struck by one thing at a time: a part that is "frozen and cut off" cannot be mended step by step, and a guard that is
frozen while nobody can see it is beyond what `timed` evidence promises (G2). Parts are struck together freely: that is where the
bugs live.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

BRIEF = (1.0, 3.0, 6.0)
"""Seconds: hiccups that leases ride out."""

LONG = (24.0, 28.0, 34.0)
"""Seconds: beyond L + G of the `fast` profile (20 s), so that work starts elsewhere before the part is back."""

GUARD_PAUSE = 1.5
"""Longest freeze of a whole host: below P of the leases (2 s), the stated limit of `timed`, with a half second for this host."""

MENDING = 2.0
"""Seconds that a part is left alone after its strike was to end: starting it again takes one or two. With less, the next strike would
wait for the mending; with much more, parts would hardly ever be struck twice in a round."""

FIRST, NEXT = (1.0, 2.5), (0.3, 2.5)
"""Seconds before the first strike of a round, so that graphs have begun; and between two."""

ETCD = "etcd"
"""Whom a loss of quorum strikes: all members as one."""

KINDS = {
    "agent killed": "cluster",
    "agent frozen": "cluster",
    "guard killed": "cluster",
    "guard frozen": "cluster",
    "host frozen": "cluster",
    "power cut": "cluster",
    "partition of a cluster": "cluster",
    "one-way cut of a cluster": "cluster",
    "slow link of a cluster": "cluster",
    "half-open links of a cluster": "cluster",
    "replica killed": "replica",
    "replica frozen": "replica",
    "partition of a replica": "replica",
    "replica cut off from etcd": "replica",
    "slow link to etcd": "replica",
    "half-open links to etcd": "replica",
    "etcd member killed": "member",
    "etcd member frozen": "member",
    "etcd without quorum": "quorum",
}
"""Kind of strike -> whom it strikes."""

SIEGES = (
    "agent frozen",
    "partition of a cluster",
    "power cut",
    "one-way cut of a cluster",
    "agent killed",
    "guard frozen",
)
"""What takes a cluster out of sight for as long as it lasts, and is struck for LONG too."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One misfortune: what, whom, for how long (seconds)."""

    kind: str
    target: str
    seconds: float
    after: float = 0.0
    """Seconds after the strike before it, or after the beginning of the round."""
    luck: int = 0
    """Seeds what else chance decides in it: a direction, a delay, which members."""

    def __str__(self) -> str:
        return f"{self.kind} ({self.target}, {self.seconds:.1f} s)"


@dataclass(frozen=True, slots=True)
class Targets:
    """The names of all parts."""

    clusters: Sequence[str]
    replicas: Sequence[str]
    members: Sequence[str]

    def of(self, kind: str) -> Sequence[str]:
        """Whom this kind may strike; nobody: it has no meaning here."""
        match KINDS[kind]:
            case "cluster":
                return self.clusters
            case "replica":
                return self.replicas
            case "member":
                return self.members
        return (ETCD,) if len(self.members) > 1 else ()

    def group(self, name: str) -> str:
        """What is struck by one thing at a time: a part, or all of etcd. (More than one member is a kind of its own.)"""
        return ETCD if name in self.members else name


class Deck:
    """The strikes of a campaign, round by round. Two decks of one seed and the same targets deal alike."""

    def __init__(self, seed: int, targets: Targets) -> None:
        self._seed, self._targets = seed, targets
        self.kinds = tuple(kind for kind in KINDS if targets.of(kind))
        self._left: dict[bool, list[str]] = {True: [], False: []}

    def deal(self, number: int, least: int, most: int, *, long: bool) -> list[Strike]:
        """The strikes of the round of that number, `least` to `most` if so many find a free part. `long`: the first one loses a
        cluster for longer than its leases. Call it for every round, in order: each kind comes once before any comes again."""
        rng = random.Random(f"chaos/{self._seed}/{number}/strikes")  # noqa: S311 - it has to come again
        strikes: list[Strike] = []
        busy: dict[str, float] = {}
        now = 0.0
        for place in range(rng.randint(least, most)):
            after = rng.uniform(*(NEXT if place else FIRST))
            now += after
            taken = {group for group, until in busy.items() if until > now}
            strike = self._draw(rng, taken, after, long=long and place == 0)
            if strike is not None:
                strikes.append(strike)
                busy[self._targets.group(strike.target)] = now + strike.seconds + MENDING
        return strikes

    def _draw(self, rng: random.Random, busy: set[str], after: float, *, long: bool) -> Strike | None:
        """The next kind that finds a part which is not busy; None if none does."""
        kinds = self._left[long]
        if not kinds:
            wanted = SIEGES if long else self.kinds
            kinds += rng.sample(wanted, len(wanted))
        for kind in kinds:
            free = [name for name in self._targets.of(kind) if self._targets.group(name) not in busy]
            if free:
                kinds.remove(kind)
                seconds = rng.choice(LONG if long else BRIEF)
                if kind == "host frozen":
                    seconds = min(seconds, GUARD_PAUSE)
                return Strike(kind, rng.choice(free), seconds, after, rng.getrandbits(32))
        return None
