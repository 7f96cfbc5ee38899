"""Lease arithmetic of the guard: who must get TERM or KILL now, and when to look again. Values in, values out.

Theory: a heartbeat *sent* at `s` and acknowledged carries its generation until `s + F` (PROTOCOL F5, G2). From then on
nothing of that generation starts (G1) and what runs under it is stopped: TERM at `s + F`, KILL early enough that all is
dead at `s + F + K`. Three more things end a workload the same way: a stop (F8), its own time-out (TERM when it has
passed, KILL one grace period later) and the run's deadline (D1: KILL falls on the deadline, TERM one grace period
earlier, which is then at most a quarter of the time there was). The first TERM names the reason; the earliest KILL of
all of them counts.

* Renewals never go back and never lie in the future; a renewal after the lease has passed permits new starts, but what
  was told to end goes on ending.
* An attempt adopted into a generation that was not renewed yet keeps its old timer (F5).
* Whoever wakes too late says so (F6): `remove` tells whether the death was seen later than `s + F + K`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

REAP_SECONDS = 0.5
"""KILL goes out this long before F + K (at most a quarter of K): exit, reaping and one tick must fit. Too small: dead
too late under load; too large: workloads lose time to end by themselves."""

REPEAT_SECONDS = 1.0
"""A KILL is repeated this often until the death is seen; a signal can meet a process between two states. Smaller:
noise."""

DEADLINE_GRACE_SHARE = 0.25
"""Of the time between start and deadline, at most this much is grace. Larger: a short deadline ends work that had
hardly begun; smaller: no time to end by itself."""


class Reason(Enum):
    """Why a workload is told to end; the values are those of `executors.base.Cause`."""

    STOP = "stop"
    FENCE = "fence"
    DEADLINE = "deadline"
    TIMEOUT = "timeout"
    LIMIT = "limit"


class Action(Enum):
    """What to send."""

    TERM = "term"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The times one attempt lives within; boot clock, seconds."""

    generation: int
    started: float
    stop_at: float | None = None
    timeout_seconds: float | None = None
    grace_seconds: float = 3.0
    keep_at_fence: bool = False


@dataclass(frozen=True, slots=True)
class Order(Generic[K]):
    """Send `action` to the whole process tree of `key`."""

    key: K
    action: Action
    reason: Reason


@dataclass(frozen=True, slots=True)
class _Cut:
    """One way to end: TERM at `term_at`, KILL at `kill_at`."""

    term_at: float
    kill_at: float
    reason: Reason


@dataclass(slots=True)
class _Entry:
    """One running attempt."""

    bounds: Bounds
    generation: int
    inherited: float | None = None
    """Send time that counted before adoption; used until the new generation is renewed."""
    cut: _Cut | None = None
    """An explicit stop."""
    reason: Reason | None = None
    """Set with the first TERM and never changed."""
    kill_at: float = 0.0
    """Fixed with the first TERM: a later renewal cannot put off a death that was announced, another cut can hasten
    it."""
    dead_by: float | None = None
    """F + K of the lease that passed; set with a TERM for FENCE."""
    repeat_at: float | None = None
    """Set with the first KILL."""


