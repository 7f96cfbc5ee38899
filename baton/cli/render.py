"""How answers look: tables for people, JSON and YAML for programs, names for pipes.

Theory: a table is a view and may change; JSON is a contract: protobuf's own JSON of the API's messages (lowerCamelCase,
default values present, 64-bit numbers as text, bytes as base64), so it is as stable as the API. Columns are separated by
spaces and the last one is not padded, so `awk` works; nothing is cut, wrapped or coloured when nobody looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from baton import quantity
from baton.cli.session import clean
from baton.graphfile_yaml import dump
from baton.v1 import run_pb2

FORMATS = ("table", "wide", "json", "yaml", "name")

Item = TypeVar("Item", bound=Message)

_COLOURS = {
    "SUCCEEDED": "green",
    "READY": "green",
    "RUNNING": "cyan",
    "FAILED": "red",
    "LOST": "red",
    "DEADLINE_EXCEEDED": "red",
    "SUSPECT": "yellow",
    "CANCELLING": "yellow",
    "CANCELLED": "yellow",
}


@dataclass(frozen=True, slots=True)
class Column(Generic[Item]):
    """A column: its head, its text, and whether only `wide` shows it."""

    head: str
    text: Callable[[Item], str]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Kind(Generic[Item]):
    """A kind of thing that can be shown: the plural for JSON, how one is named, and its columns."""

    plural: str
    name: Callable[[Item], str]
    columns: Sequence[Column[Item]]


def show(kind: Kind[Item], items: Sequence[Item], form: str, *, alone: bool = False) -> None:
    """Prints items in one of FORMATS; `alone`: JSON and YAML are the one item, not a list."""
    if form == "name":
        for item in items:
            click.echo(kind.name(item))
    elif form in {"json", "yaml"}:
        data: Any = [plain(item) for item in items]
        echo_data(data[0] if alone else {kind.plural: data}, form)
    else:
        columns = [column for column in kind.columns if form == "wide" or not column.wide]
        table([column.head for column in columns], ([column.text(item) for column in columns] for item in items))


def plain(message: Message) -> dict[str, Any]:
    """A message as protobuf's JSON, with default values present."""
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def one_line(message: Message) -> str:
    """A message as one line of JSON, for streams."""
    return json.dumps(plain(message))


def echo_data(data: Any, form: str) -> None:
    """Prints plain data as JSON or YAML."""
    click.echo(json.dumps(data, indent=2) if form == "json" else dump(data), nl=form == "json")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; widths fit the content, states are coloured on a terminal."""
    lines = [list(heads), *([clean(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = []
        for column, cell in enumerate(line):
            padded = cell if column == len(heads) - 1 else cell.ljust(widths[column])
            colour = _COLOURS.get(cell)
            cells.append(click.style(padded, fg=colour) if colour else padded)
        click.echo("   ".join(cells))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints `Name:  value` lines, values in one column."""
    rows = [(name, clean(value)) for name, value in pairs if value]
    width = max((len(name) for name, _ in rows), default=0) + 1
    for name, value in rows:
        click.echo(f"{(name + ':').ljust(width)}  {value}")


def word(enum: Any, value: int, prefix: str) -> str:
    """`RUN_STATE_FAILED` -> `FAILED`; a value this version does not know is shown as its number."""
    try:
        return str(enum.Name(value)).removeprefix(prefix)
    except ValueError:
        return f"({value})"


def run_state(value: int) -> str:
    """A RunState for people."""
    return word(run_pb2.RunState, value, "RUN_STATE_")


def task_state(value: int) -> str:
    """A TaskState for people."""
    return word(run_pb2.TaskState, value, "TASK_STATE_")


def attempt_state(value: int) -> str:
    """An AttemptState for people."""
    return word(run_pb2.AttemptState, value, "ATTEMPT_STATE_")


def evidence(value: int) -> str:
    """An Evidence for people, in lower case; "" for none needed."""
    return word(run_pb2.Evidence, value, "EVIDENCE_").lower() if value else ""


def seconds(stamp: Timestamp) -> float:
    """A timestamp as seconds since the epoch; 0.0 if unset."""
    return stamp.seconds + stamp.nanos / 1e9


def moment(stamp: Timestamp) -> str:
    """A timestamp as `2026-11-21T19:31:32Z`; "" if unset."""
    if not stamp.seconds:
        return ""
    return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(stamp: Timestamp, now: float) -> str:
    """How long ago, e.g. `3m05s`; "" if unset."""
    return quantity.format_seconds(max(0.0, now - seconds(stamp))) if stamp.seconds else ""
