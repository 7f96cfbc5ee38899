"""Errors as both sides of the wire know them: one tree of exceptions, one table, one form on the wire.

Theory: a failure has to answer three questions by machine: *why* (ErrorInfo.reason, `errors.proto`), *where*
(BadRequest.field_violations), and *did it happen* (`applied`). The third is what a distributed system is asked most
and answers least: "no" means that this try had no effect, "unknown" that it may have had one and should be repeated
with the same request_id (PROTOCOL J6, O8). The form is google.rpc.Status, so any gRPC client can read it; grpc itself
stays outside, so cores' edges and tests use this without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from google.rpc import error_details_pb2, status_pb2

DOMAIN = "baton.dev"
"""ErrorInfo.domain of everything that speaks this protocol."""

NOT_APPLIED = "no"
"""`applied` of a try that had no effect and never will."""

UNKNOWN = "unknown"
"""`applied` of a try that may have had an effect, or may have it later."""

_MAX_MESSAGE = 1000
"""Bytes of a message on the wire. Statuses travel in HTTP/2 trailers, in base64 and the message once more in plain;
gRPC begins to refuse trailers at 8 KiB, and what is refused arrives as no error of ours at all."""

_MAX_VIOLATIONS = 12
"""Field violations on the wire, for the same reason; the first ones are what a person mends first."""

_MAX_VIOLATION_TEXT = 120
"""Bytes of one violation's path, of its description, and of a value of metadata, on the wire."""

_MAX_METADATA = 8
"""Entries of metadata on the wire."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: `field` is a path such as `spec.tasks[3].parents[0]`, `message` what is wrong and the fix."""

    field: str
    message: str


class BatonError(Exception):
    """Any failure of a call. `reason` is an ErrorReason without its prefix; `applied` is "no" or "unknown"."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field_violations: Sequence[FieldViolation] = (),
        applied: str = NOT_APPLIED,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field_violations = tuple(field_violations)
        self.applied = applied
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        """Seconds after which a repetition makes sense, if the server knows."""

    @property
    def code(self) -> int:
        """The gRPC status code, as a number."""
        return CODES.get(self.reason, _INTERNAL)

    def __str__(self) -> str:
        return self.message


class _Named(BatonError):
    """An error whose reason is its class."""

    REASON: ClassVar[str]

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(self.REASON, message, **details)


class InvalidField(_Named):
    """A field of the request is wrong; `field_violations` names it."""

    REASON = "INVALID_FIELD"


class NotFound(_Named):
    """The named resource does not exist in this namespace."""

    REASON = "NOT_FOUND"


class NameTaken(_Named):
    """The name is taken by another resource."""

    REASON = "NAME_TAKEN"


class RequestIdReused(_Named):
    """The request_id was used before with another request."""

    REASON = "REQUEST_ID_REUSED"


class RequestIdExpired(_Named):
    """The request_id is older than what the shard remembers; it was not executed."""

    REASON = "REQUEST_ID_EXPIRED"


class RequestIdAhead(_Named):
    """The request_id lies more than five minutes ahead of the server's clock."""

    REASON = "REQUEST_ID_AHEAD"


class WrongState(_Named):
    """The resource is in a state that does not allow the call."""

    REASON = "WRONG_STATE"


class EtagMismatch(_Named):
    """The etag does not match the current resource."""

    REASON = "ETAG_MISMATCH"


class LimitExceeded(_Named):
    """A published limit would be exceeded; the message names it."""

    REASON = "LIMIT_EXCEEDED"


class QuotaExceeded(_Named):
    """A quota of the namespace would be exceeded."""

    REASON = "QUOTA_EXCEEDED"


class NotOwned(_Named):
    """No replica owns the shard right now, or the owner cannot be reached."""

    REASON = "NOT_OWNED"


class StoreUnavailable(_Named):
    """The store did not answer."""

    REASON = "STORE_UNAVAILABLE"


class Denied(_Named):
    """The caller's certificate or role does not allow the call."""

    REASON = "DENIED"


class RestoreSuspected(_Named):
    """etcd was restored from a snapshot; nothing runs until `baton admin restored` (PROTOCOL J12)."""

    REASON = "RESTORE_SUSPECTED"


class WatchCompacted(_Named):
    """The wanted event number is no longer kept; list again."""

    REASON = "WATCH_COMPACTED"


class Draining(_Named):
    """The replica is shutting down."""

    REASON = "DRAINING"


class Infeasible(_Named):
    """The run cannot finish by its deadline."""

    REASON = "INFEASIBLE"


class Internal(_Named):
    """Something failed inside; `metadata["reference"]` finds it in the server's log."""

    REASON = "INTERNAL"


class TimedOut(_Named):
    """The call's own time ran out before an answer was known."""

    REASON = "TIMED_OUT"


class Unreachable(_Named):
    """No endpoint answered. Made by clients only; it is not an ErrorReason because no server can say it."""

    REASON = "UNREACHABLE"


_CANCELLED, _UNKNOWN, _INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _NOT_FOUND, _ALREADY_EXISTS = 1, 2, 3, 4, 5, 6
_PERMISSION_DENIED, _RESOURCE_EXHAUSTED, _FAILED_PRECONDITION, _ABORTED, _OUT_OF_RANGE = 7, 8, 9, 10, 11
_UNIMPLEMENTED, _INTERNAL, _UNAVAILABLE, _UNAUTHENTICATED = 12, 13, 14, 16

