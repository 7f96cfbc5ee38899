"""Idempotency of mutations (PROTOCOL O8).

Theory: a mutation carries the id of the client's intent. The first decision is recorded with the request's digest; a
repeat with the same digest gets the same resource, another digest is a mistake. Ids are UUIDv7 text: their first 48 bits
are the sender's milliseconds, so they sort by time, and forgetting is one number: every id at or below the *floor* is
EXPIRED and never executed. The floor is state, raised by an event, and never sooner than `KEEP` after an id's own time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from control_plane.core.commands import Refused, Request
from control_plane.core.events import RequestRecorded, RequestsPruned

KEEP = 3600.0
"""Seconds for which ids are remembered at least (O8). Shorter: a client that retries after an outage meets EXPIRED and must
find out by itself; longer: more records per shard."""

PRUNE_EVERY = 60.0
"""Seconds past KEEP before a prune: one small event a minute instead of one per record."""

MAX_AHEAD = 300.0
"""Seconds an id may lie ahead of our clock (O8): sloppy clocks pass, an id from next year would outlive every floor."""

MAX_RECORDS = 200_000
"""Records a shard keeps; about 60 MB at worst. They cannot be dropped early (O8), so more mutations an hour are refused:
55 a second and shard, 1,700 a second over 32 shards."""


def seconds_of(request_id: str) -> float:
    """Wall seconds inside a UUIDv7 in text form. Raises `Refused` if it is none."""
    try:
        if len(request_id) != 36 or request_id[14] != "7":
            raise ValueError(request_id)
        return int(request_id[:8] + request_id[9:13], 16) / 1000
    except ValueError:
        raise Refused("INVALID_FIELD", "request_id must be a UUIDv7 in lower-case text form", "request_id") from None


class Requests:
    """The request records of one shard."""

    __slots__ = ("_limit", "_order", "floor", "records")

    def __init__(self, limit: int = MAX_RECORDS) -> None:
        self._limit = limit
        self.records: dict[str, tuple[str, str]] = {}
        self.floor = ""
        self._order: list[str] = []

    def known(self, request: Request, now: float) -> str | None:
        """The resource decided for this request, None if it is new. Raises `Refused` (REQUEST_ID_REUSED, _EXPIRED, _AHEAD,
        LIMIT_EXCEEDED, INVALID_FIELD). An empty id is exempt and always new."""
        if not request.id:
            return None
        record = self.records.get(request.id)
        if record is not None:
            digest, resource = record
            if digest != request.digest:
                raise Refused("REQUEST_ID_REUSED", "this request_id was used before with another request", "request_id")
            return resource
        at = seconds_of(request.id)
        if request.id <= self.floor:
            raise Refused("REQUEST_ID_EXPIRED", "this request_id is older than what is remembered; it was not executed")
        if at > now + MAX_AHEAD:
            raise Refused(
                "REQUEST_ID_AHEAD", f"request_id is ahead of the server's clock, which says {now:.3f}", "request_id"
            )
        if len(self.records) >= self._limit:
            raise Refused("LIMIT_EXCEEDED", f"more than {self._limit} mutations of this shard within an hour")
        return None

    def due(self) -> float | None:
        """Wall time of the next prune."""
        return seconds_of(self._order[0]) + KEEP + PRUNE_EVERY if self._order else None

    def prune(self, now: float) -> RequestsPruned | None:
        """The event that forgets every record whose id is older than `KEEP`, if one is due."""
        due = self.due()
        if due is None or due > now:
            return None
        return RequestsPruned(max(id_ for id_ in self.records if seconds_of(id_) + KEEP <= now))

    def apply_recorded(self, event: RequestRecorded) -> None:
        """Remember."""
        if event.request_id not in self.records:
            heapq.heappush(self._order, event.request_id)
        self.records[event.request_id] = (event.digest, event.resource)

    def apply_pruned(self, event: RequestsPruned) -> None:
        """Forget ids up to the floor."""
        self.floor = max(self.floor, event.floor)
        while self._order and self._order[0] <= self.floor:
            del self.records[heapq.heappop(self._order)]

    def dump(self) -> Iterable[RequestRecorded | RequestsPruned]:
        """Events that rebuild this. In order of id, so that equal states dump equally."""
        if self.floor:
            yield RequestsPruned(self.floor)
        for id_ in sorted(self.records):
            yield RequestRecorded(id_, *self.records[id_])

    def ids(self) -> list[str]:
        """Recorded ids in order, as the prune sees them."""
        return sorted(self._order)
