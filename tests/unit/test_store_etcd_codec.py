"""What an answer of etcd's means, code by code (PROTOCOL J6), and when a "no space" is a sure one."""

from __future__ import annotations

import grpc
import pytest

from baton.internal import etcdwire_pb2 as wire
from control_plane.store.base import Ambiguous, Compare, Delete, Get, KeyValue, NotApplied, Put, Txn
from control_plane.store.etcd import codec
from control_plane.store.etcd.channel import WireError, targets
from control_plane.store.rules import txn_bytes

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (Code.INVALID_ARGUMENT, "etcdserver: request is too large"),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request"),
        (Code.NOT_FOUND, "etcdserver: requested lease not found"),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied"),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests"),
        (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max (3 vs. 2)"),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: refused"),
        (Code.UNAVAILABLE, "DNS resolution failed for etcd.invalid:2379"),
        (Code.CANCELLED, "the store is closed"),
    ],
)
def test_surely_not_applied(code: grpc.StatusCode, text: str) -> None:
    assert type(codec.write_error("txn", WireError(code, text))) is NotApplied


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (Code.UNAVAILABLE, "etcdserver: request timed out"),
        (Code.UNAVAILABLE, "etcdserver: leader changed"),
        (Code.UNAVAILABLE, "etcdserver: no leader"),
        (Code.UNAVAILABLE, "Socket closed"),
        (Code.UNAVAILABLE, "keepalive watchdog timeout"),
        (Code.CANCELLED, "the channel was closed"),
        (Code.UNKNOWN, "Stream removed"),
        (Code.INTERNAL, "whatever"),
        (Code.DATA_LOSS, "etcdserver: corrupt cluster"),
        (Code.FAILED_PRECONDITION, "etcdserver: not leader"),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (3 vs. 2)"),
    ],
)
def test_everything_else_is_ambiguous(code: grpc.StatusCode, text: str) -> None:
    assert type(codec.write_error("txn", WireError(code, text))) is Ambiguous


def header(revision: int, cluster: int = 1, term: int = 5) -> wire.EtcdHeader:
    return wire.EtcdHeader(revision=revision, cluster_id=cluster, raft_term=term)


def key(mod_revision: int) -> KeyValue:
    return KeyValue("a", b"", 1, mod_revision)


def test_no_space_is_sure_only_with_proof() -> None:
    sure = codec.surely_not_applied
    assert sure(header(7), header(7), [None])  # nothing was written at all
    assert sure(header(7), header(9), [key(8), key(7)])  # one of the keys is as old as before
    assert sure(header(7), header(7, term=6), [None])  # a new leader changes nothing
    assert not sure(header(7), header(9), [key(8)])
    assert not sure(header(7), header(9), [None])  # written and deleted again, or never: who knows
    assert not sure(None, header(9), [key(8)])  # nothing was known before
    assert not sure(header(7), header(7, cluster=2), [None])  # another cluster: restored (PROTOCOL J12)
    assert not sure(header(7), header(7, term=2), [key(3)])


def test_the_end_of_a_prefix() -> None:
    assert codec.prefix_end(b"a/") == b"a0"
    assert codec.prefix_end(b"a\xff\xff") == b"b"
    assert codec.prefix_end(b"") == codec.prefix_end(b"\xff") == b"\x00"


def test_the_size_we_count_bounds_the_size_on_the_wire() -> None:
    txn = Txn(
        [Compare.equals(f"key{n}", bytes(n)) for n in range(100)] + [Compare.unchanged("m" * 200, 1 << 62)],
        [Put(f"key{n}", bytes(n * 100), (1 << 62) + n) for n in range(100)] + [Delete("prefix/", prefix=True)],
        [Get(f"key{n}") for n in range(100)],
    )
    assert codec.txn_request(txn, b"baton/").ByteSize() <= txn_bytes(txn)


def test_targets() -> None:
    assert targets(["10.0.0.1:1", "http://10.0.0.2:2/"], False) == (
        "ipv4:10.0.0.1:1,10.0.0.2:2",
        "ipv4:10.0.0.2:2,10.0.0.1:1",
    )
    assert targets(["[::1]:1"], False) == ("ipv6:[::1]:1",)
    assert targets(["10.0.0.1:1", "10.0.0.2:2"], True) == ("ipv4:10.0.0.1:1", "ipv4:10.0.0.2:2")
    assert targets(["etcd-0:1", "10.0.0.2:2"], False) == ("dns:etcd-0:1", "ipv4:10.0.0.2:2")
