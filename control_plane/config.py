"""A replica's configuration: a TOML file, flags over it, one frozen value out of it.

Everything is restart-only. An unknown key is refused with the nearest known one, since a misspelt key that is ignored is a
default that nobody chose. What would be unsafe is refused here, before anything listens: plain text beyond loopback above all.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from baton import names
from baton.telemetry import logs
from control_plane.artifacts import address

MIN_LEASE_TTL = 2.0
MAX_LEASE_TTL = 60.0
"""Seconds. etcd grants no less than 2; beyond a minute a dead replica's shards would rest longer than callers wait."""

LOG_LEVELS = ("debug", "info", "warning", "error")


class BadConfig(ValueError):
    """The configuration cannot be used; the text names the key and what it would have to be."""


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """PEM files for mutual TLS: our certificate and key, and the authority that signs everybody else's."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Config:
    """What one replica needs to know."""

    replica: str
    """Its id, unique in the federation."""
    history: Path
    """The file of finished runs; replicas of one host share it."""
    etcd: tuple[str, ...] = ("127.0.0.1:2379",)
    """host:port of members."""
    etcd_prefix: str = "baton/"
    """Of all keys; two federations may share an etcd under two prefixes."""
    etcd_quota_bytes: int = 0
    """Quota of an etcd before 3.6, which does not tell (its --quota-backend-bytes); 0: etcd's default of 2 GiB."""
    listen: str = "127.0.0.1:0"
    """host:port; port 0 takes a free one."""
    advertise: str = ""
    """host:port that others reach it at; empty: where it listens."""
    tls: TlsPaths | None = None
    """None: plain text, on loopback only."""
    etcd_tls: TlsPaths | None = None
    """None: plain text to etcd."""
    lease_ttl: float = 5.0
    """Seconds after which a dead replica's shards are free (PROTOCOL O1)."""
    port_file: Path | None = None
    """Where to write host:port once it listens."""
    reflection: bool | None = None
    """Whether gRPC reflection is served; None: on loopback only."""
    allow_unsafe_etcd: bool = False
    """Start on an etcd that breaks guarantees Baton stands on. For a first look, never for work."""
    log_level: str = "info"
    log_format: str = "json"
    """json or text: how log lines look on stderr."""
    metrics_listen: str = ""
    """host:port of the web port: metrics, health, traces; empty: none."""
    metrics_anywhere: bool = False
    """The web port may be reached from other machines, although it asks nobody who they are."""
    metrics_port_file: Path | None = None
    """Where to write the web port's host:port once it listens."""
    artifacts: str = ""
    """Where artifacts and large code lie: dir:PATH or s3://BUCKET/PREFIX?endpoint=URL; empty: nowhere, and they are refused. The
    same for all replicas."""
    otlp_endpoint: str = ""
    """http://host:port on loopback or https://host:port of an OTLP (gRPC) collector of finished runs' spans; empty: none."""

    @property
    def serves_reflection(self) -> bool:
        """Reflection tells strangers what there is, so beyond loopback it is off unless wanted."""
        return is_loopback(self.listen) if self.reflection is None else self.reflection


