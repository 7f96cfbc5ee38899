"""`scripts/sim`: many seeds with a table at the end, or one seed with its story."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from control_plane.core.events import AttemptsFinished, AttemptsLost
from control_plane.core.model import AttemptState
from lab.apart import INTERRUPTED, Died, each
from lab.checking.history import Violation
from lab.checking.judging import judge
from lab.exhaustive import hunt
from lab.simulation import sabotage
from lab.simulation.faults import KINDS
from lab.simulation.record import tally
from lab.simulation.removal import swapped
from lab.simulation.story import tell
from lab.simulation.world import LIVELY, Outcome, Shape, simulate

AT_ONCE = 8
"""Seeds that one child tries: some 50 MB of dead worlds. More: memory; fewer: forks, and the pages that each copies."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is kept of one seed."""

    seed: int
    violations: tuple[Violation, ...]
    hits: Counter[str]
    strikes: int
    virtual: float
    accepted: int
    lost: int
    processes: int
    seconds: float
    digest: str


def try_seed(seed: int, shape: Shape) -> Verdict:
    """Simulate and judge one seed. A simulation that cannot go on is a violation too."""
    logging.disable(logging.CRITICAL)
    begin = time.perf_counter()
    try:
        outcome = simulate(seed, shape)
    except Exception as error:  # noqa: BLE001 - whatever stops a simulation is a finding, and the other seeds go on
        broken = Violation("the simulation stopped", 0.0, repr(error))
        return Verdict(seed, (broken,), Counter(), 0, 0.0, 0, 0, 0, time.perf_counter() - begin, "")
    return verdict_of(outcome, time.perf_counter() - begin)


