"""join.py: adds up what the parts counted. Result: as one part's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import zones

SUMS = ("zones", "eras", "rules_by_decade")


def join(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of the parts; of two zones with equally many eras the first by name counts as the one with most."""
    total: dict[str, Any] = {"rules": 0, "links": 0}
    sums: dict[str, Counter[str]] = {key: Counter() for key in SUMS}
    most = (0, "")
    for part in parts:
        total["rules"] += part["rules"]
        total["links"] += part["links"]
        for key in SUMS:
            sums[key].update(part[key])
        most = min(most, (-part["most"][0], part["most"][1]))
    total.update({key: dict(sorted(counter.items())) for key, counter in sums.items()})
    total["most"] = [-most[0], most[1]]
    return total


if __name__ == "__main__":
    found = zones.inputs()
    zones.finish(json.dumps(join(found[task] for task in sorted(found)), sort_keys=True))
