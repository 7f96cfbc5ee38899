"""Bad input, from a person's file and on the wire: refused as the caller's fault, with the field named, and nothing changed.

"Changed nothing" is asked of etcd itself: no shard of runs has committed a batch, so no head has moved (PROTOCOL J4). The federation
is idle otherwise, and cordons, losses and heartbeats are the fleet shard's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from baton import requestid
from baton.client_call import error_of
from baton.clock import SystemEntropy
from baton.v1 import admin_pb2, cluster_pb2, graph_pb2, run_pb2
from control_plane.store.etcd import EtcdStore
from tests.e2e.federation import CLOCK, Fed, federation

pytestmark = pytest.mark.asyncio(loop_scope="module")

HUGE = "n" * (1 << 20)

MAX_SAID = 8 * 1024
"""Characters of an answer to a huge input: an error must not carry the megabyte back."""

HEAD = """\
apiVersion: baton/v1
kind: Graph
spec:
  deadline: 5m
  tasks:
"""
"""Five lines: the first task stands on line 6."""


@pytest.fixture(scope="module", loop_scope="module")
async def fed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fed]:
    async with federation(tmp_path_factory.mktemp("bad"), clusters=("eu",)) as found:
        await found.accepted_once((await found.run("before", [found.quick("works")])).name)
        yield found
        # Whatever was thrown at it, it serves as before.
        await found.accepted_once((await found.run("after", [found.quick("works")])).name)
        assert "Traceback" not in found.log_of("replica-1") + found.log_of("replica-2")


@pytest.fixture(autouse=True, loop_scope="module")
async def unchanged(fed: Fed) -> AsyncIterator[None]:
    """Nothing that a test did was committed."""
    assert fed.lab.links.store is not None
    host, port = fed.lab.links.store
    store = EtcdStore([f"{host}:{port}"], tls=None, key_prefix="baton/", clock=CLOCK)
    try:

        async def archived() -> bool:
            return await heads(store) == await heads(store)

        before = await settled(store)
        yield
        assert await heads(store) == before
    finally:
        await store.close()


async def heads(store: EtcdStore) -> dict[str, int]:
    """Revision of the newest commit of each shard of runs."""
    found = {}
    page = await store.range("shards/", timeout=10)
    for item in page.items:
        if item.key.endswith("/head") and "fleet" not in item.key:
            found[item.key] = item.mod_revision
    return found
