"""A replica's process with its artifacts in S3: the flag, the credentials from the environment, and what an operator is told."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from baton.time_limits import time_limit
from bench.artifacts import transfer
from lab import processes
from lab.etcd_server import EtcdServer
from tests.contract.artifact_worlds import BUCKET, moto_server, set_credentials

SOON = 60.0


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as server:
        yield server


@asynccontextmanager
async def replica(folder: Path, etcd: EtcdServer, where: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address."""
    port_file = folder / "port"
    flags = ["--replica", "r1", "--history", str(folder / "history"), "--port-file", str(port_file)]
    flags += ["--etcd", etcd.endpoint, "--allow-unsafe-etcd", "--artifacts", where]
    child = processes.spawn(processes.python("control_plane", *flags), folder / "log")
    try:
        async with time_limit(SOON):
            while not (port_file.exists() and port_file.read_text()):
                assert child.poll() is None, (folder / "log").read_text()
                await asyncio.sleep(0.05)
        yield child, port_file.read_text().strip()
        child.terminate()
        assert await asyncio.to_thread(child.wait, SOON) == 0
    finally:
        child.kill()
        child.wait(SOON)


async def test_artifacts_lie_in_s3(tmp_path: Path, etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)
    with moto_server() as endpoint:
        async with replica(tmp_path, etcd, f"s3://{BUCKET}/baton/one?endpoint={endpoint}") as (child, address):
            figures = await transfer(address, child.pid, 8)
            print(figures)
            assert figures.megabytes == 8
    assert "test" not in (tmp_path / "log").read_text().replace(str(tmp_path), ""), "no credentials in the log"


async def test_an_operator_is_told_what_is_wrong_with_the_bucket(
    tmp_path: Path, etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_credentials(monkeypatch)
    with moto_server() as endpoint:
        async with replica(tmp_path, etcd, f"s3://absent-bucket?endpoint={endpoint}") as (child, address):
            with pytest.raises(grpc.aio.AioRpcError, match=r"bucket absent-bucket at .* an operator has to mend"):
                await transfer(address, child.pid, 1)
