"""What stands around a production replica when nobody runs a loop: a store, a clock, callers, listeners.

Theory. Production coroutines wait only for the store and the clock. Here those waits are handed to whoever drives the coroutine, or
answered at once; so one coroutine can be run to a certain wait, answered, and looked at.
"""

# ruff: noqa: ARG002 - the ports' own arguments

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, TypeVar, cast

from control_plane.core.commands import Outbox, Refused
from control_plane.refusals import NotOwned
from control_plane.slots import OwnedShard
from control_plane.store.base import RangeResult, Txn, TxnResult
from control_plane.store.memory_keyspace import Keyspace

T = TypeVar("T")


class Wait:
    """Where a production coroutine stands: it asks the store (`ask` is the transaction), or sleeps (None)."""

    def __init__(self, ask: Txn | None) -> None:
        self.ask = ask

    def __await__(self) -> Generator[Wait, Any, Any]:
        return (yield self)


class Door:
    """A store that answers at once, or, once `asking`, leaves each transaction to whoever drives the coroutine."""

    def __init__(self, keyspace: Keyspace) -> None:
        self.keyspace = keyspace
        self.asking = False

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        """See Store."""
        if self.asking:
            return cast(TxnResult, await Wait(txn))
        return self.keyspace.commit(txn)

    async def range(
        self, prefix: str, *, timeout: float, start: str = "", limit: int = 0, revision: int = 0
    ) -> RangeResult:
        """See Store."""
        return self.keyspace.range(prefix, start, limit, revision, False)


class Ear:
    """Whoever carries effects to agents (`slots.Listener`): it notes that it was told of some."""

    def __init__(self) -> None:
        self.heard = False

    def taken(self, shard: OwnedShard) -> None:
        """See Listener."""

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """See Listener."""
        self.heard = True

    def dropped(self, shard: str) -> None:
        """See Listener."""


class Time:
    """A clock that stands still, and the only nonce that is asked for."""

    def __init__(self, wall: float, nonce: str) -> None:
        self._wall, self.nonce = wall, nonce

    def boot(self) -> float:
        """See Clock."""
        return 0.0

    def wall(self) -> float:
        """See Clock."""
        return self._wall

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        await Wait(None)

    def token(self, size: int = 16) -> str:
        """See Entropy."""
        return self.nonce


class Reply:
    """Stands for the future of a caller who waits outside of any loop."""

    def __init__(self) -> None:
        self.word = ""

    def done(self) -> bool:
        """See asyncio.Future."""
        return bool(self.word)

    def set_result(self, value: object) -> None:
        """See asyncio.Future."""
        self.word = f"yes {value}" if isinstance(value, bool) else "OK"

    def set_exception(self, error: Exception) -> None:
        """See asyncio.Future."""
        if isinstance(error, Refused):
            self.word = error.reason
        else:
            self.word = "NOT_APPLIED" if isinstance(error, NotOwned) else "UNKNOWN"


def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of production code that does not have to wait."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise AssertionError("it waits, though the store answers at once")
