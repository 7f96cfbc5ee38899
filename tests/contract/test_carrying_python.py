"""Files of Python calls at the executor: large results, the helpers of `baton` in a worker, stored code (DESIGN 10)."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster_agent.executors.base import Cause, Exited, PythonCall, StartRequest
from tests.contract.carrying_agent import join
from tests.contract.carrying_world import RUN, CarryingWorld, ref_of
from tests.contract.test_executor import Agent, new_key

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[CarryingWorld]:
    made = CarryingWorld(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def agent(world: CarryingWorld) -> AsyncIterator[Agent]:
    made = await join(world)
    yield made
    await made.executor.close()


STEPS = """
import baton
from baton import checkpoint
def big(size): return list(range(size))
def total(values): return sum(values)
def odd(): return {1, 2}
def both():
    baton.artifact_path("result").write_text("x")
    return "y" * 20_000
def makes(name):
    baton.artifact_path(name).write_text("made")
    return name
def reads(done): return baton.input_path("maker", "some.txt").read_text()
def lacks(): return str(baton.input_path("maker", "none.txt"))
def saves(value):
    before = checkpoint.load()
    checkpoint.save(value)
    return [before, checkpoint.load()]
def cannot_save(): checkpoint.save({1})
"""


def packed() -> tuple[str, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("steps.py"), STEPS)
    return hashlib.sha256(out.getvalue()).hexdigest(), out.getvalue()


SHA256, ZIP = packed()


def call(
    world: CarryingWorld, key: object, function: str, *args: object, stored: bool = False, **more: object
) -> StartRequest:
    python = PythonCall(
        f"steps:{function}", json.dumps(args), code=SHA256, code_zip=b"" if stored else ZIP, tenant="default"
    )
    env = {"PATH": world.path, "BATON_RUN": RUN, "BATON_TASK": "it"}
    return StartRequest(key, 1, (), env, python=python, **more)  # type: ignore[arg-type]


async def ran(world: CarryingWorld, agent: Agent, function: str, *args: object, **more: object) -> Exited:
    key = new_key()
    await agent.executor.start([call(world, key, function, *args, **more)])  # type: ignore[arg-type]
    return await agent.exit_of(key)


async def test_a_large_result_is_an_artifact_and_the_value_for_whoever_asks(world: CarryingWorld, agent: Agent) -> None:
    made = await ran(world, agent, "big", 50_000)
    assert made.succeeded
    assert made.result == b""
    [ref] = made.artifacts
    assert ref.name == "result"
    assert json.loads(world.store.content(made.key, "result")) == list(range(50_000))
    source = world.store.publish(made.key, "big", "result", world.store.content(made.key, "result"))
    exited = await ran(world, agent, "total", {"$baton.result": "big"}, artifacts=(source,))
    assert exited.result == str(sum(range(50_000))).encode()


async def test_python_helpers_make_and_read_files(world: CarryingWorld, agent: Agent) -> None:
    made = await ran(world, agent, "makes", "some.txt")
    assert made.artifacts == (ref_of("some.txt", b"made"),)
    source = world.store.publish(made.key, "maker", "some.txt", b"made")
    assert (await ran(world, agent, "reads", 1, artifacts=(source,))).result == b'"made"'
    lacking = await ran(world, agent, "lacks", artifacts=(source,))
    assert "none.txt" in lacking.message
    assert "its artifacts: some.txt" in lacking.message
    assert "letters, digits" in (await ran(world, agent, "makes", "../up")).message
    assert (await ran(world, agent, "saves", {"a": [1]})).result == b'[null,{"a":[1]}]'


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("odd", ["set", "not JSON"]),
        ("both", ["artifact 'result'", "too"]),
        ("cannot_save", ["bytes or JSON", "set is neither"]),
    ],
)
async def test_a_result_or_checkpoint_of_the_wrong_kind_is_the_applications_fault(
    world: CarryingWorld, agent: Agent, function: str, words: list[str]
) -> None:
    exited = await ran(world, agent, function)
    assert exited.cause in (Cause.RESULT, Cause.EXIT)
    assert not exited.succeeded
    assert all(word in exited.message for word in words), exited.message


async def test_a_worker_keeps_no_files_for_the_next_task(world: CarryingWorld, agent: Agent) -> None:
    first = await ran(world, agent, "makes", "some.txt")
    second = await ran(world, agent, "total", [1, 2])
    assert first.artifacts
    assert (second.result, second.artifacts) == (b"3", ())


async def test_stored_code_is_fetched_once_and_kept(world: CarryingWorld, agent: Agent) -> None:
    world.store.codes[SHA256] = ZIP
    keys = [new_key(), new_key()]
    await agent.executor.start([call(world, key, "total", [1, 2], stored=True) for key in keys])
    for key in keys:
        assert (await agent.exit_of(key)).result == b"3"
    assert (await ran(world, agent, "total", [1], stored=True)).result == b"1"
    assert len(world.store.gets) == 1
