"""AdminService: what operators ask and do.

Replicas and shards are told from the view of the replica that is asked: a cache, a moment late, and still there when the store or
an owner is not, which is when operators look.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from baton import names
from baton.errors import BatonError, NotFound, StoreUnavailable
from baton.v1 import admin_pb2
from control_plane.core import commands
from control_plane.core.model import ALL_SHARDS, RUN_SHARDS, shard_of
from control_plane.core.ring import owners
from control_plane.core.shard import RunShard
from control_plane.peers import CallContext, Calls
from control_plane.restore import in_words
from control_plane.services import translate
from control_plane.services.desk import Desk
from control_plane.services.failures import committed, invalid
from control_plane.services.methods import PAGE_BYTES, Asked, check_request_id
from control_plane.store.base import StoreError

LIST = "/baton.internal/ListNamespaces"

DEFAULT_WEIGHT = 1.0
MAX_WEIGHT = 1e6
"""Weights are compared with each other; beyond this ratio a namespace is starved, not weighted."""

MAX_QUOTA = 1 << 40
MAX_RETENTION = 10 * 365 * 24 * 3600.0
"""Seconds: ten years of finished runs."""

Confirm = Callable[[bool], Awaitable[int]]
"""Takes an operator's word that the store was restored, at once if True. Raises WrongState, StoreError."""

Forgotten = Callable[[], Awaitable[list[str]]]
"""Runs that a restore has made nobody's, as far as anybody remembers: a line each."""

Snapshot = Callable[[], AsyncIterator[bytes]]
"""A consistent backup of the store, in pieces. Raises StoreError."""


class Unimplemented(BatonError):
    """This replica's store cannot do it; another kind of store could."""

    @property
    def code(self) -> int:
        """UNIMPLEMENTED."""
        return 12


