"""A replica's process: flags in, log lines on stderr, an exit code out (`--help` lists them).

SIGTERM or SIGINT leaves in order: callers and agents are turned away, shards are handed over, then it ends. A second one ends it
at once; its lease then runs out by itself.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import cast

from baton import collector
from baton.clock import Clock, Entropy, SystemClock, SystemEntropy
from baton.telemetry import logs
from control_plane.artifacts import address
from control_plane.artifacts.base import ObjectStore, ObjectStoreRefused
from control_plane.artifacts.directory import DirectoryStore
from control_plane.config import BadConfig, Config, TlsPaths, from_arguments
from control_plane.history import HistoryDown
from control_plane.history_sqlite import SqliteHistory
from control_plane.observing import Observing, write_port
from control_plane.refusals import Corrupt, IncompatibleFederation
from control_plane.server import GrpcServer, Identity, Listener, Parts, Replica, live
from control_plane.snapshot_process import HelperProcess
from control_plane.store.base import StoreError, Unavailable, Unsupported
from control_plane.store.etcd import EtcdStore, ThreadedLeaseKeeper, TlsFiles
from control_plane.store.etcd.operator import save_snapshot
from control_plane.store.versions import Support, check_version, require_version

log = logging.getLogger("control_plane")

LEFT, FAILED, BAD_CONFIG = 0, 1, 2

STATUS_TIMEOUT = 5.0
STORE_PAUSE = 1.0
"""Seconds for one look at the store's version, and between two: at a start both often come up together."""

BACKUP_TIMEOUT = 600.0
"""Seconds for a backup: etcd's 8 GB at a slow disk's 15 MB/s."""

BACKUP_PIECE = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one replica; the exit code."""
    try:
        config = from_arguments(sys.argv[1:] if argv is None else argv)
    except BadConfig as error:
        sys.stderr.write(f"control_plane: {error}\n")
        return BAD_CONFIG
    logs.set_up(config.log_format, config.log_level, {"replica": config.replica})
    collector.tune()
    try:
        return asyncio.run(_serve(config))
    except BadConfig as error:
        log.error("the configuration cannot be used", extra={"error": str(error)})
        return BAD_CONFIG
    except asyncio.CancelledError:
        log.warning("ended at once; the lease is left to expire")
        return FAILED
    except BaseException as error:  # noqa: BLE001 - the last one who can say why
        _say_why(error)
        return FAILED


def _say_why(error: BaseException) -> None:
    """Known ends in one sentence, others with all there is."""
    if isinstance(error, BaseExceptionGroup):
        known, others = error.split((IncompatibleFederation, Corrupt, Unsupported))
        if others is None and known is not None:
            _say_why(known.exceptions[0])
            return
    if isinstance(error, (IncompatibleFederation, Corrupt, Unsupported, HistoryDown, ObjectStoreRefused, OSError)):
        log.error("the replica cannot run", extra={"error": str(error)})
    else:
        log.error("the replica failed", exc_info=error)


async def _serve(config: Config) -> int:
    """From the first look at the store to the end. Raises what ends it."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    this = cast("asyncio.Task[int]", asyncio.current_task())

    def signalled() -> None:
        if stop.is_set():
            this.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    clock = SystemClock()
    etcd_tls = TlsFiles(config.etcd_tls.ca, config.etcd_tls.cert, config.etcd_tls.key) if config.etcd_tls else None
    store = EtcdStore(config.etcd, tls=etcd_tls, key_prefix=config.etcd_prefix, clock=clock)
    helper = HelperProcess(_helper_arguments(config))
    server = GrpcServer(Listener(config.listen, config.tls, config.serves_reflection))
    history = SqliteHistory(config.history)
    watching = Observing(config)
    entropy = SystemEntropy()
    objects = _objects(config, clock, entropy)
    parts = Parts(
        store=store,
        make_keeper=lambda: ThreadedLeaseKeeper(config.etcd, tls=etcd_tls, clock=clock),
        make_peers=lambda view: server.make_peers(config.replica, clock, view),
        clock=clock,
        entropy=entropy,
        history=history,
        snapshotter=helper,
        quota_bytes=config.etcd_quota_bytes,
        backup=lambda: _backup(config, etcd_tls),
        meter=watching.meter,
        archived=watching.archived,
        objects=objects,
    )
    reached_at = config.advertise or server.address
    replica = Replica(Identity(config.replica, reached_at, config.lease_ttl, _version()), parts)
    try:
        return await _until_stopped(config, store, server, replica, stop, watching)
    finally:
        with suppress(asyncio.CancelledError):
            await watching.close()
            await replica.kill()
            await server.stop()
            await helper.close()
            await history.close()
            await store.close()
            if objects is not None:
                await objects.close()
            if config.port_file is not None:
                config.port_file.unlink(missing_ok=True)


