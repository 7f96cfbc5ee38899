"""The region of the control plane is lost; the federation comes back from a backup, and its clusters never stopped (PROTOCOL J12).

`baton admin backup` and `baton admin restore` are used as an operator would: etcd, its disk and all replicas are gone at once.
The agents live elsewhere, and are the only ones who remember what the backup does not know.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from baton.errors import BatonError, NotFound
from lab.layout import ETCD
from tests.e2e.conftest import MakeFederation
from tests.e2e.federation import SOON, Fed

REPLICAS = ("replica-1", "replica-2")


@pytest.mark.timeout(300)
async def test_a_lost_control_plane_comes_back_from_a_backup_with_agents_running(fed_here: MakeFederation) -> None:
    async with fed_here(clusters=("eu", "us")) as fed:
        accepted = (
            await fed.run("accepted", [fed.quick("first"), fed.gated("second", "second", after=["first"])])
        ).name
        await fed.running(accepted, "second")
        midway = (await fed.run("midway", [fed.gated("only", "midway")])).name
        await fed.running(midway, "only")
        backup = fed.directory / "region.db"
        said = await fed.cli("admin", "backup", str(backup))
        assert said.returncode == 0, said.stderr

        await _what_the_backup_misses(fed, midway)
        await _lose_region(fed)
        await _restore(fed, backup)
        await fed.eventually(lambda: _suspected(fed), "an agent to remember more than the backup")
        report = await fed.cli("admin", "restored", "--yes", "--backup", str(backup), "-o", "json")
        assert report.returncode == 0, report.stderr
        told = json.loads(report.stdout)
        assert told["incarnation"] == 2
        assert told["differences"]["keptByHistory"] == ["namespaces/default/runs/kept"]
        assert accepted in told["differences"]["goOn"]
        assert midway in [*told["differences"]["outcomeFromHistory"], *told["differences"]["goOn"]]

        fed.open_gate("second")
        tasks = await fed.accepted_once(accepted, patience=2 * SOON)
        assert [each.state for each in tasks["first"].attempts] == [3], "accepted before the backup, and not done again"
        assert len(fed.effects.copies("first", run=accepted)) == 1
        await _the_outcome_of_history_stands(fed, midway)
        with pytest.raises(NotFound):
            await fed.client.get_run("namespaces/default/runs/forgotten")
        await fed.eventually(lambda: not fed.effects.living("orphan"), "the forgotten run's work to be stopped")
        fed.effects.check()
        for run in (accepted, midway, "kept"):
            audited = await fed.cli("audit", run, "-o", "json")
            assert audited.returncode == 0, audited.stdout + audited.stderr
            assert json.loads(audited.stdout)["acceptedResults"] > 0


async def _what_the_backup_misses(fed: Fed, midway: str) -> None:
    """A run that ends, one that is created and ends, one that is created and runs; the first two are in history."""
    fed.open_gate("midway")
    await fed.accepted_once(midway)
    kept = await fed.run("kept", [fed.quick("one")])
    await fed.accepted_once(kept.name)
    await fed.run("forgotten", [fed.gated("orphan", "never")])
    await fed.eventually(lambda: fed.effects.living("orphan"), "the work of `forgotten`")
    await fed.eventually(lambda: _archived(fed, midway, kept.name), "history to have what has ended")


def _archived(fed: Fed, *runs: str) -> bool:
    """Whether the history file, which is not in the lost region's etcd, holds these runs."""
    held = fed.lab.layout.history.read_bytes()
    wal = fed.lab.layout.history.with_name(fed.lab.layout.history.name + "-wal")
    held += wal.read_bytes() if wal.exists() else b""
    return all(run.encode() in held for run in runs)


async def _lose_region(fed: Fed) -> None:
    """All at once, and the store's disk with it."""
    await asyncio.gather(*(fed.lab.kill(name) for name in (ETCD, *REPLICAS)))
    shutil.rmtree(fed.lab.layout.etcd)


async def _restore(fed: Fed, backup: Path) -> None:
    """As an operator does it; a second restore into the same place is refused."""
    tool = fed.lab.binary.etcdutl
    assert tool is not None, "`scripts/tools etcd` builds etcdutl beside etcd"
    words = ("admin", "restore", str(backup), "--data-dir", str(fed.lab.layout.etcd), "--etcdutl", str(tool))
    said = await fed.cli(*words)
    assert said.returncode == 0, said.stderr
    assert "What cannot be kept" in said.stdout
    again = await fed.cli(*words)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    await fed.lab.start_again(ETCD)
    await asyncio.gather(*(fed.lab.start_again(name) for name in REPLICAS))


async def _suspected(fed: Fed) -> bool:
    try:
        return (await fed.client.list_shards()).restore_suspected
    except BatonError:
        return False  # the replicas are not there yet


async def _the_outcome_of_history_stands(fed: Fed, run: str) -> None:
    """It was live in the backup, and had ended: one outcome, one accepted result, whatever was done again meanwhile."""
    tasks = await fed.accepted_once(run)
    assert [each.accepted_results for each in tasks.values()] == [1]
