"""The agent's configuration: a TOML file, flags over it, one frozen dataclass out of it.

Everything is restart-only. Unknown keys are refused with the nearest known name; the lease values are checked against
both inequalities of F5 before anything starts.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from baton.leases import DEFAULT_PROFILE, PROFILES, LeaseValues, UnsafeLease, check
from baton.telemetry import logs
from baton.webport import NotLoopback, check_address
from cluster_agent.core.capacity import NodeSpec

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""Names of clusters and namespaces."""

_SIZES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


class BadConfig(ValueError):
    """The configuration cannot be used; the text names the key and what it would have to be."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files for mutual TLS."""

    ca: Path
    certificate: Path
    key: Path
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What one agent needs to know."""

    cluster: str
    """Name of the cluster it serves; must be the certificate's."""
    endpoints: tuple[str, ...]
    """host:port of replicas or of a balancer before them; tried in turn."""
    directory: Path
    """Journal, guard and private directories of workloads."""
    nodes: tuple[NodeSpec, ...]
    """What work may use."""
    lease: LeaseValues = field(default_factory=lambda: PROFILES[DEFAULT_PROFILE])
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    """Namespaces it may serve; empty means all."""
    fixed_endpoints: bool = False
    """Never dial an address that a replica tells: what replicas call themselves may not be reachable from here (a
    balancer, a tunnel, a fault proxy)."""
    tls: TlsConfig | None = None
    """None: plain text, to loopback only."""
    boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id")
    """Where the host's boot id is read; a lab gives its own file to play a power cut."""
    cache_bytes: int = 5 << 30
    """Of artifacts kept for the next attempt that reads them: a few large parents of a wide map. Smaller fetches them again and
    again; larger takes disk that nobody reserved. 0 keeps none."""
    drain_on_term: bool = False
    """SIGTERM kills all work, waits for its reports and says goodbye (S5); otherwise work goes on for the next
    agent."""
    drain_seconds: float = 60.0
    """Longest drain; after it the agent leaves without a goodbye, and the session ends by time."""
    log_level: str = "info"
    log_format: str = "json"
    """json or text: how log lines look on stderr."""
    metrics_listen: str = ""
    """host:port of /metrics and /healthz; empty: none."""
    metrics_anywhere: bool = False
    """They may be reached from other machines, although nobody there is asked who they are."""
    metrics_port_file: Path | None = None
    """Where to write their host:port once they are served."""


def parse_size(text: str | int) -> int:
    """Bytes of `4Gi`, `500M`, `1024`. Raises BadConfig."""
    found = re.fullmatch(r"(\d{1,18})([kmgt]i?)?b?", str(text).strip().lower())
    if found is None:
        raise BadConfig(f"{text!r} is not a size such as 4Gi, 500M or 1024")
    return int(found[1]) * _SIZES[found[2] or ""]


def parse_cpus(text: str | float) -> int:
    """Thousandths of a CPU of `4` or `0.5`. Raises BadConfig."""
    if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", str(text)) is None or float(text) <= 0:
        raise BadConfig(f"{text!r} is not a number of CPUs above 0, with at most three decimals")
    return round(float(text) * 1000)


