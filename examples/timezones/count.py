"""count.py PART: counts what is in one part of the table.

It waits PACE_MS milliseconds after each line. That is no work: it makes the step long enough for a person to see it move
when its cluster dies. Set PACE_MS to 0 for no wait. The result does not depend on it.

Result: {"rules", "links", "zones": {area: n}, "eras": {area: n}, "most": [eras, zone], "rules_by_decade": {decade: n}}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

import zones


def count(lines: list[str], pace: float) -> dict[str, Any]:
    """What is in these lines; `pace` is the wait after each, in seconds."""
    rules = links = 0
    zone_count: Counter[str] = Counter()
    eras: Counter[str] = Counter()
    decades: Counter[str] = Counter()
    eras_of: Counter[str] = Counter()
    zone = ""
    for number, line in enumerate(lines):
        words = line.split()
        if words[0] == "R":
            rules += 1
            decades[words[2][:3] + "0s"] += 1
        elif words[0] == "L":
            links += 1
        elif not line.startswith("#"):
            if words[0] == "Z":
                zone = words[1]
                zone_count[area(zone)] += 1
            eras[area(zone)] += 1
            eras_of[zone] += 1
        if pace:
            time.sleep(pace)
        if number % 100 == 0:
            print(f"line {number} of {len(lines)}", flush=True)
    most = min(((-count, name) for name, count in eras_of.items()), default=(0, ""))
    return {
        "rules": rules,
        "links": links,
        "zones": dict(sorted(zone_count.items())),
        "eras": dict(sorted(eras.items())),
        "most": [-most[0], most[1]],
        "rules_by_decade": dict(sorted(decades.items())),
    }


def area(zone: str) -> str:
    """`Africa` of `Africa/Algiers`; `(none)` of `UTC`."""
    return zone.partition("/")[0] if "/" in zone else "(none)"


if __name__ == "__main__":
    first, end = zones.inputs()["split"]["ranges"][int(sys.argv[1])]
    pace = float(os.environ.get("PACE_MS", "0")) / 1000
    zones.finish(json.dumps(count(zones.lines()[first:end], pace), sort_keys=True))