def _objects(config: Config, clock: Clock, entropy: Entropy) -> ObjectStore | None:
    """The store of artifacts, if there is one. Raises ObjectStoreRefused, OSError."""
    if not config.artifacts:
        return None
    where = address.parse(config.artifacts)
    if isinstance(where, Path):
        return DirectoryStore(where, clock, entropy)
    from control_plane.artifacts.s3 import S3Store  # noqa: PLC0415 - loads a large library that few replicas need

    return S3Store(where)


async def _until_stopped(
    config: Config,
    store: EtcdStore,
    server: GrpcServer,
    replica: Replica,
    stop: asyncio.Event,
    watching: Observing,
) -> int:
    """Serve until a signal or a failure."""
    asked = asyncio.create_task(stop.wait())
    life = asyncio.create_task(_live(config, store, server, replica, watching))
    try:
        await asyncio.wait({asked, life}, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            await life
            return FAILED  # loops only end when they are told to
        log.info("leaving")
        await server.drain()
        await replica.stop()
        return LEFT
    finally:
        asked.cancel()
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)


async def _live(config: Config, store: EtcdStore, server: GrpcServer, replica: Replica, watching: Observing) -> None:
    """Gate, start, tell the ports, run."""
    await _gate(config, store)
    await watching.start(replica, server)
    await live(replica, server, lambda: _started(config, server))


def _started(config: Config, server: GrpcServer) -> None:
    log.info("listening", extra={"address": server.address})
    if config.port_file is not None:
        write_port(config.port_file, server.address)


async def _gate(config: Config, store: EtcdStore) -> None:
    """Which etcd this is (reliability.md 1.1). Waits for one that does not answer yet. Raises Unsupported."""
    version = None
    while version is None:
        try:
            version = (await store.status(timeout=STATUS_TIMEOUT)).version
        except Unavailable as error:
            log.warning("waiting for the store", extra={"error": str(error)})
            await SystemClock().sleep(STORE_PAUSE)
    support = check_version(version) if config.allow_unsafe_etcd else require_version(version)
    if support is not Support.SUPPORTED:
        log.warning("this etcd has known bugs that later releases fixed", extra={"etcd": version, "is": support.value})


async def _backup(config: Config, tls: TlsFiles | None) -> AsyncIterator[bytes]:
    """A backup of the first member that gives one, by way of a file beside history: etcd's is not to be held in memory."""
    with tempfile.TemporaryDirectory(dir=config.history.parent, prefix="backup-") as directory:
        path = Path(directory) / "snapshot"
        failure: StoreError = Unavailable("no member")
        for endpoint in config.etcd:
            try:
                await asyncio.to_thread(save_snapshot, endpoint, path, timeout=BACKUP_TIMEOUT, tls=tls)
                break
            except StoreError as error:
                failure = error
        else:
            raise failure
        with path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, BACKUP_PIECE):
                yield piece


def _helper_arguments(config: Config) -> list[str]:
    arguments = [part for endpoint in config.etcd for part in ("--endpoint", endpoint)]
    arguments += ["--prefix", config.etcd_prefix]
    if config.etcd_tls is not None:
        arguments += _tls_arguments(config.etcd_tls)
    return arguments


def _tls_arguments(tls: TlsPaths) -> list[str]:
    return ["--tls-ca", str(tls.ca), "--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]


def _version() -> str:
    try:
        return metadata.version("baton-federation")
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
