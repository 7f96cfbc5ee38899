"""Fleet's facts as plain JSON values, for snapshots (PROTOCOL J9) and for the published table (PROTOCOL S5). Pure.

A cluster keeps many generations that mostly share boot id and journal uid, so strings are interned per cluster: a generation
is five small values. Lists instead of objects: the table travels to every replica on every change.
"""

from __future__ import annotations

from typing import Any

from control_plane.core.model import Admission, ClusterFacts, Evidence, Generation, Health


def facts_to_json(facts: ClusterFacts) -> dict[str, Any]:
    """A cluster's row as JSON values."""
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(text, len(words))

    generations = [
        [g.number, word(g.boot_id), word(g.journal_uid), int(g.evidence), g.guard_seconds] for g in facts.generations
    ]
    return {
        "uid": facts.uid,
        "name": facts.name,
        "health": int(facts.health),
        "admission": int(facts.admission),
        "words": list(words),
        "generations": generations,
        "labels": [list(pair) for pair in facts.labels],
        "taints": list(facts.taints),
        "isolation": facts.isolation,
        "orphan_killer": facts.orphan_killer,
        "namespaces": list(facts.namespaces),
        "profile": facts.profile,
        "agent_version": facts.agent_version,
        "create_wall": facts.create_wall,
    }


def facts_from_json(row: dict[str, Any]) -> ClusterFacts:
    """Inverse of `facts_to_json`. Raises KeyError, ValueError, TypeError on anything else."""
    words: list[str] = row["words"]
    generations = tuple(
        Generation(number, words[boot], words[journal], Evidence(evidence), guard)
        for number, boot, journal, evidence, guard in row["generations"]
    )
    return ClusterFacts(
        uid=row["uid"],
        name=row["name"],
        health=Health(row["health"]),
        admission=Admission(row["admission"]),
        generations=generations,
        labels=tuple((key, value) for key, value in row["labels"]),
        taints=tuple(row["taints"]),
        isolation=row["isolation"],
        orphan_killer=row["orphan_killer"],
        namespaces=tuple(row["namespaces"]),
        profile=row["profile"],
        agent_version=row["agent_version"],
        create_wall=row["create_wall"],
    )
