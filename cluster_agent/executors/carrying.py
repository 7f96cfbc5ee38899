"""A decorator of the Executor port: attempts find their files when they start, and what they leave is stored before they are told.

Theory. To the agent's machine an attempt counts as running from its start order until its `Exited`; so the file work fits in at both
ends without a new state. Before: a `start` that needs files is held back while they are fetched, and passed on with the
generation it has by then; the guard judges at that moment whether its lease still holds (G1). Since the guard never heard of it, a
fetch that is stopped needs no more than a tombstone (F8), and from the passing on only the guard knows; a fetch that fails ends the
attempt as lost, which costs the application nothing. After: an `Exited` of a success that left files is held back until they are
stored, and is passed on with their refs, which the owner publishes if it accepts the report (F2). Its processes are dead already, so
nothing of this can make two copies run.

A crash of the agent: what was being fetched has no process and is reported lost (F4); what was being stored is in the guard's census
with its mark, and is stored again; what was stored is written down and only told again. A census says of the attempts in
between that they run.

What needs nothing and leaves nothing passes through: one look per batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from baton.clock import Clock
from cluster_agent.carrying.checkpoints import Checkpoints
from cluster_agent.carrying.courier import Courier, Undeliverable
from cluster_agent.carrying.fetching import Fetcher
from cluster_agent.carrying.port import Maker, NameUsed
from cluster_agent.carrying.shelf import Kept, Shelf, Unfit
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactRef
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    CensusEntry,
    Executor,
    ExecutorEvent,
    Exited,
    Features,
    Phase,
    Refused,
    Saved,
    StartRequest,
    Stopped,
)
from cluster_agent.waiting import within

log = logging.getLogger("baton.agent")

WORTH_SAVING = (Cause.EXIT, Cause.TIMEOUT, Cause.LIMIT, Cause.RESULT)
"""Ends after which another attempt may follow, and which this cluster saw: its last checkpoint is stored first."""

LONGEST_FETCH = 7 * 86_400.0
"""Of an attempt without a deadline, which no run has: only a bound. A fetch that makes no progress ends by the courier's patience."""

LIVING = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)


class Telling(Executor, Protocol):
    """An executor whose events can be added to."""

    async def tell(self, events: Sequence[ExecutorEvent]) -> None:
        """These come among the next `events`."""
        ...


@dataclass(slots=True)
class _Held:
    """A start that waits for its files."""

    request: StartRequest
    task: asyncio.Task[None] | None = None
    """None: its files are here, and the executor was away."""
    passing: bool = False
    """The executor was asked to start it, in vain or not: the guard may have it."""


