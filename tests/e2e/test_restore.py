"""etcd comes back from a backup under a fleet that remembers more than it does (PROTOCOL J12; F1, F8)."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from baton.client import AsyncClient
from baton.errors import BatonError, NotFound, RestoreSuspected
from baton.leases import PROFILES
from baton.v1 import graph_pb2, run_pb2
from control_plane.core.model import ALL_SHARDS
from control_plane.store import keys
from control_plane.store.etcd import EtcdStore
from lab.layout import ETCD
from lab.parts import Store
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import CLOCK, WAIT, Fed
from tests.e2e.test_local import Home, eventually

QUIET = 12.0
"""Seconds during which nothing may be placed: longer than a grant's life or a hand-over takes, shorter than L + G."""

GAP = 300
"""Commits that the backup misses: more than the federation makes by itself while the test goes on after the restore."""

FAST = PROFILES["fast"]

Epoch = tuple[str, int, int]
"""Shard, incarnation, create_revision of the taking: what agents know an owner by (J12)."""


@pytest.mark.timeout(240)
async def test_nothing_is_placed_after_a_restore_until_an_operator_says_so(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        await fed.eventually(fed.balanced, "both replicas to have their shards")
        seen = await _epochs(fed)
        before = await fed.run("before", [fed.gated("kept", "kept"), fed.quick("child", after=["kept"]), _twice(fed)])
        await fed.eventually(lambda: len(fed.effects.living(run=before.name)) == 2, "the work of `before`")

        backup = fed.directory / "backup.db"
        said = await fed.cli("admin", "backup", str(backup))
        assert said.returncode == 0, said.stderr
        seen |= await _what_the_backup_misses(fed, before.name)

        ended = await fed.run("ended", [fed.quick("one")])  # what history has not yet when the store goes
        await fed.accepted_once(ended.name)
        await fed.lab.kill(ETCD)
        fed.open_gate("kept")  # `child` can be placed as soon as somebody places
        await fed.eventually(lambda: fed.effects.copies("kept")[0].ended, "`kept` to end while the store is away")
        started = len(fed.effects.copies())
        await _restore(fed, backup)
        await fed.eventually(lambda: _suspected(fed), "the restore to be noticed")
        seen |= await _epochs(fed)
        # At once: what the backup has forgotten lives for some seconds more, and it is the product that waits for its end.
        asked, waiting = (
            CLOCK.boot(),
            asyncio.create_task(fed.cli("admin", "restored", "--yes", "--backup", str(backup))),
        )
        during = graph_pb2.GraphSpec(tasks=[fed.quick("one")])
        async with AsyncClient(fed.lab.endpoints, timeout=5.0) as client:
            with pytest.raises(BatonError, match="restored"):
                await client.create_run(during, deadline=CLOCK.wall() + 600, run_id="during")
            with pytest.raises(RestoreSuspected):  # "not found" would be a lie that nobody can know
                await client.get_run("namespaces/default/runs/never-was")
        await asyncio.sleep(QUIET)  # a promise that nothing happens can only be waited for
        assert len(fed.effects.copies()) == started, "something was placed before an operator had looked"

        said = await waiting
        assert CLOCK.boot() - asked > FAST.fence + FAST.kill
        _check_report(said)
        await fed.eventually(fed.all_ready, "the clusters to be ready")
        await fed.eventually(lambda: len(fed.effects.copies("twice")) == 3, "the forgotten attempt to be repeated")
        fed.open_gate("second")
        await fed.accepted_once(before.name)
        later = await fed.run("later", [fed.quick("one"), fed.quick("two", after=["one"])])
        await fed.accepted_once(later.name)
        await _forgotten_work_is_stopped(fed)

        assert (await fed.client.get_run(ended.name)).state == run_pb2.RUN_STATE_SUCCEEDED
        epochs = await _epochs(fed)
        assert {incarnation for _, incarnation, _ in epochs} == {2}
        assert not epochs & seen, "an epoch came again"
        fed.effects.check()  # no fence came again, and what the store had forgotten was dead before it was done again


def _check_report(said: subprocess.CompletedProcess[str]) -> None:
    """Every run of the test is named with what became of it, those that the store has forgotten too."""
    assert said.returncode == 0, said
    lines = said.stdout.splitlines()
    assert lines[0] == "incarnation 2"
    parts: dict[str, list[str]] = {}
    for line in lines[1:]:
        if line.startswith("  "):
            parts[list(parts)[-1]].append(line.strip().partition(" ")[0].rpartition("/")[2])
        else:
            parts[line] = []
    assert parts["2 runs created after the backup, had ended: kept by history:"] == ["done", "ended"], said.stdout
    assert parts["1 runs go on from where the backup has them:"] == ["before"], said.stdout
    assert parts["1 runs forgotten, as far as replicas and agents remember:"] == ["forgotten"], said.stdout
    assert "{" not in said.stdout + said.stderr, "no raw JSON for people"


def _twice(fed: Fed) -> graph_pb2.Task:
    """A task whose first attempt fails when told to, and whose second one lives until told to end."""
    first = 'if [ "$BATON_ATTEMPT" = 1 ]; then while [ ! -e "$GATE" ]; do sleep 0.2; note tick; done; exit 1; fi\n'
    # Deaf to TERM, so that it lives until it is killed: a repetition that does not wait for its end meets it.
    second = 'trap "" TERM; while [ ! -e "${GATE%first}second" ]; do sleep 0.2; note tick; done\n'
    return fed.task("twice", first + second, gate="first", max_attempts=5)


async def _what_the_backup_misses(fed: Fed, before: str) -> set[Epoch]:
    """Everything that goes on after the backup: another attempt, whole runs, shards that change hands. The epochs."""
    fed.open_gate("first")
    await fed.eventually(
        lambda: len(fed.effects.living("twice")) == 1 and len(fed.effects.copies("twice")) == 2, "retry"
    )
    # Work that no lease ends (F7): only owners who hear of it can.
    await fed.run("forgotten", [fed.gated("orphan", "never", on_cluster_lost=WAIT)])
    await fed.eventually(lambda: fed.effects.living("orphan"), "the work of `forgotten`")
    done = await fed.run("done", [fed.quick("one")])
    await fed.accepted_once(done.name)
    for n in range(GAP):  # so that what watches wait for is far ahead of what the restored store will say
        await fed.client.put_graph("busy", graph_pb2.GraphSpec(tasks=[fed.quick(f"one-{n}")]))
    seen = await _epochs(fed)
    await fed.lab.kill("replica-2")
    await fed.eventually(lambda: _owned_by(fed, "replica-1"), "replica-1 to have all shards")
    seen |= await _epochs(fed)
    await fed.lab.start_again("replica-2")
    await fed.eventually(fed.balanced, "replica-2 to have its shards back")
    return seen | await _epochs(fed)


async def _owned_by(fed: Fed, replica: str) -> bool:
    return set((await fed.owners()).values()) == {replica}


async def _epochs(fed: Fed) -> set[Epoch]:
    """The epochs of all shards, as etcd has them now."""
    server = fed.lab.part(ETCD)
    assert isinstance(server, Store)
    store = EtcdStore([server._server.endpoint], clock=CLOCK)
    try:
        incarnation, _ = await store.get(keys.INCARNATION, timeout=5.0)
        assert incarnation is not None
        owners = [(shard, (await store.get(keys.owner(shard), timeout=5.0))[0]) for shard in ALL_SHARDS]
        return {(shard, int(incarnation.value), kv.create_revision) for shard, kv in owners if kv is not None}
    finally:
        await store.close()


async def _restore(fed: Fed, backup: Path) -> None:
    server = fed.lab.part(ETCD)
    assert isinstance(server, Store)
    await server._do(lambda: server._server.restore(backup))


async def _suspected(fed: Fed) -> bool:
    return (await fed.client.list_shards()).restore_suspected


async def _forgotten_work_is_stopped(fed: Fed) -> None:
    """What was placed after the backup is unknown now: its agents are told to stop it (F8)."""
    with pytest.raises(NotFound):
        await fed.client.get_run("namespaces/default/runs/forgotten")
    await fed.eventually(lambda: not fed.effects.living("orphan"), "the forgotten run's work to be stopped")


@pytest.mark.timeout(400)
def test_a_stopped_local_federation_comes_back_over_a_restored_etcd(tmp_path: Path) -> None:
    """Down, restore, up: it stays up under the suspicion, says what to type, and that works (README, rehearse a restore)."""
    home = Home(tmp_path)
    try:
        home.baton("local", "up", "--clusters", "eu", "--detach")
        home.baton("admin", "backup", "mid.db")
        home.baton("run", home.graph(), "--name", "after", "--wait")
        home.baton("local", "down")
        data = home.layout.etcd
        shutil.rmtree(data)
        home.baton("admin", "restore", "mid.db", "--data-dir", str(data))
        up = home.baton("local", "up", "--detach", seconds=110.0)
        assert "etcd looks restored from a backup, and nothing is written" in up.stdout
        assert "baton admin restored --backup FILE" in up.stdout
        assert "{" not in up.stdout
        assert home.baton("local", "status").stdout.startswith("degraded: etcd looks restored")
        shards = home.baton("get", "shards").stderr
        assert ("etcd looks restored: replica-" in shards, "{" in shards) == (True, False)
        assert home.baton("get", "run", "after", code=None).returncode in {0, 6}, "in history, or nobody can know yet"
        done = home.baton("admin", "restored", "--yes", "--backup", "mid.db", seconds=110.0)
        assert "incarnation 2" in done.stdout
        again = home.baton("run", home.graph(), "--name", "again", "--wait")
        assert "SUCCEEDED" in again.stdout + again.stderr
        eventually(lambda: home.baton("local", "status").stdout.startswith("running"), "the headline to say so")
    finally:
        home.baton("local", "down", code=None)
