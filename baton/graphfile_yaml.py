"""YAML as a tree of nodes that know their lines: the only importer of ruamel.yaml.

Theory: a person's mistake is answered with file, line, field, what is wrong and how to mend it. A loader that builds
Python objects forgets the lines and obeys the file (tags, merges, implicit types); so we take the parser's node graph
and read it by our own schema. Reading is bounded: bytes before parsing, depth by the parser's own stack, and entries
visited, because an alias makes a small file large ("billion laughs").
"""

from __future__ import annotations

import difflib
import io
import math
import stat
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from baton import names

MAX_BYTES = 16 * 1024 * 1024
"""Largest file. A million small tasks are made by a program through the client, not by hand through YAML."""

MAX_ENTRIES = 1_000_000
"""Entries read, aliases counted each time. Fewer would refuse honest files of 16 MiB; many more take minutes."""

MAX_PROBLEMS = 20
"""Problems told at once; more scroll the first one off the screen."""

MAX_UNKNOWN = 3
"""Unknown fields of one mapping that are named. A file with more is another kind of file, perhaps a secret one."""

MAX_UNKNOWN_NAME = 40
"""Characters told of an unknown field: enough to find a slip of the pen, little of what was never meant as a field."""

_NAME_A_FILE = "name a YAML file, or `-` for standard input"

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file. `line` counts from 1, 0 is the file as a whole; `field` is a path as the file writes it, or empty."""

    file: str
    line: int
    field: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        field = f"{self.field}: " if self.field else ""
        return f"{where}: {field}{self.what}" + (f". Fix: {self.fix}" if self.fix else "")


class GraphFileError(ValueError):
    """The file is no graph; `problems` says where and why, at least one."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Node:
    """A value in the file: where it stands, how the file calls it, and the parser's node."""

    raw: Any
    field: str
    line: int

    @property
    def kind(self) -> str:
        """map, seq, str, int, float, bool, null, timestamp, or another tag."""
        tag = str(self.raw.tag)
        return tag.removeprefix(_TAG)


