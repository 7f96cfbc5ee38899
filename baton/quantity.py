"""Durations and amounts as people write them: `30m`, `1h30m`, `500m` of a CPU, `256Mi` of memory.

Theory: a bare number has no unit, and the reader's guess is not the writer's; so durations need one. CPU and memory
follow Kubernetes' quantities, because that is what users of clusters have in their fingers. Everything becomes an
integer (nanoseconds, thousandths, bytes) by decimal arithmetic, never through a binary float. Pure.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|us|s|m|h|d)")
_AMOUNT = re.compile(r"(-?[0-9]{1,18}(?:\.[0-9]{1,9})?)(Ki|Mi|Gi|Ti|Pi|k|K|M|G|T|P)?")
_CPU = re.compile(r"(-?[0-9]{1,12}(?:\.[0-9]{1,9})?)(m)?")
_NANOS = {
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
    "d": 86_400_000_000_000,
}
_BYTES = {
    "": 1,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "P": 10**15,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "Pi": 2**50,
}


def duration_nanos(text: str) -> int:
    """Nanoseconds of `1h30m`, `2.5s`, `500ms`. Raises ValueError with the fix."""
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text)
    total, at = Decimal(0), 0
    while at < len(rest) and (part := _PART.match(rest, at)):
        total += Decimal(part[1]) * _NANOS[part[2]]
        at = part.end()
    if at == 0 or at != len(rest):
        raise ValueError("write a duration with units, e.g. 30s, 10m, 1h30m or 500ms")
    return sign * int(total)


def cpu_millis(text: str) -> int:
    """Thousandths of a CPU of `0.5`, `2` or `500m`. Raises ValueError with the fix."""
    found = _CPU.fullmatch(text)
    if found is None:
        raise ValueError("write CPUs as 0.5, 2 or 500m")
    amount = Decimal(found[1]) * (1 if found[2] else 1000)
    if amount != int(amount):
        raise ValueError("is finer than a thousandth of a CPU: write at least 1m, or 0.001")
    return int(amount)


def amount_bytes(text: str) -> int:
    """Bytes of `256Mi`, `1.5Gi`, `10M` or a plain number. Raises ValueError with the fix."""
    found = _AMOUNT.fullmatch(text.removesuffix("B"))
    if found is None:
        raise ValueError("write bytes as 256Mi, 1Gi, 500M or a plain number")
    return int(Decimal(found[1]) * _BYTES[found[2] or ""])


def instant(text: str) -> float:
    """Seconds since the epoch of `2026-11-30T18:00:00Z`. Raises ValueError with the fix."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("write a moment as 2026-11-30T18:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("has no time zone: append Z for UTC, or an offset such as +01:00")
    return moment.astimezone(UTC).timestamp()


def format_seconds(seconds: float) -> str:
    """`0.4s`, `12s`, `3m05s`, `2h10m`, `4d3h`: two units at most, for people."""
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"
