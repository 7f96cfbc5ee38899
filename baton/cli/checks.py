"""What `baton doctor` makes of what it found: a verdict and a cure for each thing that has to be right. Values in, values out.

Theory. `fail` is what stops work now, `warn` what will stop it on a worse day, and neither is said without what to do about
it. Nothing is judged twice: what cannot be known because of an earlier failure is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton import quantity
from baton.cli import render
from baton.v1 import admin_pb2, cluster_pb2

OK, WARN, FAIL = "ok", "warn", "fail"

BEAT_SECONDS = 15.0
"""Age of the newest heartbeat that is no sign of a wrong clock: the slowest profile beats every 10 s, and beats travel."""

BEHIND_SECONDS = 2.0
"""How far in the future a heartbeat may lie: what NTP leaves, with room. Less would accuse healthy machines."""

REFUSED_SECONDS = 300.0
"""Wrong by more, and mutations are refused (PROTOCOL O8)."""

RENEW_DAYS = 14.0
"""A certificate that ends sooner should be renewed now: shorter is a weekend and a holiday."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's: what was looked at, how it is, and what to do if it is not well."""

    name: str
    status: str
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Reached:
    """One endpoint: `seconds` to an answer, or None and why not."""

    address: str
    seconds: float | None
    error: str = ""


def reachable(endpoints: Sequence[Reached]) -> Iterator[Check]:
    """One line for each endpoint; a federation is reached if one of them answers."""
    good = sum(each.seconds is not None for each in endpoints)
    for each in endpoints:
        if each.seconds is not None:
            yield Check("reachable", OK, f"{each.address} answers in {each.seconds * 1000:.0f} ms")
        elif good:
            yield Check(
                "reachable", WARN, f"{each.address}: {each.error}", "start that replica, or take it out of the context"
            )
        else:
            cure = "check that the federation is up (`baton local status`) and that --endpoint or the context names it"
            yield Check("reachable", FAIL, f"{each.address}: {each.error}", cure)


def tls(certificates: bool, days: float | None, problem: str) -> Check:
    """`days`: until the server's certificate ends; None if it was not seen, with a `problem`."""
    if not certificates:
        cure = "use mutual TLS where other people log in"
        return Check("tls", OK, f"plain text, on this machine only: every local user is trusted ({cure})")
    if days is None:
        return Check(
            "tls", FAIL, problem, "check ca, certificate and key of the context: all three PEM files, of one CA"
        )
    left = f"the replica's certificate is good for {days:.0f} days"
    if days < RENEW_DAYS:
        return Check("tls", WARN, left, "renew it: replicas read new files without a restart")
    return Check("tls", OK, left)


def versions(own: str, replicas: Sequence[admin_pb2.Replica]) -> Check:
    """Whether everybody runs the same."""
    theirs = sorted({replica.version for replica in replicas})
    told = f"this command line {own or 'unknown'}, replicas {', '.join(theirs) or 'unknown'}"
    if len(theirs) > 1:
        return Check(
            "version", WARN, told, "finish the upgrade: new features wait until all replicas are at one version"
        )
    if theirs and own and theirs[0] != own:
        return Check("version", WARN, told, "install the same version here as there")
    return Check("version", OK, told)


def feature_level(found: Sequence[admin_pb2.Replica]) -> Check:
    """What the federation's log may hold (PROTOCOL J11): the level rises by itself to what every replica reads."""
    lowest = min((each.feature_level for each in found), default=0)
    behind = [each.id for each in found if each.feature_level == lowest]
    if len(behind) < len(found):
        highest = max(each.feature_level for each in found)
        told = f"the federation stays at {lowest} or lower: {', '.join(behind)} reads no more"
        cure = f"upgrade {', '.join(behind)}: once all read {highest} for a minute, the level rises by itself, and for good"
        return Check("level", WARN, told, cure)
    return Check("level", OK, f"every replica reads feature level {lowest}, so that is the federation's")