def read_text(path: str) -> str:
    """The text of a file (`-`: standard input), at most 16 MiB of UTF-8. Raises GraphFileError."""
    if not path:
        raise GraphFileError([Problem("''", 0, "", "names no file", _NAME_A_FILE)])
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            file = Path(path)
            if not stat.S_ISREG(file.stat().st_mode):
                what = "is a directory" if file.is_dir() else "is not a regular file"
                raise GraphFileError([Problem(path, 0, "", what, _NAME_A_FILE)])
            with file.open("rb") as opened:
                data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, GraphFileError):
            raise
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise GraphFileError([Problem(path, 0, "", f"cannot be read: {what}", "check the path")]) from None
    if len(data) > MAX_BYTES:
        fix = "create so large a graph through the client (baton.client)"
        raise GraphFileError([Problem(path, 0, "", f"is larger than {MAX_BYTES} bytes", fix)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte {data[error.start]:#04x} is not UTF-8"
        raise GraphFileError([Problem(path, line, "", what, "save the file as UTF-8")]) from None


def parse(path: str, text: str) -> Node:
    """The top node of a YAML text. Raises GraphFileError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a reused anchor is legal YAML 1.2; the reader's job is errors
            raw = YAML(typ="rt", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        what = " ".join(str(error.problem or error.context or "is not YAML").split())
        fix = "check quotes, brackets and indentation"
        if "\\t" in what:
            what, fix = "a tab is used for indentation", "indent with spaces"
        elif "single document" in str(error.context):
            what, fix = "a second document begins here", "keep one graph in a file"
        raise GraphFileError([Problem(path, line, "", what, fix)]) from None
    except YAMLError as error:
        where = getattr(error, "position", None)
        line = text.count("\n", 0, where) + 1 if isinstance(where, int) else 1
        what = f"a character is not allowed in YAML: {getattr(error, 'reason', 'unreadable')}"
        raise GraphFileError([Problem(path, line, "", what, "remove it, or write it as an escape in quotes")]) from None
    except RecursionError:
        fix = "a graph needs no more than six levels"
        raise GraphFileError([Problem(path, 1, "", "is nested too deeply", fix)]) from None
    except ValueError as error:
        raise GraphFileError([Problem(path, 1, "", f"is not YAML: {names.quote(str(error))}")]) from None
    if raw is None:
        fix = "begin with `apiVersion: baton/v1` and `kind: Graph`"
        raise GraphFileError([Problem(path, 1, "", "is empty", fix)])
    return Node(raw, "", raw.start_mark.line + 1)


class Reader:
    """Reads typed values from nodes and collects what is wrong. A method answers None after it has complained."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self._entries = 0

    def complain(self, node: Node, what: str, fix: str = "") -> None:
        """Adds a problem; raises GraphFileError once there are 20."""
        self.add(node.line, node.field, what, fix)

    def add(self, line: int, field: str, what: str, fix: str = "") -> None:
        """Adds a problem at a line; raises GraphFileError once there are 20."""
        problem = Problem(self.path, line, field, what, fix)
        if problem not in self.problems:  # a fault in the defaults is every task's, and one line's
            self.problems.append(problem)
        if len(self.problems) >= MAX_PROBLEMS:
            raise GraphFileError(self.problems)

    def mapping(self, node: Node, allowed: Iterable[str] | None) -> dict[str, Node]:
        """The entries of a mapping whose keys are text; unknown and doubled keys are problems, not entries."""
        if node.kind != "map":
            self._wrong_type(node, "a mapping (key: value)")
            return {}
        known = None if allowed is None else list(allowed)
        entries: dict[str, Node] = {}
        unknown: list[int] = []
        for key, value in node.raw.value:
            self._count(node)
            line = key.start_mark.line + 1
            name = key.value if isinstance(key.value, str) else None
            if name is None:
                self.add(line, node.field, "a key is not plain text", "write `name: value`")
                continue
            field = self.child(node.field, name, free=known is None)
            if name in entries:
                self.add(line, field, f"is given twice (first on line {entries[name].line})", "keep one of them")
            elif known is not None and name not in known:
                unknown.append(line)
                if len(unknown) <= MAX_UNKNOWN:
                    shown = self.child(node.field, _shown(name), most=MAX_UNKNOWN_NAME)
                    self.add(line, shown, "is not a known field", _nearest(name, known))
            else:
                entries[name] = Node(value, field, line)
        if known is not None and len(unknown) > MAX_UNKNOWN:
            more = len(unknown) - MAX_UNKNOWN
            self.add(unknown[MAX_UNKNOWN], node.field, f"and {more} more unknown fields", f"use {', '.join(known)}")
        return entries

    def sequence(self, node: Node) -> list[Node]:
        """The items of a list."""
        if node.kind != "seq":
            self._wrong_type(node, "a list ([a, b] or lines that begin with -)")
            return []
        items = []
        for number, raw in enumerate(node.raw.value):
            self._count(node)
            mark = raw.start_mark
            # An alias' node stands where its anchor stands; the list's own line is nearer to the mistake.
            line = mark.line + 1 if mark is not None and mark.line + 1 >= node.line else node.line
            items.append(Node(raw, f"{node.field}[{number}]", line))
        return items

    def text(self, node: Node, *, numbers: bool = False) -> str | None:
        """A text; with `numbers`, a number as it is written, too."""
        if node.kind == "str" or (numbers and node.kind in {"int", "float"}):
            return str(node.raw.value)
        self._wrong_type(node, "text", 'put it in quotes: "..."')
        return None

    def boolean(self, node: Node) -> bool | None:
        """true or false."""
        if node.kind == "bool":
            return str(node.raw.value).lower() == "true"
        self._wrong_type(node, "true or false")
        return None

    def integer(self, node: Node) -> int | None:
        """A whole number."""
        if node.kind == "int":
            try:
                return int(str(node.raw.value).replace("_", ""), 0)
            except ValueError:
                pass
        self._wrong_type(node, "a whole number")
        return None

    def number(self, node: Node) -> float | None:
        """A finite number."""
        if node.kind in {"int", "float"}:
            text = str(node.raw.value).replace("_", "").lower()
            try:
                value = (
                    float(text.replace(".nan", "nan").replace(".inf", "inf")) if node.kind == "float" else int(text, 0)
                )
            except ValueError:
                self._wrong_type(node, "a number")
                return None
            if math.isfinite(value):
                return value
            self.complain(node, f"is {node.raw.value}", "write a finite number")
            return None
        self._wrong_type(node, "a number")
        return None

    def choice(self, node: Node, choices: Iterable[str]) -> str | None:
        """One of some words."""
        words = list(choices)
        if node.kind == "str" and node.raw.value in words:
            return str(node.raw.value)
        shown = names.quote(str(node.raw.value)) if isinstance(node.raw.value, str) else f"a {_say(node.kind)}"
        self.complain(node, f"is {shown}", f"use one of {', '.join(words)}" if len(words) > 1 else f"write {words[0]}")
        return None

    @staticmethod
    def child(field: str, name: str, *, free: bool = False, most: int = names.MAX_ID) -> str:
        """The path of an entry; the keys of free maps are quoted."""
        short = name if len(name) <= most else name[:most] + "..."
        if free:
            return f'{field}["{short}"]'
        return f"{field}.{short}" if field else short

    def _wrong_type(self, node: Node, wanted: str, fix: str = "") -> None:
        given = _say(node.kind)
        if node.field and isinstance(node.raw.value, str) and node.raw.value:  # not a whole file that is no graph
            given += f" {names.quote(node.raw.value)}"
        self.complain(node, f"is {given}, not {wanted}", fix or f"write {wanted}")

    def _count(self, node: Node) -> None:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            self.add(node.line, node.field, f"aliases make more than {MAX_ENTRIES} entries", "write fewer aliases")
            raise GraphFileError(self.problems)


def _say(kind: str) -> str:
    words = {
        "map": "a mapping",
        "seq": "a list",
        "str": "the text",
        "int": "the number",
        "float": "the number",
        "bool": "the boolean",
        "null": "nothing",
        "timestamp": "the date",
    }
    return words.get(kind, f"a value tagged {names.quote(kind)}")


def _shown(name: str) -> str:
    """An unknown field's name for a message. What follows a colon is no name: a line of /etc/shadow reads as a key."""
    head, colon, _ = name.partition(":")
    return f"{head}:..." if colon else name


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:64], known, n=1)
    if name == "<<":
        return "merge keys are not supported; put shared fields into spec.defaults"
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(known)}"


def dump(value: object) -> str:
    """Plain data (of JSON's types) as YAML, in the given order of keys."""
    out = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares it as None
    yaml.dump(value, out)
    return out.getvalue()
