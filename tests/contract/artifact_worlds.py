"""The object stores that artifacts are tested on: a directory, and S3 as moto's server speaks it."""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import obstore
import pytest

from baton.clock import SystemClock, SystemEntropy
from control_plane.artifacts.address import S3Address
from control_plane.artifacts.base import ObjectStore
from control_plane.artifacts.directory import DirectoryStore
from control_plane.artifacts.s3 import S3Store
from lab.etcd_server import free_ports

BUCKET = "artifacts"
START_SECONDS = 60.0
_numbers = itertools.count()


class StoreWorld(Protocol):
    def client(self) -> ObjectStore:
        """A new client of the same objects, as another replica has it."""
        ...

    def spoil(self, key: str, data: bytes) -> None:
        """Put other bytes where an object lies, behind its store's back; none remove it."""
        ...


class DirectoryWorld:
    def __init__(self, root: Path) -> None:
        self.root = root

    def client(self) -> DirectoryStore:
        return DirectoryStore(self.root, SystemClock(), SystemEntropy())

    def spoil(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.write_bytes(data) if data else path.unlink()

    def age(self, key: str, seconds: float) -> None:
        """Make a file look older."""
        then = time.time() - seconds
        os.utime(self.root / key, (then, then))


class S3World:
    """A prefix of its own in a bucket that tests share."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self.endpoint, self.prefix = endpoint, prefix

    def client(self) -> S3Store:
        return S3Store(S3Address(BUCKET, self.prefix, self.endpoint))

    def spoil(self, key: str, data: bytes) -> None:
        raw = self.client()._client
        obstore.put(raw, key, data) if data else obstore.delete(raw, key)


def request(endpoint: str, method: str, path: str, data: bytes = b"") -> int:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, body=data or None)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of an S3 in a process of its own, with a bucket; dead at the end."""
    port = free_ports()[0]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, "moto ended at start"
            try:
                if request(endpoint, "PUT", f"/{BUCKET}") == 200:
                    break
            except OSError:
                assert time.monotonic() < deadline, "moto does not answer"
                time.sleep(0.05)
        yield endpoint
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def unanswering_port() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def set_credentials(patch: pytest.MonkeyPatch) -> None:
    """As an operator gives them: in the environment."""
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def next_prefix() -> str:
    return f"world-{next(_numbers)}"
