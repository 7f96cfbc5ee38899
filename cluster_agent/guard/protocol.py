"""The words between an agent and its guard: batches as JSON objects, each behind a four-byte length, on a Unix stream
socket.

The guard's socket lies in its directory; a path over 107 bytes does not fit a socket address, so both ends go through
`/proc/self/fd/N` of the open directory. Agent to guard: `{"op": ...}`; guard to agent: `{"ev": ...}`. Both ends come
from one installation, but not from one moment: a guard outlives upgrades of its agent, so VERSION is checked at hello
and unknown fields are ignored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cluster_agent.executors.base import AttemptKey, Cause, CensusEntry, Exited, Limits, Phase, PythonCall, StartRequest

VERSION = 2
"""Raised when an old guard would misread a new agent; such a guard is left to end its work and is then replaced."""

MAX_FRAME = 64 << 20
"""Bytes of one message. Larger than any legal start: the inputs of a wide join are the inline results of a whole run (16 MiB,
DESIGN 14), as texts inside JSON inside base64. Smaller would refuse such joins; larger would let one broken peer take the
guard's memory."""

START_BATCH_BYTES = 1 << 20
"""Of start requests in one message: renewals and stops sent after it do not wait behind a longer one."""

SOCKET = "guard.sock"
LOCK = "guard.lock"
"""Held (flock) by the living guard for all its life: single instance, and the proof of its death."""
KEEPERS = "keepers.lock"
"""Held (flock, shared) by every keeper: a new guard serves only when all of the old one's are gone."""

_FOR_PIP = ("PIP_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")

_LIMITS = tuple(each.name for each in fields(Limits))

_LENGTH = struct.Struct(">I")

Message = dict[str, Any]

_encode = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: `json.dumps` with separators makes an encoder a call."""


def for_pip(env: Mapping[str, str]) -> dict[str, str]:
    """What of the agent's environment tells pip where its index is: for making environments; no task sees it."""
    return {name: value for name, value in env.items() if name.startswith(_FOR_PIP)}


class ProtocolError(Exception):
    """The other end does not speak this protocol."""