def split_address(address: str, key: str, *, port_zero: bool = False) -> tuple[str, int]:
    """Host and port of host:port or [v6]:port. Raises BadConfig naming `key`."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not host or not (0 if port_zero else 1) <= number <= 65535:
        raise BadConfig(f"{key}: {address!r} is not host:port")
    return host, number


def is_loopback(address: str) -> bool:
    """Whether only this host can reach host:port."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -- from keys to values -----------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("must be a text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list) or not value:
        raise TypeError("must be a list of texts")
    return tuple(_text(item) for item in value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("must be a number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError("must be a whole number, 0 or more")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be true or false")
    return value


def _path(value: Any) -> Path:
    return value if isinstance(value, Path) else Path(_text(value))


_READERS: dict[str, Callable[[Any], Any]] = {
    "replica": _text,
    "history": _path,
    "etcd": _texts,
    "etcd_prefix": _text,
    "etcd_quota_bytes": _count,
    "listen": _text,
    "advertise": _text,
    "lease_ttl": _number,
    "port_file": _path,
    "reflection": _flag,
    "allow_unsafe_etcd": _flag,
    "log_level": _text,
    "log_format": _text,
    "metrics_listen": _text,
    "metrics_anywhere": _flag,
    "metrics_port_file": _path,
    "otlp_endpoint": _text,
    "artifacts": _text,
}

_TABLES = ("tls", "etcd_tls")
_REQUIRED = tuple(f.name for f in fields(Config) if f.default is MISSING and f.default_factory is MISSING)


def load_file(path: Path) -> dict[str, Any]:
    """The keys of a TOML file. Raises BadConfig."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path} is no TOML: {error}") from error


def build(keys: Mapping[str, Any]) -> Config:
    """A checked configuration from keys as in the file. Raises BadConfig."""
    _known(keys, {*_READERS, *_TABLES}, "")
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if key in _TABLES:
            values[key] = _tls(value, key)
            continue
        try:
            values[key] = _READERS[key](value)
        except TypeError as error:
            raise BadConfig(f"{key} {error}, not {value!r}") from None
    for key in _REQUIRED:
        if key not in values:
            raise BadConfig(f"{key} is missing: give --{key} or the key in the file")
    config = Config(**values)
    _check(config)
    return config


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
            raise BadConfig(f"unknown key {where}{key!r}{hint}")


def _tls(table: Any, where: str) -> TlsPaths:
    if not isinstance(table, Mapping):
        raise BadConfig(f"[{where}] must be a table of cert, key and ca")
    _known(table, {"cert", "key", "ca"}, f"{where}.")
    missing = [key for key in ("cert", "key", "ca") if key not in table]
    if missing:
        raise BadConfig(f"[{where}] needs {' and '.join(missing)} too: Baton speaks mutual TLS or none")
    try:
        return TlsPaths(*(_path(table[key]) for key in ("cert", "key", "ca")))
    except TypeError as error:
        raise BadConfig(f"[{where}] cert, key and ca: each {error}") from None


def _check(config: Config) -> None:
    """What the values must be together. Raises BadConfig."""
    if problem := names.id_problem(config.replica):
        raise BadConfig(f"replica {problem}")
    split_address(config.listen, "listen", port_zero=True)
    if config.advertise:
        split_address(config.advertise, "advertise")
    for endpoint in config.etcd:
        split_address(endpoint.split("://", 1)[-1], "etcd")
    if not is_loopback(config.listen) and config.tls is None:
        raise BadConfig(
            f"listen: {config.listen} can be reached from other machines, and plain text is spoken on loopback only: "
            "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
        )
    host = split_address(config.listen, "listen", port_zero=True)[0]
    if not config.advertise and host in ("0.0.0.0", "::"):  # noqa: S104 - it is looked for, not bound
        raise BadConfig(f"advertise is missing: nobody can reach {host}; say where others find this replica")
    if not config.etcd_prefix.endswith("/") or not config.etcd_prefix.isascii():
        raise BadConfig(f"etcd_prefix {config.etcd_prefix!r} must be ASCII and end in /")
    if not MIN_LEASE_TTL <= config.lease_ttl <= MAX_LEASE_TTL:
        raise BadConfig(f"lease_ttl is {config.lease_ttl:g}: use {MIN_LEASE_TTL:g} to {MAX_LEASE_TTL:g} seconds")
    if config.metrics_listen:
        split_address(config.metrics_listen, "metrics_listen", port_zero=True)
        if not is_loopback(config.metrics_listen) and not config.metrics_anywhere:
            raise BadConfig(
                f"metrics_listen: {config.metrics_listen} can be reached from other machines, and whoever asks there is not "
                "asked who they are: listen on 127.0.0.1, or say --metrics-anywhere"
            )
    _check_collector(config.otlp_endpoint)
    _check_artifacts(config.artifacts)
    _check_logs(config)


def _check_logs(config: Config) -> None:
    if config.log_level not in LOG_LEVELS:
        raise BadConfig(f"log_level {config.log_level!r} is none of {', '.join(LOG_LEVELS)}")
    if config.log_format not in logs.FORMATS:
        raise BadConfig(f"log_format {config.log_format!r} is none of {', '.join(logs.FORMATS)}")


def _check_artifacts(where: str) -> None:
    """Raises BadConfig."""
    try:
        if where:
            address.parse(where)
    except ValueError as error:
        raise BadConfig(f"artifacts: the address {error}") from None


def _check_collector(endpoint: str) -> None:
    """Spans name runs, tasks and clusters: in plain text on loopback only. Raises BadConfig."""
    if not endpoint:
        return
    scheme, found, address = endpoint.rpartition("://")
    if found and scheme not in ("http", "https"):
        raise BadConfig(f"otlp_endpoint: {endpoint!r} is neither http://host:port nor https://host:port")
    split_address(address, "otlp_endpoint")
    if scheme != "https" and not is_loopback(address):
        raise BadConfig(
            f"otlp_endpoint: {endpoint} is not on this host, and plain text is spoken on loopback only: use https"
        )


# -- the command line --------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line. Flags win over the file."""
    parser = argparse.ArgumentParser(
        prog="python -m control_plane",
        description="Run one replica of a federation's control plane.",
        epilog="Exit codes: 0 left in order, 1 failed, 2 bad configuration or usage. Logs go to stderr.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="TOML file with the keys below (dashes as underscores)")
    add("--replica", metavar="NAME", help="this replica's id, unique in the federation")
    add("--listen", metavar="HOST:PORT", help="where to serve; port 0 takes a free one (default 127.0.0.1:0)")
    add("--advertise", metavar="HOST:PORT", help="where others reach it (default: where it listens)")
    add("--etcd", action="append", metavar="HOST:PORT", help="an etcd member; may be repeated (default 127.0.0.1:2379)")
    add("--etcd-prefix", metavar="PREFIX", help="of all keys in etcd (default baton/)")
    add(
        "--etcd-quota-bytes", type=int, metavar="BYTES", help="quota of an etcd before 3.6, which does not tell its own"
    )
    add("--history", type=Path, metavar="PATH", help="file of finished runs, shared by the replicas of a host")
    add("--lease-ttl", type=float, metavar="SECONDS", help="a dead replica's shards are free after this (default 5)")
    add("--port-file", type=Path, metavar="PATH", help="write host:port here once it listens")
    add("--reflection", action=argparse.BooleanOptionalAction, help="serve gRPC reflection (default: on loopback)")
    add("--allow-unsafe-etcd", action="store_true", default=None, help="start on an etcd with known consistency bugs")
    add("--log-level", metavar="LEVEL", help=f"{', '.join(LOG_LEVELS)} (default info)")
    add("--log-format", metavar="FORM", help=f"{' or '.join(logs.FORMATS)} (default json)")
    add("--metrics-listen", metavar="HOST:PORT", help="serve /metrics, /healthz and traces there (default: nowhere)")
    add("--metrics-anywhere", action="store_true", default=None, help="let --metrics-listen be beyond loopback")
    add("--metrics-port-file", type=Path, metavar="PATH", help="write the port of --metrics-listen here")
    add("--artifacts", metavar="WHERE", help="store of artifacts: dir:PATH or s3://BUCKET/PREFIX?endpoint=URL")
    add("--otlp-endpoint", metavar="URL", help="send finished runs' spans to this collector (OTLP over gRPC)")
    for prefix, whom in (("tls", "callers"), ("etcd-tls", "etcd")):
        add(f"--{prefix}-cert", metavar="PEM", help=f"our certificate, shown to {whom}")
        add(f"--{prefix}-key", metavar="PEM", help="its key")
        add(f"--{prefix}-ca", metavar="PEM", help=f"authority of the certificates of {whom}")
    return parser


def from_arguments(argv: Sequence[str]) -> Config:
    """The configuration of a command line. Raises BadConfig; argparse exits by itself, with 2, for what it refuses."""
    given = {key: value for key, value in vars(arguments().parse_args(argv)).items() if value is not None}
    path = given.pop("config", None)
    keys = load_file(path) if path is not None else {}
    for table in _TABLES:
        flags = {key: given.pop(f"{table}_{key}") for key in ("cert", "key", "ca") if f"{table}_{key}" in given}
        if flags:
            keys[table] = {**keys.get(table, {}), **flags}
    return build({**keys, **given})
