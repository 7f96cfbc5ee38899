"""`scripts/chaos`: rounds of faults against real processes, and a verdict.

Exit code 0: every promise was kept; 1: one was not; 2: nothing was judged (a flag that makes no sense, no etcd, a part that did not
start, a fault of chaos itself); 130, 143: ctrl-C, SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from baton.clock import SystemEntropy
from lab.chaos.campaign import Campaign, Plan, Result
from lab.chaos.ending import Ending
from lab.etcd_binary import EtcdNotFound
from lab.layout import MAX_CLUSTERS, MAX_REPLICAS
from lab.parts import PartFailed

MINUTES = 10.0
"""Without --minutes and --rounds: some ten rounds, so that most kinds of strikes come."""

SHOWN = 20
"""Violations printed."""


class Refused(Exception):
    """A flag that makes no sense; the text is one line for a person."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person asked for."""

    plan: Plan
    directory: Path | None
    """Theirs, new or empty; None: one of ours, which goes when all went well."""
    keep: bool

    @property
    def again(self) -> str:
        """The command that draws the same graphs and strikes."""
        plan = self.plan
        length = f"--rounds {plan.rounds}" if plan.rounds else f"--minutes {plan.seconds / 60:g}"
        brief = " --brief" * plan.brief
        sizes = f"--replicas {plan.replicas} --clusters {plan.clusters} --etcd {plan.members}"
        return f"scripts/chaos --seed {plan.seed} {length}{brief} {sizes}"


def main(arguments: Sequence[str], ending: Ending) -> int:
    """The exit code. Raises Interrupted."""
    try:
        asked = parse(arguments)
        directory = asked.directory or Path(tempfile.mkdtemp(prefix="baton-chaos-"))
    except (Refused, OSError) as error:
        return _say(str(error))
    kept = asked.directory is not None or asked.keep
    try:
        result = _strike(asked, directory, ending)
        ending.check()
        kept = kept or bool(result.violations)
        return _sum_up(result, directory if kept else None)
    except EtcdNotFound as error:
        return _say(str(error))
    except (PartFailed, OSError) as error:
        kept = True
        if ending.number:  # what an interruption breaks is no news, unless something was not ended
            _say(f"interrupted, but {_line(error)}; all of it is kept in {directory}")
            return 128 + ending.number
        return _say(f"{_line(error)}; all of it is kept in {directory}")
    except Exception:  # noqa: BLE001 - a fault of ours must not have the exit code of a broken promise
        kept = True
        traceback.print_exc()
        return _say(f"stopped by a fault of its own, nothing was judged; all of it is kept in {directory}")
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def _strike(asked: Asked, directory: Path, ending: Ending) -> Result:
    """Raises Interrupted, EtcdNotFound, PartFailed, OSError."""
    campaign = Campaign(asked.plan, directory, lambda line: print(line, flush=True))
    print(f"etcd {campaign.etcd_version}, {asked.plan.members} members")
    print(
        f"again (draws the same graphs and strikes; when each falls, and so what it meets, is the machine's): {asked.again}",
        flush=True,
    )

    async def run() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.create_task(campaign.run())

        def cancel() -> None:
            loop.call_soon_threadsafe(task.cancel)

        with ending.through(cancel):
            return await task

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        ending.check()
        raise


def _line(error: Exception) -> str:
    """The first line of what is wrong. What follows is the end of a log, which is kept."""
    return str(error).partition("\n")[0].rstrip(":").removesuffix("; the end of its log")


def _say(text: str) -> int:
    print(f"chaos: {text}", file=sys.stderr)
    return 2


def _sum_up(result: Result, kept: Path | None) -> int:
    for kind, count in sorted(result.hits.items()):
        print(f"{kind:<32} {count:>5}")
    clocks = result.clocks or "every cluster's boot clock is another; dates cannot be set per process"
    print(f"clock offset: {f'not here ({clocks})' if result.clocks else clocks}")
    for each in result.violations[:SHOWN]:
        print(f"VIOLATION {each.invariant} at {each.at:.1f} s: {each.text}")
    if kept is not None:
        print(f"all of it is kept in {kept}")
    checked = ", ".join(f"{count} {kind}" for kind, count in result.checked.items())
    audited = ", ".join(f"{count} {verdict.value}" for verdict, count in sorted(result.verdicts.items(), key=str))
    print(f"checked: {checked}; audited runs: {audited}; attempts moved: {result.moved}")
    print(
        f"chaos: {result.rounds} rounds survived, {sum(result.hits.values())} faults of {len(result.hits)} kinds, "
        f"{len(result.violations)} violations",
        flush=True,
    )
    return 1 if result.violations else 0


# -- flags -----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def parse(arguments: Sequence[str]) -> Asked:
    """Raises Refused. Makes the directory that --directory names, and nothing else."""
    options = _parser().parse_args(arguments)
    if options.rounds is not None and options.minutes is not None:
        raise Refused("--rounds says exactly how long, and so does --minutes: give one of them")
    minutes = MINUTES if options.minutes is None else options.minutes
    if not (minutes > 0 and math.isfinite(minutes)):
        raise Refused(f"--minutes is {minutes:g}; it must be more than 0")
    _within("--rounds", 1 if options.rounds is None else options.rounds, None)
    _within("--replicas", options.replicas, MAX_REPLICAS)
    _within("--clusters", options.clusters, MAX_CLUSTERS)
    seed = options.seed if options.seed is not None else int(SystemEntropy().token(4), 16)
    rounds = options.rounds or 0
    plan = Plan(seed, options.replicas, options.clusters, options.etcd, rounds, minutes * 60.0, options.brief)
    return Asked(plan, None if options.directory is None else _unused(options.directory), options.keep)


def _within(flag: str, value: int, most: int | None) -> None:
    if value < 1 or (most is not None and value > most):
        raise Refused(f"{flag} is {value}; it must be {'1 or more' if most is None else f'1 to {most}'}")


def _unused(name: str) -> Path:
    """The directory of that name, made if it is not there. Raises Refused if it cannot be, or holds something."""
    if not name:
        raise Refused("--directory is empty; leave it out, or name one")
    path = Path(name).absolute()  # workloads write there, from wherever they run
    try:
        if path.exists() and not path.is_dir():
            raise Refused(f"--directory {path} is no directory")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if next(path.iterdir(), None) is not None:
            raise Refused(f"--directory {path} is not empty: a campaign starts in a new or empty one")
        with tempfile.TemporaryFile(dir=path):
            pass  # it can be written
    except OSError as error:
        raise Refused(f"--directory {path} cannot be used: {error.strerror}") from error
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="chaos", description="Faults against a federation of real processes.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, help=f"no round but the first begins later (default {MINUTES:g})")
    parser.add_argument("--rounds", type=int, help="exactly so many rounds, instead of --minutes")
    parser.add_argument("--brief", action="store_true", help="strikes of a few seconds only, which leases outlive")
    parser.add_argument("--seed", type=int, help="of strikes and graphs (default: a fresh one, printed)")
    parser.add_argument("--replicas", type=int, default=3, help=f"replicas, 1 to {MAX_REPLICAS} (default 3)")
    parser.add_argument("--clusters", type=int, default=3, help=f"clusters, 1 to {MAX_CLUSTERS} (default 3)")
    parser.add_argument("--etcd", type=int, default=3, choices=(1, 3, 5), help="etcd members (default 3)")
    parser.add_argument("--directory", help="new or empty: where everything lies, and stays")
    parser.add_argument(
        "--keep", action="store_true", help="keep everything, in a directory of its own that is named at the end"
    )
    return parser
