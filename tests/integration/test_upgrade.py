"""A federation that an older program made learns what the newer one can do, by itself (PROTOCOL J11): real replicas and calls."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from baton.cli import checks
from baton.errors import WrongState
from baton.time_limits import time_limit
from baton.v1 import graph_pb2
from control_plane import upgrading
from control_plane.artifacts.directory import DirectoryStore
from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import RUN_SHARDS
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from tests.integration.fake_clusters import fake_cluster
from tests.integration.replicas import CLOCK, ENTROPY, Rig, client, rig, spec, until

OLD = FEATURE_LEVEL - 1


def stored_code() -> graph_pb2.GraphSpec:
    """A task whose code is too large for the journal: the client stores it."""
    archive, graph = bytes(300_000), spec("a")
    sha256 = hashlib.sha256(archive).hexdigest()
    graph.tasks[0].ClearField("process")
    graph.tasks[0].python.CopyFrom(graph_pb2.PythonTask(function="m:f", args_json="[]", code=sha256))
    graph.codes.add(sha256=sha256, zip=archive)
    return graph


@pytest.mark.timeout(180)
async def test_j11_what_was_refused_works_once_the_last_old_replica_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrading, "LOOK", 0.1)
    graph = stored_code()
    made, objects = Rig(), DirectoryStore(tmp_path, CLOCK, ENTROPY)
    fixed = json.dumps({"uid": "made-by-an-older-program", "shards": len(RUN_SHARDS)}).encode()
    level = Put(keys.FEATURE_LEVEL, str(OLD).encode())
    made.etcd.txn(Txn((), (Put(keys.FEDERATION, fixed), Put(keys.INCARNATION, b"1"), level)))
    try:
        new = await made.add("new", objects=objects)
        with monkeypatch.context() as older:
            older.setattr("control_plane.replica.FEATURE_LEVEL", OLD)
            old = await made.add("old", objects=objects)
        await made.settled()
        monkeypatch.setattr(upgrading, "HOLD", 0.5)
        async with client(new) as user:
            with pytest.raises(WrongState, match=f"feature level {FEATURE_LEVEL}"):
                await user.create_run(graph, deadline=CLOCK.wall() + 600)
            told = checks.feature_level(await user.list_replicas())
            assert (told.status, "upgrade old" in told.fix) == (checks.WARN, True)

            made.nodes.remove(old)
            await old.channel.close()
            await old.replica.stop()
            await old.server.stop(0)
            await until(lambda: new.replica.controller.feature_level == FEATURE_LEVEL, 60)
            assert made.etcd.keyspace.live[keys.FEATURE_LEVEL].value == str(FEATURE_LEVEL).encode()
            run = await user.create_run(graph, deadline=CLOCK.wall() + 600)
            assert run.task_count == 1
            told = checks.feature_level(await user.list_replicas())
            assert told.status == checks.OK
    finally:
        await made.close()
        await objects.close()


async def test_j11_an_older_agent_gets_no_stored_code_and_the_task_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = DirectoryStore(tmp_path, CLOCK, ENTROPY)
    async with rig("r1", "r2", objects=objects) as made, client(*made.nodes) as user:
        endpoints = [node.server.address for node in made.nodes]
        monkeypatch.setattr("cluster_agent.agent.FEATURE_LEVEL", OLD)
        async with fake_cluster("eu", endpoints):
            run = await user.create_run(stored_code(), deadline=CLOCK.wall() + 600)
            plain = await user.create_run(spec("a"), deadline=CLOCK.wall() + 600)

            async def waits() -> bool:
                return (
                    "no cluster with an agent of feature level" in (await user.get_task(f"{run.name}/tasks/a")).reason
                )

            await holds(waits)
            await user.wait_run(plain.name, patience=60)
            monkeypatch.undo()
            async with fake_cluster("us", endpoints):

                async def placed() -> bool:
                    attempts = (await user.get_task(f"{run.name}/tasks/a")).attempts
                    return [attempt.cluster for attempt in attempts][:1] == ["us"]

                await holds(placed)
    await objects.close()


async def holds(look: Callable[[], Awaitable[bool]]) -> None:
    async with time_limit(60):
        while not await look():  # noqa: ASYNC110 - nobody would set an event for a test
            await asyncio.sleep(0.05)
