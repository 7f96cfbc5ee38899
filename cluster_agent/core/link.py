"""The agent's current stream, its session, and the lease that acknowledged heartbeats of that session carry (F3, F5,
S2).

A lease belongs to a generation. It counts from the *send* time of the newest acknowledged heartbeat; until the first
one of a session is answered there is no lease, and F counts from the opening of the stream. A lapse is final for the
stream: only another stream, with an inventory of its own, ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster_agent.core.model import Epoch


@dataclass(slots=True)
class Link:
    """Times are seconds of the boot clock."""

    fence_seconds: float
    stream: int = 0
    generation: int = 0
    is_open: bool = False
    welcomed: bool = False
    lapsed: bool = False
    renewed_at: float | None = None
    """Send time of the newest acknowledged heartbeat of this generation."""
    opened_at: float | None = None
    received: dict[str, tuple[Epoch, int]] = field(default_factory=dict)
    """Per shard: the owner's epoch, and the highest dispatch received without a gap on this stream (C4)."""
    _answer: tuple[float, int] | None = None

    @property
    def ready(self) -> bool:
        """Owners' messages count and reports may leave."""
        return self.is_open and self.welcomed and not self.lapsed

    @property
    def leased(self) -> bool:
        """A heartbeat of this generation was acknowledged, and F has not passed since."""
        return self.welcomed and self.renewed_at is not None and not self.lapsed

    def open(self, stream: int, now: float) -> None:
        """Hello is about to be sent. A lease that did not lapse goes on, for the session may be resumed (S2)."""
        self.stream, self.is_open, self.welcomed = stream, True, False
        self.opened_at = now
        self.received.clear()
        if self.lapsed:
            self.lapsed, self.renewed_at = False, None

    def close(self) -> None:
        """The stream is gone. The lease is not: what came on the last stream may start until F or the next one."""
        self.is_open = False

    def welcome(self, generation: int, fence_seconds: float) -> None:
        """The session stands; a new generation has no lease yet."""
        if generation != self.generation:
            self.renewed_at = None
        self.generation, self.fence_seconds, self.welcomed = generation, fence_seconds, True

    def renew(self, stream: int, generation: int, sent_boot: float, server_wall_ms: int) -> bool:
        """Count an acknowledged heartbeat; False if it is of another stream or generation, or came after the lapse."""
        if stream != self.stream or generation != self.generation or not self.ready:
            return False
        self.renewed_at = sent_boot if self.renewed_at is None else max(self.renewed_at, sent_boot)
        self._answer = (sent_boot, server_wall_ms)
        return True

    def passed(self, now: float) -> bool:
        """Whether F is over. Nothing can lapse before the first stream."""
        since = self.opened_at if self.renewed_at is None else self.renewed_at
        return since is not None and now >= since + self.fence_seconds

    def lapse(self) -> None:
        """F is over: this stream is not trusted any more."""
        self.lapsed, self.renewed_at = True, None

    def expects(self, shard: str, epoch: Epoch, dispatch_no: int) -> bool:
        """Whether this dispatch is the next one of its owner on this stream (F3). An earlier one was acted upon already: what it
        brought may have been rejected and forgotten since, and must not start. A later one comes again after those before it (J7)."""
        held = self.received.get(shard)
        return dispatch_no == (held[1] if held is not None and held[0] == epoch else 0) + 1

    def count(self, shard: str, epoch: Epoch, dispatch_no: int) -> int:
        """Count a dispatch; the highest number of this owner without a gap. Each owner begins a stream with 1: if that
        were lost and the next one set the beginning, a receipt would cover it."""
        held = self.received.get(shard)
        before = held[1] if held is not None and held[0] == epoch else 0
        highest = before + 1 if dispatch_no == before + 1 else before
        self.received[shard] = (epoch, highest)
        return highest

    def boot_of(self, wall_ms: int) -> float | None:
        """The server's wall time on this host's boot clock (D1); never later than it truly is. None without a deadline.

        The server read its clock after we sent, so whatever the answer took makes the result earlier.
        """
        if not wall_ms or self._answer is None:
            return None
        sent_boot, server_wall_ms = self._answer
        return sent_boot + (wall_ms - server_wall_ms) / 1000
