"""What every step of the time-zone example shares: the shipped table, and how a step reads inputs and writes a result.

The table is `tzdata.zi`, the whole time-zone database in its compact form, one record a line:

    R name from to - month day time save letters     a rule: when daylight saving begins or ends
    Z name offset rules format [until]               a zone, with its first era
    offset rules format [until]                      a further era of the zone above
    L target name                                    another name of a zone

An era is a stretch of time in which a place kept one standard offset and one set of rules.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tzdata.zi")


def lines() -> list[str]:
    """The table's lines, in order."""
    return TABLE.read_text(encoding="utf-8").splitlines()


def inputs() -> dict[str, Any]:
    """The parents' results, by task id: Baton writes them to the file that BATON_INPUTS names."""
    texts = json.loads(Path(os.environ["BATON_INPUTS"]).read_text(encoding="utf-8"))
    return {task: json.loads(text) for task, text in texts.items()}


def finish(result: str) -> None:
    """Hands the result to Baton: the file that BATON_RESULT names, at most 16 KiB."""
    Path(os.environ["BATON_RESULT"]).write_text(result, encoding="utf-8")