def verdict_of(outcome: Outcome, seconds: float) -> Verdict:
    """Judge a finished simulation."""
    record = outcome.record
    accepted = sum(
        written.event.states.count(AttemptState.SUCCEEDED)
        for written in record.journal
        if isinstance(written.event, AttemptsFinished)
    )
    return Verdict(
        seed=outcome.seed,
        violations=tuple(judge(record)),
        hits=outcome.hits,
        strikes=sum(count for kind, count in outcome.hits.items() if kind in KINDS),
        virtual=record.ended,
        accepted=accepted,
        lost=tally(record.journal)[AttemptsLost.__name__],
        processes=len(record.ran),
        seconds=seconds,
        digest=record.digest,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if every promise was kept, 1 if not, 2 for a wrong flag, 130 after ctrl-C."""
    options = _parse(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("sim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Died as died:
        print(f"sim: {died}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.exhaustive:
        return _exhaustive(options)
    if options.sabotage:
        return _sabotage(options)
    faults = tuple(options.faults.split(",")) if options.faults else KINDS
    shape = replace(LIVELY if options.liveness else Shape(), faults=faults)
    unknown = set(shape.faults) - set(KINDS)
    if unknown:
        print(f"sim: no fault class {sorted(unknown)}; there are: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    if options.seed is not None:
        return _one(options.seed, shape, whole=options.all)
    begin, base = time.perf_counter(), options.seed_base or 0
    verdicts: list[Verdict] = []
    for verdict in _many(range(base, base + options.seeds), shape, options.jobs):
        verdicts.append(verdict)
        if verdict.violations:
            worst = verdict.violations[0]
            print(f"seed {verdict.seed}: {worst.invariant} at {worst.at:.1f} s: {worst.text}")
            chosen = f" --faults {shlex.quote(options.faults)}" if options.faults else ""
            chosen += " --liveness" * options.liveness
            print(f"    reproduce: scripts/sim --seed {verdict.seed}{chosen}", flush=True)
    return _sum_up(verdicts, time.perf_counter() - begin)


def _exhaustive(options: argparse.Namespace) -> int:
    """Every interleaving of small worlds, instead of seeds."""
    if options.remove:
        return hunt.run_removals(options.remove, options.minutes, options.jobs)
    return hunt.run(options.slice, options.minutes, options.jobs)


def _sabotage(options: argparse.Namespace) -> int:
    """The checks are checked."""
    if options.sabotage == "list":
        print(*sabotage.listing(), sep="\n")
        return 0
    names = sabotage.chosen(options.sabotage)
    if names is None:
        print(f"sim: unknown removal; there are: {', '.join(sabotage.REMOVALS)}", file=sys.stderr)
        return 2
    if options.seed is None:
        return sabotage.hunt_all(names, options.seed_base, options.jobs)
    removal = sabotage.REMOVALS[names[0]]
    with swapped((*removal.setting, *removal.swaps)):
        return _one(options.seed, removal.shape, whole=options.all)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sim", description="Deterministic simulation of a whole federation.")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds (default 20)")
    parser.add_argument(
        "--seed-base", type=int, help="the first seed (default 0; with --sabotage: each one's known seed)"
    )
    parser.add_argument("--seed", type=int, help="replay one seed and tell its story")
    parser.add_argument("--all", action="store_true", help="with --seed: the whole story, not only its important part")
    parser.add_argument(
        "--liveness", action="store_true", help="demand progress after healing: no deadline ends what is stuck"
    )
    parser.add_argument(
        "--sabotage",
        default="",
        metavar="NAMES",
        help="remove safety mechanisms, one at a time, until each is caught: `all`, names, or `list`; with --seed: its story",
    )
    parser.add_argument(
        "--exhaustive", action="store_true", help="every interleaving of small worlds (docs/exhaustive.md)"
    )
    parser.add_argument(
        "--slice", choices=("a", "b", "ab"), default="ab", help="with --exhaustive: journal (a), sessions (b)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="with --exhaustive: its time (default 9)")
    parser.add_argument(
        "--remove",
        default="",
        metavar="NAMES",
        help="with --exhaustive: show what happens without these rules; `all`, or names",
    )
    parser.add_argument("--faults", default="", help="only these classes of faults, separated by commas")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"processes (default: one per core, here {cores})")
    return parser.parse_args(arguments)


def _many(seeds: range, shape: Shape, jobs: int) -> Iterator[Verdict]:
    """As they end."""
    jobs = max(1, min(jobs, len(seeds)))
    # A few at a time, and at the end no process waits long for another.
    step = max(1, min(AT_ONCE, len(seeds) // (4 * jobs)))
    parts = (seeds[start : start + step] for start in range(0, len(seeds), step))
    for _, verdicts in each((partial(_try_all, part, shape) for part in parts), jobs):
        yield from verdicts


def _try_all(seeds: range, shape: Shape) -> list[Verdict]:
    return [try_seed(seed, shape) for seed in seeds]


def _one(seed: int, shape: Shape, *, whole: bool) -> int:
    logging.disable(logging.CRITICAL)
    begin = time.perf_counter()
    outcome = simulate(seed, shape)
    verdict = verdict_of(outcome, time.perf_counter() - begin)
    for line in tell(outcome.record, verdict.violations, outcome.revisions if whole else ()):
        print(line)
    print(f"trace {verdict.digest}")
    print(_closing([verdict], verdict.seconds))
    return 1 if verdict.violations else 0


def _sum_up(verdicts: Sequence[Verdict], seconds: float) -> int:
    hits: Counter[str] = Counter()
    for verdict in verdicts:
        hits += verdict.hits
    print("fault                                         count")
    for kind in [*KINDS, *sorted(set(hits) - set(KINDS))]:
        print(f"{kind:<44} {hits[kind]:>6}")
    count = max(1, len(verdicts))
    print(
        f"per seed: {sum(v.virtual for v in verdicts) / count:.0f} virtual seconds, "
        f"{sum(v.accepted for v in verdicts) / count:.1f} accepted tasks, "
        f"{sum(v.strikes for v in verdicts) / count:.1f} faults, {sum(v.lost for v in verdicts) / count:.1f} failovers, "
        f"{sum(v.processes for v in verdicts) / count:.1f} processes"
    )
    print(_closing(verdicts, seconds))
    return 1 if any(verdict.violations for verdict in verdicts) else 0


def _closing(verdicts: Sequence[Verdict], seconds: float) -> str:
    bad = [str(seed) for seed in sorted(verdict.seed for verdict in verdicts if verdict.violations)]
    broken = f"violations in {len(bad)} ({', '.join(bad[:20])})" if bad else "0 violations"
    return f"sim: {len(verdicts)} seeds in {seconds:.1f} s ({len(verdicts) / max(seconds, 1e-9):.2f} seeds/s), {broken}"
