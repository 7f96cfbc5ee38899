"""Where etcd's programs may lie: what `BATON_ETCD` names, and what `scripts/tools etcd` has built.

One place for all who look: the local federation, which runs etcd, and `baton admin restore`, which needs its tool for data files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT = "BATON_ETCD"
"""Path of an etcd binary to use instead of any other; its etcdctl and etcdutl are looked for beside it."""


def cache_dir(env: Mapping[str, str]) -> Path:
    """Where `scripts/tools` puts what it builds."""
    return Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home()) / ".cache") / "baton" / "tools"


def built_folders(env: Mapping[str, str]) -> list[Path]:
    """The folders of our own builds of etcd, the newest version first."""
    return sorted(cache_dir(env).glob("etcd-*/"), key=_version, reverse=True)


def beside_etcd(tool: str, env: Mapping[str, str]) -> list[Path]:
    """Where a tool of etcd's may lie, best first; PATH is not among them."""
    named = env.get(ENVIRONMENT)
    return [*([Path(named).with_name(tool)] if named else []), *(folder / tool for folder in built_folders(env))]


def _version(folder: Path) -> tuple[int, ...]:
    found = re.match(r"etcd-(\d+)\.(\d+)\.(\d+)", folder.name)
    return tuple(int(part) for part in found.groups()) if found else ()
