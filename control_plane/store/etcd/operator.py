"""What an operator does to an etcd, not a replica: back it up, raise and disarm its alarms.

Theory: none of this is part of the Store port, for no decision of Baton's may rest on it. It is synchronous, on a
connection of its own, for tools and tests. Failures come as `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from baton.internal import etcdwire_pb2 as wire
from control_plane.store.base import Unavailable
from control_plane.store.etcd.channel import CHANNEL_OPTIONS, STATUS, Method, TlsFiles, targets

_ALARM = Method(
    "/etcdserverpb.Maintenance/Alarm", wire.EtcdAlarmRequest.SerializeToString, wire.EtcdAlarmResponse.FromString
)
_SNAPSHOT = Method(
    "/etcdserverpb.Maintenance/Snapshot",
    wire.EtcdSnapshotRequest.SerializeToString,
    wire.EtcdSnapshotResponse.FromString,
)


def save_snapshot(endpoint: str, path: Path, *, timeout: float, tls: TlsFiles | None = None) -> None:
    """Write a backup of one member to `path`, the file that `etcdutl snapshot restore` takes. Raises Unavailable; the
    file is then of no use."""
    with _connected(endpoint, tls) as channel, path.open("wb") as file:
        stub = channel.unary_stream(_SNAPSHOT.path, _SNAPSHOT.encode, _SNAPSHOT.decode)
        for piece in stub(wire.EtcdSnapshotRequest(), timeout=timeout):
            file.write(piece.blob)


def set_nospace(endpoint: str, active: bool, *, timeout: float, tls: TlsFiles | None = None) -> None:
    """Raise or disarm the NOSPACE alarm of one member: while it is up, writes that grow the store are refused, on every
    member. Raises Unavailable."""
    action = wire.EtcdAlarmRequest.ACTION_ACTIVATE if active else wire.EtcdAlarmRequest.ACTION_DEACTIVATE
    with _connected(endpoint, tls) as channel:
        status = channel.unary_unary(STATUS.path, STATUS.encode, STATUS.decode)
        member = status(wire.EtcdStatusRequest(), timeout=timeout).header.member_id
        alarm = channel.unary_unary(_ALARM.path, _ALARM.encode, _ALARM.decode)
        request = wire.EtcdAlarmRequest(action=action, member_id=member, alarm=wire.ETCD_ALARM_TYPE_NOSPACE)
        alarm(request, timeout=timeout)


@contextmanager
def _connected(endpoint: str, tls: TlsFiles | None) -> Iterator[grpc.Channel]:
    (target,) = targets([endpoint], tls is not None)
    if tls is None:
        channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.secure_channel(target, tls.credentials(), options=CHANNEL_OPTIONS)
    try:
        yield channel
    except grpc.RpcError as error:
        raise Unavailable(f"etcd at {endpoint}: {error}") from error
    finally:
        channel.close()
