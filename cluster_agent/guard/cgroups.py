"""Control groups, v1 and v2: memory, CPU and process-count limits that hold for a whole tree.

What works is found by trying: at start the guard makes a group under its own one, for each controller, and writes a
limit into it. Hosts differ (v1, v2, hybrid, delegated or not, read-only in containers), and mount tables promise more
than is granted. Groups are made only for workloads with limits; killing does not depend on them (keeper.py).

Groups outlive processes, so the guard writes down where it made them (RECORD): it removes them at its end, and the next
guard of the directory, or whoever killed it, those of one that had no end.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster_agent.executors.base import Limits

CONTROLLERS = ("memory", "cpu", "pids")

CPU_PERIOD_MICROS = 100_000
"""The kernel's default scheduling period; shorter costs overhead, longer makes throttled programs stutter."""

RECORD = "cgroups"
"""File in the guard's directory: its groups, a path a line."""

_PREFIX = "baton-"
"""Only groups of this name are ever removed: the record is a file, and files can be wrong."""

CLOSE_ROUNDS = 50
"""Looks, 10 ms apart, at groups in which the kernel still counts the dead. Fewer leaves some; more delays the end."""

_PROBE_MILLIS, _PROBE_BYTES, _PROBE_PROCESSES = 1000, 64 << 20, 64


@dataclass(slots=True)
class Group:
    """The control groups of one workload."""

    directories: dict[str, Path] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def procs_files(self) -> tuple[str, ...]:
        """Files into which the workload writes `0` to enter."""
        return tuple(str(path / "cgroup.procs") for path in dict.fromkeys(self.directories.values()))

    def breach(self) -> str:
        """Which limit was hit, in words; empty when none was."""
        memory, pids = self.directories.get("memory"), self.directories.get("pids")
        files = ("memory.oom_control", "memory.events")  # v1, v2
        if memory is not None and any(_counter(memory, file, "oom_kill") for file in files):
            return f"killed for memory: over its limit of {self.limits.memory_bytes} bytes"
        if pids is not None and _counter(pids, "pids.events", "max"):
            return f"could not fork: over its limit of {self.limits.processes} processes"
        return ""

    def remove(self) -> bool:
        """Delete the groups; False when the kernel still counts something in one (try again later)."""
        for path in dict.fromkeys(self.directories.values()):
            try:
                path.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return False
        return True


class Groups:
    """The guard's subtree of each controller that it may use; `found` names them."""

    def __init__(self, name: str, record: Path, *, wanted: bool) -> None:
        self._parents: dict[str, Path] = {}
        self._record = record
        self.version = ""
        made = set(_recorded(record))
        for version, finder in (("v2", _v2_parents), ("v1", _v1_parents)) if wanted else ():
            parents = finder(f"{_PREFIX}{name}")
            made.update(parents.values())
            if len(parents) > len(self._parents):
                self._parents, self.version = parents, version
        for path in made:
            _sweep(path)
        for controller in list(self._parents):
            if not self._works(controller):
                del self._parents[controller]
        self._write_record(_remove(made - set(self._parents.values())) | set(self._parents.values()))
        self.found = tuple(self._parents)

    def complete(self) -> bool:
        """Whether memory, CPU and process counts can all be limited."""
        return set(self.found) == set(CONTROLLERS)

    def make(self, name: str, limits: Limits) -> Group | None:
        """Groups for one workload, with its limits written; None when it needs none. Raises OSError."""
        wanted = {"memory": limits.memory_bytes, "cpu": limits.cpu_millis, "pids": limits.processes}
        group = Group(limits=limits)
        for controller, parent in self._parents.items():
            if wanted[controller]:
                path = parent / name
                path.mkdir(parents=True, exist_ok=True)  # parents: somebody may have tidied up an empty group
                group.directories[controller] = path
        try:
            for controller, path in group.directories.items():
                _write_limit(controller, path, wanted[controller])
        except OSError:
            group.remove()
            raise
        return group if group.directories else None

    def close(self) -> None:
        """Delete the guard's own groups; what stays busy stays on record, for the next guard."""
        remove_left(self._record, self._parents.values())

    def _write_record(self, paths: Iterable[Path]) -> None:
        with suppress(OSError):  # a full disk: without it some empty groups may stay
            self._record.write_text("".join(f"{path}\n" for path in sorted(paths)))

    def _works(self, controller: str) -> bool:
        """Really write a limit."""
        path = self._parents[controller] / "probe"
        probe = {"memory": _PROBE_BYTES, "cpu": _PROBE_MILLIS, "pids": _PROBE_PROCESSES}
        try:
            path.mkdir(exist_ok=True)
            _write_limit(controller, path, probe[controller])
        except OSError:
            return False
        finally:
            with suppress(OSError):
                path.rmdir()
        return True


