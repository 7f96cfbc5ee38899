"""One call over several replicas: where it goes, when it is tried again, and what its failure means.

Theory (PROTOCOL J6, O5, O8): any replica serves any client, so a call that fails goes to the next endpoint; but a call
that failed may have happened. It is repeated only where that is harmless: reads, and mutations under a `request_id`,
which stays the same over all tries so that a retry through any replica meets its first try. A server's "not applied"
speaks of one try; it is passed on only if no earlier try is unanswered or unknown. Every try has a deadline of its own
inside the call's, so that a frozen replica costs seconds and not the call.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from baton import names
from baton.clock import Clock, Entropy
from baton.errors import (
    NOT_APPLIED,
    UNKNOWN,
    BatonError,
    Denied,
    FieldViolation,
    InvalidField,
    TimedOut,
    Unreachable,
    from_status,
)
from baton.v1 import admin_pb2_grpc, artifact_pb2_grpc, cluster_pb2_grpc, graph_pb2_grpc, run_pb2_grpc, trace_pb2_grpc

Answer = TypeVar("Answer")

TRY_SECONDS = 5.0
"""Longest wait for one try. Shorter: a hand-over (calls are parked, PROTOCOL O4) is taken for a dead replica; longer: a
call of 10 s has no second chance when its first replica is frozen."""

FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
"""Bounds of the wait between rounds over the endpoints (full jitter). Larger: a call of 10 s misses the moment when a
shard has a new owner; smaller: a thousand clients press on the one replica that is left."""

REFUSED_SECONDS = 2.0
"""How long endpoints are asked that all refuse to be connected to, if none of them ever answered this client. Shorter: a
federation that is just being started is missed; longer: a person with a wrong address waits for nothing."""

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""Largest answer taken: a page of 1000 tasks with results of 16 KiB each, twice. gRPC's own 4 MiB is too small for it."""

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Largest request sent: what the server takes. Larger graphs go in pieces (`create_run`)."""

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    ("grpc.enable_retries", 0),  # retries are decided here, where it is known what is safe
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),  # two clients in one process share no broken connection
]
_REFUSED = "Connection refused"
"""In gRPC's words for a port where nobody listens; if they change, such a port costs the whole time-out again."""

_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class Tls:
    """Mutual TLS: paths of PEM files. `ca` signs the servers; `certificate` and `key` are the caller's."""

    ca: str
    certificate: str
    key: str


