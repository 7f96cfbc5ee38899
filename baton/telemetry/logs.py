"""Log lines, the same on replicas and agents: one fixed sentence and fields, as JSON for machines or as text for people.

Theory. A sentence that never changes can be searched for and counted; what changes is in fields beside it, under the same names
everywhere: `run` (its uid), `task`, `attempt`, `fence`, `cluster`, `trace`. So one query follows an attempt through the logs of every
process that had to do with it, and `trace` leads to the run's spans (`baton trace`). Lines tell what is rare: no line is
written for a task that goes well, since events and spans already say it (DESIGN section 13). A line is one line: whatever a field
holds, line breaks and control characters in it are escaped. Nothing here ever raises: a line that cannot be made of what it was
given is made of what those things call themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("json", "text")

FIELDS = ("run", "task", "attempt", "fence", "cluster", "trace")
"""What a line about an attempt carries, as far as it applies; in this order, before other fields."""

MAX_FIELD = 4096
"""Characters of one field. A traceback fits; a task's megabyte of output does not belong into a log."""

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName"}
"""What every record has: everything else is a field of ours."""

_UID_HEX = 24


def trace_of(run_uid: str) -> str:
    """The trace id of a run, as control_plane/core/span_model.py makes it of the uid."""
    own = len(run_uid) == _UID_HEX and all(digit in "0123456789abcdef" for digit in run_uid)
    return _hex(4, f"trace\n{run_uid}") + run_uid if own else _hex(16, f"trace\n{run_uid}")


def _hex(size: int, text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def about(
    run_uid: str, *, task: str | int = "", attempt: int = 0, fence: str = "", cluster: str = "", **more: Any
) -> dict[str, Any]:
    """`extra=` of a line about a run or an attempt: FIELDS as far as they are known, then `more`."""
    trace = trace_of(run_uid)
    said = {"run": run_uid, "task": task, "attempt": attempt, "fence": fence, "cluster": cluster, "trace": trace}
    known = {name: value for name, value in said.items() if value not in ("", 0) or (name == "task" and value == 0)}
    return {**known, **more}


class _Lines(logging.Formatter):
    """What both forms share. `who` are fields of every line, such as replica="r1"."""

    def __init__(self, who: Mapping[str, Any]) -> None:
        super().__init__()
        self._who = dict(who)

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        own = {key: value for key, value in vars(record).items() if key not in _PLAIN}
        first = {name: own.pop(name) for name in FIELDS if name in own}
        return {**self._who, **first, **own}

    @staticmethod
    def _sentence(record: logging.LogRecord) -> str:
        try:
            return record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit
            return str(record.msg)

    @staticmethod
    def _failure(record: logging.LogRecord) -> str:
        if not record.exc_info or record.exc_info[0] is None:
            return ""
        return "".join(traceback.format_exception(*record.exc_info))


class JsonLines(_Lines):
    """One JSON object a line: time (seconds since the epoch), level, logger, message, fields; `exception` with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._sentence(record),
            **{key: _bounded(value) for key, value in self._fields(record).items()},
        }
        if failure := self._failure(record):
            line["exception"] = failure
        return json.dumps(line, default=_name)


class TextLines(_Lines):
    """`2026-11-21T22:00:00.123Z WARNING control_plane.x sentence key=value ...`, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        parts = [f"{at}Z", record.levelname.ljust(7), record.name, _flat(self._sentence(record))]
        parts += [f"{key}={_value(value)}" for key, value in self._fields(record).items()]
        return "\n".join([" ".join(parts), *self._failure(record).splitlines()])


def formatter(form: str, who: Mapping[str, Any]) -> logging.Formatter:
    """The formatter of one of FORMATS. Raises ValueError."""
    if form not in FORMATS:
        raise ValueError(f"log_format {form!r} is none of {', '.join(FORMATS)}")
    return JsonLines(who) if form == "json" else TextLines(who)


def set_up(form: str, level: str, who: Mapping[str, Any], to: TextIO | None = None) -> None:
    """From now on all lines of this process go to `to` (stderr). Raises ValueError for an unknown form."""
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(formatter(form, who))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _bounded(value: Any) -> Any:
    return f"{value[:MAX_FIELD]}..." if isinstance(value, str) and len(value) > MAX_FIELD else value


def _value(value: Any) -> str:
    """A field's value as one word, or in quotes."""
    text = value if isinstance(value, str) else json.dumps(value, default=_name)
    text = str(_bounded(text))
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def _flat(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


def _name(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - an object of anybody's
        return f"<{type(value).__name__}>"