def pairs(items: Sequence[str], what: str) -> dict[str, str]:
    """`["a=b"]` as a mapping. Raises BadConfig."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals or name in found:
            raise BadConfig(f"{what} {item!r} is not name=value, or given twice")
        found[name] = value
    return found


def load_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises BadConfig for what it cannot read and for unknown keys."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path}: {error}") from error
    _known(content, FILE_KEYS, str(path))
    _known(content.get("tls", {}), {item.name for item in fields(TlsConfig)}, f"{path}: [tls]")
    _known(content.get("lease", {}), {item.name for item in fields(LeaseValues)} - {"profile"}, f"{path}: [lease]")
    return content


FILE_KEYS = {
    "cluster",
    "endpoints",
    "fixed_endpoints",
    "directory",
    "profile",
    "lease",
    "cpus",
    "memory",
    "disk",
    "extended",
    "labels",
    "taints",
    "namespaces",
    "tls",
    "boot_id_file",
    "cache",
    "drain",
    "drain_seconds",
    "log_level",
    "log_format",
    "metrics_listen",
    "metrics_anywhere",
    "metrics_port_file",
}


def _known(table: object, names: set[str], where: str) -> None:
    if not isinstance(table, dict):
        raise BadConfig(f"{where} must be a table")
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, sorted(names), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadConfig(f"{where}: unknown key {key!r}{hint}")


def build(values: Mapping[str, Any]) -> AgentConfig:
    """A checked configuration from keys as in the file. Raises BadConfig."""
    _known(dict(values), FILE_KEYS, "configuration")
    for key in ("cluster", "endpoints", "directory", "cpus"):
        if not values.get(key):
            raise BadConfig(f"{key} is missing")
    cluster = str(values["cluster"])
    if NAME.fullmatch(cluster) is None:
        raise BadConfig(f"cluster {cluster!r} must match {NAME.pattern}")
    drain_seconds = float(values.get("drain_seconds", 60.0))
    if not 0 < drain_seconds <= 3600:
        raise BadConfig("drain_seconds must be above 0 and at most 3600")
    return AgentConfig(
        cluster=cluster,
        endpoints=_strings(values, "endpoints"),
        directory=Path(values["directory"]),
        nodes=(_node(values),),
        lease=_lease(values),
        labels={str(name): str(value) for name, value in dict(values.get("labels", {})).items()},
        taints=_strings(values, "taints"),
        namespaces=_strings(values, "namespaces"),
        fixed_endpoints=bool(values.get("fixed_endpoints", False)),
        tls=_tls(values.get("tls")),
        boot_id_file=Path(values.get("boot_id_file", AgentConfig.__dataclass_fields__["boot_id_file"].default)),
        cache_bytes=parse_size(values.get("cache", "5Gi")),
        drain_on_term=bool(values.get("drain", False)),
        drain_seconds=drain_seconds,
        log_level=_level(str(values.get("log_level", "info"))),
        log_format=_log_format(str(values.get("log_format", "json"))),
        metrics_listen=_metrics_listen(values),
        metrics_anywhere=bool(values.get("metrics_anywhere", False)),
        metrics_port_file=Path(values["metrics_port_file"]) if values.get("metrics_port_file") else None,
    )


def _metrics_listen(values: Mapping[str, Any]) -> str:
    address = str(values.get("metrics_listen", ""))
    try:
        if address:
            check_address(address, anywhere=bool(values.get("metrics_anywhere", False)))
    except NotLoopback as error:
        raise BadConfig(f"metrics_listen: {error}: listen on 127.0.0.1, or say --metrics-anywhere") from error
    except ValueError as error:
        raise BadConfig(f"metrics_listen: {error}") from error
    return address


def _strings(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = values.get(key, ())
    if isinstance(found, str) or not all(isinstance(item, str) and item for item in found):
        raise BadConfig(f"{key} must be a list of texts")
    return tuple(found)


def _node(values: Mapping[str, Any]) -> NodeSpec:
    extended = dict(values.get("extended", {}))
    if not all(isinstance(amount, int) and amount >= 0 for amount in extended.values()):
        raise BadConfig("extended must be a table of whole numbers, 0 or more")
    memory, disk = parse_size(values.get("memory", 0)), parse_size(values.get("disk", 0))
    return NodeSpec(parse_cpus(values["cpus"]), memory, disk, tuple(sorted(extended.items())))


def _lease(values: Mapping[str, Any]) -> LeaseValues:
    profile = values.get("profile", DEFAULT_PROFILE)
    if profile not in PROFILES:
        raise BadConfig(f"profile {profile!r} is none of {', '.join(PROFILES)}")
    lease = replace(PROFILES[profile], **values.get("lease", {}))
    try:
        check(lease)
    except UnsafeLease as error:
        raise BadConfig(str(error)) from error
    return lease


def _tls(table: Mapping[str, Any] | None) -> TlsConfig | None:
    if not table:
        return None
    missing = [key for key in ("ca", "certificate", "key") if not table.get(key)]
    if missing:
        raise BadConfig(f"tls needs {', '.join(missing)} too")
    return TlsConfig(Path(table["ca"]), Path(table["certificate"]), Path(table["key"]), table.get("server_name", ""))


def _level(level: str) -> str:
    if level not in {"debug", "info", "warning", "error"}:
        raise BadConfig(f"log_level {level!r} is none of debug, info, warning, error")
    return level


def _log_format(form: str) -> str:
    if form not in logs.FORMATS:
        raise BadConfig(f"log_format {form!r} is none of {', '.join(logs.FORMATS)}")
    return form


def arguments() -> argparse.ArgumentParser:
    """The command line. Flags win over the file."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_agent",
        description="Serve one cluster: run its share of the federation's work under leases and fences.",
        epilog="Exit codes: 0 left in order, 1 failed while running, 2 bad configuration, 3 journal damaged, 4 disk.",
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="TOML file with the keys below (dashes as underscores)")
    add("--cluster", help="name of the cluster")
    add("--endpoint", action="append", metavar="HOST:PORT", help="a replica; may be repeated")
    add("--fixed-endpoints", action="store_true", default=None, help="dial nothing but the endpoints given here")
    add("--directory", metavar="D", help="journal, guard and workloads live here")
    add("--profile", choices=sorted(PROFILES), help=f"lease profile (default {DEFAULT_PROFILE})")
    add("--cpus", help="CPUs that work may use, e.g. 4 or 0.5")
    add("--memory", help="memory that work may use, e.g. 8Gi; not accounted if not given")
    add("--disk", help="disk that work may use, e.g. 50Gi; not accounted if not given")
    add("--extended", action="append", metavar="NAME=COUNT", help="a countable extra, e.g. gpus=2; may be repeated")
    add("--label", action="append", metavar="K=V", help="a label of the cluster; may be repeated")
    add("--taint", action="append", metavar="T", help="a taint of the cluster; may be repeated")
    add("--namespace", action="append", metavar="NS", help="a namespace it may serve (default all); may be repeated")
    add("--tls-ca", metavar="PEM", help="authority of the replicas' certificates")
    add("--tls-certificate", metavar="PEM", help="certificate that names this cluster")
    add("--tls-key", metavar="PEM", help="its key")
    add("--tls-server-name", metavar="NAME", help="name the replicas' certificates must carry, if not the endpoint's")
    add("--boot-id-file", metavar="FILE", help="where the host's boot id is read")
    add("--cache", metavar="SIZE", help="disk for artifacts that may be read again (default 5Gi; 0 for none)")
    add("--drain", action="store_true", default=None, help="on SIGTERM kill all work, report it, say goodbye")
    add("--drain-seconds", type=float, help="longest drain (default 60)")
    add("--log-level", help="debug, info (default), warning or error")
    add("--log-format", help="json (default) or text")
    add("--metrics-listen", metavar="HOST:PORT", help="serve /metrics and /healthz there (default: nowhere)")
    add("--metrics-anywhere", action="store_true", default=None, help="let --metrics-listen be beyond loopback")
    add("--metrics-port-file", metavar="PATH", help="write the port of --metrics-listen here")
    return parser


def from_arguments(argv: Sequence[str]) -> AgentConfig:
    """The configuration of a command line. Raises BadConfig; argparse exits by itself for --help and bad flags."""
    given = {name: value for name, value in vars(arguments().parse_args(argv)).items() if value is not None}
    path = given.pop("config", None)
    values: dict[str, Any] = load_file(path) if path is not None else {}
    for flag, key in {"endpoint": "endpoints", "taint": "taints", "namespace": "namespaces"}.items():
        if flag in given:
            values[key] = given.pop(flag)
    if "label" in given:
        values["labels"] = {**values.get("labels", {}), **pairs(given.pop("label"), "label")}
    if "extended" in given:
        counts = pairs(given.pop("extended"), "extended")
        if not all(count.isdecimal() for count in counts.values()):
            raise BadConfig("extended takes whole numbers, e.g. gpus=2")
        values["extended"] = {**values.get("extended", {}), **{name: int(count) for name, count in counts.items()}}
    tls = {name.removeprefix("tls_"): given.pop(name) for name in list(given) if name.startswith("tls_")}
    if tls:
        values["tls"] = {**values.get("tls", {}), **tls}
    return build({**values, **given})
