"""The supervisor: the process that a local federation belongs to. `python -m lab.supervisor` is what `--detach` starts.

Theory: one lock, one supervisor, one federation per directory. It ends the federation on SIGINT, SIGTERM, SIGHUP or the
order `down`, and on nothing else; a second signal does not shorten the end, for what is left half ended would be somebody
else's to find. Everything it owns is known by pid and start time (processes.py): it ends its own and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from baton import contexts
from baton.clock import SystemClock
from baton.errors import InvalidField
from lab import control
from lab.control import Refused
from lab.etcd_binary import EtcdNotFound
from lab.federation import Federation, UnknownPart
from lab.health import headline
from lab.layout import BadSettings, Layout, Settings, default_directory
from lab.parts import PartFailed

LOOK_SECONDS = 1.0
"""Between looks at the parts. A part that died by itself is in the log this much later."""


class AlreadyRunning(Exception):
    """Another supervisor holds the directory."""


def context_name(layout: Layout) -> str:
    """The context that `up` writes: `local`, or `local-DIRECTORY` for a directory of one's own."""
    if layout.directory == default_directory(os.environ).absolute():
        return "local"
    letters = [char if char.isascii() and char.isalnum() else "-" for char in layout.directory.name.lower()]
    return "local-" + ("".join(letters)[:50].strip("-") or "federation")


async def supervise(layout: Layout, settings: Settings, ready: Callable[[dict[str, Any]], None]) -> None:
    """Own a federation until it is told to end. `ready` gets its status once.

    Raises AlreadyRunning, BadSettings, EtcdNotFound, PartFailed, OSError.
    """
    layout.make()
    lock = layout.take_lock()
    if lock is None:
        raise AlreadyRunning(f"a federation is already running in {layout.directory}")
    try:
        federation = Federation(layout, settings)
        end = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end.set)
        async with control.serving(layout, _Orders(federation, end).obey):
            await _live(federation, end, ready)
    finally:
        os.close(lock)


async def _live(federation: Federation, end: asyncio.Event, ready: Callable[[dict[str, Any]], None]) -> None:
    starting = asyncio.create_task(federation.start())
    asked = asyncio.create_task(end.wait())
    await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()  # it stops what it has started
        await asyncio.gather(starting, return_exceptions=True)
        return
    try:
        starting.result()
    finally:
        asked.cancel()
    name = context_name(federation.layout)
    try:
        contexts.write_context(name, federation.endpoints, env=os.environ)
        ready(federation.status())
        async with _logging(federation):
            await end.wait()
    finally:
        forget_context(name, federation.endpoints)
        await federation.stop()


@asynccontextmanager
async def _logging(federation: Federation) -> AsyncIterator[None]:
    """Tell every change of the headline on stderr, which `--detach` keeps as supervisor.log, while the body runs."""

    async def look() -> None:
        last, clock = headline(federation.status()), SystemClock()
        async with federation.client() as client:
            while True:
                await clock.sleep(LOOK_SECONDS)
                await federation.look(client)
                now = headline(federation.status())
                if now != last:
                    sys.stderr.write(f"{now}\n")
                    sys.stderr.flush()
                    last = now

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def forget_context(name: str, endpoints: list[str]) -> None:
    """Remove the context if it still is what `up` wrote: a person may have put something of theirs there."""
    try:
        _, known = contexts.read_contexts(os.environ)
        if name in known and list(known[name].endpoints) == endpoints:
            contexts.remove_context(name, env=os.environ)
    except (InvalidField, OSError) as error:
        sys.stderr.write(f"the context {name} stays in {contexts.config_path(os.environ)}: {error}\n")


class _Orders:
    """What another terminal may order."""

    def __init__(self, federation: Federation, end: asyncio.Event) -> None:
        self._federation = federation
        self._end = end

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order. Raises Refused."""
        what, name = order.get("order"), str(order.get("name", ""))
        if what == "down":
            self._end.set()
        elif what != "status":
            if self._federation.stage != "running":
                raise Refused(f"the federation is {self._federation.stage}; try again in a moment")
            try:
                await self._act(str(what), name, flag=bool(order.get("flag")))
            except UnknownPart as error:
                raise Refused(str(error), unknown_name=True) from error
            except PartFailed as error:
                raise Refused(str(error)) from error
        return self._federation.status()

    async def _act(self, what: str, name: str, *, flag: bool) -> None:
        federation = self._federation
        match what:
            case "kill":
                await federation.kill(name, agent_only=flag)
            case "start":
                await federation.start_again(name)
            case "freeze":
                await federation.freeze(name, everything=flag)
            case "thaw":
                await federation.thaw(name)
            case "cut":
                federation.cut(name)
            case "heal":
                federation.heal(name)
            case _:
                raise Refused(f"there is no order {what!r}")


def why(error: Exception, layout: Layout) -> str:
    """What ended `supervise`, for people: a full disk is told with its place."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename or layout.directory}: {error.strerror}"


def main() -> int:
    """Supervise until told to end; what went wrong is on stderr."""
    parser = argparse.ArgumentParser(prog="python -m lab.supervisor", description="Own a local federation.")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--clusters", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--apart", action="store_true")
    given = parser.parse_args()
    layout = Layout(given.directory.absolute())
    settings = Settings(given.replicas, tuple(given.clusters.split(",")), given.profile, given.cpus, given.apart)
    try:
        asyncio.run(supervise(layout, settings, lambda _status: None))
    except (AlreadyRunning, BadSettings, EtcdNotFound, PartFailed, InvalidField, OSError) as error:
        sys.stderr.write(f"{why(error, layout)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
