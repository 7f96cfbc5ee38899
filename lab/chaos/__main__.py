"""`scripts/chaos`: rounds of faults against real processes, and a verdict. Exit code 0: every promise was kept; 1: one was not."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from baton.clock import SystemEntropy
from lab.chaos.campaign import Campaign, Plan, Result
from lab.etcd_binary import EtcdNotFound
from lab.parts import PartFailed

INTERRUPTED = 130
"""Exit code of ctrl-C, as a shell has it."""

SHOWN = 20
"""Violations printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a broken promise, 2 if there is no federation to strike."""
    options = _parse(arguments)
    seed = options.seed if options.seed is not None else int(SystemEntropy().token(4), 16)
    plan = Plan(
        seed, options.replicas, options.clusters, options.etcd, options.rounds, options.minutes * 60.0, options.brief
    )
    again = f"scripts/chaos --seed {seed} --replicas {plan.replicas} --clusters {plan.clusters} --etcd {plan.members}"
    print(f"again (the same strikes and graphs; their timing is the machine's): {again}", flush=True)
    with tempfile.TemporaryDirectory(prefix="baton-chaos-", ignore_cleanup_errors=True) as scratch:
        directory = Path(options.directory or scratch)
        try:
            campaign = Campaign(plan, directory, lambda line: print(line, flush=True))
            print(f"etcd {campaign.etcd_version}, {plan.members} members", flush=True)
            result = asyncio.run(campaign.run())
        except (EtcdNotFound, PartFailed) as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("chaos: interrupted; nothing is left running", file=sys.stderr)
            return INTERRUPTED
        if result.violations and not options.directory:
            print("logs are not kept; `--directory DIR` keeps them", file=sys.stderr)
    return _sum_up(result)


def _sum_up(result: Result) -> int:
    for kind, count in sorted(result.hits.items()):
        print(f"{kind:<32} {count:>5}")
    clocks = result.clocks or "every cluster's boot clock is another; dates cannot be set per process"
    print(f"clock offset: {f'not here ({clocks})' if result.clocks else clocks}")
    for each in result.violations[:SHOWN]:
        print(f"VIOLATION {each.invariant} at {each.at:.1f} s: {each.text}")
    checked = ", ".join(f"{count} {kind}" for kind, count in result.checked.items())
    audited = ", ".join(f"{count} {verdict.value}" for verdict, count in sorted(result.verdicts.items(), key=str))
    print(f"checked: {checked}; audited runs: {audited}; attempts moved: {result.moved}")
    print(
        f"chaos: {result.rounds} rounds survived, {sum(result.hits.values())} faults of {len(result.hits)} kinds, "
        f"{len(result.violations)} violations"
    )
    return 1 if result.violations else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description="Faults against a federation of real processes.")
    parser.add_argument("--minutes", type=float, default=10.0, help="no round begins later (default 10)")
    parser.add_argument("--rounds", type=int, default=0, help="exactly so many rounds, instead of --minutes")
    parser.add_argument("--brief", action="store_true", help="strikes of a few seconds only: no work moves")
    parser.add_argument("--seed", type=int, help="of strikes and graphs (default: a fresh one, printed)")
    parser.add_argument("--replicas", type=int, default=3, help="replicas (default 3)")
    parser.add_argument("--clusters", type=int, default=3, help="clusters (default 3)")
    parser.add_argument("--etcd", type=int, default=3, choices=(1, 3, 5), help="etcd members (default 3)")
    parser.add_argument("--directory", default="", help="where everything lies, and stays (default: thrown away)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
