"""`EtcdServer`: one real etcd on loopback that a test may kill, freeze, fill up, back up and restore.

Theory: what a store does when it dies can only be learned from a store that dies. The server is a child process with
its own data directory (fsync on), addressed by pid only, and the kernel kills it when the thread that started it ends,
so a dying test leaves nothing behind. Start it from a thread that lives as long as the test, best the main one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from baton.clock import SystemClock
from control_plane.store.etcd import TlsFiles, operator
from lab.etcd_binary import EtcdBinary, find_etcd
from lab.processes import mortal

START_TIMEOUT = 30.0
"""Seconds until a started etcd must serve: one here, ten on a machine with a slow disk."""

STOP_TIMEOUT = 10.0
"""Seconds that `stop` gives it to end by itself before it is killed."""

PORT_TRIES = 5
"""A free port may be taken between our asking and etcd's binding; then others are tried."""

RPC_TIMEOUT = 30.0
"""Seconds for a snapshot or an alarm."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A member's place in a cluster of several."""

    name: str
    ports: tuple[int, int, int]
    """Client, peer, metrics: all members must know them before the first one starts."""
    peers: Mapping[str, int]
    """Name of every member -> its peer port."""


class EtcdServer:
    """See the module. A context manager: entering starts it, leaving stops it."""

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: EtcdBinary | None = None,
        tls: TlsFiles | None = None,
        flags: Sequence[str] = (),
        membership: Membership | None = None,
    ) -> None:
        """`data_dir` is made if need be and kept; `tls` makes clients show a certificate; `flags` go to etcd as is. With
        `membership` it is one of several, and serves only once most of them run."""
        self.binary = binary or find_etcd()
        self.data_dir = data_dir
        self.log_path = data_dir.with_name(data_dir.name + ".log")
        self._tls = tls
        self._flags = tuple(flags)
        self._name = membership.name if membership else "baton"
        self._peers = membership.peers if membership else {}
        self._ports = membership.ports if membership else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """host:port for clients. The same over restarts."""
        return f"127.0.0.1:{self._reserved()[0]}"

    @property
    def pid(self) -> int:
        """The running process. Raises RuntimeError if there is none."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("etcd is not running")
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it serves. Raises RuntimeError with the end of its log."""
        first_time = self._ports is None
        fresh = not self.data_dir.exists()
        for _ in range(PORT_TRIES):
            if self._ports is None:
                self._ports = free_ports()
            self._process = self._spawn(self._ports)
            if self._wait_until_serving(self._process):
                return
            self._reap()
            if not first_time:
                break
            self._ports = None
            if fresh:  # it may hold a peer address that was taken; data that was there before is never ours to delete
                shutil.rmtree(self.data_dir, ignore_errors=True)
        raise RuntimeError(f"etcd did not start:\n{self._log_tail()}")

    def stop(self) -> None:
        """End it in order; kill it if it does not. Does nothing if it does not run."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()

    def kill(self) -> None:
        """SIGKILL: what was not synced to disk is gone for it."""
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def restart(self) -> None:
        """Start again on the same data and ports, stopping it first if it runs."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def set_nospace(self, active: bool) -> None:
        """Raise or disarm the NOSPACE alarm: writes that grow the store are refused while it is up."""
        operator.set_nospace(self.endpoint, active, timeout=RPC_TIMEOUT, tls=self._tls)

    def snapshot(self, path: Path) -> None:
        """Write a backup to `path`, as `etcdctl snapshot save` does."""
        operator.save_snapshot(self.endpoint, path, timeout=RPC_TIMEOUT, tls=self._tls)

    def restore(self, path: Path, *, bump_revision: int = 0) -> None:
        """Stop, replace all data by the backup, start. Without `bump_revision` revisions rewind (PROTOCOL J12); with it
        they go on that far ahead, and everything before is compacted. Raises RuntimeError without etcdutl."""
        if self.binary.etcdutl is None:
            raise RuntimeError("a restore needs etcdutl beside etcd: run `scripts/tools etcd`")
        self.stop()
        shutil.rmtree(self.data_dir)
        peer = f"http://127.0.0.1:{self._reserved()[1]}"
        command = [str(self.binary.etcdutl), "snapshot", "restore", str(path), "--data-dir", str(self.data_dir)]
        command += ["--name", "baton", "--initial-cluster", f"baton={peer}", "--initial-advertise-peer-urls", peer]
        if bump_revision:
            command += ["--bump-revision", str(bump_revision), "--mark-compacted"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RPC_TIMEOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"etcdutl snapshot restore failed:\n{done.stderr}")
        self.start()

    # -- the process ---------------------------------------------------------------------------------------------------

    def _reserved(self) -> tuple[int, int, int]:
        if self._ports is None:
            raise RuntimeError("etcd was never started")
        return self._ports

    def _spawn(self, ports: tuple[int, int, int]) -> subprocess.Popen[bytes]:
        scheme = "https" if self._tls else "http"
        client, peer = f"{scheme}://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        members = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in self._peers.items())
        command = [str(self.binary.etcd), "--name", self._name, "--data-dir", str(self.data_dir), "--log-level", "warn"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += [
            "--initial-cluster",
            members or f"{self._name}={peer}",
            "--listen-metrics-urls",
            f"http://127.0.0.1:{ports[2]}",
        ]
        if self._tls:
            command += ["--cert-file", str(self._tls.cert), "--key-file", str(self._tls.key)]
            command += ["--trusted-ca-file", str(self._tls.ca), "--client-cert-auth"]
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                mortal([*command, *self._flags]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle, not etcd's
            )

    def _wait_until_serving(self, process: subprocess.Popen[bytes]) -> bool:
        url = f"http://127.0.0.1:{self._reserved()[2]}/health"
        clock = SystemClock()
        deadline = clock.boot() + START_TIMEOUT
        while clock.boot() < deadline:
            try:
                with urllib.request.urlopen(url, timeout=1.0) as answer:
                    if b"true" in answer.read():
                        return True
            except OSError:
                pass  # not listening yet, or no leader yet
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            return False  # it ended
        return False

    def _reap(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(STOP_TIMEOUT)
            self._process = None

    def _log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-4_000:] if self.log_path.exists() else "(no log)"


def free_ports() -> tuple[int, int, int]:
    """Three different loopback ports that are free right now."""
    sockets = [socket.socket() for _ in range(3)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        first, second, third = (each.getsockname()[1] for each in sockets)
        return first, second, third
    finally:
        for each in sockets:
            each.close()
