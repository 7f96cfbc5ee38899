"""Where a local federation lives on disk, what it was asked to be, and what its supervisor wrote down.

Theory: one private directory is one federation. Whoever holds its lock is its supervisor; `state.json` is replaced
whole, so a reader never sees half of it, and says which processes to look for if a supervisor died without a word. What
the federation itself knows is in etcd, the history file and the clusters' journals: a second `up` finds all of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton import names
from baton.leases import PROFILES

ETCD = "etcd"
"""Name of the store among the parts that can be killed or frozen."""

MAX_REPLICAS = 9
MAX_CLUSTERS = 32
"""More than a person can watch and a laptop can run; a mistyped number must not start a thousand processes."""

MAX_CPUS = 1024


class BadSettings(ValueError):
    """A federation that cannot be; the text names the setting and what it would have to be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a local federation is made of."""

    replicas: int = 2
    clusters: tuple[str, ...] = ("eu", "us", "ap")
    profile: str = "fast"
    cpus: int = 4
    """CPUs that the work of one cluster may use. They are promised, not reserved: clusters share this machine."""
    apart: bool = False
    """No cluster sees files of another one or of the control plane, as on machines of their own: each has a mount namespace. Needs
    root, or a host that lets ordinary users have user namespaces."""
    otlp_endpoint: str = ""
    """http://host:port of a collector on this machine to which replicas send finished runs' spans; empty: none."""

    def checked(self) -> Settings:
        """These settings. Raises BadSettings."""
        if not 1 <= self.replicas <= MAX_REPLICAS:
            raise BadSettings(f"--replicas is {self.replicas}; it must be 1 to {MAX_REPLICAS}")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise BadSettings(f"--cpus is {self.cpus}; it must be 1 to {MAX_CPUS}")
        if not 1 <= len(self.clusters) <= MAX_CLUSTERS:
            raise BadSettings(f"--clusters names {len(self.clusters)}; it must name 1 to {MAX_CLUSTERS}, with commas")
        for name in self.clusters:
            if problem := names.id_problem(name):
                raise BadSettings(f"--clusters: a name {problem}")
            if name == ETCD or name.startswith("replica-"):
                raise BadSettings(f"--clusters: {name!r} is the name of another part of the federation")
        if len(set(self.clusters)) < len(self.clusters):
            raise BadSettings("--clusters names one twice")
        if self.profile not in PROFILES:
            raise BadSettings(f"--profile is {self.profile!r}; it must be one of {', '.join(PROFILES)}")
        return self

    @property
    def replica_names(self) -> tuple[str, ...]:
        """`replica-1` and so on."""
        return tuple(f"replica-{number}" for number in range(1, self.replicas + 1))


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of a federation in one directory."""

    directory: Path

    @property
    def lock(self) -> Path:
        """Held by the living supervisor."""
        return self.directory / "lock"

    @property
    def state(self) -> Path:
        """What the supervisor wrote down."""
        return self.directory / "state.json"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.directory / "logs"

    @property
    def etcd(self) -> Path:
        """The store's data; its log lies beside it."""
        return self.directory / "etcd" / "data"

    @property
    def history(self) -> Path:
        """Finished runs, shared by the replicas."""
        return self.directory / "history.sqlite"

    @property
    def artifacts(self) -> Path:
        """Artifacts, shared by the replicas; clusters reach them through these."""
        return self.directory / "artifacts"

    def log(self, name: str) -> Path:
        """A process's log."""
        return self.logs / f"{name}.log"

    def port_file(self, replica: str) -> Path:
        """Where a replica says its port."""
        return self.directory / "run" / f"{replica}.port"

    def metrics_file(self, name: str) -> Path:
        """Where a replica or an agent says its web port."""
        return self.directory / "run" / f"{name}.metrics"

    def web_address(self, name: str) -> str:
        """host:port of its metrics and traces, as last said; empty if it said none."""
        try:
            return self.metrics_file(name).read_text(encoding="ascii").strip()
        except OSError:
            return ""

    def cluster(self, name: str) -> Path:
        """A cluster's private directory: the disk of that machine."""
        return self.directory / "clusters" / name

    def beyond(self, cluster: str, clusters: Iterable[str]) -> list[Path]:
        """What a cluster that is kept apart does not see."""
        others = [self.cluster(other) for other in clusters if other != cluster]
        return [*others, self.artifacts, self.etcd.parent]

    def boot_id(self, cluster: str) -> Path:
        """The machine's boot id; another one after each power cut."""
        return self.directory / "run" / f"{cluster}.boot_id"

    def make(self) -> None:
        """The directories, readable by this user only. Raises OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)  # also one that was there: tokens, results and logs lie here
        for path in (self.logs, self.etcd.parent, self.directory / "run", self.directory / "clusters"):
            path.mkdir(mode=0o700, exist_ok=True)

    def take_lock(self) -> int | None:
        """A descriptor that holds the lock while it is open; None when a living supervisor has it. Raises OSError."""
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def is_live(self) -> bool:
        """Whether a supervisor holds the lock right now."""
        if not self.lock.exists():
            return False
        fd = self.take_lock()
        if fd is None:
            return True
        os.close(fd)
        return False

    def read_state(self) -> dict[str, Any]:
        """What was written down; empty when there is nothing."""
        try:
            found = json.loads(self.state.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace it whole. Raises OSError."""
        handle, draft = tempfile.mkstemp(dir=self.directory, prefix=".state-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
        Path(draft).replace(self.state)

    def stored_settings(self) -> Settings | None:
        """What this directory's federation was asked to be the last time; None when there was none."""
        found = self.read_state().get("settings")
        if not isinstance(found, dict):
            return None
        try:
            return Settings(**{**found, "clusters": tuple(found["clusters"])}).checked()
        except (BadSettings, KeyError, TypeError):
            return None


def settings_record(settings: Settings) -> dict[str, Any]:
    """Settings as `stored_settings` reads them."""
    return {**asdict(settings), "clusters": list(settings.clusters)}


def default_directory(env: Mapping[str, str]) -> Path:
    """${XDG_STATE_HOME:-~/.local/state}/baton/local"""
    base = env.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "baton" / "local"
