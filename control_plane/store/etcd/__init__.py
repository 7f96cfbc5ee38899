"""The Store port on a real etcd, over our own slice of its wire format (baton.internal.etcdwire). The only importer of
grpc below the services; no exception of grpc's leaves this package."""

from __future__ import annotations

from control_plane.store.etcd.channel import TlsFiles
from control_plane.store.etcd.client import EtcdStore
from control_plane.store.etcd.keeper import ThreadedLeaseKeeper

__all__ = ["EtcdStore", "ThreadedLeaseKeeper", "TlsFiles"]
