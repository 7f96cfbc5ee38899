"""The table of methods: what each call is, where it belongs, what must hold before it is tried, and who answers it.

Theory. Every call goes the same way (DESIGN 7): bytes -> message -> `validate` -> `route` to the shard that is its one writer
(PROTOCOL O6) -> `handler` at that shard's owner. A method is therefore a value; the gRPC edge and the peer stream both run
the same table, so a call means the same wherever it arrived (O5). Every method is safe to repeat: it is a read, or it carries
a request_id (O8). That is a rule of this table, and what parking and retrying rest on (O4, J6).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from google.protobuf.message import DecodeError, Message

from baton import requestid
from baton.clock import Clock
from baton.errors import RequestIdAhead
from control_plane.services.failures import invalid
from control_plane.services.identity import NOBODY, Identity

DEFAULT_PAGE = 50
DEFAULT_TASK_PAGE = 500
MAX_PAGE = 1000
"""Sizes of pages, as the protos promise."""

PAGE_BYTES = 1 << 20
"""Bytes of a page; it ends early rather than break the 4 MiB that clients receive. One entry is far below the difference."""


class Kind(Enum):
    """How many messages go each way."""

    UNARY = "unary"
    STREAM_OUT = "server stream"
    STREAM_IN = "client stream"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a handler may know of a call. `ends` is a time of the replica's own boot clock, in seconds."""

    method: str
    principal: str
    ends: float
    clock: Clock
    shard: str = ""
    caller: Identity = NOBODY
    """Who asks, at the replica that was asked; at the owner only `principal` is known."""

    def left(self) -> float:
        """Seconds until the answer is due; never below a millisecond, so that it may be used as a time-out."""
        return max(0.001, self.ends - self.clock.boot())

    @property
    def over(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.clock.boot() >= self.ends


Handler = Callable[[Any, Asked], AsyncIterator[Message]]
Route = Callable[[Any], str]
Validate = Callable[[Any, float], None]
Resume = Callable[[Any, Any], None]


def anything(request: Any, now: float) -> None:
    """A request that cannot be wrong."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method. `name` is the full gRPC one, e.g. /baton.v1.RunService/GetRun."""

    name: str
    request: type[Message]
    response: type[Message]
    handler: Handler
    """Async generator of responses. For STREAM_IN its first argument is an async iterator of requests."""
    route: Route | None = None
    """The shard at whose owner the handler runs; None: at the replica that was asked."""
    validate: Validate = anything
    """Raises InvalidField and its like; the second argument is the wall clock."""
    kind: Kind = Kind.UNARY
    resume: Resume | None = None
    """For a routed stream: `resume(request, response)` changes the request so that it goes on after `response`."""
    agents: bool = False
    """Agents may call it, too; the handler looks at `Asked.caller`."""

    @property
    def service(self) -> str:
        """Full name of its service."""
        return self.name.split("/")[1]

    @property
    def short(self) -> str:
        """Its name in the service."""
        return self.name.split("/")[2]


def decode(kind: type[Message], payload: bytes) -> Any:
    """The message in `payload`. Raises InvalidField: the library's own text names our files and says nothing to the caller."""
    try:
        return kind.FromString(payload)
    except (DecodeError, RecursionError):
        name = kind.DESCRIPTOR.full_name
        raise invalid("request", f"the bytes are no {name}: broken, not UTF-8, or nested too deeply") from None


def check_request_id(request_id: str, now: float) -> None:
    """PROTOCOL O8: a UUIDv7, not more than five minutes ahead; what is too old is the shard's to say. Raises."""
    if not request_id:
        raise invalid("request_id", "is required: a UUIDv7, kept over all tries of one intent")
    try:
        at = requestid.time_of(request_id)
    except ValueError as error:
        raise invalid("request_id", str(error)) from None
    if at > now + requestid.MAX_AHEAD_SECONDS:
        raise RequestIdAhead(
            f"request_id lies {at - now:.0f} s ahead of this server's clock; set the caller's clock",
            metadata={"server_time": f"{now:.3f}"},
        )


def page_size(wanted: int, default: int = DEFAULT_PAGE) -> int:
    """The size of a page that was asked for. Raises InvalidField."""
    if wanted < 0:
        raise invalid("page_size", f"is {wanted}: use 1 to {MAX_PAGE}, or 0 for {default}")
    return min(wanted or default, MAX_PAGE)
