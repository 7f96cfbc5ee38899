"""`python -m control_plane.snapshot_helper`: makes snapshots for the replica that started it (PROTOCOL J9).

Reads one job a line on stdin, writes one report a line on stdout, ends when stdin does: so it never outlives its
owner for longer than a job, whose writes are fenced by the owner key anyway. Logs go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.clock import SystemClock
from control_plane.machines import make_machine
from control_plane.refusals import Corrupt, TooNew
from control_plane.snapshot_process import answer, parse_job
from control_plane.snapshots import Report, Superseded, write_snapshot
from control_plane.store.base import Store, StoreError
from control_plane.store.etcd import EtcdStore, TlsFiles


async def serve(store: Store) -> None:
    """Jobs from stdin until it ends."""
    loop, clock = asyncio.get_running_loop(), SystemClock()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        outcome: Report | Exception
        try:
            outcome = await write_snapshot(store, clock, parse_job(line), make_machine)
        except (StoreError, Superseded, TooNew, Corrupt) as error:
            outcome = error
        sys.stdout.buffer.write(answer(outcome))
        sys.stdout.buffer.flush()


async def run(arguments: Sequence[str]) -> None:
    """Connect and serve."""
    parser = argparse.ArgumentParser(prog="control_plane.snapshot_helper", description=__doc__)
    parser.add_argument("--endpoint", action="append", required=True, help="host:port of an etcd member; repeatable")
    parser.add_argument("--prefix", default="baton/", help="prefix of all keys")
    parser.add_argument("--tls-ca", type=Path, help="certificates that etcd's are checked with")
    parser.add_argument("--tls-cert", type=Path, help="our certificate")
    parser.add_argument("--tls-key", type=Path, help="its key")
    options = parser.parse_args(arguments)
    tls = TlsFiles(options.tls_ca, options.tls_cert, options.tls_key) if options.tls_ca else None
    store = EtcdStore(options.endpoint, tls=tls, key_prefix=options.prefix, clock=SystemClock())
    try:
        await serve(store)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))
