"""Translation between the port's values and etcd's messages, and of its failures. Pure functions.

Theory: the only question that matters about a failed write is whether it may have been applied (PROTOCOL J6). The
tables below answer it code by code; what is not listed is `Ambiguous`, for a wrong "ambiguous" costs a round trip and a
wrong "not applied" costs the promise.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from baton.internal import etcdwire_pb2 as wire
from control_plane.store.base import (
    Ambiguous,
    Compare,
    Delete,
    EventKind,
    Get,
    KeyValue,
    NotApplied,
    Put,
    StoreError,
    Target,
    Txn,
    TxnResult,
    Unavailable,
    WatchEvent,
)
from control_plane.store.etcd.channel import CLOSED, WireError

_REFUSED_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,  # too large, too many operations, duplicate key
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,  # the lease of a put: checked before the first operation runs
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Codes that a server gives only to what it has not run and will not run."""

_REFUSED_TEXTS = (
    CLOSED,
    "failed to connect to all addresses",  # grpc never had a connection to send it on
    "DNS resolution failed",
    "etcdserver: too many requests",  # refused before it was proposed
    "grpc: received message larger than max",  # the server's words; our own side's differ
)
"""Beginnings of texts that prove the same whatever the code."""

_NO_SPACE = "database space exceeded"
_COMPACTED = "required revision has been compacted"


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys that start with `prefix`; for an empty prefix: after all keys."""
    end = prefix.rstrip(b"\xff")
    return end[:-1] + bytes([end[-1] + 1]) if end else b"\x00"


def key_value(kv: wire.EtcdKeyValue, strip: int) -> KeyValue:
    """One key, without the first `strip` bytes of its name."""
    key = kv.key[strip:].decode("ascii")
    return KeyValue(key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def event(message: wire.EtcdEvent, strip: int) -> WatchEvent:
    """One change."""
    deleted = message.kind == wire.EtcdEvent.KIND_DELETE
    return WatchEvent(EventKind.DELETE if deleted else EventKind.PUT, key_value(message.kv, strip))


def txn_request(txn: Txn, prefix: bytes) -> wire.EtcdTxnRequest:
    """The request, all keys under `prefix`."""
    request = wire.EtcdTxnRequest()
    for compare in txn.compares:
        _fill_compare(request.compare.add(), compare, prefix)
    for op in txn.success:
        _fill_op(request.success.add(), op, prefix)
    for op in txn.failure:
        _fill_op(request.failure.add(), op, prefix)
    return request


def txn_result(response: wire.EtcdTxnResponse, strip: int) -> TxnResult:
    """The port's view of the answer."""
    reads: list[KeyValue | None] = []
    for answer in response.responses:
        if answer.WhichOneof("response") == "response_range":
            kvs = answer.response_range.kvs
            reads.append(key_value(kvs[0], strip) if kvs else None)
    return TxnResult(response.succeeded, response.header.revision, tuple(reads))


def write_error(what: str, error: WireError) -> StoreError:
    """What a failed write means: NotApplied only beyond doubt, else Ambiguous."""
    if error.code in _REFUSED_CODES or error.detail.startswith(_REFUSED_TEXTS):
        return NotApplied(f"{what}: {error}")
    return Ambiguous(f"{what}: {error}")


def read_error(what: str, error: WireError) -> StoreError:
    """What a failed read, or a call whose loss does no harm, means."""
    return Unavailable(f"{what}: {error}")


def is_no_space(error: WireError) -> bool:
    """The server says that its quota is exhausted."""
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and _NO_SPACE in error.detail


def is_compacted(error: WireError) -> bool:
    """The revision asked for is gone."""
    return error.code is grpc.StatusCode.OUT_OF_RANGE and _COMPACTED in error.detail


def is_oversize(error: WireError) -> bool:
    """The answer was larger than we take."""
    return error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in error.detail


def surely_not_applied(
    before: wire.EtcdHeader | None, after: wire.EtcdHeader, written_keys: Sequence[KeyValue | None]
) -> bool:
    """Whether a write that the server called off was really without effect.

    A "no space" is no proof by itself: etcd checks its quota again when it applies, and if it has just run out there,
    it runs the transaction *and* reports the error (etcd 3.7.3, server/etcdserver/apply/quota.go). But the answer is
    final, so a read after it decides: the write would have taken a revision after `before`, the last header seen before
    it was sent. It did not if nothing did, or if a key that it would have written is still as old as `before`. Another
    cluster or an older raft term means a restored store, whose revisions prove nothing (PROTOCOL J12).
    """
    if before is None or before.cluster_id != after.cluster_id or after.raft_term < before.raft_term:
        return False
    if after.revision == before.revision:
        return True
    return any(kv is not None and kv.mod_revision <= before.revision for kv in written_keys)


def _fill_compare(message: wire.EtcdCompare, compare: Compare, prefix: bytes) -> None:
    message.result = wire.EtcdCompare.RESULT_EQUAL
    message.key = prefix + compare.key.encode("ascii")
    if compare.target is Target.VALUE:
        message.target = wire.EtcdCompare.TARGET_VALUE
        message.value = compare.value
    elif compare.target is Target.MOD:
        message.target = wire.EtcdCompare.TARGET_MOD
        message.mod_revision = compare.revision
    else:
        message.target = wire.EtcdCompare.TARGET_CREATE
        message.create_revision = compare.revision


def _fill_op(message: wire.EtcdRequestOp, op: Put | Delete | Get, prefix: bytes) -> None:
    key = prefix + op.key.encode("ascii")
    if isinstance(op, Put):
        message.request_put.key = key
        message.request_put.value = op.value
        message.request_put.lease = op.lease
    elif isinstance(op, Get):
        message.request_range.key = key
    else:
        message.request_delete_range.key = key
        if op.prefix:
            message.request_delete_range.range_end = prefix_end(key)
