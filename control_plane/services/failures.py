"""Whatever goes wrong, as the one thing a caller may be told (PROTOCOL J6, I5): why, where, and whether it happened.

Theory. A failure starts as one of three kinds: a decision against the request (`Refused`, a bad field), a statement of the
loops about a commit (`control_plane.refusals`), or a fault of ours. The first two say by their type whether anything was
applied; a fault says nothing, so it is UNKNOWN, and its text stays here: the caller gets a reference that finds it in the log.
The same form travels between replicas, so an answer means the same whichever replica gave it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from google.rpc import status_pb2

from baton import errors
from baton.errors import NOT_APPLIED, UNKNOWN, BatonError, FieldViolation
from baton.names import InvalidName
from control_plane.core.commands import Refused
from control_plane.peers import CallFailed, CallLost
from control_plane.refusals import ConditionFailed, Corrupt, NotOwned, OutcomeUnknown, StoreDown, TooNew

if TYPE_CHECKING:
    from baton.clock import Entropy

log = logging.getLogger(__name__)

NO_OWNER = "no replica owns the shard of this resource right now"


def invalid(field: str, message: str) -> BatonError:
    """One wrong field."""
    return errors.InvalidField(f"{field}: {message}", field_violations=[FieldViolation(field, message)])


@contextmanager
def committed() -> Iterator[None]:
    """Around making the answer of a mutation that is committed. If that fails, because the shard was lost a moment later or
    history is down, nobody may be told "not applied" (J6): raises OutcomeUnknown instead, and a repeat finds the answer."""
    try:
        yield
    except (NotOwned, StoreDown, BatonError) as error:
        raise OutcomeUnknown("it is committed, but its answer could not be made") from error


def explain(error: BaseException, reference: Callable[[], str]) -> BatonError:
    """The failure as it is told. `reference` draws an id for a fault, under which it is logged."""
    told = _known(error)
    if told is None:
        told = _fault(error, reference, NOT_APPLIED if isinstance(error, _NOTHING_DONE) else UNKNOWN)
    return told


_NOTHING_DONE = (TooNew, Corrupt, ConditionFailed)


def _known(error: BaseException) -> BatonError | None:  # noqa: PLR0911 - one line a kind
    """What is not a fault of ours."""
    match error:
        case BatonError():
            return error
        case Refused():
            where = [FieldViolation(error.field_path, error.message)] if error.field_path else []
            return errors.of_reason(error.reason, error.message, field_violations=where)
        case InvalidName():
            return invalid("name", str(error))
        case NotOwned():
            return errors.NotOwned(NO_OWNER)
        case StoreDown():
            return errors.StoreUnavailable("the store did not answer in time; nothing was decided")
        case OutcomeUnknown():
            return errors.StoreUnavailable(
                "whether this was carried out is not known; repeat it with the same request_id", applied=UNKNOWN
            )
        case CallLost():
            return errors.NotOwned("the owner's answer was lost; repeat with the same request_id", applied=UNKNOWN)
        case CallFailed():
            return of_call(error)
        case TimeoutError():
            return errors.TimedOut("the call's time ran out before an answer was known", applied=UNKNOWN)
        case _:
            return None


def of_call(error: CallFailed) -> BatonError:
    """What another replica answered."""
    status = status_pb2.Status()
    try:
        status.ParseFromString(error.details)
    except Exception:  # noqa: BLE001 - a peer of another version may speak otherwise; its code is what is left
        status = status_pb2.Status(code=error.code, message=error.args[0])
    if not status.code:
        status = status_pb2.Status(code=error.code, message=error.args[0])
    return errors.from_status(status)


def _fault(error: BaseException, reference: Callable[[], str], applied: str) -> BatonError:
    mark = reference()
    log.error("a call failed inside", extra={"reference": mark}, exc_info=error)
    return errors.Internal(
        f"something failed inside; the server's log has it under {mark}", applied=applied, metadata={"reference": mark}
    )


def peer_failure(entropy: Entropy) -> Callable[[BaseException], CallFailed]:
    """How an exception of a handler travels to the replica that forwarded the call. The message begins with the reason, for
    internal callers that read nothing else."""

    def travel(error: BaseException) -> CallFailed:
        if isinstance(error, CallFailed):
            return error
        told = explain(error, lambda: entropy.token(6))
        return CallFailed(told.code, f"{told.reason}: {told.message}", errors.to_status(told).SerializeToString())

    return travel