class Leases(Generic[K]):
    """All timers of one guard. `now`, `sent`: boot clock, seconds."""

    def __init__(self) -> None:
        self._fence: float | None = None
        self._kill = 0.0
        self._sent: dict[int, float] = {}
        self._entries: dict[K, _Entry] = {}
        self._earliest: float | None = None
        """Never later than the true next wake-up, unless `_stale`; asked before every request, so it is not
        searched anew."""
        self._stale = False

    def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """F and K from now on (S8); running attempts are measured by the new values. Raises ValueError unless both >
        0."""
        if not (fence_seconds > 0 and kill_seconds > 0):
            raise ValueError(f"fence ({fence_seconds}) and kill ({kill_seconds}) seconds must be positive")
        self._fence, self._kill = fence_seconds, kill_seconds
        self._stale = True

    def renew(self, generation: int, sent: float, now: float) -> None:
        """A heartbeat sent at `sent` was acknowledged for `generation`."""
        self._prune(now)
        sent = min(sent, now)
        self._sent[generation] = max(self._sent.get(generation, sent), sent)
        self._stale = True

    def refusal(self, generation: int, now: float) -> str | None:
        """Why nothing of `generation` may start at `now`; None when it may (G1)."""
        if self._fence is None:
            return "the guard was not told its lease values yet"
        sent = self._sent.get(generation)
        if sent is None:
            return f"no lease of generation {generation}"
        over = now - (sent + self._fence)
        return f"the lease of generation {generation} passed {over:.3f} s ago" if over >= 0 else None

    def add(self, key: K, bounds: Bounds) -> None:
        """`key` was started."""
        entry = self._entries[key] = _Entry(bounds, bounds.generation)
        at = self._wakeup(entry)
        if at is not None and (self._earliest is None or at < self._earliest):
            self._earliest = at

    def adopt(self, key: K, generation: int) -> bool:
        """`key` lives under `generation` from now on; False when it is not running."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        if entry.generation != generation:
            entry.inherited = self._sent_for(entry)
            entry.generation = generation
            self._stale = True
        return True

    def restart(self, key: K, now: float, timeout_seconds: float | None) -> None:
        """The preparations of `key` are over: its time-out counts from `now`. All other bounds stay."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.bounds = replace(entry.bounds, started=now, timeout_seconds=timeout_seconds)
            self._stale = True

    def cut(self, key: K, reason: Reason, now: float, grace_seconds: float) -> None:
        """End `key`: TERM now, KILL `grace_seconds` later (at once if 0). A second cut can only make it earlier."""
        entry = self._entries.get(key)
        if entry is None:
            return
        cut = _Cut(now, now + max(0.0, grace_seconds), reason)
        if entry.cut is None or cut.kill_at < entry.cut.kill_at:
            entry.cut = cut
            self._stale = True

    def generation(self, key: K) -> int | None:
        """The generation `key` lives under; None when it is not running."""
        entry = self._entries.get(key)
        return None if entry is None else entry.generation

    def reason(self, key: K) -> Reason | None:
        """Why `key` was told to end, if it was."""
        entry = self._entries.get(key)
        return None if entry is None else entry.reason

    def remove(self, key: K, now: float) -> bool:
        """`key` is dead, seen at `now`. True when that was later than its lease allowed (F6)."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        dead_by = entry.dead_by if entry.dead_by is not None else self._dead_by(entry)
        return dead_by is not None and now > dead_by

    def due(self, now: float) -> list[Order[K]]:
        """What must be sent now; each TERM is ordered once, a KILL again every REPEAT_SECONDS until `remove`."""
        orders: list[Order[K]] = []
        self._stale = True
        for key, entry in self._entries.items():
            cuts = self._cuts(entry)
            if entry.reason is None:
                first = min(cuts, key=lambda cut: cut.term_at, default=None)
                if first is None or first.term_at > now:
                    continue
                entry.reason, entry.kill_at = first.reason, min(cut.kill_at for cut in cuts)
                if first.reason is Reason.FENCE:
                    entry.dead_by = self._dead_by(entry)
                if now < entry.kill_at:
                    orders.append(Order(key, Action.TERM, entry.reason))
            if self._kill_time(entry, cuts) <= now:
                entry.repeat_at = now + REPEAT_SECONDS
                orders.append(Order(key, Action.KILL, entry.reason))
        return orders

    def next_wakeup(self) -> float | None:
        """When `due` must be asked next; never too late, at times too early (after a `remove`). None: nothing to
        wait for."""
        if self._stale:
            times = [at for at in map(self._wakeup, self._entries.values()) if at is not None]
            self._earliest, self._stale = min(times, default=None), False
        return self._earliest if self._entries else None

    def _wakeup(self, entry: _Entry) -> float | None:
        cuts = self._cuts(entry)
        if entry.reason is None:
            return min((cut.term_at for cut in cuts), default=None)
        return self._kill_time(entry, cuts)

    @staticmethod
    def _kill_time(entry: _Entry, cuts: list[_Cut]) -> float:
        """When the next KILL is due for an attempt that was told to end."""
        if entry.repeat_at is not None:
            return entry.repeat_at
        return min([entry.kill_at, *(cut.kill_at for cut in cuts)])

    def _dead_by(self, entry: _Entry) -> float | None:
        """F + K of the attempt's lease: the time by which it must be dead (F5); None when it has none."""
        sent = self._sent_for(entry)
        if entry.bounds.keep_at_fence or self._fence is None or sent is None:
            return None
        return sent + self._fence + self._kill

    def _cuts(self, entry: _Entry) -> list[_Cut]:
        """Every way in which this attempt will be ended, as known now."""
        bounds, cuts = entry.bounds, []
        if entry.cut is not None:
            cuts.append(entry.cut)
        sent = self._sent_for(entry)
        if not bounds.keep_at_fence and self._fence is not None and sent is not None:
            fence_at = sent + self._fence
            cuts.append(_Cut(fence_at, fence_at + self._kill - min(REAP_SECONDS, self._kill / 4), Reason.FENCE))
        if bounds.stop_at is not None:
            room = DEADLINE_GRACE_SHARE * max(0.0, bounds.stop_at - bounds.started)
            cuts.append(_Cut(bounds.stop_at - min(bounds.grace_seconds, room), bounds.stop_at, Reason.DEADLINE))
        if bounds.timeout_seconds is not None:
            end = bounds.started + bounds.timeout_seconds
            cuts.append(_Cut(end, end + bounds.grace_seconds, Reason.TIMEOUT))
        return cuts

    def _sent_for(self, entry: _Entry) -> float | None:
        return self._sent.get(entry.generation, entry.inherited)

    def _prune(self, now: float) -> None:
        """Forget generations that have passed and carry nothing: an absent lease refuses just as a passed one does."""
        if self._fence is None or len(self._sent) < 16:
            return
        used = {entry.generation for entry in self._entries.values()}
        self._sent = {g: sent for g, sent in self._sent.items() if g in used or now < sent + self._fence}