class Admin:
    """AdminService."""

    def __init__(self, desk: Desk, confirm_restored: Confirm, snapshot: Snapshot | None, forgotten: Forgotten) -> None:
        self._desk, self._confirm_restored, self._snapshot = desk, confirm_restored, snapshot
        self._forgotten = forgotten

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(LIST, self._list_shard)

    async def list_replicas(
        self, _request: admin_pb2.ListReplicasRequest, _asked: Asked
    ) -> AsyncIterator[admin_pb2.ListReplicasResponse]:
        """AdminService.ListReplicas."""
        view = self._desk.view
        shards = Counter(owner.replica for owner in view.owners.values())
        yield admin_pb2.ListReplicasResponse(
            replicas=[
                admin_pb2.Replica(
                    id=member.replica,
                    address=member.address,
                    version=member.version,
                    feature_level=member.feature_level,
                    start_time=translate.timestamp(member.start_wall),
                    shards=shards[member.replica],
                )
                for _, member in sorted(view.members.items())
            ]
        )

    async def list_shards(
        self, _request: admin_pb2.ListShardsRequest, _asked: Asked
    ) -> AsyncIterator[admin_pb2.ListShardsResponse]:
        """AdminService.ListShards. Once nothing is suspected any more, the detail names what the restore has made nobody's."""
        view = self._desk.view
        preferred = owners(ALL_SHARDS, dict.fromkeys(view.members, 1.0))
        yield admin_pb2.ListShardsResponse(
            shards=[
                admin_pb2.Shard(
                    id=shard,
                    replica=view.owners[shard].replica if shard in view.owners else "",
                    preferred=preferred.get(shard, ""),
                )
                for shard in ALL_SHARDS
            ],
            incarnation=view.incarnation,
            restore_suspected=bool(view.restore_suspected),
            restore_detail=in_words(view.restore_suspected)
            if view.restore_suspected
            else "\n".join(await self._forgotten()),
        )

    # -- namespaces --------------------------------------------------------------------------------------------------------

    async def put_namespace(
        self, request: admin_pb2.PutNamespaceRequest, asked: Asked
    ) -> AsyncIterator[admin_pb2.PutNamespaceResponse]:
        """AdminService.PutNamespace, at the owner of the namespace's shard."""
        wanted = request.namespace
        weight = wanted.weight or DEFAULT_WEIGHT
        retention = translate.seconds(wanted.retention)
        shard = shard_of(wanted.name, "")
        text = f"namespace\n{wanted.name}\n{weight!r}\n{wanted.live_task_quota}\n{retention!r}"
        ask = commands.Request(request.request_id, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
        command = commands.PutNamespace(ask, wanted.name, weight, wanted.live_task_quota, retention)
        await self._desk.submit(shard, command, asked)
        with committed():
            view = await self._desk.read(shard, lambda machine: machine.namespace(wanted.name), asked)
        if view is None:
            raise NotFound(f"there is no namespace {wanted.name}")
        yield admin_pb2.PutNamespaceResponse(namespace=translate.namespace(view))

    async def list_namespaces(
        self, _request: admin_pb2.ListNamespacesRequest, asked: Asked
    ) -> AsyncIterator[admin_pb2.ListNamespacesResponse]:
        """AdminService.ListNamespaces: merged over all shards, in order of name."""
        found = await self._all(asked)
        yield admin_pb2.ListNamespacesResponse(namespaces=sorted(found, key=lambda namespace: namespace.name))

    async def _all(self, asked: Asked) -> list[admin_pb2.Namespace]:
        answers = await asyncio.gather(
            *(
                self._desk.forwarder.one(shard, LIST, json.dumps({"shard": shard}).encode(), asked)
                for shard in RUN_SHARDS
            )
        )
        return [each for a in answers for each in admin_pb2.ListNamespacesResponse.FromString(a).namespaces]

    async def _list_shard(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        shard = str(json.loads(payload)["shard"])

        def question(machine: RunShard) -> list[admin_pb2.Namespace]:
            return [translate.namespace(view) for view in machine.namespaces()]

        found = await self._desk.controller.read(shard, question, timeout=context.timeout)
        yield admin_pb2.ListNamespacesResponse(namespaces=found).SerializeToString()

    # -- the store ---------------------------------------------------------------------------------------------------------

    async def backup(self, _request: admin_pb2.BackupRequest, _asked: Asked) -> AsyncIterator[admin_pb2.BackupResponse]:
        """AdminService.Backup."""
        if self._snapshot is None:
            raise Unimplemented("UNIMPLEMENTED", "this replica's store offers no backup; use the store's own tools")
        try:
            async for data in self._snapshot():
                for start in range(0, len(data), PAGE_BYTES):
                    yield admin_pb2.BackupResponse(data=data[start : start + PAGE_BYTES])
        except StoreError as error:
            raise StoreUnavailable("the store did not finish the backup; start it anew") from error

    async def confirm_restored(
        self, request: admin_pb2.ConfirmRestoredRequest, _asked: Asked
    ) -> AsyncIterator[admin_pb2.ConfirmRestoredResponse]:
        """AdminService.ConfirmRestored (PROTOCOL J12). A repetition finds nothing suspected and changes nothing. Any replica
        answers: each counts the seconds by itself."""
        try:
            yield admin_pb2.ConfirmRestoredResponse(incarnation=await self._confirm_restored(request.now))
        except StoreError as error:
            raise StoreUnavailable("the store did not answer; repeat it", applied="unknown") from error


def shard_of_namespace(request: admin_pb2.PutNamespaceRequest) -> str:
    """The namespace's own shard (O6)."""
    return shard_of(request.namespace.name, "")


def check_put(request: admin_pb2.PutNamespaceRequest, now: float) -> None:
    """A namespace. Raises InvalidField, RequestIdAhead."""
    check_request_id(request.request_id, now)
    wanted = request.namespace
    if problem := names.id_problem(wanted.name):
        raise invalid("namespace.name", problem)
    if wanted.weight and not (math.isfinite(wanted.weight) and 1 / MAX_WEIGHT <= wanted.weight <= MAX_WEIGHT):
        raise invalid("namespace.weight", f"is {wanted.weight:g}: use 1e-6 to 1e6, or 0 for {DEFAULT_WEIGHT:g}")
    if not 0 <= wanted.live_task_quota <= MAX_QUOTA:
        raise invalid("namespace.live_task_quota", f"is {wanted.live_task_quota}: use 0 to {MAX_QUOTA}")
    nanos, retention = wanted.retention.nanos, translate.seconds(wanted.retention)
    if not 0 <= nanos < 10**9 or not 0 <= retention <= MAX_RETENTION:
        raise invalid("namespace.retention", "must be 0 (the default) to 10 years")


def check_confirm(request: admin_pb2.ConfirmRestoredRequest, now: float) -> None:
    """A confirmation. Raises InvalidField, RequestIdAhead."""
    check_request_id(request.request_id, now)
