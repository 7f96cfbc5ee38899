"""What is wrong with a federation that is up, in one line, and what to type about it.

Theory: a headline that says `running` beside a dead etcd is believed. So the headline is computed from the parts, by one
function, for `status`, for `up` and for the supervisor's log; the stage says only whether orders are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CURES = {"dead": "start", "agent dead": "start", "frozen": "thaw"}
"""A part's word -> the verb that mends it."""


def headline(status: Mapping[str, Any], command: str = "baton", suffix: str = "", context: str = "") -> str:
    """The stage; or, of a running federation with parts that are not, `degraded: etcd is dead; baton local start etcd`.

    `command` is what `baton` is called here, `suffix` the flags that name the directory, `context` those that name the federation,
    if it needs any.
    """
    if status["stage"] != "running":
        return str(status["stage"])
    wrong, cures = [], []
    for part in _parts(status):
        name = part["name"]
        if verb := _CURES.get(part["state"]):
            wrong.append(
                f"the agent of {name} is dead" if part["state"] == "agent dead" else f"{name} is {part['state']}"
            )
            cures.append(f"{command} local {verb} {name}{suffix}")
        if part["network"] == "cut" and part["state"] != "dead":
            wrong.append(f"{name} is cut off")
            cures.append(f"{command} local heal {name}{suffix}")
    if status.get("restored"):
        wrong.append("etcd looks restored, and nothing is written")
        cures.append(f"{command} admin restored --backup FILE{context}")
    return f"degraded: {', '.join(wrong)}; {'; '.join(cures)}" if wrong else "running"


def part_word(status: Mapping[str, Any], name: str) -> str:
    """How a part is (`running`, `frozen`, `agent dead`, `dead`); empty if there is none of that name."""
    return next((str(part["state"]) for part in _parts(status) if part["name"] == name), "")


def _parts(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [status["store"], *status["replicas"], *status["clusters"]]
