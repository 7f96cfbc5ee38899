"""The version gate: on which etcd servers Baton dares to run (reliability.md 1.1).

Theory: fences make wrong timing harmless, but nothing makes a store harmless that answers a linearizable read with old
data, loses a watch event, or lets members disagree. Each bound below is the first release of its line that carries the
last known fix of that kind:

* refused: everything below 3.5.28, and 3.6.0 to 3.6.8 (stale linearizable reads after a pause, etcd issue 20418;
  lease renewal after revocation; lost watch events). No 3.4 release is developed any more.
* run with a warning: 3.5.28 to 3.5.32, 3.6.9 to 3.6.13, 3.7.0 (safe in what we rely on; open security fixes).
* supported: from 3.5.33, 3.6.14 and 3.7.1 on.

Pure.
"""

from __future__ import annotations

import re
from enum import Enum

from control_plane.store.base import Unsupported


class Support(Enum):
    """What the gate says about a server."""

    SUPPORTED = "supported"
    OLD = "old"
    """Safe to run on; known, fixed bugs remain: warn."""
    UNSAFE = "unsafe"
    """Breaks a guarantee that Baton stands on, or is not known to keep it: refuse to start."""


_SAFE_FROM = {(3, 5): 28, (3, 6): 9, (3, 7): 0}
"""First patch of each line that keeps the guarantees we use."""

_SUPPORTED_FROM = {(3, 5): 33, (3, 6): 14, (3, 7): 1}
"""First patch of each line without a known bug that touches us."""

_NEWEST_LINE = max(_SUPPORTED_FROM)
"""Lines of major version 3 after this one inherit its fixes and count as supported."""

_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.\-]+)?(\+[0-9A-Za-z.\-]+)?")


def parse_version(version: str) -> tuple[int, int, int] | None:
    """(major, minor, patch); a pre-release counts as the patch before it; None if it is no version."""
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        return None
    patch = int(match[3]) - (1 if match[4] else 0)
    return int(match[1]), int(match[2]), patch


def check_version(version: str) -> Support:
    """Judge a server by the version that `Store.status` reports. What cannot be read is UNSAFE."""
    parsed = parse_version(version)
    if parsed is None:
        return Support.UNSAFE
    line, patch = parsed[:2], parsed[2]
    if line[0] == _NEWEST_LINE[0] and line > _NEWEST_LINE:
        return Support.SUPPORTED if patch >= 0 else Support.OLD
    if line not in _SAFE_FROM or patch < _SAFE_FROM[line]:
        return Support.UNSAFE
    return Support.SUPPORTED if patch >= _SUPPORTED_FROM[line] else Support.OLD


def require_version(version: str) -> Support:
    """Like `check_version`, for a start-up gate. Raises Unsupported instead of returning UNSAFE."""
    support = check_version(version)
    if support is Support.UNSAFE:
        raise Unsupported(
            f"etcd {version or '(no version)'} is refused: it does not keep guarantees that Baton stands on; "
            "run 3.7.1 or newer, 3.6.14 or newer, or 3.5.33 or newer"
        )
    return support
