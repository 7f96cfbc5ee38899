"""A checkpoint's and an artifact's way through a replica: from an agent's report, by a commit, to the next dispatch and to readers
(PROTOCOL J7, F2; DESIGN 10)."""

from __future__ import annotations

from typing import Any

from baton.v1 import agent_pb2 as pb
from control_plane import agent_codec as codec
from control_plane.core.events import ARTIFACTS_LEVEL
from control_plane.core.model import AttemptId
from control_plane.store.memory import CallFault, MemoryEtcd
from tests.unit.journal_world import story, until
from tests.unit.test_serving import AgentEnd, Node, alone, linked


def ref(name: str) -> pb.ArtifactRef:
    return pb.ArtifactRef(name=name, size=3, digest=bytes(32))


def saved(attempt: AttemptId, number: int) -> pb.Reports:
    report = pb.CheckpointReport(attempt=codec.ref(attempt), artifact=ref(f"checkpoint-{number}"))
    return pb.Reports(shard="00", checkpoints=[report])


def settled(end: AgentEnd) -> list[str]:
    """Names of acknowledged checkpoints."""
    return [said.artifact.name for acks in end.of("report_acks") for said in acks.checkpoints]


async def running(server: MemoryEtcd) -> tuple[Node, AgentEnd, AttemptId]:
    node = await alone(server)
    end = node.dial(feature_level=ARTIFACTS_LEVEL)
    await linked(node, end)
    await node.create("r", 1)
    await node.place(1)
    await until(lambda: end.tasks() == [0])
    (attempt,) = node.machine().live_on(node.cluster)
    return node, end, attempt


async def moved(node: Node, lost: AttemptId) -> AgentEnd:
    """The host was booted anew, so its work is known dead (S6); the task is placed again."""
    end = node.dial(boot_id="b2", last_generation=1, feature_level=ARTIFACTS_LEVEL)
    await end.welcomed()
    await until(lambda: node.view.table.clusters[node.cluster].generation == 2)
    await until(lambda: bool(node.machine().demand()))
    await node.place(1)
    await until(lambda: end.tasks() == [0])
    assert lost not in node.machine().live_on(node.cluster)
    return end


def dispatch(end: AgentEnd) -> Any:
    return end.of("dispatches")[0].dispatches[0]


@story
async def test_j7_a_checkpoint_is_acknowledged_after_its_commit_and_comes_with_the_next_dispatch(
    server: MemoryEtcd,
) -> None:
    node, end, attempt = await running(server)
    assert not dispatch(end).HasField("checkpoint")
    node.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    end.say(reports=saved(attempt, 40))
    await until(lambda: settled(end) == ["checkpoint-40"])
    view = node.machine().task("r", "t0")
    assert view is not None
    assert view.checkpoint is not None, "it was committed before it was acknowledged"
    second = await moved(node, attempt)
    told = dispatch(second).checkpoint
    assert (told.artifact.name, told.attempt, told.cluster_uid) == ("checkpoint-40", codec.ref(attempt), node.cluster)
    assert (told.namespace, told.task_id) == ("ns", "t0")
    await node.crash()


@story
async def test_f2_a_late_checkpoint_is_settled_and_changes_nothing(server: MemoryEtcd) -> None:
    node, end, attempt = await running(server)
    end.say(reports=saved(attempt, 1))
    await until(lambda: settled(end) == ["checkpoint-1"])
    second = await moved(node, attempt)
    second.say(reports=saved(attempt, 2))
    await until(lambda: settled(second) == ["checkpoint-2"])
    view = node.machine().task("r", "t0")
    assert view is not None
    assert view.checkpoint is not None
    assert view.checkpoint.ref.name == "checkpoint-1"
    await node.crash()


@story
async def test_j7_a_takeover_dispatches_from_the_same_checkpoint(server: MemoryEtcd) -> None:
    node, end, attempt = await running(server)
    end.say(reports=saved(attempt, 7))
    await until(lambda: settled(end) == ["checkpoint-7"])
    second = await moved(node, attempt)
    await node.controller.release("00")
    await until(lambda: "00" not in node.controller.owned())
    assert await node.controller.take("00")
    again = node.dial(boot_id="b2", last_generation=2, feature_level=ARTIFACTS_LEVEL)
    await until(lambda: bool(again.tasks()))
    assert dispatch(again).checkpoint == dispatch(second).checkpoint
    await node.crash()


@story
async def test_f2_artifacts_are_seen_with_the_accepted_result(server: MemoryEtcd) -> None:
    node, end, attempt = await running(server)
    done = pb.FinishedReport(
        attempt=codec.ref(attempt), outcome=pb.OUTCOME_SUCCEEDED, artifacts=[ref("model.bin"), ref("result")]
    )
    end.say(reports=pb.Reports(shard="00", finished=[done]))
    await until(lambda: bool(end.of("report_acks")))
    views = node.machine().artifacts("r", 0, 10)
    assert [(view.ref.name, view.attempt, view.cluster) for view in views] == [
        ("model.bin", attempt, node.cluster),
        ("result", attempt, node.cluster),
    ]
    await node.crash()
