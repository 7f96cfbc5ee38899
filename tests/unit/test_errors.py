"""Errors keep their meaning over the wire, and the one table agrees with errors.proto."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from baton import errors
from baton.v1 import errors_pb2

REASONS = [
    name.removeprefix("ERROR_REASON_")
    for name in list(errors_pb2.ErrorReason.keys())
    if not name.endswith("UNSPECIFIED")
]


def test_table_has_every_reason_with_the_code_its_comment_says() -> None:
    proto = (Path(__file__).parents[2] / "proto/baton/v1/errors.proto").read_text()
    pairs = re.findall(r"([A-Z_]{5,})\.\n  ERROR_REASON_([A-Z_]+) =", proto)
    by_reason = {reason: code for code, reason in pairs}
    assert set(by_reason) == set(REASONS)
    assert {reason: code_pb2.Code.Name(errors.CODES[reason]) for reason in REASONS} == by_reason


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_class_and_survives_the_wire(reason: str) -> None:
    sent = errors.of_reason(
        reason,
        "what went wrong",
        field_violations=[errors.FieldViolation("spec.tasks[0].id", "is empty")],
        applied=errors.UNKNOWN,
        metadata={"run": "r1"},
        retry_after=1.5,
    )
    assert type(sent) is not errors.BatonError
    got = errors.from_status(status_pb2.Status.FromString(errors.to_status(sent).SerializeToString()))
    assert type(got) is type(sent)
    for field in ("reason", "message", "field_violations", "applied", "metadata", "retry_after", "code"):
        assert getattr(got, field) == getattr(sent, field)


def test_status_says_applied_domain_and_fields() -> None:
    status = errors.to_status(errors.InvalidField("bad", field_violations=[errors.FieldViolation("f", "is empty")]))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("baton.dev", "INVALID_FIELD", {"applied": "no"})
    assert status.code == code_pb2.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("code", "kind", "applied"),
    [
        (code_pb2.UNAVAILABLE, errors.Unreachable, "unknown"),
        (code_pb2.DEADLINE_EXCEEDED, errors.TimedOut, "unknown"),
        (code_pb2.UNKNOWN, errors.Internal, "unknown"),
        (code_pb2.RESOURCE_EXHAUSTED, errors.LimitExceeded, "unknown"),
        (code_pb2.UNIMPLEMENTED, errors.Internal, "no"),
        (code_pb2.UNAUTHENTICATED, errors.Denied, "no"),
        (code_pb2.NOT_FOUND, errors.NotFound, "no"),
        (999, errors.Internal, "unknown"),
    ],
)
def test_a_status_that_is_not_ours_is_judged_by_its_code(
    code: int, kind: type[errors.BatonError], applied: str
) -> None:
    error = errors.from_status(status_pb2.Status(code=code, message="m"))
    assert type(error) is kind
    assert error.applied == applied


def test_our_status_without_applied_is_unknown() -> None:
    status = status_pb2.Status(code=code_pb2.NOT_FOUND, message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=errors.DOMAIN, reason="NOT_FOUND"))
    assert errors.from_status(status).applied == errors.UNKNOWN


def test_a_reason_of_a_newer_server_is_kept() -> None:
    error = errors.from_status(errors.to_status(errors.BatonError("BRAND_NEW", "m", applied="no")))
    assert (error.reason, error.applied) == ("BRAND_NEW", "no")


def test_foreign_details_are_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="m")
    info = error_details_pb2.ErrorInfo(domain="proxy.example", reason="NOT_FOUND", metadata={"applied": "no"})
    status.details.add().Pack(info)
    error = errors.from_status(status)
    assert (error.reason, error.applied) == ("UNREACHABLE", errors.UNKNOWN)


def test_a_huge_error_fits_into_trailers() -> None:
    fields = [errors.FieldViolation("f" * 10_000, "ü" * 10_000)] * 1000
    metadata = {f"{n}" * 1000: "b" * 100_000 for n in range(100)}
    status = errors.to_status(errors.InvalidField("\U0001f600" * 1_000_000, field_violations=fields, metadata=metadata))
    # base64 of the details, and the message in percent-encoding
    assert status.ByteSize() * 4 / 3 + len(status.message.encode()) * 3 < 12_000
    assert status.ByteSize() < 6_500
