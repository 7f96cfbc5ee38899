"""What an agent may say (PROTOCOL S1, S2, C4): the first wrong field is named; what real agents say passes."""

from __future__ import annotations

from typing import Any

import pytest

from baton.v1 import agent_pb2 as pb
from baton.v1.cluster_pb2 import NodeShape
from control_plane.agent_rules import MAX_BEAT, MAX_NODES, heartbeat_problem, hello_problem

NODE: dict[str, Any] = {
    "count": 2,
    "cpu_millis": 4000,
    "total_cpu_millis": 8000,
    "memory_bytes": 1 << 34,
    "extended": {"gpus": 2},
}
LISTED: dict[str, Any] = {
    "shard": "00",
    "run_uids": ["r"],
    "run": [0],
    "task": [1],
    "n": [2],
    "nonce": ["x"],
    "generation": [3],
}


def hello(**changes: Any) -> pb.Hello:
    fields: dict[str, Any] = {
        "cluster": "eu-1",
        "instance": "3f2c",
        "boot_id": "b",
        "journal_uid": "j",
        "labels": {"zone": "a"},
        "taints": ["gpu=yes"],
        "namespaces": ["default"],
        "shapes": [NodeShape(**NODE)],
        "inventory": [listed()],
        "marks": [pb.ShardMark(shard="00", incarnation=1, seq=7, nonce="n")],
        "agent_version": "1.0.0",
        "last_generation": 3,
    }
    return pb.Hello(**fields | changes)


def listed(**changes: Any) -> pb.ShardInventory:
    return pb.ShardInventory(**{**LISTED, "phase": [pb.ATTEMPT_PHASE_RUNNING], **changes})


def shape(**changes: Any) -> NodeShape:
    return NodeShape(**{**NODE, **changes})


def test_s1_what_a_real_agent_says_passes() -> None:
    assert hello_problem(hello()) is None
    assert hello_problem(hello(shapes=[], inventory=[pb.ShardInventory(shard="01")], marks=[], labels={})) is None
    assert heartbeat_problem(pb.Heartbeat(seq=1, generation=1, shapes=[shape(cpu_millis=0)])) is None


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("hello.cluster", {"cluster": "a" * 1_600_000}),
        ("hello.cluster", {"cluster": "../x"}),
        ("hello.cluster", {"cluster": ""}),
        ("hello.instance", {"instance": "i" * 129}),
        ("hello.boot_id", {"boot_id": ""}),
        ("hello.journal_uid", {"journal_uid": "j" * 129}),
        ("hello.profile", {"profile": "p" * 129}),
        ("hello.federation_uid", {"federation_uid": "f" * 129}),
        ("hello.agent_version", {"agent_version": "v" * 65}),
        ("hello.last_generation", {"last_generation": (1 << 63) - 1}),
        ("hello.labels", {"labels": {f"k{n}": "v" for n in range(65)}}),
        ('hello.labels["k"]', {"labels": {"k": "v" * 3_000_000}}),
        ("hello.taints[0]", {"taints": ["two words"]}),
        ("hello.taints", {"taints": ["t"] * 65}),
        ("hello.namespaces[1]", {"namespaces": ["default", "Not A Name"]}),
        ("hello.marks[0]", {"marks": [pb.ShardMark(shard="00", seq=-1)]}),
        ("hello.marks", {"marks": [pb.ShardMark(shard="00")] * 257}),
        ("hello.inventory[0]", {"inventory": [listed(task=[1, 2])]}),
        ("hello.inventory[0].run", {"inventory": [listed(run=[-1])]}),
        ("hello.inventory[0].run", {"inventory": [listed(run=[1])]}),
        ("hello.inventory[0].task", {"inventory": [listed(task=[-1])]}),
        ("hello.inventory[0].nonce", {"inventory": [listed(nonce=["x" * 129])]}),
        ("hello.inventory[1].shard", {"inventory": [listed(), listed()]}),
        ("hello.shapes[0].count", {"shapes": [shape(count=0)]}),
    ],
)
def test_s1_a_wrong_field_of_a_hello_is_named(field: str, changes: dict[str, Any]) -> None:
    found = hello_problem(hello(**changes))
    assert found is not None
    assert found[0] == field
    assert len(f"{found[0]}{found[1]}") < 400, "a large text makes no large answer"


@pytest.mark.parametrize(
    ("field", "shapes"),
    [
        ("heartbeat.shapes[0].count", [shape(count=-1)]),
        ("heartbeat.shapes[0].count", [shape(count=MAX_NODES + 1)]),
        ("heartbeat.shapes", [shape(count=MAX_NODES), shape(count=1)]),
        ("heartbeat.shapes[1].cpu_millis", [shape(), shape(cpu_millis=-1)]),
        ("heartbeat.shapes[0].memory_bytes", [shape(memory_bytes=1 << 62)]),
        ("heartbeat.shapes[0].total_memory_bytes", [shape(total_memory_bytes=1 << 62)]),
        ('heartbeat.shapes[0].extended["gpus"]', [shape(extended={"gpus": -1})]),
        ("heartbeat.shapes[0].extended", [shape(extended={"Not a name": 1})]),
        ("heartbeat", [shape(cpu_millis=n) for n in range(MAX_BEAT // 20)]),
    ],
)
def test_c4_a_wrong_shape_of_a_heartbeat_is_named(field: str, shapes: list[NodeShape]) -> None:
    found = heartbeat_problem(pb.Heartbeat(seq=1, generation=1, shapes=shapes))
    assert found is not None
    assert found[0] == field
