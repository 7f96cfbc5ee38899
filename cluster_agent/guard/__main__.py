"""`python -m cluster_agent.guard --dir D`: become the guard of directory D, or say why not.

The starter waits for the first process: it ends with 0 when the guard serves, with 3 when another guard lives on D,
with 1 and a line on stderr when it cannot serve. The guard itself goes on in a session of its own, a child of nobody,
and writes what it has to say to D/guard.err. With `--foreground` it stays (for service managers).
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import resource
import signal
import sys
from pathlib import Path

from cluster_agent.executors.base import Features
from cluster_agent.guard import host, isolation
from cluster_agent.guard.cgroups import RECORD, Groups
from cluster_agent.guard.ledger import Ledger, LedgerCorrupt, digest
from cluster_agent.guard.places import Places
from cluster_agent.guard.predecessor import bury_predecessor, private_directory
from cluster_agent.guard.protocol import KEEPERS, LOCK
from cluster_agent.guard.server import Server
from cluster_agent.guard.workload import Spawner

ALREADY = 3
"""Exit code: another guard lives on this directory."""

BURY_SECONDS = 8.0
"""How long a new guard waits for an earlier one's work to be dead. The kernel takes milliseconds; a process stuck on
dead storage takes for ever, and then this guard must not serve. Below the agent's patience with the start."""

MIN_FREE_BYTES = 16 << 20
"""Free disk below which starts are refused: room for the ledger, logs and results of what runs already."""


def main(arguments: list[str]) -> int:
    """Parse, detach, serve; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster_agent.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="the executor's directory")
    parser.add_argument("--foreground", action="store_true", help="do not detach")
    parser.add_argument("--killer", choices=("auto", "scan"), default="auto", help="scan: never use namespaces")
    parser.add_argument("--limits", choices=("auto", "poll"), default="auto", help="poll: never use control groups")
    parser.add_argument("--min-free-bytes", type=int, default=MIN_FREE_BYTES, help="less free disk refuses starts")
    options = parser.parse_args(arguments)
    directory = private_directory(options.dir)
    if options.foreground:
        return serve(directory, options, None)
    ready_read, ready_write = os.pipe()
    if os.fork() == 0:
        os.close(ready_read)
        os.setsid()
        code = 1
        try:
            code = serve(directory, options, ready_write)
        finally:
            os._exit(code)
    os.close(ready_write)
    said = b""
    while part := os.read(ready_read, 1024):
        said += part
    word, _, words = said.decode().partition(" ")
    if word == "ready":
        return 0
    os.write(2, (words or "the guard died at start; see guard.err").encode() + b"\n")
    return ALREADY if word == "already" else 1


def serve(directory: Path, options: argparse.Namespace, ready: int | None) -> int:
    """Be the guard."""

    def say(word: str, words: str = "") -> None:
        if ready is not None:
            os.write(ready, f"{word} {words}".encode())
            os.close(ready)
        elif words:
            os.write(2, f"{words}\n".encode())

    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("already", f"another guard lives on {directory}")
        return ALREADY
    if ready is not None:
        _detach(directory)
    try:
        server = _build(directory, options)
    except (OSError, LedgerCorrupt) as error:
        say("failed", f"{type(error).__name__}: {error}")
        return 1
    say("ready")
    gc.collect()
    gc.freeze()  # keepers are forks: a collection in one would copy every page it looks at
    gc.disable()
    server.run()
    return 0


def _build(directory: Path, options: argparse.Namespace) -> Server:
    """Find out what this host permits, bury the predecessor, and put the parts together."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o077)
    chosen = isolation.choose(options.killer)
    if not chosen.namespace:
        host.prctl(host.PR_SET_CHILD_SUBREAPER, 1)
    ledger = Ledger(directory, host.boot_id())
    keepers = os.open(directory / KEEPERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    lost = bury_predecessor(ledger, lambda: _try_lock(keepers), BURY_SECONDS)
    fcntl.flock(keepers, fcntl.LOCK_SH)
    groups = Groups(f"{digest(str(directory)):016x}", directory / RECORD, wanted=options.limits == "auto")
    places = Places(directory)
    places.tidy(ledger.started_keys.keys() | ledger.exits.keys())
    lives_read, _lives_write = os.pipe2(os.O_CLOEXEC)  # the write end closes with this process, and nothing else has it
    spawner = Spawner(places, groups, chosen, lives_read, keepers)
    features = Features(groups.complete(), chosen.namespace, _describe(groups, chosen))
    server = Server(directory, ledger, places, spawner, features, options.min_free_bytes)
    server.guard.lost_before = bool(lost)
    return server


def _describe(groups: Groups, chosen: isolation.Isolation) -> str:
    limits = f"cgroup {groups.version} ({', '.join(groups.found)})" if groups.found else "rlimits and polling"
    return f"limits: {limits}; killer: {chosen.words}"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _detach(directory: Path) -> None:
    """No terminal, no inherited output, no directory held."""
    errors = os.open(directory / "guard.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    for target, source in ((0, null), (1, errors), (2, errors)):
        os.dup2(source, target)
    os.close(errors)
    os.close(null)
    os.chdir("/")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
