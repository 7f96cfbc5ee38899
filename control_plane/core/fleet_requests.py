"""Idempotency records of the fleet shard (PROTOCOL O8). Pure.

Few and rare (an operator's cordons), so a dict in order of arrival is enough; run shards have an index of their own. An id is
a UUIDv7: its first 48 bits are milliseconds, so order of ids is order of time.
"""

from __future__ import annotations

import re
from typing import Any

from control_plane.core.commands import Refused, Request
from control_plane.core.events import RequestRecorded

KEEP_SECONDS = 3600.0
"""O8: no record goes before. Shorter breaks the promise to clients; longer only costs memory."""

MAX_AHEAD_SECONDS = 300.0
"""O8: further ahead and the id would outlive the hour."""

MAX_RECORDS = 10_000
"""Bound of the ledger: three mutations a second for an hour, far above what operators do."""

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class RequestLedger:
    """Requests that were decided: id -> (digest, resource, wall time of the record)."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[str, str, float]] = {}
        self._floor = ""

    def find(self, request: Request, now: float) -> str | None:
        """The resource a repeat gets; None if the request is new (or exempt: an empty id). Raises Refused."""
        if not request.id:
            return None
        if not _UUID7.fullmatch(request.id):
            raise Refused("INVALID_FIELD", "is not a UUIDv7 in lower-case 8-4-4-4-12 form", "request_id")
        known = self._records.get(request.id)
        if known is not None:
            if known[0] != request.digest:
                raise Refused("REQUEST_ID_REUSED", "this request_id was used with another request", "request_id")
            return known[1]
        if request.id <= self._floor:
            raise Refused("REQUEST_ID_EXPIRED", "this request_id is older than what is remembered", "request_id")
        if int(request.id[:8] + request.id[9:13], 16) / 1000 > now + MAX_AHEAD_SECONDS:
            raise Refused(
                "REQUEST_ID_AHEAD", f"this request_id is ahead of the server's clock ({now:.3f})", "request_id"
            )
        if len(self._records) >= MAX_RECORDS:
            raise Refused("LIMIT_EXCEEDED", f"more than {MAX_RECORDS} fleet mutations in an hour")
        return None

    def record(self, event: RequestRecorded, wall: float) -> None:
        """Fold a RequestRecorded."""
        self._records[event.request_id] = (event.digest, event.resource, wall)

    def prune(self, floor: str) -> None:
        """Fold a RequestsPruned."""
        self._floor = max(self._floor, floor)
        self._records = {key: record for key, record in self._records.items() if key > self._floor}

    def floor_at(self, now: float) -> str:
        """The highest id such that every record at or below it is old enough to go; empty if there is none. A younger
        record with a lower id (a slow client clock) keeps the floor below it."""
        floor = ""
        for key in sorted(self._records):
            if self._records[key][2] + KEEP_SECONDS > now:  # the very sum of `due`, so that its time is enough
                break
            floor = key
        return floor

    def due(self) -> float | None:
        """When `floor_at` will move next (wall), None if the ledger is empty."""
        if not self._records:
            return None
        return self._records[min(self._records)][2] + KEEP_SECONDS

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as JSON values."""
        return {"floor": self._floor, "records": [[key, *record] for key, record in self._records.items()]}

    @staticmethod
    def from_json(image: Any) -> RequestLedger:
        """Inverse of `to_json`."""
        ledger = RequestLedger()
        ledger._floor = image["floor"]
        ledger._records = {key: (digest, resource, wall) for key, digest, resource, wall in image["records"]}
        return ledger

    def validate(self) -> None:
        """Bounds and floor; raises AssertionError."""
        if len(self._records) > MAX_RECORDS:
            raise AssertionError("too many request records")
        if not all(key > self._floor for key in self._records):
            raise AssertionError("a record lies at or below the floor")
