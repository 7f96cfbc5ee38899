"""The ten most important stories, as scripts for a stage (`lab.simulation.stage`).

`PYTHONHASHSEED=0 python -m tests.simulation.story_scripts --write` tells them anew into tests/simulation/stories/. Read the difference
before you commit it: a changed story is a changed product.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from control_plane.core.events import AttemptsFinished, ClusterLost, ResultsRefused
from lab.checking.judging import judge
from lab.simulation.etcd import Weather
from lab.simulation.processes import ClusterProcess, ReplicaProcess
from lab.simulation.prose import tell
from lab.simulation.stage import Script, Stage, perform, task

HOME = Path(__file__).parent / "stories"


@dataclass(frozen=True, slots=True)
class Story:
    """A script with its title and what it shows."""

    title: str
    moral: str
    script: Script
    clusters: int


STORIES: dict[str, Story] = {}
"""Name of the file -> story."""


def story(name: str, title: str, moral: str, *, clusters: int = 2) -> Callable[[Script], Script]:
    """Registers a script."""

    def register(script: Script) -> Script:
        STORIES[name] = Story(title, moral, script, clusters)
        return script

    return register


async def dies_for(
    stage: Stage, seconds: float, victim: ClusterProcess | ReplicaProcess, *, dies: str, returns: str
) -> None:
    """Its process is killed, and starts again so much later; both are said as they happen."""
    stage.say(dies)
    victim.kill()
    await stage.sleep(seconds)
    stage.say(returns)
    victim.start()


@story(
    "agent-dies",
    "An agent dies and comes back",
    "The guard lives outside the agent (G1), so work survives its agent. The new agent, of the same boot and journal, resumes the\n"
    "session (S6) and finds the work running: nothing is started twice, and nothing is lost.",
)
async def agent_dies(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 12.0), task("report", 1.0, after=["extract"])])
    cluster = await stage.running(0)
    await stage.sleep(2.0)
    dies = f"The agent of {cluster.name} is killed. Its guard and its work live on."
    await dies_for(stage, 4.0, cluster, dies=dies, returns=f"A new agent starts on {cluster.name}.")
    await stage.sleep(12.0)


@story(
    "agent-pauses",
    "An agent pauses past its lease",
    "An agent that stands still cannot renew its lease, so its guard ends the work (F5) before the control plane may start a copy\n"
    "(L + G). When the agent wakes up it is told what it missed.",
)
async def agent_pauses(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 30.0)])
    cluster = await stage.running(0)
    node = cluster.node
    assert node is not None
    await stage.sleep(2.0)
    stage.say(f"The agent of {cluster.name} stops in its tracks (SIGSTOP).")
    node.freeze()
    await stage.running(0, 2)
    await stage.sleep(3.0)
    stage.say(f"The agent of {cluster.name} goes on (SIGCONT), and knows nothing of what happened.")
    node.thaw()
    await stage.sleep(30.0)


@story(
    "replica-dies-mid-commit",
    "A replica dies in the middle of a commit",
    "The commit reaches etcd, its answer does not reach the replica, and the replica dies: nobody knows that the result was\n"
    "accepted, except the journal (J1). The next owner folds it, and goes on from there: the result is neither lost nor taken\n"
    "twice (J6, J7).",
)
async def replica_dies(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 4.0), task("report", 2.0, after=["extract"])])
    await stage.running(0)
    owner = stage.owner("nightly")
    await stage.sleep(2.0)
    stage.say(f"From now on {owner.name}, which owns the run, hears no answer from etcd.")
    owner.faults.weather = Weather(lost_reply=1.0)
    await stage.until(lambda: stage.happened(AttemptsFinished) > 0)
    await stage.sleep(0.3)
    dies = f"{owner.name} is killed before it knows that its commit is in the journal."
    await dies_for(stage, 20.0, owner, dies=dies, returns=f"{owner.name} starts again.")
    await stage.sleep(10.0)


@story(
    "etcd-without-quorum",
    "etcd loses its leader and its quorum",
    "While etcd cannot commit, nobody can be declared lost (S4), and work goes on: an outage shorter than the lease's bound neither\n"
    "kills nor doubles anything. What waited is settled when etcd is back (J6).",
)
async def etcd_without_quorum(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 10.0), task("report", 1.0, after=["extract"])])
    await stage.running(0)
    await stage.sleep(2.0)
    stage.say("etcd loses its quorum: nothing can be read or written.")
    stage.ground.etcd.lose_quorum()
    await stage.sleep(4.0)
    stage.say("etcd has a quorum again, and a new leader: every lease begins anew.")
    stage.ground.etcd.regain_quorum(apply_parked=True)
    stage.ground.etcd.change_leader()
    await stage.sleep(12.0)


@story(
    "partition-heals-late",
    "A partition heals late",
    "A cluster out of sight is not a dead cluster, but its work may start elsewhere once it must be dead: F + K after its last\n"
    "acknowledged heartbeat its own guard has ended it (F5). The cluster comes back as a new session (S5), with nothing left to stop.",
)
async def partition_heals_late(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 25.0)])
    cluster = await stage.running(0)
    await stage.sleep(2.0)
    stage.say(f"{cluster.name} is cut off from every replica. Its agent, guard and work live.")
    stage.cut(cluster)
    await stage.until(lambda: stage.happened(ClusterLost) > 0)
    await stage.running(0, 2)
    await stage.sleep(5.0)
    stage.say(f"The network of {cluster.name} is mended.")
    stage.heal(cluster)
    await stage.sleep(25.0)


@story(
    "stale-result-returns",
    "A stale result returns",
    "Work ends while its cluster is cut off, and its result is kept on the agent's disk. By the time it arrives another attempt has\n"
    "the task, so its fence is no longer good (F1, F2): it is counted as evidence, and never accepted (F8).",
)
async def stale_result(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 6.0)])
    cluster = await stage.running(0)
    await stage.sleep(2.0)
    stage.say(f"{cluster.name} is cut off from every replica, while its work is about to end.")
    stage.cut(cluster)
    await stage.running(0, 2)
    await stage.sleep(1.0)
    stage.say(f"The network of {cluster.name} is mended, and the result arrives.")
    stage.heal(cluster)
    await stage.until(lambda: stage.happened(ResultsRefused) > 0)
    await stage.sleep(10.0)


@story(
    "guard-dies",
    "A guard dies",
    "The guard is the killer outside the agent, so who kills when the guard is dead? Each workload has a killer of its own (G4): it\n"
    "dies with its guard, the agent says so, and the attempt is replaced at once, with no overlap to fear.",
)
async def guard_dies(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 8.0)])
    cluster = await stage.running(0)
    await stage.sleep(2.0)
    stage.say(f"The guard of {cluster.name} is killed.")
    cluster.host.kill_guard()
    await stage.sleep(25.0)


@story(
    "restore-from-backup",
    "etcd is restored from a backup",
    "A restore takes back what was acknowledged after the backup, and nothing in etcd shows it. Memory outside does (J12): the\n"
    "first who remembers more stops everybody, until an operator has looked. Only after L + G is it confirmed: by then no work\n"
    "is left that etcd has forgotten. Fences of the new incarnation are above all earlier ones (F1).",
)
async def restore_from_backup(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 60.0)])
    await stage.running(0)
    await stage.sleep(1.0)
    stage.say("A backup is made.")
    etcd = stage.ground.etcd
    backup, revision = etcd.snapshot(), etcd.keyspace.revision
    stage.want("late", [task("sum", 40.0)])
    await stage.until(lambda: any(said.run == "late" and said.ok for said in stage.client.said))
    await stage.sleep(3.0)
    stage.say("etcd is restored from the backup: it has forgotten that `late` was ever wanted.")
    stage.restore(backup, revision)
    await stage.sleep(2.0)
    stage.say("An operator confirms the restore, as soon as he may.")
    await stage.confirm_restored()
    stage.say("The restore is confirmed: a new incarnation begins.")
    stage.settle_restore()
    await stage.sleep(70.0)


@story(
    "storm-of-clusters",
    "Half of the clusters vanish together",
    "When many clusters vanish at once the network is more likely to blame than they are. Their tasks are held for a while (S7)\n"
    "instead of being heaped on the clusters that are left; those that cannot wait, for their slack is short, go at once.",
    clusters=4,
)
async def storm_of_clusters(stage: Stage) -> None:
    stage.want("nightly", [task(f"part-{number}", 30.0) for number in range(4)], lifetime=400.0)
    for number in range(4):
        await stage.running(number)
    await stage.sleep(2.0)
    gone = stage.clusters[:2]
    stage.say("c0 and c1 are cut off from every replica at the same moment.")
    for cluster in gone:
        stage.cut(cluster)
    await stage.sleep(75.0)
    stage.say("The network of c0 and c1 is mended.")
    for cluster in gone:
        stage.heal(cluster)
    await stage.sleep(40.0)


@story(
    "deadline-during-outage",
    "A deadline passes while etcd is away",
    "Nobody can decide anything without etcd, but the deadline needs no decision: it travelled with the dispatch, and the guard ends\n"
    "the work when it comes (D1). The verdict is written within a stated bound of the store's return.",
)
async def deadline_during_outage(stage: Stage) -> None:
    stage.want("nightly", [task("extract", 60.0)], lifetime=12.0)
    await stage.running(0)
    await stage.sleep(5.0)
    stage.say("etcd loses its quorum: nothing can be read or written.")
    stage.ground.etcd.lose_quorum()
    await stage.sleep(20.0)
    stage.say("etcd has a quorum again.")
    stage.ground.etcd.regain_quorum(apply_parked=True)
    await stage.sleep(25.0)


def told(name: str) -> str:
    """Play a story, judge it, and tell it."""
    found = STORIES[name]
    record, zero = perform(found.script, found.clusters)
    return tell(found.title, found.moral, record, judge(record), zero)


def main() -> int:
    """All stories as one JSON object on standard output, or into their files."""
    parser = argparse.ArgumentParser(prog="story_scripts")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--write", action="store_true", help="write tests/simulation/stories/NAME.md")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    stories = {name: told(name) for name in options.names or STORIES}
    if not options.write:
        json.dump(stories, sys.stdout)
        return 0
    HOME.mkdir(exist_ok=True)
    for name, text in stories.items():
        (HOME / f"{name}.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