class Endpoint:
    """One replica's address, its channel and its services' stubs."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        if tls is None:
            self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(address, _credentials(tls), options=_OPTIONS)
        self.runs = run_pb2_grpc.RunServiceStub(self.channel)
        self.clusters = cluster_pb2_grpc.ClusterServiceStub(self.channel)
        self.graphs = graph_pb2_grpc.GraphServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.traces = trace_pb2_grpc.TraceServiceStub(self.channel)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(self.channel)


class Caller:
    """Calls with failover. One per client; lives in one event loop."""

    def __init__(self, addresses: Sequence[str], *, tls: Tls | None, clock: Clock, entropy: Entropy) -> None:
        """Raises InvalidField if there is no address, or a plain-text one that is not loopback."""
        if not addresses:
            raise InvalidField("no endpoint is given: name at least one host:port")
        for address in addresses:
            _check_address(address, tls)
        self.addresses = tuple(dict.fromkeys(addresses))
        self.clock = clock
        self.entropy = entropy
        self._tls = tls
        self._open: dict[str, Endpoint] = {}
        self._at = 0
        self.answered = False
        """Whether any endpoint ever answered; a handler's error is an answer, too."""

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that serves now; its channel is opened on first use."""
        address = self.addresses[self._at]
        if address not in self._open:
            self._open[address] = Endpoint(address, self._tls)
        return self._open[address]

    def next_endpoint(self, failed: Endpoint) -> None:
        """Turns to the next address, unless another call has turned already."""
        if self.addresses[self._at] == failed.address:
            self._at = (self._at + 1) % len(self.addresses)

    async def close(self) -> None:
        """Closes all channels; calls under way fail."""
        opened, self._open = list(self._open.values()), {}
        for each in opened:
            await each.channel.close(None)

    async def call(
        self,
        send: Callable[[Endpoint, float], Awaitable[Answer]],
        *,
        timeout: float,
        try_seconds: float = TRY_SECONDS,
    ) -> Answer:
        """The answer of `send(endpoint, seconds)`, tried until `timeout` seconds have passed.

        `send` must be safe to repeat: a read, or a mutation whose request carries its request_id. Raises BatonError.
        """
        end = self.clock.boot() + timeout
        tries = 0
        unclear = False
        refusals = Refusals(self)
        while True:
            left = end - self.clock.boot()
            endpoint = self.endpoint
            try:
                answer = await send(endpoint, max(0.001, min(left, try_seconds)))
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                again = failure.code() in _AGAIN
                refusals.see(endpoint, failure)
            else:
                self.answered = True
                return answer
            tries += 1
            wait = self.backoff(tries, error.retry_after)
            left = end - self.clock.boot()
            if not again or left <= wait or refusals.hopeless:
                if refusals.hopeless and refusals.nothing_else:  # no try was ever sent
                    error.applied, unclear = NOT_APPLIED, False
                raise self._final(error, again=again, unclear=unclear, timeout=None if refusals.hopeless else timeout)
            unclear = unclear or error.applied == UNKNOWN
            self.next_endpoint(endpoint)
            await self.clock.sleep(wait)

    def backoff(self, tries: int, at_least: float | None = None) -> float:
        """Seconds to wait after `tries` failures: none until every endpoint had its turn, then with full jitter."""
        rounds = tries // len(self.addresses)
        if rounds == 0:
            return at_least or 0.0
        bound = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(rounds, 10))
        return max(at_least or 0.0, bound * self.entropy.uniform())

    def _final(self, error: BatonError, *, again: bool, unclear: bool, timeout: float | None) -> BatonError:
        """The failure as the caller must understand it (PROTOCOL J6, last sentences); no time-out: all refused."""
        if unclear:
            error.applied = UNKNOWN
        if again and isinstance(error, (Unreachable, TimedOut)):
            where = ", ".join(self.addresses)
            told = (
                f"no answer within {timeout:g} s from {where} ({error.message})"
                if timeout
                else f"nobody listens at {where}"
            )
            return Unreachable(
                f"{told}; check that the federation is up and that --endpoint or the context names it",
                applied=error.applied,
            )
        return error


class Refusals:
    """Which endpoints refuse the connection, since one call or stream began to ask. A restart never makes it hopeless."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._since = caller.clock.boot()
        self._addresses: set[str] = set()
        self.nothing_else = True
        """Whether every failure seen was a refusal: then no request has left this client."""

    def see(self, endpoint: Endpoint, failure: grpc.aio.AioRpcError) -> None:
        """Notes what an endpoint's failure says of it."""
        self._addresses.discard(endpoint.address)
        if failure.trailing_metadata():
            self._caller.answered = True
        elif failure.code() is grpc.StatusCode.UNAVAILABLE and _REFUSED in (failure.details() or ""):
            self._addresses.add(endpoint.address)
            return
        self.nothing_else = False

    @property
    def hopeless(self) -> bool:
        """Whether all refuse, two seconds have passed, and none ever answered this client."""
        if self._caller.answered or len(self._addresses) < len(self._caller.addresses):
            return False
        return self._caller.clock.boot() - self._since >= REFUSED_SECONDS


def error_of(failure: grpc.aio.AioRpcError) -> BatonError:
    """What a failed call says, as our exception; grpc's own never leaves the client."""
    try:
        status = rpc_status.from_call(cast("grpc.Call", failure))  # documented to take either
    except ValueError:  # details that contradict the status: a proxy has meddled; the code is what is left
        status = None
    if status is None:
        code: Any = failure.code()
        status = status_pb2.Status(code=code.value[0], message=failure.details() or code.name)
    return from_status(status)


def full_name(kind: names.Kind, text: str, namespace: str) -> str:
    """A name as servers take it, of one as people write it. Raises InvalidField naming the forms that are taken."""
    try:
        return names.full_name(kind, text, namespace)
    except names.InvalidName as error:
        raise InvalidField(str(error), field_violations=[FieldViolation(kind, str(error))]) from None


def may_retry(failure: grpc.aio.AioRpcError) -> bool:
    """Whether another replica, or the same one later, may answer what this one did not."""
    return failure.code() in _AGAIN


def _check_address(address: str, tls: Tls | None) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidField(f"endpoint {address!r} is not of the form host:port")
    if tls is None and not _is_loopback(host.strip("[]")):
        raise Denied(
            f"endpoint {address!r} is not on this machine: plain text is spoken on loopback only; give a CA, a"
            " certificate and a key (mutual TLS) in the context"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    parts = []
    for word, path in (("CA", tls.ca), ("key", tls.key), ("certificate", tls.certificate)):
        try:
            parts.append(Path(path).read_bytes())
        except OSError as error:
            raise InvalidField(f"the {word} file {path!r} cannot be read: {error.strerror}") from None
    return grpc.ssl_channel_credentials(*parts)