def clocks(clusters: Sequence[cluster_pb2.Cluster], now: float) -> Check:
    """This machine's clock against the replicas', by the newest heartbeat they committed."""
    ready = [
        each for each in clusters if each.health == cluster_pb2.CLUSTER_HEALTH_READY and each.heartbeat_time.seconds
    ]
    if not ready:
        return Check("clocks", WARN, "cannot be compared: no cluster has a fresh heartbeat", "bring a cluster up")
    age = now - max(render.seconds(each.heartbeat_time) for each in ready)
    if -BEHIND_SECONDS <= age <= BEAT_SECONDS:
        return Check("clocks", OK, "this machine's clock agrees with the replicas'")
    word = "behind" if age < 0 else "ahead of"
    told = f"this machine's clock is about {quantity.format_seconds(abs(age))} {word} the replicas'"
    status = FAIL if abs(age) > REFUSED_SECONDS else WARN
    return Check("clocks", status, told, "let NTP set it: deadlines `from now` are counted here")


def replicas(found: Sequence[admin_pb2.Replica]) -> Check:
    """Whether a replica may die."""
    told = f"{len(found)}: {', '.join(each.id for each in found)}"
    if len(found) < 2:
        return Check("replicas", WARN, told, "start a second one: with one, its death stops all runs until it is back")
    return Check("replicas", OK, told)


def shards(answer: admin_pb2.ListShardsResponse) -> Iterator[Check]:
    """Whether every run has an owner, and whether anything may be written."""
    if answer.restore_suspected:
        yield Check(
            "restore",
            FAIL,
            f"etcd looks restored, nothing is written: {answer.restore_detail}",
            "if it was on purpose: `baton admin restored --backup FILE`, with the file that was restored",
        )
    elif answer.restore_detail:
        lost = answer.restore_detail.splitlines()
        some = "; ".join(lost[:5]) + ("; ..." if len(lost) > 5 else "")
        told = f"{len(lost)} runs are forgotten since etcd was restored: {some}"
        yield Check("restore", WARN, told, "whoever wanted them has to ask again; `baton get shards` names all")
    lone = [each.id for each in answer.shards if not each.replica]
    if lone:
        some = ", ".join(lone[:5]) + (", ..." if len(lone) > 5 else "")
        yield Check(
            "shards",
            FAIL,
            f"{len(lone)} of {len(answer.shards)} have no owner: {some}",
            "start a replica; one is taken in seconds",
        )
    else:
        yield Check("shards", OK, f"all {len(answer.shards)} are owned")


def clusters(found: Sequence[cluster_pb2.Cluster]) -> Iterator[Check]:
    """Whether work has somewhere to go, and how safe it is there."""
    if not found:
        yield Check("clusters", FAIL, "none has ever connected", "start an agent (`baton local up` starts three)")
        return
    by_health: dict[str, list[str]] = {}
    for each in found:
        health = render.word(cluster_pb2.ClusterHealth, each.health, "CLUSTER_HEALTH_")
        by_health.setdefault(health, []).append(each.name.rpartition("/")[2])
    ready = by_health.pop("READY", [])
    if by_health:
        told = "; ".join(f"{health}: {', '.join(names)}" for health, names in sorted(by_health.items()))
        yield Check(
            "clusters",
            WARN if ready else FAIL,
            f"{told}; READY: {', '.join(ready) or 'none'}",
            "start or reconnect their agents",
        )
    else:
        yield Check("clusters", OK, f"{len(ready)} ready: {', '.join(ready)}")
    open_ = [each for each in found if each.admission == cluster_pb2.CLUSTER_ADMISSION_OPEN]
    if len(open_) < len(found):
        names = ", ".join(each.name.rpartition("/")[2] for each in found if each not in open_)
        yield Check(
            "admission",
            WARN if open_ else FAIL,
            f"no new work goes to {names}",
            "when it may again: `baton uncordon NAME`",
        )
    if 0 < len(ready) < 3:
        yield Check(
            "storm guard", WARN, f"off with {len(ready)} cluster(s)", "three can tell a storm from a loss (PROTOCOL S7)"
        )
    unproved = [each.name.rpartition("/")[2] for each in found if each.health == cluster_pb2.CLUSTER_HEALTH_READY
                and not each.orphan_killer]  # fmt: skip
    if unproved:
        told = f"{', '.join(unproved)} cannot prove that lost work is dead: its copies are told as overlap_possible"
        yield Check("guards", WARN, told, "let their agents use PID namespaces or cgroups")


def worst(checks: Sequence[Check]) -> str:
    """The verdict over all."""
    counts = Counter(check.status for check in checks)
    return FAIL if counts[FAIL] else WARN if counts[WARN] else OK