def remove_left(record: Path, known: Iterable[Path] = ()) -> None:
    """Delete the groups of a guard that is dead or ending, and its record when all are gone. `known`: also if a full
    disk kept them off the record."""
    left = {*_recorded(record), *known}
    for _ in range(CLOSE_ROUNDS):
        left = _remove(left)
        if not left:
            with suppress(OSError):
                record.unlink()
            return
        select.select([], [], [], 0.01)


def _recorded(record: Path) -> list[Path]:
    """The groups on record that still may be there."""
    try:
        paths = [Path(line) for line in record.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [path for path in paths if path.name.startswith(_PREFIX)]


def _remove(paths: set[Path]) -> set[Path]:
    """Delete groups and what is in them; returns those that are still there."""
    for path in paths:
        _sweep(path)
        with suppress(OSError):
            path.rmdir()
    return {path for path in paths if path.exists()}


def _sweep(parent: Path) -> None:
    """Delete the groups of workloads; busy ones stay."""
    with suppress(OSError):
        for path in [path for path in parent.iterdir() if path.is_dir()]:
            with suppress(OSError):
                path.rmdir()


def _v1_parents(name: str) -> dict[str, Path]:
    """Our directory under each v1 controller, as far as it can be made."""
    own = _own_paths()
    parents: dict[str, Path] = {}
    for controller, mount in _mounts("cgroup").items():
        if controller in CONTROLLERS and controller in own:
            path = mount / own[controller].lstrip("/") / name
            with suppress(OSError):
                path.mkdir(exist_ok=True)
                parents[controller] = path
    return parents


def _v2_parents(name: str) -> dict[str, Path]:
    """Our directory in the v2 tree with its controllers switched on for children, as far as that is granted.

    A group with processes cannot hand controllers down, so this works at the root, or where the agent's service was
    started in a sub-group of a delegated one (its parent is used then).
    """
    mount, own = _mounts("cgroup2").get(""), _own_paths().get("")
    if mount is None or own is None:
        return {}
    here = mount / own.lstrip("/")
    for base in (here, here.parent):
        if base != mount and mount not in base.parents:
            continue
        path = base / name
        with suppress(OSError):
            offered = set((base / "cgroup.controllers").read_text().split()) & set(CONTROLLERS)
            if not offered:
                continue
            _switch_on(base, offered)
            path.mkdir(exist_ok=True)
            _switch_on(path, offered)
            return {controller: path for controller in CONTROLLERS if controller in offered}
    return {}


def _switch_on(path: Path, controllers: set[str]) -> None:
    (path / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(controllers)))


def _mounts(kind: str) -> dict[str, Path]:
    """Controller -> mount point of the given file-system type; the v2 tree has the name ''."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, point, type_name, options = line.split()[:4]
        if type_name == kind:
            names = [""] if kind == "cgroup2" else options.split(",")
            found.update({name: Path(point) for name in names if name in CONTROLLERS or name == ""})
    return found


def _own_paths() -> dict[str, str]:
    """Controller -> path of this process's group; v2 has the name ''."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _write_limit(controller: str, path: Path, value: int) -> None:
    """One limit in whichever dialect this directory speaks. Raises OSError."""
    if controller == "pids":
        (path / "pids.max").write_text(str(value))
    elif controller == "cpu":
        quota = max(1000, value * CPU_PERIOD_MICROS // 1000)
        if (path / "cpu.max").exists():
            (path / "cpu.max").write_text(f"{quota} {CPU_PERIOD_MICROS}")
        else:
            (path / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_MICROS))
            (path / "cpu.cfs_quota_us").write_text(str(quota))
    elif (path / "memory.max").exists():
        (path / "memory.max").write_text(str(value))
        with suppress(OSError):  # hosts without swap accounting lack the file
            (path / "memory.swap.max").write_text("0")
        (path / "memory.oom.group").write_text("1")
    else:
        (path / "memory.limit_in_bytes").write_text(str(value))
        with suppress(OSError):
            (path / "memory.memsw.limit_in_bytes").write_text(str(value))


def _counter(path: Path, file: str, name: str) -> int:
    """A `name value` line of a control file; 0 when there is none."""
    try:
        fd = os.open(path / file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        for line in os.read(fd, 4096).decode().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    finally:
        os.close(fd)
    return 0
