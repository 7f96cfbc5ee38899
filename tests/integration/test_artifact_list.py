"""What a run published, asked of a replica: page by page, and the same when the run is archived (PROTOCOL J8, J10)."""

from __future__ import annotations

import pytest

from baton import errors
from baton.v1 import agent_pb2, artifact_pb2, artifact_pb2_grpc, run_pb2
from control_plane import archiver
from control_plane.controller import Controller
from control_plane.core.commands import Finish, Grant, TakeGrants, TakeReports, TakeTable
from control_plane.core.model import (
    Admission,
    ArtifactRef,
    AttemptId,
    ClusterFacts,
    FleetTable,
    Generation,
    Health,
    Outcome,
)
from control_plane.core.shard import RunShard
from control_plane.services import artifact_list
from tests.integration.replicas import Node, creation, rig, until
from tests.integration.test_services import failure

FACTS = ClusterFacts("c1", "eu", Health.READY, Admission.OPEN, (Generation(1, "boot", "disk"),))


class Lists:
    """ListArtifacts of one run."""

    def __init__(self, node: Node, run: run_pb2.Run) -> None:
        self._stub = artifact_pb2_grpc.ArtifactServiceStub(node.channel)
        self.run = run.name

    async def page(self, **more: object) -> artifact_pb2.ListArtifactsResponse:
        request = artifact_pb2.ListArtifactsRequest(run=self.run, **more)  # type: ignore[arg-type]
        answer: artifact_pb2.ListArtifactsResponse = await self._stub.ListArtifacts(request)
        return answer

    async def all(self, size: int = 0, task: str = "") -> list[agent_pb2.ArtifactSource]:
        """Over all pages; none is larger than was asked for."""
        found: list[agent_pb2.ArtifactSource] = []
        token = ""
        while True:
            page = await self.page(page_size=size, page_token=token, task=task)
            assert not size or len(page.artifacts) <= size
            found += page.artifacts
            token = page.next_page_token
            if not token:
                return found


async def placed(controller: Controller, shard: str, machine: RunShard) -> AttemptId:
    """The next attempt. A finished task's slot serves it (C2), unless the replica's own placement has just returned that slot: its
    leader grants nothing here."""
    for _ in range(100):
        if live := tuple(machine.live_on("c1")):
            return live[0]
        for line in machine.demand():
            await controller.submit(shard, TakeGrants(1 << 40, (Grant("c1", 1, line.key, 1),)), timeout=10)
    raise AssertionError("a hundred grants place nothing")


async def finished(node: Node, *ids: str) -> run_pb2.Run:
    """A run whose every other task made three artifacts."""
    run = (await node.runs.CreateRun(creation(*ids, run_id="old"))).run
    controller = node.replica.controller
    machine = controller.owned()[run.shard].machine
    assert isinstance(machine, RunShard)
    # A table of a later seq than fleet's own: this test is the fleet.
    await controller.submit(run.shard, TakeTable(FleetTable(1 << 40, {"c1": FACTS})), timeout=10)
    for _ in ids:
        attempt = await placed(controller, run.shard, machine)
        made = tuple(ArtifactRef(f"f{n}", n, bytes(32)) for n in range(3)) if not attempt.task % 2 else ()
        finish = Finish(attempt, Outcome.SUCCEEDED, 0, b"", "", 1.0, 2.0, made)
        await controller.submit(run.shard, TakeReports("c1", 1, finished=(finish,)), timeout=10)
    return run


async def test_j10_live_and_archived_runs_list_the_same_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archiver, "DELAY", 1e6)
    monkeypatch.setattr(artifact_list, "SCAN", 2)
    async with rig("r1") as made:
        (node,) = made.nodes
        run = await finished(node, "a", "b", "c", "d", "e")
        lists = Lists(node, run)
        wanted = [(task, f"f{n}") for task in "ace" for n in range(3)]

        async def check() -> None:
            for size in (0, 1, 2, 3, 4, 7, 9):
                found = await lists.all(size)
                assert [(each.task_id, each.artifact.name) for each in found] == wanted
            assert [each.artifact.name for each in await lists.all(2, task="c")] == ["f0", "f1", "f2"]
            assert await lists.all(task="b") == []
            assert isinstance(await failure(lists.page(task="none")), errors.NotFound)
            task = (await node.runs.GetTask(run_pb2.GetTaskRequest(name=f"{run.name}/tasks/c"))).task
            assert list(task.artifacts) == await lists.all(task="c")
            assert not task.HasField("checkpoint")

        machine = node.replica.controller.owned()[run.shard].machine
        assert isinstance(machine, RunShard)
        await check()
        live = await lists.all()
        monkeypatch.setattr(archiver, "DELAY", 0.1)
        await until(lambda: machine.run_by_uid(run.uid) is None)
        await check()
        assert await lists.all() == live
        # A look that is cut short goes on at the next page.
        monkeypatch.setattr(artifact_list, "MAX_SCANNED", 2)
        assert (await lists.page()).next_page_token
        await check()


async def test_bad_questions_are_refused() -> None:
    async with rig("r1") as made:
        (node,) = made.nodes
        run = (await node.runs.CreateRun(creation("a"))).run
        lists = Lists(node, run)
        for wrong in ({"page_size": -1}, {"page_token": "x"}, {"task": "a b"}):
            assert isinstance(await failure(lists.page(**wrong)), errors.InvalidField)
        assert await lists.all() == []
        lists.run = "namespaces/default/runs/none"
        assert isinstance(await failure(lists.page()), errors.NotFound)
        lists.run = "none"
        assert isinstance(await failure(lists.page()), errors.InvalidField)
