"""Files of attempts at the executor (executors/carrying.py): fetched before the start, stored before the end is told.

The guard and the workloads are real; the artifact store is a dictionary that can wait, fail and lie. Rules F1, F4, F5, F8; DESIGN 10.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from baton.time_limits import time_limit
from cluster_agent.carrying.port import CarrierDown, CarrierFull, NotConfigured
from cluster_agent.core.model import ArtifactSource
from cluster_agent.executors.base import AttemptKey, Cause, Phase, Refused, Saved, Started, Stopped
from tests.contract.carrying_agent import join
from tests.contract.carrying_world import PATIENCE, CarryingWorld, ref_of
from tests.contract.executor_worlds import FakeWorld
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


async def eventually(see: Callable[[], bool]) -> None:
    async with time_limit(20):
        while not see():  # noqa: ASYNC110 - what is waited for is on a disk, or in another process
            await asyncio.sleep(0.01)


# --- what it leaves ---------------------------------------------------------------------------------------------------


async def test_files_that_a_success_left_are_stored_and_told_with_its_end(world: CarryingWorld, agent: Agent) -> None:
    key = new_key()
    script = (
        'printf one > "$BATON_ARTIFACTS_DIR/a.txt"; printf two > "$BATON_ARTIFACTS_DIR/b"; printf 7 > "$BATON_RESULT"'
    )
    await agent.executor.start([world.shell(key, script)])
    exited = await agent.exit_of(key)
    assert exited.succeeded
    assert exited.result == b"7"
    assert exited.artifacts == (ref_of("a.txt", b"one"), ref_of("b", b"two"))
    assert world.store.content(key, "a.txt") == b"one"
    assert agent.kinds(key) == ["Started", "Exited"]


async def test_a_failure_leaves_nothing(world: CarryingWorld, agent: Agent) -> None:
    key = new_key()
    await agent.executor.start([world.shell(key, 'printf one > "$BATON_ARTIFACTS_DIR/a"; exit 3')])
    exited = await agent.exit_of(key)
    assert (exited.exit_code, exited.artifacts) == (3, ())
    assert world.store.names(key) == set()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('ln -s /etc/hostname "$BATON_ARTIFACTS_DIR/link"', ["'link'", "symbolic link", "copy the file"]),
        ('mkdir "$BATON_ARTIFACTS_DIR/sub"', ["'sub'", "is a folder", "pack it"]),
        ('touch "$BATON_ARTIFACTS_DIR/a b"', ["'a b'", "letters, digits"]),
        ('touch "$BATON_ARTIFACTS_DIR/checkpoint-3"', ["'checkpoint-3'", "name of a checkpoint"]),
        ('cd "$BATON_ARTIFACTS_DIR"; for i in $(seq 65); do touch f$i; done', ["65 files", "limit of 64"]),
        ('mkfifo "$BATON_ARTIFACTS_DIR/pipe"', ["'pipe'", "no regular file"]),
        ('printf 1 > "$BATON_RESULT"; printf 2 > "$BATON_ARTIFACTS_DIR/result"', ["came twice"]),
        (
            'cd /; mv "$BATON_ARTIFACTS_DIR" "$BATON_ARTIFACTS_DIR.x"; ln -s /etc "$BATON_ARTIFACTS_DIR"',
            ["no folder any more"],
        ),
    ],
)
async def test_what_cannot_be_an_artifact_is_the_applications_fault_and_named(
    world: CarryingWorld, agent: Agent, script: str, words: list[str]
) -> None:
    key = new_key()
    await agent.executor.start([world.shell(key, script)])
    exited = await agent.exit_of(key)
    assert exited.cause is Cause.RESULT
    assert exited.artifacts == ()
    assert all(word in exited.message for word in words), exited.message
    assert world.store.names(key) == set()


async def test_a_store_that_is_down_for_a_moment_costs_a_moment(world: CarryingWorld, agent: Agent) -> None:
    key = new_key()
    world.store.failures = [CarrierDown("it does not answer"), CarrierFull("it is full")]
    await agent.executor.start([world.shell(key, 'printf one > "$BATON_ARTIFACTS_DIR/a"')])
    exited = await agent.exit_of(key)
    assert exited.succeeded
    assert exited.artifacts == (ref_of("a", b"one"),)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        (
            CarrierDown("127.0.0.1 is silent"),
            Cause.CARRIAGE,
            ["artifact store unreachable for 1 s", "127.0.0.1 is silent"],
        ),
        (CarrierFull("the bucket is full"), Cause.CARRIAGE, ["artifact store full", "the bucket is full"]),
        (NotConfigured("no artifact store: --artifacts"), Cause.RESULT, ["no artifact store", "--artifacts"]),
    ],
)
async def test_a_store_that_stays_away_ends_the_attempt_and_says_whose_fault_it_is(
    world: CarryingWorld, agent: Agent, fault: CarrierDown, cause: Cause, words: list[str]
) -> None:
    key = new_key()
    world.store.down = fault
    await agent.executor.start([world.shell(key, 'printf one > "$BATON_ARTIFACTS_DIR/a"')])
    exited = await agent.exit_of(key)
    assert exited.cause is cause
    assert (exited.result, exited.artifacts) == (b"", ())
    assert all(word in exited.message for word in words), exited.message


async def test_a_stop_while_its_files_are_stored_ends_it_as_stopped(world: CarryingWorld, agent: Agent) -> None:
    key = new_key()
    world.store.open.clear()
    await agent.executor.start([world.shell(key, 'printf one > "$BATON_ARTIFACTS_DIR/a"')])
    await agent.until(Started, key)
    listening = asyncio.create_task(agent.until(Stopped, key))
    await eventually(lambda: world.store.waiting == 1)
    await agent.executor.stop([key], grace_seconds=1.0)
    await listening
    exited = await agent.exit_of(key)
    assert (exited.cause, exited.artifacts) == (Cause.STOP, ())
    world.store.open.set()
    assert world.store.names(key) == set()


async def test_an_agent_that_crashes_between_exit_and_upload_is_followed_by_one_that_stores(
    world: CarryingWorld,
) -> None:
    first, key = await join(world), new_key()
    world.store.open.clear()
    await first.executor.start([world.shell(key, 'printf one > "$BATON_ARTIFACTS_DIR/a"; printf 7 > "$BATON_RESULT"')])
    await first.until(Started, key)
    listening = asyncio.create_task(first.until(Stopped))
    await eventually(lambda: world.store.waiting == 1)
    listening.cancel()
    await first.executor.close()
    world.store.open.set()
    second = await join(world)
    assert second.census[key].phase is Phase.RUNNING  # to the agent it runs until its files are stored
    assert second.census[key].exited is None
    exited = await second.exit_of(key)
    assert (exited.result, exited.artifacts) == (b"7", (ref_of("a", b"one"),))
    await second.executor.close()
    third = await join(world)
    told = third.census[key].exited
    assert told is not None
    assert told.artifacts == (ref_of("a", b"one"),)
    assert world.store.puts == ["a"]  # it was known to be stored
    await third.executor.forget([key])
    await third.executor.close()
    fourth = await join(world)
    assert key not in fourth.census or fourth.census[key].exited is None
    await fourth.executor.close()


# --- what it is given -------------------------------------------------------------------------------------------------


async def test_artifacts_of_parents_are_there_when_it_starts(world: CarryingWorld, agent: Agent) -> None:
    one = world.store.publish(new_key(), "load", "rows.csv", b"a,b")
    two = world.store.publish(new_key(), "fit", "model", b"m" * 3_000_000)  # larger than the cache
    keys = [new_key(), new_key()]
    script = 'cd "$BATON_INPUT_DIR"; cat load/rows.csv > "$BATON_RESULT"; wc -c < fit/model >> "$BATON_RESULT"'
    await agent.executor.start([world.shell(key, script, artifacts=(one, two)) for key in keys])
    for key in keys:
        exited = await agent.exit_of(key)
        assert exited.succeeded, exited
        assert exited.result.split() == [b"a,b3000000"]
    assert sorted(world.store.gets).count("artifact rows.csv of task load") == 1  # the second came from the cache
    inputs = world.directory.parent / "carried" / "inputs"
    await eventually(lambda: not any(inputs.iterdir()))


async def test_who_writes_into_its_inputs_changes_nobody_elses(world: CarryingWorld, agent: Agent) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    first, second = new_key(), new_key()
    vandal = 'cd "$BATON_INPUT_DIR/load"; chmod u+w rows; printf lies > rows'
    await agent.executor.start([world.shell(first, vandal, artifacts=(source,))])
    assert (await agent.exit_of(first)).succeeded
    await agent.executor.start(
        [world.shell(second, 'cat "$BATON_INPUT_DIR/load/rows" > "$BATON_RESULT"', artifacts=(source,))]
    )
    assert (await agent.exit_of(second)).result == b"true"
    assert len(world.store.gets) == 1


async def test_damaged_content_is_fetched_again_and_then_blamed_on_the_store(
    world: CarryingWorld, agent: Agent
) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    good, bad = new_key(), new_key()
    world.store.damaged = 2
    await agent.executor.start(
        [world.shell(good, 'cat "$BATON_INPUT_DIR/load/rows" > "$BATON_RESULT"', artifacts=(source,))]
    )
    assert (await agent.exit_of(good)).result == b"true"
    broken = dataclasses.replace(source, ref=ref_of("rows", b"other"))
    await agent.executor.start([world.shell(bad, "true", artifacts=(broken,))])
    exited = await agent.exit_of(bad)
    assert exited.cause is Cause.CARRIAGE
    assert all(
        w in exited.message for w in ("artifact rows of task load", "3 times", "artifact store's content is damaged")
    )


async def test_what_is_not_in_the_store_ends_it_before_it_starts(world: CarryingWorld, agent: Agent) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    world.store.objects.clear()
    key = new_key()
    await agent.executor.start([world.shell(key, "true", artifacts=(source,))])
    exited = await agent.exit_of(key)
    assert exited.cause is Cause.CARRIAGE
    assert "not in the store" in exited.message
    assert agent.kinds(key) == ["Exited"]


async def test_a_stop_while_it_waits_for_its_files_keeps_it_from_ever_starting(
    world: CarryingWorld, agent: Agent
) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    key = new_key()
    world.store.open.clear()
    request = world.shell(key, "true", artifacts=(source,))
    await agent.executor.start([request])
    await eventually(lambda: world.store.waiting == 1)
    await agent.executor.stop([key], grace_seconds=1.0)
    await agent.until(Stopped, key)
    world.store.open.set()
    await agent.executor.start([request])  # F8: the tombstone is at the guard
    [refused] = await agent.until(Refused, key)
    assert isinstance(refused, Refused)
    assert "Started" not in agent.kinds(key)


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def end(agent: Agent, key: AttemptKey, order: str) -> None:
    if order == "stop":
        await agent.executor.stop([key], grace_seconds=0.5)
    else:
        await agent.executor.kill_all()


@pytest.mark.parametrize("order", ["stop", "kill_all"])
@pytest.mark.parametrize("passing", ["slow", "unclear"])
async def test_who_is_stopped_while_its_start_may_be_at_the_guard_is_dead_when_its_end_is_told(
    world: CarryingWorld, agent: Agent, passing: str, order: str
) -> None:
    """F8, F2: the call has not returned, or failed, but the process runs; only the guard may say that it does not any more."""
    source = world.store.publish(new_key(), "load", "rows", b"true")
    key = new_key()
    if passing == "slow":
        world.passage.returns.clear()
    else:
        world.passage.unclear = 1
    script = "trap '' TERM; while true; do sleep 0.05; done"
    await agent.executor.start([world.shell(key, script, artifacts=(source,))])
    [started] = await agent.until(Started, key)
    assert isinstance(started, Started)
    await eventually(lambda: world.passage.unclear == 0)
    await end(agent, key, order)
    exited = await agent.exit_of(key)
    assert not lives(started.pid)
    assert exited.cause is Cause.STOP
    await agent.until(Stopped, key)
    assert agent.kinds(key) == ["Started", "Exited", "Stopped"]


@pytest.mark.parametrize("order", ["stop", "kill_all"])
async def test_a_start_that_reaches_the_guard_after_its_stop_comes_to_nothing(
    world: CarryingWorld, agent: Agent, order: str
) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    key = new_key()
    world.passage.leaves.clear()
    await agent.executor.start([world.shell(key, "sleep 60", artifacts=(source,))])
    await eventually(lambda: world.passage.asked == [key])
    await end(agent, key, order)
    world.passage.leaves.set()
    await agent.until(Refused, key)  # F8: the tombstone was there first
    assert agent.kinds(key) == ["Stopped", "Refused"]


async def test_a_start_that_came_through_although_its_call_failed_is_not_repeated(
    world: CarryingWorld, agent: Agent
) -> None:
    """F4, J7: the guard would answer `Refused` to the second, which must not compete with the `Exited` of the first."""
    source = world.store.publish(new_key(), "load", "rows", b"true")
    key, other = new_key(), new_key()
    world.passage.unclear = 1
    await agent.executor.start([world.shell(key, 'printf 7 > "$BATON_RESULT"', artifacts=(source,))])
    assert (await agent.exit_of(key)).result == b"7"
    await eventually(lambda: world.passage.unclear == 0)
    await agent.connect()
    told = agent.census[key].exited
    assert told is not None
    assert told.result == b"7"
    await agent.executor.configure(30.0, 4.0)
    await agent.executor.renew(1, world.clock.boot())
    await agent.executor.start([world.shell(other, "true")])
    assert (await agent.exit_of(other)).succeeded
    assert world.passage.asked == [key, other]
    assert "Refused" not in agent.kinds(key)


async def test_a_lease_that_passes_while_it_waits_for_its_files_keeps_it_from_starting(
    world: CarryingWorld, agent: Agent
) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    lapsed, adopted = new_key(), new_key()
    world.store.open.clear()
    requests = [world.shell(key, "true", artifacts=(source,)) for key in (lapsed, adopted)]
    await agent.executor.start([dataclasses.replace(request, generation=3) for request in requests])
    await eventually(lambda: world.store.waiting == 1)  # for both: one fetches, the other waits for it
    await agent.executor.adopt([adopted], 1)  # of generation 3 no heartbeat was ever answered
    world.store.open.set()
    assert (await agent.exit_of(adopted)).succeeded
    if not any(isinstance(event, Refused) and event.key == lapsed for event in agent.told):
        await agent.until(Refused, lapsed)
    assert "Started" not in agent.kinds(lapsed)


async def test_a_guard_that_dies_while_it_waits_for_its_files_does_not_cost_it(
    world: CarryingWorld, agent: Agent
) -> None:
    source = world.store.publish(new_key(), "load", "rows", b"true")
    key = new_key()
    world.store.open.clear()
    await agent.executor.start(
        [world.shell(key, 'cat "$BATON_INPUT_DIR/load/rows" > "$BATON_RESULT"', artifacts=(source,))]
    )
    await eventually(lambda: world.store.waiting == 1)
    world.kill_guard()
    await agent.connect()
    assert agent.census[key].phase is Phase.STARTING
    await agent.executor.configure(30.0, 4.0)
    await agent.executor.renew(1, world.clock.boot())
    world.store.open.set()
    assert (await agent.exit_of(key)).result == b"true"


async def test_a_restarted_agent_does_not_list_what_it_was_fetching_for(world: CarryingWorld) -> None:
    first, key = await join(world), new_key()
    source = world.store.publish(new_key(), "load", "rows", b"true")
    world.store.open.clear()
    await first.executor.start([world.shell(key, "true", artifacts=(source,))])
    await eventually(lambda: world.store.waiting == 1)
    await first.executor.close()
    second = await join(world)
    assert key not in second.census  # so it is reported lost, after a tombstone (F4)
    assert not any((world.directory.parent / "carried" / "inputs").iterdir())
    await second.executor.close()


# --- checkpoints ------------------------------------------------------------------------------------------------------

SAVE = 'save() { printf %s "$1" > "$BATON_CHECKPOINT_DIR/draft"; mv "$BATON_CHECKPOINT_DIR/draft" "$BATON_CHECKPOINT_DIR/latest"; }\n'


async def test_checkpoints_of_a_running_attempt_are_stored_and_told_once_each(
    world: CarryingWorld, agent: Agent
) -> None:
    key = new_key()
    go = world.directory.parent / "go"
    script = f"{SAVE} save one; while [ ! -e {go} ]; do sleep 0.05; done; save two; sleep 60"
    await agent.executor.start([world.shell(key, script)])
    [first] = await agent.until(Saved, key)
    assert isinstance(first, Saved)
    assert first.checkpoint == ref_of("checkpoint-1", b"one")
    go.touch()
    agent.told.clear()
    [second] = await agent.until(Saved, key)
    assert isinstance(second, Saved)
    assert second.checkpoint == ref_of("checkpoint-2", b"two")
    assert world.store.names(key) == {"checkpoint-1", "checkpoint-2"}


async def test_a_restarted_agent_tells_the_last_checkpoint_again_and_goes_on_counting(world: CarryingWorld) -> None:
    first, key = await join(world), new_key()
    go = world.directory.parent / "go"
    script = f"{SAVE} save one; while [ ! -e {go} ]; do sleep 0.05; done; save two; sleep 60"
    await first.executor.start([world.shell(key, script)])
    await first.until(Saved, key)
    await first.executor.close()
    second = await join(world)
    [again] = await second.until(Saved, key)
    assert isinstance(again, Saved)
    assert again.checkpoint.name == "checkpoint-1"
    go.touch()
    second.told.clear()
    [newer] = await second.until(Saved, key)
    assert isinstance(newer, Saved)
    assert newer.checkpoint == ref_of("checkpoint-2", b"two")
    assert world.store.puts == ["checkpoint-1", "checkpoint-2"]
    await second.executor.close()


async def test_an_attempt_starts_from_the_checkpoint_it_is_given_whatever_lies_here(
    world: CarryingWorld, agent: Agent
) -> None:
    earlier = new_key()
    await agent.executor.start([world.shell(earlier, f"{SAVE} save stale; exit 1")])
    [saved] = await agent.until(Saved, earlier)  # stored before the failure is told
    assert isinstance(saved, Saved)
    assert agent.kinds(earlier) in (["Started", "Saved"], ["Started", "Saved", "Exited"])
    assert (await agent.exit_of(earlier)).exit_code == 1
    elsewhere = dataclasses.replace(earlier, n=2)
    source = world.store.publish(elsewhere, "it", "checkpoint-40", b"forty", cluster="0193other")
    key = dataclasses.replace(earlier, n=3)
    await agent.executor.start(
        [world.shell(key, 'cat "$BATON_CHECKPOINT_DIR/latest" > "$BATON_RESULT"; sleep 0.7', checkpoint=source)]
    )
    exited = await agent.exit_of(key)
    assert exited.result == b"forty"
    assert world.store.names(key) == set()  # what it was given is no news


def gone(world: CarryingWorld, key: AttemptKey, how: str) -> ArtifactSource:
    """A checkpoint that the owner still names, of an earlier attempt on another cluster (J12)."""
    source = world.store.publish(dataclasses.replace(key, n=2), "it", "checkpoint-40", b"forty", cluster="0193other")
    if how == "damaged":
        return dataclasses.replace(source, ref=ref_of("checkpoint-40", b"other"))
    world.store.objects.clear()
    return source


@pytest.mark.parametrize("how", ["missing", "damaged"])
async def test_a_checkpoint_that_the_store_has_lost_costs_its_work_and_not_the_run(
    world: CarryingWorld, agent: Agent, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    key = new_key(3)
    script = '[ ! -e "$BATON_CHECKPOINT_DIR/latest" ] && printf anew > "$BATON_RESULT"'
    with caplog.at_level(logging.WARNING, "baton.agent"):
        await agent.executor.start([world.shell(key, script, checkpoint=gone(world, key, how))])
        exited = await agent.exit_of(key)
    assert (exited.cause, exited.result) == (Cause.EXIT, b"anew"), exited.message
    [said] = [vars(record) for record in caplog.records if "starts without it" in record.getMessage()]
    assert (said["run"], said["task"], said["attempt"]) == (key.run_uid, key.task, key.n)
    assert said["checkpoint"] == "checkpoint-40"
    assert ("not in the store" if how == "missing" else "damaged") in said["reason"]


async def test_in_place_of_a_lost_checkpoint_the_one_that_lies_here_serves_and_is_stored(
    world: CarryingWorld, agent: Agent
) -> None:
    """Else the owner would go on naming what is gone, to the next cluster too."""
    earlier, go = new_key(), world.directory.parent / "go"
    await agent.executor.start([world.shell(earlier, f"{SAVE} save mine; exit 1")])
    await agent.exit_of(earlier)
    key = dataclasses.replace(earlier, n=3)
    script = f'cat "$BATON_CHECKPOINT_DIR/latest" > "$BATON_RESULT"; while [ ! -e {go} ]; do sleep 0.05; done'
    await agent.executor.start([world.shell(key, script, checkpoint=gone(world, key, "missing"))])
    [saved] = await agent.until(Saved, key)
    assert isinstance(saved, Saved)
    assert saved.checkpoint == ref_of("checkpoint-1", b"mine")
    go.touch()
    assert (await agent.exit_of(key)).result == b"mine"


async def test_a_checkpoint_that_cannot_be_stored_does_not_fail_the_attempt(world: CarryingWorld, agent: Agent) -> None:
    key = new_key()
    world.store.down = CarrierDown("it does not answer")
    await agent.executor.start([world.shell(key, f"{SAVE} save one; sleep {PATIENCE + 1}")])
    exited = await agent.exit_of(key)
    assert exited.succeeded
    assert "Saved" not in agent.kinds(key)


# --- the fake ---------------------------------------------------------------------------------------------------------


async def test_the_fake_executor_tells_files_that_its_script_names() -> None:
    world = FakeWorld()
    agent = await Agent(world.executor()).connect()
    await agent.executor.configure(30.0, 4.0)
    await agent.executor.renew(1, world.clock.boot())
    good, bad = new_key(), new_key()
    await agent.executor.start([world.request(good, "--artifact", "model", "--checkpoint", "3")])
    await agent.executor.start([world.request(bad, "--artifact", "model", "--exit", "1")])
    assert [ref.name for ref in (await agent.exit_of(good)).artifacts] == ["model"]
    assert (await agent.exit_of(bad)).artifacts == ()
    assert agent.kinds(good) == ["Started", "Saved", "Exited"]
    await world.close()
