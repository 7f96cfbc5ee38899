"""split.py PARTS: cuts the table into PARTS ranges of lines, never between a zone and its eras.

Result: {"ranges": [[first, end], ...]}, line numbers from 0, `end` not included.
"""

from __future__ import annotations

import json
import sys

import zones


def ranges(lines: list[str], parts: int) -> list[list[int]]:
    """About equal ranges that begin where a record begins."""
    starts = [0]
    for part in range(1, parts):
        at = max(starts[-1], len(lines) * part // parts)
        while at < len(lines) and lines[at][:2] not in {"R ", "Z ", "L "}:
            at += 1  # an era belongs to the zone above it
        starts.append(at)
    return [[first, end] for first, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


if __name__ == "__main__":
    cut = ranges(zones.lines(), int(sys.argv[1]))
    print(f"{len(cut)} parts of about {cut[0][1] - cut[0][0]} lines")
    zones.finish(json.dumps({"ranges": cut}))