CODES: dict[str, int] = {
    "INVALID_FIELD": _INVALID_ARGUMENT,
    "NOT_FOUND": _NOT_FOUND,
    "NAME_TAKEN": _ALREADY_EXISTS,
    "REQUEST_ID_REUSED": _ALREADY_EXISTS,
    "REQUEST_ID_EXPIRED": _FAILED_PRECONDITION,
    "REQUEST_ID_AHEAD": _INVALID_ARGUMENT,
    "WRONG_STATE": _FAILED_PRECONDITION,
    "ETAG_MISMATCH": _ABORTED,
    "LIMIT_EXCEEDED": _RESOURCE_EXHAUSTED,
    "QUOTA_EXCEEDED": _RESOURCE_EXHAUSTED,
    "NOT_OWNED": _UNAVAILABLE,
    "STORE_UNAVAILABLE": _UNAVAILABLE,
    "DENIED": _PERMISSION_DENIED,
    "RESTORE_SUSPECTED": _FAILED_PRECONDITION,
    "WATCH_COMPACTED": _OUT_OF_RANGE,
    "DRAINING": _UNAVAILABLE,
    "INFEASIBLE": _FAILED_PRECONDITION,
    "INTERNAL": _INTERNAL,
    "TIMED_OUT": _DEADLINE_EXCEEDED,
    "UNREACHABLE": _UNAVAILABLE,
}
"""Reason -> gRPC status code: the one table (errors.proto says the same in words)."""

_CLASSES: dict[str, type[_Named]] = {each.REASON: each for each in _Named.__subclasses__()}

_BARE: dict[int, tuple[str, str]] = {
    _CANCELLED: ("UNREACHABLE", UNKNOWN),
    _UNKNOWN: ("INTERNAL", UNKNOWN),
    _INVALID_ARGUMENT: ("INVALID_FIELD", NOT_APPLIED),
    _DEADLINE_EXCEEDED: ("TIMED_OUT", UNKNOWN),
    _NOT_FOUND: ("NOT_FOUND", NOT_APPLIED),
    _ALREADY_EXISTS: ("NAME_TAKEN", NOT_APPLIED),
    _PERMISSION_DENIED: ("DENIED", NOT_APPLIED),
    # The library says it of an *answer* that is too large, too: the call may well have been carried out.
    _RESOURCE_EXHAUSTED: ("LIMIT_EXCEEDED", UNKNOWN),
    _FAILED_PRECONDITION: ("WRONG_STATE", NOT_APPLIED),
    _ABORTED: ("ETAG_MISMATCH", NOT_APPLIED),
    _OUT_OF_RANGE: ("WATCH_COMPACTED", NOT_APPLIED),
    _UNIMPLEMENTED: ("INTERNAL", NOT_APPLIED),
    _INTERNAL: ("INTERNAL", UNKNOWN),
    _UNAVAILABLE: ("UNREACHABLE", UNKNOWN),
    _UNAUTHENTICATED: ("DENIED", NOT_APPLIED),
}
"""What a status without our ErrorInfo means: it was made by a library or a proxy, not by a handler of ours."""


def of_reason(reason: str, message: str, **details: Any) -> BatonError:
    """The exception of a reason: its class, or plain BatonError for one that this version does not know."""
    found = _CLASSES.get(reason)
    return found(message, **details) if found else BatonError(reason, message, **details)


def to_status(error: BatonError) -> status_pb2.Status:
    """The error as it travels: cut to sizes that fit into trailers, `applied` always said."""
    status = status_pb2.Status(code=error.code, message=_cut(error.message, _MAX_MESSAGE))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:_MAX_METADATA]:
        info.metadata[_cut(key, _MAX_VIOLATION_TEXT)] = _cut(value, _MAX_VIOLATION_TEXT)
    info.metadata["applied"] = error.applied
    status.details.add().Pack(info)
    if error.field_violations:
        bad = error_details_pb2.BadRequest()
        for each in error.field_violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(
                field=_cut(each.field, _MAX_VIOLATION_TEXT), description=_cut(each.message, _MAX_VIOLATION_TEXT)
            )
        status.details.add().Pack(bad)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(max(0, int(error.retry_after * 1000)))
        status.details.add().Pack(retry)
    return status


def from_status(status: status_pb2.Status) -> BatonError:
    """The exception of a status. One without our ErrorInfo is judged by its code, and pessimistically."""
    reason, applied = _BARE.get(status.code, ("INTERNAL", UNKNOWN))
    code_of_ours = False
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            code_of_ours = True
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [FieldViolation(each.field, each.description) for each in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if code_of_ours:
        applied = NOT_APPLIED if metadata.pop("applied", UNKNOWN) == NOT_APPLIED else UNKNOWN
    return of_reason(
        reason,
        status.message,
        field_violations=violations,
        applied=applied,
        metadata=metadata,
        retry_after=retry_after,
    )


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of UTF-8."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= size else data[: size - 3].decode("utf-8", "ignore") + "..."
