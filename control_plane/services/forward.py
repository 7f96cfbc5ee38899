"""Reaching the owner of a shard: once, again, and until the caller's time is over (PROTOCOL O4, O5, J6).

Theory. While a shard changes hands nobody is at fault, so a call is parked rather than failed: it is tried again until its time
is up. That is safe since every method may be repeated (`methods`). What is said at the end counts all tries, not the last: a
single try whose end is unclear makes the answer "unknown", for it may still be carried out.

A call to another replica may also hang: that replica may be frozen, its lease running out. So a call waits for its answer and
watches who owns the shard; when that changes, the old try counts as lost and the next goes to the new owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from baton.clock import Clock, Entropy
from baton.errors import UNKNOWN, BatonError, NotFound, RestoreSuspected
from control_plane.peers import CallFailed, CallLost
from control_plane.refusals import NotOwned, OutcomeUnknown, StoreDown
from control_plane.restore import in_words
from control_plane.router import Router
from control_plane.services.failures import explain
from control_plane.services.methods import Asked

PAUSE = 0.1
"""Seconds between two tries. A hand-over takes tens of milliseconds, a takeover after a death seconds; smaller only burns CPU
of a federation that is busy recovering, larger adds that much to every hand-over."""

TRY_SECONDS = 10.0
"""Seconds for the first answer of one try at another replica, and as many again for each MiB of the request; then it is tried
again. Longer than any decision takes; smaller
would double the work of big graphs, larger would let one lost message cost a caller most of its minute."""

LOOK_SECONDS = 0.5
"""Seconds between looks at who owns the shard while an answer from another replica is awaited."""

_PARKED = frozenset({"NOT_OWNED", "STORE_UNAVAILABLE", "DRAINING"})
"""Reasons that say nothing about the request: another try may succeed. Not if the answer says itself when to come again."""

_STOPPED = (
    "etcd looks restored from a backup, so nothing is written, and little can be read, until `baton admin restored`: {}"
)

_NOBODY_KNOWS = (
    "whether it exists cannot be known until `baton admin restored`: {}, but etcd looks restored from a backup,"
    " which may not know it: {}"
)
"""What the store does not have may have been acknowledged after its backup (J12)."""

OnAnswer = Callable[[bytes], bytes]
"""Told of every answer passed on; the payload that goes on from there."""


class Forwarder:
    """Calls to owners of shards, for one replica."""

    def __init__(self, router: Router, clock: Clock, entropy: Entropy, restore_suspected: Callable[[], str]) -> None:
        self._router, self._clock, self._entropy = router, clock, entropy
        self._restore_suspected = restore_suspected

    async def one(self, shard: str, method: str, payload: bytes, asked: Asked) -> bytes:
        """The one answer of a unary method. Raises BatonError."""
        async with aclosing(self.stream(shard, method, payload, asked)) as answers:
            async for answer in answers:
                return answer
        raise explain(CallLost("no answer"), self._reference)

    async def stream(
        self, shard: str, method: str, payload: bytes, asked: Asked, on_answer: OnAnswer | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The answers of `method` at the owner of `shard`. With `on_answer` a broken stream goes on where it was; without, only
        a call that has answered nothing is tried again. Raises BatonError, its `applied` counting all tries."""
        unclear = False
        answered = False
        while True:
            try:
                async with aclosing(self._try(shard, method, payload, asked)) as answers:
                    async for answer in answers:
                        answered, unclear = True, False
                        yield answer
                        if on_answer is not None:
                            payload = on_answer(answer)
                return
            except (BatonError, NotOwned, CallLost, CallFailed, OutcomeUnknown, StoreDown, TimeoutError) as error:
                told = explain(error, self._reference)
            if told.reason == NotFound.REASON and (suspicion := self._restore_suspected()):
                raise _final(RestoreSuspected(_NOBODY_KNOWS.format(told.message, in_words(suspicion))), unclear)
            if told.reason not in _PARKED or told.retry_after is not None:
                raise _final(told, unclear)
            unclear = unclear or told.applied == UNKNOWN
            if suspicion := self._restore_suspected():
                raise _final(RestoreSuspected(_STOPPED.format(in_words(suspicion))), unclear)
            if asked.ends - self._clock.boot() <= PAUSE or (answered and on_answer is None):
                raise _final(told, unclear)
            await self._clock.sleep(PAUSE * (0.5 + self._entropy.uniform()))

    async def _try(self, shard: str, method: str, payload: bytes, asked: Asked) -> AsyncGenerator[bytes, None]:
        """One try. Raises what `Router.call` raises, and CallLost when the shard changes hands meanwhile."""
        owner = self._router.owner(shard)
        left = asked.left()
        call = self._router.call(shard, method, payload, timeout=left, principal=asked.principal)
        async with aclosing(call) as answers:  # type: ignore[type-var]  # it is an async generator
            if owner == self._router.replica:
                # Handlers keep the time themselves: a time-out around a `yield` would strike whoever reads us.
                async for answer in answers:
                    yield answer
                return
            patience = TRY_SECONDS * (1 + len(payload) / (1 << 20))
            first_by = self._clock.boot() + patience
            while True:
                pending = asyncio.ensure_future(anext(answers, None))
                try:
                    while not pending.done():
                        await asyncio.wait({pending}, timeout=LOOK_SECONDS)
                        if not pending.done():
                            self._look(shard, owner, first_by, asked)
                    received = pending.result()
                finally:
                    await _settled(pending)
                if received is None:
                    return
                first_by = float("inf")
                yield received

    def _look(self, shard: str, owner: str | None, first_by: float, asked: Asked) -> None:
        """Whether waiting still makes sense. Raises CallLost, TimeoutError."""
        now_owner = self._router.owner(shard)
        if now_owner != owner:
            raise CallLost(f"shard {shard} went from {owner} to {now_owner}")
        if self._clock.boot() > first_by:
            raise CallLost(f"{owner} did not answer in time")
        if asked.over:
            raise TimeoutError

    def _reference(self) -> str:
        return self._entropy.token(6)


async def _settled(pending: asyncio.Future[bytes | None]) -> None:
    """A generator can be closed only when nobody waits in it."""
    if not pending.done():
        pending.cancel()
        await asyncio.wait({pending})
    if not pending.cancelled():
        pending.exception()


def _final(told: BatonError, unclear: bool) -> BatonError:
    """NOT_APPLIED speaks of one try; what the caller hears speaks of all (J6)."""
    if unclear:
        told.applied = UNKNOWN
    return told
