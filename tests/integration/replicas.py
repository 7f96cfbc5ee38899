"""Real replicas in one process: a store in memory, real gRPC on loopback, real time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from baton import requestid
from baton.client import AsyncClient
from baton.clock import SystemClock, SystemEntropy
from baton.time_limits import time_limit
from baton.v1 import admin_pb2_grpc, cluster_pb2_grpc, graph_pb2, graph_pb2_grpc, run_pb2, run_pb2_grpc
from control_plane.core.model import ALL_SHARDS
from control_plane.history import MemoryHistory
from control_plane.server import GrpcServer, Identity, Listener, Parts, Replica
from control_plane.store.keeper import TaskLeaseKeeper
from control_plane.store.memory import MemoryEtcd, MemoryStore

CLOCK, ENTROPY = SystemClock(), SystemEntropy()


@dataclass
class Node:
    """One replica, its listener, and plain stubs to it."""

    replica: Replica
    server: GrpcServer
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.runs = run_pb2_grpc.RunServiceStub(self.channel)
        self.graphs = graph_pb2_grpc.GraphServiceStub(self.channel)
        self.clusters = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def owned(self) -> set[str]:
        return set(self.replica.controller.owned())


@dataclass
class Rig:
    """A federation. `history` is shared, as a host's file would be."""

    etcd: MemoryEtcd = field(default_factory=lambda: MemoryEtcd(CLOCK))
    history: MemoryHistory = field(default_factory=MemoryHistory)
    nodes: list[Node] = field(default_factory=list)

    async def add(self, name: str, **more: Any) -> Node:
        """`more`: further `Parts`."""
        server = GrpcServer(Listener("127.0.0.1:0", reflection=True))
        store = MemoryStore(self.etcd)
        parts = Parts(
            store=store,
            make_keeper=lambda: TaskLeaseKeeper(store, CLOCK),
            make_peers=lambda view: server.make_peers(name, CLOCK, view),
            clock=CLOCK,
            entropy=ENTROPY,
            history=self.history,
            **more,
        )
        replica = Replica(Identity(name, server.address), parts)
        await replica.start()
        await server.start(replica)
        async with time_limit(20):
            await replica.ready()
        await server.serving()
        node = Node(replica, server, grpc.aio.insecure_channel(server.address))
        self.nodes.append(node)
        return node

    async def settled(self) -> None:
        """Every shard has an owner, spread over all nodes, and all nodes have heard of it."""
        await until(lambda: set().union(*(node.owned for node in self.nodes)) == set(ALL_SHARDS))
        await until(lambda: all(node.owned for node in self.nodes))
        await until(lambda: all(set(node.replica.view.owners) == set(ALL_SHARDS) for node in self.nodes))

    async def close(self) -> None:
        for node in self.nodes:
            await node.channel.close()
            await node.replica.kill()
            await node.server.stop(0)
        await self.etcd.close()


@asynccontextmanager
async def rig(*names: str, **more: Any) -> AsyncIterator[Rig]:
    made = Rig()
    try:
        for name in names:
            await made.add(name, **more)
        await made.settled()
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def client(*nodes: Node) -> AsyncIterator[AsyncClient]:
    async with AsyncClient([node.server.address for node in nodes]) as made:
        yield made


async def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    async with time_limit(seconds):
        while not holds():  # noqa: ASYNC110 - nobody would set an event for a test
            await asyncio.sleep(0.02)


def request_id() -> str:
    return requestid.new(CLOCK, ENTROPY)


def spec(*ids: str) -> graph_pb2.GraphSpec:
    """A chain of tasks."""
    made = graph_pb2.GraphSpec()
    for place, id_ in enumerate(ids):
        task = made.tasks.add(id=id_, process=graph_pb2.ProcessTask(argv=["true"]))
        task.parents.extend(ids[max(0, place - 1) : place])
    return made


def creation(*ids: str, **fields: object) -> run_pb2.CreateRunRequest:
    """A good request; `fields` over it."""
    request = run_pb2.CreateRunRequest(request_id=request_id(), spec=spec(*(ids or ("a",))))
    request.deadline_time.FromMilliseconds(int((CLOCK.wall() + 600) * 1000))
    request.MergeFrom(run_pb2.CreateRunRequest(**fields))  # type: ignore[arg-type]
    return request