def encode(message: Message) -> bytes:
    """One frame. Raises ProtocolError when it is too large."""
    body = _encode(message).encode()
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages completed by `data`. Raises ProtocolError on an oversized or unreadable frame."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME:
                raise ProtocolError(f"a frame of {size} bytes is over the limit of {MAX_FRAME}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = json.loads(body)
            except ValueError as error:
                raise ProtocolError(f"unreadable frame: {error}") from None
            if not isinstance(message, dict):
                raise ProtocolError("a frame must be a JSON object")
            yield message


class SocketDirectory:
    """An address of the guard's socket that is short, however deep the directory lies."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def address(self) -> str:
        """Valid in this process while this object is open."""
        return f"/proc/self/fd/{self._fd}/{SOCKET}"

    def close(self) -> None:
        """Give the directory back."""
        os.close(self._fd)


def start_to_wire(request: StartRequest) -> Message:
    """A StartRequest as JSON; packed code travels ahead of it (`code_to_wire`)."""
    wire: Message = {
        "key": request.key.text(),
        "gen": request.generation,
        "argv": list(request.argv),
        "env": dict(request.env),
        "limits": {name: getattr(request.limits, name) for name in _LIMITS},
        "stop_at": request.stop_at,
        "timeout": request.timeout_seconds,
        "grace": request.grace_seconds,
        "keep": request.keep_at_fence,
        "inputs": base64.b64encode(request.inputs).decode() if request.inputs else "",
    }
    if request.slots:
        wire["slots"] = request.slots
    call = request.python
    if call is not None:
        wire["python"] = {
            "function": call.function,
            "args": call.args_json,
            "requirements": list(call.requirements),
            "code": call.code,
            "tenant": call.tenant,
        }
        if call.extended:
            wire["python"]["extended"] = call.extended
    return wire


def start_batches(requests: Sequence[StartRequest]) -> Iterator[list[Message]]:
    """Wire forms of the requests in groups of about START_BATCH_BYTES."""
    batch: list[Message] = []
    size = 0
    for request in requests:
        wire = start_to_wire(request)
        batch.append(wire)
        size += sum(map(len, request.argv)) + sum(map(len, request.env.values())) + len(wire["inputs"]) + 512
        size += len(request.python.args_json) if request.python is not None else 0
        if size >= START_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def start_from_wire(wire: Message) -> StartRequest:
    """Inverse of `start_to_wire`. Raises ValueError, KeyError or TypeError on nonsense."""
    return StartRequest(
        key=AttemptKey.parse(wire["key"]),
        generation=int(wire["gen"]),
        argv=tuple(str(arg) for arg in wire["argv"]),
        env={str(name): str(value) for name, value in wire["env"].items()},
        limits=Limits(**{name: int(value) for name, value in wire["limits"].items() if name in _LIMITS}),
        stop_at=wire["stop_at"],
        timeout_seconds=wire["timeout"],
        grace_seconds=float(wire["grace"]),
        keep_at_fence=bool(wire["keep"]),
        inputs=base64.b64decode(wire["inputs"]),
        python=_call_from_wire(wire["python"]) if "python" in wire else None,
        slots=int(wire.get("slots", 0)),
    )


def _call_from_wire(wire: Message) -> PythonCall:
    requirements = tuple(str(each) for each in wire["requirements"])
    code, tenant = str(wire["code"]), str(wire["tenant"])
    extended = tuple((str(name), int(amount)) for name, amount in wire.get("extended", ()))
    return PythonCall(str(wire["function"]), str(wire["args"]), requirements, code, tenant=tenant, extended=extended)


def code_to_wire(call: PythonCall) -> Message:
    """The packed code of a call, for the guard to keep under its hash."""
    return {"op": "code", "sha256": call.code, "zip": base64.b64encode(call.code_zip).decode()}


def code_from_wire(wire: Message) -> tuple[str, bytes]:
    """Hash and archive. Raises ValueError when they do not belong together."""
    sha256, data = str(wire["sha256"]), base64.b64decode(wire["zip"])
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"code {sha256[:80]!r} came damaged")
    return sha256, data


def exit_to_wire(exited: Exited) -> Message:
    """An Exited as JSON; also how the ledger keeps it."""
    wire: Message = {
        "key": exited.key.text(),
        "cause": exited.cause.value,
        "code": exited.exit_code,
        "signal": exited.signal,
        "from": exited.start_wall,
        "to": exited.end_wall,
        "result": base64.b64encode(exited.result).decode(),
        "message": exited.message,
        "late": exited.late,
    }
    if exited.files_of:
        wire["files"] = exited.files_of
    return wire


def exit_from_wire(wire: Message) -> Exited:
    """Inverse of `exit_to_wire`."""
    return Exited(
        key=AttemptKey.parse(wire["key"]),
        cause=Cause(wire["cause"]),
        exit_code=wire["code"],
        signal=wire["signal"],
        start_wall=wire["from"],
        end_wall=wire["to"],
        result=base64.b64decode(wire["result"]),
        message=wire["message"],
        late=wire["late"],
        files_of=str(wire.get("files", "")),
    )


def entry_to_wire(entry: CensusEntry) -> Message:
    """A CensusEntry as JSON."""
    wire: Message = {"key": entry.key.text(), "gen": entry.generation, "phase": entry.phase.value, "run": entry.run}
    if entry.exited is not None:
        wire["exited"] = exit_to_wire(entry.exited)
    return wire


def entry_from_wire(wire: Message) -> CensusEntry:
    """Inverse of `entry_to_wire`."""
    exited = exit_from_wire(wire["exited"]) if "exited" in wire else None
    run = str(wire.get("run", ""))
    return CensusEntry(AttemptKey.parse(wire["key"]), wire["gen"], Phase(wire["phase"]), exited, run)
