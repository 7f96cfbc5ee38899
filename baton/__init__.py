"""Baton's public package: the wire contract (`v1`), the client SDK, the command line and the words both planes share.

Imports neither plane. What lives here is what a user may import; `clock` and `random` sources come from here so that
nothing else in the tree reads a clock or rolls a die on its own.

`from baton import Graph, task` and the other names below are loaded when they are asked for: workers import this package
through users' scripts, and need neither gRPC nor protobuf.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton import checkpoint, testing
    from baton.client import AsyncClient
    from baton.client_sync import Client
    from baton.errors import BatonError
    from baton.inside import artifact_path, input_path
    from baton.sdk import Graph, Handle, Options, Task, task
    from baton.sdk_run import Results, RunFailed, StartedRun

__all__ = [
    "AsyncClient",
    "BatonError",
    "Client",
    "Graph",
    "Handle",
    "Options",
    "Results",
    "RunFailed",
    "StartedRun",
    "Task",
    "artifact_path",
    "checkpoint",
    "input_path",
    "task",
    "testing",
]

_HOMES = {
    "AsyncClient": "baton.client",
    "BatonError": "baton.errors",
    "artifact_path": "baton.inside",
    "input_path": "baton.inside",
    "Client": "baton.client_sync",
    "Graph": "baton.sdk",
    "Handle": "baton.sdk",
    "Options": "baton.sdk",
    "Task": "baton.sdk",
    "task": "baton.sdk",
    "Results": "baton.sdk_run",
    "RunFailed": "baton.sdk_run",
    "StartedRun": "baton.sdk_run",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "testing"):
        return importlib.import_module(f"baton.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'baton' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
