"""Files that travel, with real processes: a checkpoint that outlives its cluster, large files in flat memory, a killed upload.

A page of Python over clusters that cannot see each other's files is in test_python_tasks.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from baton.v1 import graph_pb2
from bench.carrying import measure
from lab.layout import Layout
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import SUCCEEDED, Fed

STEPS = 60
LOST_AT = 40

STEPPING = """\
cd "$BATON_CHECKPOINT_DIR"
n=0; [ -e latest ] && n=$(wc -c < latest)
echo "from step $n"
while [ $n -lt 60 ]; do
  n=$((n + 1)); echo "step $n at $BATON_CLUSTER"
  head -c $n /dev/zero > draft; mv draft latest
  [ $n -eq 40 ] && [ "$BATON_ATTEMPT" = 1 ] && while :; do note tick; sleep 0.2; done
  sleep 0.02
done
"""
"""Its checkpoint is as many bytes as it has done steps. The first attempt never gets beyond the step at which it is lost."""


@pytest.mark.timeout(180)
async def test_a_task_whose_cluster_is_lost_at_step_40_goes_on_elsewhere_from_its_last_checkpoint(
    fed_here: MakeFederation,
) -> None:
    async with fed_here() as fed:
        run = await fed.run("steps", [fed.task("climb", STEPPING)])

        async def saved() -> int:
            return (await fed.tasks(run.name))["climb"].checkpoint.artifact.size

        async def at_the_step() -> bool:
            return await saved() == LOST_AT

        await fed.eventually(at_the_step, f"step {LOST_AT} to be committed")
        first = (await fed.tasks(run.name))["climb"].attempts[-1].cluster
        await fed.lab.kill(first)
        assert (await fed.client.wait_run(run.name, patience=120)).state == SUCCEEDED
        tasks = await fed.accepted_once(run.name)
        attempts = tasks["climb"].attempts
        assert [each.n for each in attempts] == [1, 2]
        assert attempts[1].cluster != first
        log = (await fed.cli("logs", "steps/climb")).stdout
        assert log.splitlines()[0] == f"from step {LOST_AT}"
        assert [int(n) for n in re.findall(r"step (\d+) at", log)] == list(range(LOST_AT + 1, STEPS + 1))
        timeline = (await fed.cli("timeline", "steps")).stdout
        assert f"resumed from {attempts[0].checkpoint} of attempt 1" in timeline, timeline
        fed.effects.check()


MEGABYTES = 96
BOUND = 80
"""Megabytes of growth, with 96 MB as with 1 GB (`python -m bench.carrying`): chunks in flight and the arenas of a few threads."""


@pytest.mark.timeout(180)
async def test_a_large_file_passes_agents_guards_and_replicas_in_flat_memory(tmp_path: Path) -> None:
    figures = await measure(tmp_path / "federation", MEGABYTES)
    print(figures)
    assert figures.same
    assert all(growth < BOUND for growth in figures.growth_mb.values()), figures


def objects(layout: Layout) -> list[Path]:
    return [path for path in layout.artifacts.rglob("*") if path.is_file()]


async def artifacts_of(fed: Fed, run: str) -> list[str]:
    return [source.artifact.name async for source in fed.client.artifacts.list(run)]


@pytest.mark.timeout(180)
async def test_an_upload_that_is_killed_leaves_nothing_visible_and_is_done_again(fed_here: MakeFederation) -> None:
    """The agent dies in the middle; its guard and the finished work do not. The next agent stores it."""
    large = 'head -c 200000000 /dev/urandom > "$BATON_ARTIFACTS_DIR/large"\n'
    async with fed_here(clusters=("eu",)) as fed:
        run = await fed.run("torn", [fed.task("make", large), reading(fed)])
        await fed.eventually(lambda: len(objects(fed.lab.layout)) > 3, "the upload to be under way")
        await fed.lab.kill("eu", agent_only=True)
        stored = objects(fed.lab.layout)
        assert stored
        assert not [path for path in stored if path.name == "manifest"]
        assert await artifacts_of(fed, run.name) == []
        got = await fed.cli("artifacts", "get", "torn", "make", "large", "-o", str(fed.directory / "got"))
        assert got.returncode != 0
        assert not (fed.directory / "got").exists()
        await fed.lab.start_again("eu")
        tasks = await fed.accepted_once(run.name)
        assert {each.accepted_results for each in tasks.values()} == {1}
        assert await artifacts_of(fed, run.name) == ["large"]
        assert tasks["make"].attempts[-1].n == 1  # nothing had to run again


def reading(fed: Fed) -> graph_pb2.Task:
    """A task that fails unless the whole file is there."""
    return fed.task("read", '[ "$(wc -c < "$BATON_INPUT_DIR/make/large")" = 200000000 ] || exit 1\n', after=["make"])
