"""The snapshot process as its owner sees it: jobs in, reports out, one line of JSON each (PROTOCOL J9).

Theory. A fold takes as long as the state is large, and the owner's loop must not wait for it. So a child process with
a store connection of its own does the jobs, one at a time. It knows nothing that the store does not; if it hangs or
dies it is killed by its own handle, started again for the next job, and nothing is lost: the fence of J9 covers
whatever it still sends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from baton.time_limits import time_limit
from control_plane.refusals import Corrupt, TooNew
from control_plane.snapshots import Job, Report, Superseded
from control_plane.store.base import Unavailable

JOB_SECONDS = 300.0
"""For one job. Too small: a big shard never gets its snapshot; too large: a hung process delays all other shards' for
that long, and their logs grow."""

STOP_SECONDS = 5.0
"""For the process to end after its input was closed; then it is killed."""

_ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (Superseded, Unavailable, TooNew, Corrupt)}


def describe(job: Job) -> bytes:
    """A job as a line."""
    return json.dumps(asdict(job)).encode() + b"\n"


def parse_job(line: bytes) -> Job:
    """The job of a line."""
    return Job(**json.loads(line))


def answer(outcome: Report | Exception) -> bytes:
    """A report or failure as a line."""
    if isinstance(outcome, Report):
        return json.dumps(asdict(outcome)).encode() + b"\n"
    kind = next((error for error in type(outcome).__mro__ if error.__name__ in _ERRORS), Unavailable)
    return json.dumps({"error": kind.__name__, "text": str(outcome)}).encode() + b"\n"


def parse_answer(line: bytes) -> Report:
    """The report of a line. Raises what the process met, Unavailable if it was cut short."""
    try:
        value = json.loads(line)
        if "error" not in value:
            return Report(**value)
    except (ValueError, TypeError) as error:
        raise Unavailable("the snapshot process was cut short") from error
    raise _ERRORS.get(value["error"], Unavailable)(value["text"])


class HelperProcess:
    """A `Snapshotter` in a child process. `arguments` tell `control_plane.snapshot_helper` how to reach the store."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = (sys.executable, "-m", "control_plane.snapshot_helper", *arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def snapshot(self, job: Job) -> Report:
        """See `Snapshotter.snapshot`. One at a time."""
        try:
            async with time_limit(JOB_SECONDS):
                return parse_answer(await self._ask(describe(job)))
        except TimeoutError:
            await self.close()
            raise Unavailable(f"a snapshot took longer than {JOB_SECONDS} s") from None
        except OSError as error:
            await self.close()
            raise Unavailable(f"the snapshot process died: {error}") from error

    async def close(self) -> None:
        """End the process; kill it if it does not end by itself."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with time_limit(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _ask(self, line: bytes) -> bytes:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise Unavailable("the snapshot process has no pipes")
        stdin.write(line)
        await stdin.drain()
        found = await stdout.readline()
        if not found:
            raise ConnectionResetError("it closed its output")
        return found