class Carrying:
    """See the module's theory, and Executor. `cluster_uid`: asked when something is stored."""

    def __init__(
        self,
        inner: Telling,
        shelf: Shelf,
        fetcher: Fetcher,
        courier: Courier,
        clock: Clock,
        tally: Tally,
        *,
        cluster_uid: Callable[[], str],
    ) -> None:
        self.tally = tally
        self._inner, self._shelf, self._fetcher, self._courier = inner, shelf, fetcher, courier
        self._clock, self._cluster_uid = clock, cluster_uid
        self._checkpoints = Checkpoints(shelf, courier, clock, tally, self._maker, self._tell_saved)
        self._fetching: dict[AttemptKey, _Held] = {}
        self._storing: dict[AttemptKey, tuple[Exited, asyncio.Task[None]]] = {}
        self._marked: set[AttemptKey] = set()
        """Attempts that may have something in the agent's own tree."""
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- joining ------------------------------------------------------------------------------------------------------

    async def connect(self) -> Sequence[CensusEntry]:
        """See Executor. What is being fetched or stored counts as running."""
        entries = await self._inner.connect()
        self._checkpoints.rejoined()
        if self._looking is None:
            self._looking = asyncio.create_task(self._checkpoints.look_for_ever())
            self._marked = await asyncio.to_thread(self._shelf.known)
        known = {entry.key for entry in entries}
        for key in [key for key, held in self._fetching.items() if held.task is None and key in known]:
            del self._fetching[key]  # the start came through after all (F4): a second one would be `Refused`
        held = [
            CensusEntry(key, held.request.generation, Phase.STARTING, run=held.request.env.get("BATON_RUN", ""))
            for key, held in self._fetching.items()
            if key not in known
        ]
        counted = [self._counted(entry) for entry in entries]
        needed = known | self._fetching.keys()
        unknown = self._marked - needed
        if unknown:
            await asyncio.to_thread(self._shelf.forget, unknown)
            self._marked -= unknown
        for key, waiting in self._fetching.items():
            if waiting.task is None:
                waiting.task = self._spawn(self._pass_on(key, waiting))
        return [*counted, *held]

    def _counted(self, entry: CensusEntry) -> CensusEntry:
        """An entry as the agent shall see it."""
        key, exited = entry.key, entry.exited
        if entry.phase in LIVING and entry.run:
            self._checkpoints.track(key, {"BATON_RUN": entry.run})
            kept = self._shelf.kept(key) if key in self._marked else None
            if kept is not None and kept.checkpoint is not None:
                self._checkpoints.resume(key, kept)
                self._soon(self._inner.tell([Saved(key, kept.checkpoint)]))
        if exited is None or not exited.files_of:
            return entry
        if key not in self._storing:
            kept = self._shelf.kept(key)
            if kept is not None and kept.artifacts:
                return replace(entry, exited=replace(exited, artifacts=kept.artifacts))
            self._store(exited)
        return replace(entry, phase=Phase.RUNNING, exited=None, run=exited.files_of)

    async def close(self) -> None:
        """See Executor. What is held back is given up here; the next agent finds it in its census."""
        self._checkpoints.close()
        tasks = [held.task for held in self._fetching.values() if held.task is not None]
        tasks += [task for _, task in self._storing.values()]
        tasks += [*self._tasks, *([self._looking] if self._looking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._inner.close()

    # --- before -------------------------------------------------------------------------------------------------------

    async def start(self, requests: Sequence[StartRequest]) -> None:
        """See Executor."""
        ready = [request for request in requests if not request.carried]
        if len(ready) < len(requests):
            for request in requests:
                if request.carried:
                    self._fetch(request)
        if ready:
            self._checkpoints.track_all(ready)
            await self._inner.start(ready)

    def _fetch(self, request: StartRequest) -> None:
        if request.key in self._fetching:
            return
        self._marked.add(request.key)
        held = self._fetching[request.key] = _Held(request)
        held.task = self._spawn(self._bring(request.key, held))

    async def _bring(self, key: AttemptKey, held: _Held) -> None:
        began, stop_at = self._clock.wall(), held.request.stop_at
        left = max(0.0, stop_at - self._clock.boot()) if stop_at is not None else LONGEST_FETCH
        try:
            ready, stamp = await within(self._clock, left, self._fetcher.bring(held.request))
        except TimeoutError:
            told = self._ended(key, Cause.DEADLINE, "the deadline passed while its files were fetched", began)
        except (Undeliverable, OSError) as error:
            self.tally.failures_down += 1
            told = self._ended(key, Cause.CARRIAGE, str(error), began)
        else:
            if stamp is not None:
                self._checkpoints.begin(key, stamp)
            held.request = replace(ready, generation=held.request.generation)
            await self._pass_on(key, held)
            return
        self._fetching.pop(key, None)
        await self._inner.tell([told])
        await asyncio.to_thread(self._shelf.drop_inputs, key)

    async def _pass_on(self, key: AttemptKey, held: _Held) -> None:
        """Its files are here. If the executor is away, the next census begins with it."""
        self._checkpoints.track(key, held.request.env)
        held.passing = True
        try:
            await self._inner.start([held.request])
        except OSError:
            held.task = None
            return
        if self._fetching.get(key) is held:
            del self._fetching[key]

    # --- after --------------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[Sequence[ExecutorEvent]]:
        """See Executor."""
        async for batch in self._inner.events():
            passed = [event for event in batch if self._passes(event)]
            if passed:
                yield passed

    def _passes(self, event: ExecutorEvent) -> bool:
        """Whether an event is told now; else it is held back."""
        if isinstance(event, Exited):
            if event.succeeded and not event.files_of and not self._marked:
                self._checkpoints.over(event.key)  # nothing of it is held here: by far the most
                return True
            if event.artifacts or event.cause is Cause.CARRIAGE:
                return True  # our own words
            run = self._checkpoints.ended(event.key)
            if event.key in self._marked:
                self._soon(asyncio.to_thread(self._shelf.drop_inputs, event.key))
            if event.files_of and event.succeeded:
                self._store(event)
                return False
            if run and not event.succeeded and event.cause in WORTH_SAVING and self._checkpoints.unsaved(event.key):
                self._soon(self._save_last(event, run))
                return False
            self._checkpoints.drop(event.key)
        elif isinstance(event, Refused | Stopped):
            self._checkpoints.over(event.key)
        return True

    def _store(self, exited: Exited) -> None:
        self._marked.add(exited.key)
        if exited.key not in self._storing:
            self._storing[exited.key] = (exited, self._spawn(self._stored(exited)))

    async def _stored(self, exited: Exited) -> None:
        """Tell the end once its files are stored, or why they cannot be."""
        key = exited.key
        try:
            told = replace(exited, files_of="", artifacts=await self._put_all(exited))
        except Unfit as error:
            told = self._failed(exited, Cause.RESULT, str(error))
        except (Undeliverable, OSError) as error:
            self.tally.failures_up += 1
            mended_by_trying = not (isinstance(error, Undeliverable) and error.setup)
            told = self._failed(exited, Cause.CARRIAGE if mended_by_trying else Cause.RESULT, str(error))
        self._storing.pop(key, None)
        self._checkpoints.drop(key)
        await self._inner.tell([told])

    async def _put_all(self, exited: Exited) -> tuple[ArtifactRef, ...]:
        """Store what it left. Raises Unfit, Undeliverable, OSError."""
        key = exited.key
        maker = self._maker(key, exited.files_of)
        refs = []
        for name in await asyncio.to_thread(self._shelf.made, key, has_result=bool(exited.result)):
            with await asyncio.to_thread(self._shelf.open_made, key, name) as file:
                try:
                    refs.append(await self._courier.store(maker, name, file))
                except NameUsed as error:
                    raise Unfit(f"artifact {name} changed while it was stored: {error}") from error
        with suppress(OSError):  # without the note a later agent stores them once more
            await asyncio.to_thread(self._shelf.keep, key, Kept(artifacts=tuple(refs)))
        return tuple(refs)

    async def _save_last(self, exited: Exited, run: str) -> None:
        """Tell a failure after the last checkpoint of it is stored, or a short while."""
        try:
            await self._checkpoints.save_last(exited.key, run)
        finally:
            self._checkpoints.drop(exited.key)
            await self._inner.tell([replace(exited, files_of="")])

    async def _tell_saved(self, saved: Saved) -> None:
        self._marked.add(saved.key)
        await self._inner.tell([saved])

    # --- between ------------------------------------------------------------------------------------------------------

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:
        """See Executor. What is held back ends at once: no process of it is left, or was made."""
        given_up = [told for key in keys if (told := self._give_up(key)) is not None]
        await self._inner.stop(keys, grace_seconds=grace_seconds)
        if given_up:
            await self._inner.tell(given_up)

    async def kill_all(self) -> None:
        """See Executor."""
        keys = [*self._fetching, *self._storing]
        given_up = [told for key in keys if (told := self._give_up(key)) is not None]
        await self._inner.kill_all()
        if keys:
            await self._inner.stop(keys, grace_seconds=0.0)
            await self._inner.tell(given_up)

    def _give_up(self, key: AttemptKey) -> Exited | None:
        """The end of an attempt that was held back; None if it was not, or if the guard may have it: a process may run, which
        must not be taken for dead (F2), and the guard's tombstone and `Stopped` speak (F8)."""
        fetch = self._fetching.pop(key, None)
        if fetch is not None:
            if fetch.passing or fetch.task is None:
                return None
            fetch.task.cancel()
            return self._ended(key, Cause.STOP, "it was stopped while its files were fetched", self._clock.wall())
        storing = self._storing.pop(key, None)
        if storing is None:
            return None
        storing[1].cancel()
        return self._failed(storing[0], Cause.STOP, "it was stopped while its artifacts were stored")

    async def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """See Executor."""
        for key in keys:
            if key in self._fetching:
                held = self._fetching[key]
                held.request = replace(held.request, generation=generation)
        await self._inner.adopt(keys, generation)

    async def forget(self, keys: Sequence[AttemptKey]) -> None:
        """See Executor."""
        await self._inner.forget(keys)
        if self._marked:
            ours = self._marked.intersection(keys)
            self._marked -= ours
            if ours:
                await asyncio.to_thread(self._shelf.forget, ours)

    # --- passed through -----------------------------------------------------------------------------------------------

    def features(self) -> Features:
        """See Executor."""
        return self._inner.features()

    def ticked_at(self) -> float:
        """See Executor."""
        return self._inner.ticked_at()

    async def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """See Executor."""
        await self._inner.configure(fence_seconds, kill_seconds)

    async def renew(self, generation: int, sent_boot: float) -> None:
        """See Executor."""
        await self._inner.renew(generation, sent_boot)

    async def widen(self, key: AttemptKey, slots: int) -> None:
        """See Executor."""
        await self._inner.widen(key, slots)

    async def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:
        """See Executor."""
        return await self._inner.read_log(key, offset, limit)

    async def kill_if_silent(self) -> None:
        """See Executor."""
        await self._inner.kill_if_silent()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _maker(self, key: AttemptKey, run: str) -> Maker:
        return Maker(run.removeprefix("namespaces/").partition("/")[0], key, self._cluster_uid())

    def _ended(self, key: AttemptKey, cause: Cause, message: str, began: float) -> Exited:
        """The end of an attempt that never ran."""
        return Exited(key, cause, None, None, began, self._clock.wall(), message=message)

    @staticmethod
    def _failed(exited: Exited, cause: Cause, message: str) -> Exited:
        """The end of an attempt whose files did not become artifacts."""
        return replace(exited, cause=cause, result=b"", message=message, files_of="")

    def _soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Done beside everything else; nobody waits for it."""
        self._tasks.add(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Carrying files failed.", exc_info=error)
