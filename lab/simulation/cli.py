"""`scripts/sim`: many seeds with a table at the end, or one seed with its story."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
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
from lab.simulation.kinds import DERIVED, KINDS
from lab.simulation.options import Options, parse
from lab.simulation.record import tally
from lab.simulation.removal import swapped
from lab.simulation.story import tell
from lab.simulation.world import LIVELY, Outcome, Shape, simulate

AT_ONCE = 8
"""Seeds that one child tries: some 50 MB of dead worlds. More: memory; fewer: forks, and the pages that each copies."""

MANY = 100
"""Seeds from which on a row of the table at 0 is worth a word: the rarest are seen about once in forty."""

ENOUGH = 500
"""Seeds from which on a class of faults that never struck is a failure: each strikes in one seed of ten or more often."""

WIDTH = 44
"""Of the table's first column."""


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
        return _stopped(seed, error, time.perf_counter() - begin)
    return verdict_of(outcome, time.perf_counter() - begin)


def _stopped(seed: int, error: Exception, seconds: float) -> Verdict:
    broken = Violation("the simulation stopped", 0.0, repr(error))
    return Verdict(seed, (broken,), Counter(), 0, 0.0, 0, 0, 0, seconds, "")


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
    """The exit code: 0 if every promise was kept, 1 if not (or a class of faults never struck in many seeds), 2 for a wrong flag, 130
    after ctrl-C. Whoever closes standard output has enough: that is a 0."""
    options = parse(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("sim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Died as died:
        print(f"sim: {died}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # What standard output still holds must not be a second failure at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(options: Options) -> int:
    if options.exhaustive:
        return _exhaustive(options)
    if options.sabotage:
        return _sabotage(options)
    shape = replace(LIVELY if options.liveness else Shape(), faults=options.faults or KINDS)
    if options.seed is not None:
        return _one(options.seed, shape, whole=options.all)
    begin, base = time.perf_counter(), options.seed_base or 0
    verdicts: list[Verdict] = []
    for verdict in _many(range(base, base + options.seeds), shape, options.jobs):
        verdicts.append(verdict)
        if verdict.violations:
            print(_first(verdict))
            chosen = f" --faults {shlex.quote(','.join(options.faults))}" if options.faults else ""
            chosen += " --liveness" * options.liveness
            print(f"    reproduce: scripts/sim --seed {verdict.seed}{chosen}", flush=True)
    return _sum_up(verdicts, shape, time.perf_counter() - begin)


def _exhaustive(options: Options) -> int:
    """Every interleaving of small worlds, instead of seeds."""
    if options.remove:
        return hunt.run_removals(options.remove, options.minutes, options.jobs)
    return hunt.run(options.slice, options.minutes, options.jobs)


def _sabotage(options: Options) -> int:
    """The checks are checked."""
    if options.sabotage == "list":
        print(*sabotage.listing(), sep="\n")
        return 0
    names = sabotage.chosen(options.sabotage)
    if options.seed is None:
        return sabotage.hunt_all(names, options.seed_base, options.jobs)
    removal = sabotage.REMOVALS[names[0]]
    with swapped((*removal.setting, *removal.swaps)):
        return _one(options.seed, removal.shape, whole=options.all)


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
    """One seed with its story. If the simulation stops there is none: it is told as in a batch, and where it stopped with `whole`."""
    logging.disable(logging.CRITICAL)
    begin = time.perf_counter()
    try:
        outcome = simulate(seed, shape)
    except Exception as error:  # noqa: BLE001 - as in `try_seed`
        verdict = _stopped(seed, error, time.perf_counter() - begin)
        if whole:
            traceback.print_exc(file=sys.stdout)
        print(_first(verdict))
    else:
        verdict = verdict_of(outcome, time.perf_counter() - begin)
        for line in tell(outcome.record, verdict.violations, outcome.revisions if whole else (), whole=whole):
            print(line)
        print(f"trace {verdict.digest}")
    print(_closing([verdict], verdict.seconds))
    return 1 if verdict.violations else 0


def _first(verdict: Verdict) -> str:
    worst = verdict.violations[0]
    return f"seed {verdict.seed}: {worst.invariant} at {worst.at:.1f} s: {worst.text}"


def _sum_up(verdicts: Sequence[Verdict], shape: Shape, seconds: float) -> int:
    hits: Counter[str] = Counter()
    for verdict in verdicts:
        hits += verdict.hits
    print(f"{'fault':<{WIDTH}} {'count':>6}")
    for kind in KINDS:
        print(f"{kind:<{WIDTH}} {hits[kind]:>6}")
    print("what came of them")
    for row in DERIVED:
        print(f"{row:<{WIDTH}} {hits[row]:>6}")
    count = len(verdicts)
    print(
        f"per seed: {sum(v.virtual for v in verdicts) / count:.0f} virtual seconds, "
        f"{sum(v.accepted for v in verdicts) / count:.1f} accepted tasks, "
        f"{sum(v.strikes for v in verdicts) / count:.1f} faults, {sum(v.lost for v in verdicts) / count:.1f} failovers, "
        f"{sum(v.processes for v in verdicts) / count:.1f} processes"
    )
    # With some classes only, what may come of them is anybody's guess; what was to strike is not.
    silent = [kind for kind in shape.faults if not hits[kind]]
    derived = [row for row in DERIVED if not hits[row]] if set(shape.faults) == set(KINDS) else []
    unused = bool(silent) and count >= ENOUGH
    if unused:
        print(f"sim: never struck in {count} seeds: {', '.join(silent)}")
    rows = f", rows at 0: {', '.join([*silent, *derived]) or 'none'}" if count >= MANY else ""
    print(_closing(verdicts, seconds) + rows)
    return 1 if unused or any(verdict.violations for verdict in verdicts) else 0


def _closing(verdicts: Sequence[Verdict], seconds: float) -> str:
    count = len(verdicts)
    noun = "seed" if count == 1 else "seeds"
    bad = sorted((verdict for verdict in verdicts if verdict.violations), key=lambda verdict: verdict.seed)
    seeds = ", ".join(f"{verdict.seed}: {_invariants(verdict)}" for verdict in bad[:20])
    seeds += f", and {len(bad) - 20} more" if len(bad) > 20 else ""
    broken = f"violations in {len(bad)} ({seeds})" if bad else "0 violations"
    return f"sim: {count} {noun} in {seconds:.1f} s ({count / max(seconds, 1e-9):.2f} seeds/s), {broken}"


def _invariants(verdict: Verdict) -> str:
    return " and ".join(dict.fromkeys(violation.invariant for violation in verdict.violations))
