"""Is a page of /metrics good? Judged everywhere by promtool's rules said again here, and by promtool's own code where that can be had.

`promtool check metrics` parses the text and calls a small library (client_golang's promlint). Where promtool is installed it is
run; where Go is, `scripts/tools promlint` builds that library's linter, in a second once etcd is built. A machine that has neither
still has `problems`: the same rules over the same text, which a test holds against the original wherever that runs.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]

BUILD_SECONDS = 300.0
"""For a first build from nothing: half a minute of one core that others may want too."""

_ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
_OFF_BASE = {"minutes", "hours", "days", "weeks", "kelvins", "fahrenheit", "rankine", "inches", "yards", "miles"} | {
    *("bits", "calories", "pounds", "ounces"),
}
_LAST_WORDS = {
    "total": {"counter"},
    "bucket": {"histogram"},
    "count": {"histogram", "summary"},
    "sum": {"histogram", "summary"},
}
"""Ends of names that are reserved for types."""
_LABELS = {"le": "histogram", "quantile": "summary"}
"""Labels that are."""
_PREFIXED = re.compile(
    r"(pico|nano|micro|milli|centi|deci|deca|hecto|kilo|kibi|mega|mibi|giga|gibi|tera|tebi|peta|pebi)(seconds|bytes|meters|grams)"
)


def problems(text: str) -> list[str]:
    """What is wrong with a page; empty if nothing is."""
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError as error:
        return [f"it does not parse: {error}"]
    told = [f"{said} twice" for said, count in Counter(_announcements(text)).items() if count > 1]
    series = Counter((s.name, *sorted(s.labels.items())) for family in families for s in family.samples)
    told += [f"{name} twice" for name, count in series.items() if count > 1]
    names = Counter(family.name for family in families)
    told += [f"{name} in two places" for name, count in names.items() if count > 1]
    for family in families:
        told += [f"{family.name}: {problem}" for problem in _of(family, f"# TYPE {family.name}_total counter" in text)]
    return told


def _announcements(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            yield " ".join(line.split(" ")[:3])


def _of(family: Metric, says_total: bool) -> Iterator[str]:
    words = family.name.lower().split("_")
    if not family.documentation:
        yield "no help text"
    if family.type == "unknown":
        return
    if family.type == "counter" and not says_total:
        yield 'counters end with "_total"'
    if family.type not in _LAST_WORDS.get(words[-1], {family.type}):
        yield f'has no business with "_{words[-1]}"'
    if family.type in words:
        yield "its type is in its name"
    if ":" in family.name:
        yield "has a colon"
    if _ABBREVIATED.intersection(words):
        yield "has an abbreviated unit"
    if _OFF_BASE.intersection(words) or any(map(_PREFIXED.fullmatch, words)):
        yield "has a unit that is no base unit"
    labels = {label for sample in family.samples for label in sample.labels}
    if any(re.search("[a-z][A-Z]", name) for name in (family.name, *labels)):
        yield "is in camelCase"
    for label, owner in _LABELS.items():
        if label in labels and family.type != owner:
            yield f"only a {owner} has the label {label}"


@functools.cache
def original() -> tuple[str, ...] | None:
    """The command of promtool's own linter; None, and a line that says so, where there is neither promtool nor Go."""
    if promtool := shutil.which("promtool"):
        return promtool, "check", "metrics"
    if shutil.which("go") is None:
        print("neither promtool nor Go is here: /metrics is judged by our own rules alone")
        return None
    command = [str(ROOT / "scripts" / "tools"), "promlint"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert built.returncode == 0, built.stderr
    return (str(Path(built.stdout.strip()) / "promlint"),)


def check(text: str) -> None:
    """Nothing is wrong with a page, by either judge."""
    assert problems(text) == []
    if (linter := original()) is not None:
        said = subprocess.run(linter, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert said.returncode == 0, said.stderr
