"""The flags of `scripts/sim`, and which of them go together.

Theory. A flag that is ignored tells somebody that something was tried which was not. So each way of running it has its own flags, and
any other is refused; so is a count of nothing, from which nothing would follow, and a name that is not known.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.exhaustive.hunt import MINUTES
from lab.exhaustive.removals import REMOVALS as MISSING
from lab.simulation import sabotage
from lab.simulation.kinds import KINDS

SEEDS = 20
"""Seeds by default: some 20 seconds."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is wanted. Exactly one of `sabotage`, `exhaustive`, `seed` and none of them."""

    seeds: int
    seed_base: int | None
    seed: int | None
    all: bool
    liveness: bool
    faults: tuple[str, ...]
    """Classes of faults; empty: all."""
    sabotage: str
    """`list`, or names of removals separated by commas; empty: none."""
    exhaustive: bool
    slice: str
    minutes: float | None
    remove: str
    jobs: int


ALLOWED: dict[str, frozenset[str]] = {
    "--exhaustive --remove": frozenset({"exhaustive", "remove", "minutes", "jobs"}),
    "--exhaustive": frozenset({"exhaustive", "slice", "minutes", "jobs"}),
    "--sabotage list": frozenset({"sabotage"}),
    "--sabotage with --seed": frozenset({"sabotage", "seed", "all"}),
    "--sabotage": frozenset({"sabotage", "seed_base", "jobs"}),
    "--seed": frozenset({"seed", "all", "liveness", "faults"}),
    "a range of seeds": frozenset({"seeds", "seed_base", "liveness", "faults", "jobs"}),
}
"""Way of running -> flags that it takes."""


def parse(arguments: Sequence[str] | None) -> Options:
    """The flags. Ends the program with exit code 2, and the reason, if they are wrong."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if "sabotage" in given:
        given["sabotage"] = _removals(parser, given["sabotage"], "--sabotage", list(sabotage.REMOVALS), {"list"})
    if "remove" in given:
        given["remove"] = _removals(parser, given["remove"], "--remove", [missing.name for missing in MISSING], set())
    faults = tuple(dict.fromkeys(given.pop("faults").split(","))) if "faults" in given else ()
    _refuse(parser, _way(given), {*given, *(("faults",) if faults else ())})
    if unknown := [name for name in faults if name not in KINDS]:
        parser.error(f"no class of faults {', '.join(map(repr, unknown))}; there are: {', '.join(KINDS)}")
    if "seed" in given and "," in given.get("sabotage", ""):
        parser.error("--sabotage with --seed tells the story of one removal: name one")
    return Options(
        seeds=given.get("seeds", SEEDS),
        seed_base=given.get("seed_base"),
        seed=given.get("seed"),
        all="all" in given,
        liveness="liveness" in given,
        faults=faults,
        sabotage=given.get("sabotage", ""),
        exhaustive="exhaustive" in given,
        slice=given.get("slice", "ab"),
        minutes=given.get("minutes"),
        remove=given.get("remove", ""),
        jobs=given.get("jobs", _cores()),
    )


def _way(given: dict[str, object]) -> str:
    if "exhaustive" in given:
        return "--exhaustive --remove" if "remove" in given else "--exhaustive"
    if given.get("sabotage") == "list":
        return "--sabotage list"
    if "sabotage" in given:
        return "--sabotage with --seed" if "seed" in given else "--sabotage"
    return "--seed" if "seed" in given else "a range of seeds"


def _refuse(parser: argparse.ArgumentParser, way: str, given: set[str]) -> None:
    wrong = sorted(given - ALLOWED[way])
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        right = ", ".join("--" + name.replace("_", "-") for name in sorted(ALLOWED[way]))
        parser.error(f"{flags} would mean nothing for {way}, which takes {right}")


def _removals(parser: argparse.ArgumentParser, words: str, flag: str, names: list[str], also: set[str]) -> str:
    """The words, checked; each removal once."""
    if words == "all" or words in also:
        return words
    wanted = list(dict.fromkeys(words.split(",")))
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"{flag}: no removal {', '.join(map(repr, unknown))}; there are: {', '.join(names)}")
    return ",".join(wanted)


def _count(words: str) -> int:
    number = int(words)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is nothing: at least 1")
    return number


def _minutes(words: str) -> float:
    number = float(words)
    if not number > 0 or math.isinf(number):
        raise argparse.ArgumentTypeError(f"{words} is no time: above 0")
    return number


_count.__name__, _minutes.__name__ = "count", "number"  # what argparse calls them when they are not numbers at all


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _parser() -> argparse.ArgumentParser:
    """Flags that are not given leave nothing, so that they can be told from given ones."""
    parser = argparse.ArgumentParser(
        prog="sim",
        description="Deterministic simulation of a whole federation.",
        epilog=f"classes of faults: {', '.join(KINDS)}",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add: Callable[..., object] = parser.add_argument
    add("--seeds", type=_count, metavar="N", help=f"how many seeds (default {SEEDS})")
    add("--seed-base", type=int, metavar="B", help="the first seed (default 0; with --sabotage: each one's known seed)")
    add("--seed", type=int, metavar="N", help="replay one seed bit for bit and tell its story")
    add("--all", action="store_true", help="with --seed: the whole story, not only its important part")
    add("--liveness", action="store_true", help="demand progress after healing: no deadline ends what is stuck")
    add("--faults", metavar="A,B", help="only these classes of faults (default: all; named below)")
    add(
        "--sabotage",
        metavar="NAMES",
        help="remove safety mechanisms, one at a time, until each is caught: `all`, names, or `list`; with --seed: its story",
    )
    add("--exhaustive", action="store_true", help="every interleaving of small worlds (docs/exhaustive.md)")
    add("--slice", choices=("a", "b", "ab"), help="with --exhaustive: journal (a), sessions (b), both (default)")
    add("--minutes", type=_minutes, metavar="M", help=f"with --exhaustive: its time (default {MINUTES:g})")
    add("--remove", metavar="NAMES", help="with --exhaustive: show what happens without these rules; `all`, or names")
    add("--jobs", type=_count, metavar="J", help=f"processes (default: one per core, here {_cores()})")
    return parser
