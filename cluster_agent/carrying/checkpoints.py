"""Checkpoints of running attempts: looked for, stored, told (DESIGN 10).

A workload commits a checkpoint by renaming a complete file onto `$BATON_CHECKPOINT_DIR/latest`. By level: every LOOK the newest file
of each task is compared with the one stored last; if another one is there, what is opened is stored, while later ones may come. They
are numbered by attempt; numbers rise also over a restart of the agent, for what is stored is written down, and a number that is
taken all the same is passed over.

A checkpoint that cannot be stored is no failure of the attempt: it is told in the log, and the next look tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import BinaryIO

from baton.artifacts import MAX_ARTIFACT_BYTES, checkpoint_name
from baton.clock import Clock
from baton.telemetry.logs import about
from cluster_agent.carrying.courier import Courier, Undeliverable
from cluster_agent.carrying.port import Maker, NameUsed
from cluster_agent.carrying.shelf import Kept, Shelf, Stamp
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactRef
from cluster_agent.executors.base import AttemptKey, Saved, StartRequest
from cluster_agent.waiting import within

log = logging.getLogger("baton.agent")

LOOK_SECONDS = 0.5
"""Between looks. Smaller costs a look at the disk more often; larger loses more of the work of a cluster that dies."""

LAST_SECONDS = 10.0
"""For the last checkpoint of an attempt that has failed: what it saved is worth a moment, but somebody waits for the failure."""

PASSED_OVER = 1000
"""Numbers that are taken: an agent that lost its notes meets as many as the attempt has checkpoints in the store."""

AGAIN_SECONDS = 30.0
"""After a checkpoint could not be stored: the store is asked for longer than this already, and others wait."""


class Checkpoints:
    """Of all attempts that run. `tell`: what becomes of a stored one. `maker`: who an attempt of a run (by name) is to the store."""

    def __init__(
        self,
        shelf: Shelf,
        courier: Courier,
        clock: Clock,
        tally: Tally,
        maker: Callable[[AttemptKey, str], Maker],
        tell: Callable[[Saved], Awaitable[None]],
    ) -> None:
        self._shelf, self._courier, self._clock, self._tally = shelf, courier, clock, tally
        self._maker, self._tell = maker, tell
        self._running: dict[tuple[str, int], tuple[AttemptKey, Mapping[str, str]]] = {}
        """Run uid and index of a task -> its attempt here, and what names its run in full. Kept for every task, so it costs next to
        nothing."""
        self._kept: dict[AttemptKey, Kept] = {}
        self._under_way: dict[AttemptKey, asyncio.Task[None]] = {}
        self._not_before: dict[AttemptKey, float] = {}

    def track(self, key: AttemptKey, env: Mapping[str, str]) -> None:
        """It is about to run, or runs; its environment names its run."""
        self._running[key.run_uid, key.task] = (key, env)

    def track_all(self, requests: Iterable[StartRequest]) -> None:
        """`track` of many."""
        self._running.update([((each.key.run_uid, each.key.task), (each.key, each.env)) for each in requests])

    def begin(self, key: AttemptKey, stamp: Stamp) -> None:
        """It starts from the checkpoint with this stamp, which is no news."""
        self._kept[key] = Kept(stamp=stamp)

    def rejoined(self) -> None:
        """A census follows, which tells what runs."""
        self._running.clear()

    def resume(self, key: AttemptKey, kept: Kept) -> None:
        """What an earlier agent has stored of it."""
        self._kept[key] = kept

    def over(self, key: AttemptKey) -> None:
        """It runs no more, and nothing more of it is to be stored."""
        held = self._running.pop((key.run_uid, key.task), None)
        if held is not None and held[0].n != key.n:  # another attempt of the task
            self._running[key.run_uid, key.task] = held
        if self._kept or self._under_way or self._not_before:
            self.drop(key)

    def ended(self, key: AttemptKey) -> str | None:
        """It runs no more, and is not looked at any more; the name of its run, if it is known here."""
        held = self._running.get((key.run_uid, key.task))
        if held is None or held[0] != key:
            return None
        del self._running[key.run_uid, key.task]
        return held[1].get("BATON_RUN", "")

    def drop(self, key: AttemptKey) -> None:
        """Nothing more of it is to be stored."""
        self._kept.pop(key, None)
        self._not_before.pop(key, None)
        task = self._under_way.pop(key, None)
        if task is not None:
            task.cancel()

    def unsaved(self, key: AttemptKey) -> bool:
        """Whether a checkpoint of it is here that is not stored."""
        stamp = self._shelf.stamp(key)
        return stamp is not None and stamp != self._stamp(key)

    async def save_last(self, key: AttemptKey, run: str) -> None:
        """Store what it saved last, if that can be done soon; it has failed."""
        before = self._under_way.pop(key, None)
        try:
            await within(self._clock, LAST_SECONDS, self._save_after(before, key, run))
        except TimeoutError:
            log.warning("A last checkpoint could not be stored in time.", extra=_fields(key, ""))

    async def _save_after(self, before: asyncio.Task[None] | None, key: AttemptKey, run: str) -> None:
        if before is not None:
            await asyncio.wait((before,))
        if self.unsaved(key):
            await self._save(key, run)

    async def look_for_ever(self) -> None:
        """The loop."""
        while True:
            await self._clock.sleep(LOOK_SECONDS)
            if self._running:
                try:
                    await self.look()
                except OSError as error:
                    log.warning("Checkpoints cannot be looked for.", extra={"cause": str(error)})

    async def look(self) -> None:
        """Once: begin to store what is new."""
        now = self._clock.boot()
        for task, stamp in (await asyncio.to_thread(self._shelf.latest)).items():
            held = self._running.get(task)
            if held is None or held[0] in self._under_way or stamp == self._stamp(held[0]):
                continue
            key, run = held[0], held[1].get("BATON_RUN", "")
            if self._not_before.get(key, now) <= now:
                saving = asyncio.create_task(self._save(key, run))
                self._under_way[key] = saving
                saving.add_done_callback(lambda done, key=key: self._done(key, done))  # type: ignore[misc]

    def close(self) -> None:
        """Give up what is under way."""
        for task in self._under_way.values():
            task.cancel()

    def _done(self, key: AttemptKey, task: asyncio.Task[None]) -> None:
        if self._under_way.get(key) is task:
            del self._under_way[key]
        if not task.cancelled() and task.exception() is not None:
            log.error("Storing a checkpoint failed.", extra=_fields(key, str(task.exception())))

    def _stamp(self, key: AttemptKey) -> Stamp | None:
        kept = self._kept.get(key)
        return kept.stamp if kept is not None else None

    async def _save(self, key: AttemptKey, run: str) -> None:
        try:
            file, stamp = await asyncio.to_thread(self._shelf.open_latest, key)
        except OSError:
            return  # gone again; the next look sees what is there
        kept = self._kept.get(key) or Kept()
        with file:
            try:
                if stamp[2] > MAX_ARTIFACT_BYTES:
                    raise Undeliverable(f"it has {stamp[2]} bytes, over the limit of {MAX_ARTIFACT_BYTES >> 30} GiB")
                number, ref = await self._store(self._maker(key, run), kept.number + 1, file)
            except (Undeliverable, OSError) as error:
                self._tally.failures_up += 1
                self._not_before[key] = self._clock.boot() + AGAIN_SECONDS
                log.warning("A checkpoint could not be stored.", extra=_fields(key, str(error)))
                return
        self._kept[key] = kept = Kept(number, stamp, ref)
        with suppress(OSError):  # without the note a later agent stores it once more
            await asyncio.to_thread(self._shelf.keep, key, kept)
        await self._tell(Saved(key, ref))

    async def _store(self, maker: Maker, number: int, file: BinaryIO) -> tuple[int, ArtifactRef]:
        """Under the first number that is free. Raises Undeliverable, OSError."""
        for free in range(number, number + PASSED_OVER):
            try:
                return free, await self._courier.store(maker, checkpoint_name(free), file)
            except NameUsed:
                continue
        raise Undeliverable(f"{PASSED_OVER} numbers are taken")


def _fields(key: AttemptKey, reason: str) -> dict[str, object]:
    return about(key.run_uid, task=key.task, attempt=key.n, reason=reason)
