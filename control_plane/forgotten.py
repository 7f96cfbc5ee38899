"""Runs that a restore has made nobody's: remembered by a replica or an agent, and known to no owner and no history (PROTOCOL J12).

Theory. The restored store cannot name what it has lost; memories can. A replica that lives through the restore remembers the open runs
of its shards (`survivors.py`); an agent's inventory names the runs of attempts that no owner knows (F8). Each replica keeps what it
has heard, bounded, as long as it lives; whoever is asked asks all, leaves out what an owner or history knows, and tells the rest. It
is a help for people and proves nothing: what no memory has is not in it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from control_plane.aftermath import FIRST_INCARNATION
from control_plane.history import History, HistoryDown
from control_plane.peers import CallContext, CallFailed, CallLost, Calls, single
from control_plane.survivors import MAX_NAMES, Survivors

if TYPE_CHECKING:
    from control_plane.router import Router
    from control_plane.view import View

MEMORIES, LIVING = "/baton.internal/RunsRemembered", "/baton.internal/RunsLiving"

ASK_TIMEOUT = 2.0
"""Seconds for one replica to answer: it looks into its memory. Longer: a frozen one delays a list of shards."""


class Forgotten:
    """One replica's memory of such runs, and its question to all."""

    def __init__(
        self, router: Router, view: View, history: History, survivors: Survivors, has: Callable[[str], bool]
    ) -> None:
        """`has(uid)`: whether a shard owned here knows a run of that uid."""
        self._router, self._view, self._history = router, view, history
        self._survivors, self._has = survivors, has
        self._remembered: dict[str, str] = {}
        """Uid -> name of runs that were open when a restore was suspected."""
        self._held: dict[str, set[str]] = {}
        """Uid of a run that no owner knew -> names of the clusters that had work of it."""
        view.subscribe(self._changed)

    def serve_peers(self, calls: Calls) -> None:
        """Answer other replicas."""
        calls.register(MEMORIES, self._answer)
        calls.register(LIVING, self._answer)

    def held(self, uids: Iterable[str], cluster: str) -> None:
        """An agent has work of these runs, and their owner does not know them."""
        if self._view.incarnation <= FIRST_INCARNATION:
            return  # nothing was ever restored: they have ended
        for uid in uids:
            if uid in self._held or len(self._held) < MAX_NAMES:
                self._held.setdefault(uid, set()).add(cluster)

    async def lines(self) -> list[str]:
        """What is told, a line a run: its name if a replica remembers it, else its uid; and who has work of it. Empty while nothing
        was ever restored, and while nobody can know."""
        view = self._view
        if view.incarnation <= FIRST_INCARNATION or view.restore_suspected:
            return []
        names: dict[str, str] = {}
        held: dict[str, set[str]] = {}
        for told in await self._ask_all(MEMORIES, []):
            names |= told["names"]
            for uid, clusters in told["held"].items():
                held.setdefault(uid, set()).update(clusters)
        uids = sorted({*names, *held})
        if not uids:
            return []
        living = {uid for told in await self._ask_all(LIVING, uids) for uid in told["living"]}
        found = [_line(uid, names, held) for uid in uids if uid not in living and not await self._archived(uid)]
        return sorted(found)[:MAX_NAMES]

    def _changed(self, topic: str) -> None:
        if topic == "restore" and self._view.restore_suspected:
            self._remembered |= self._survivors.open_runs(self._view.incarnation)
            while len(self._remembered) > MAX_NAMES:
                del self._remembered[next(iter(self._remembered))]

    async def _ask_all(self, method: str, uids: list[str]) -> list[dict[str, Any]]:
        """Every replica's answer, of those that answer."""
        found: list[dict[str, Any]] = []
        for replica in sorted(self._view.members):
            if replica == self._router.replica:
                found.append(self._own(method, uids))
                continue
            try:
                answer = await single(self._router.ask(replica, method, json.dumps(uids).encode(), timeout=ASK_TIMEOUT))
                found.append(json.loads(answer))
            except (CallLost, CallFailed, TimeoutError):
                continue  # of an earlier version, or gone: what it remembers is not told
        return found

    async def _archived(self, uid: str) -> bool:
        try:
            return await self._history.by_uid(uid) is not None
        except HistoryDown:
            return False

    def _own(self, method: str, uids: list[str]) -> dict[str, Any]:
        if method == LIVING:
            return {"living": [uid for uid in uids if self._has(uid)]}
        return {"names": self._remembered, "held": {uid: sorted(clusters) for uid, clusters in self._held.items()}}

    async def _answer(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        yield json.dumps(self._own(context.method, json.loads(payload))).encode()


def _line(uid: str, names: Mapping[str, str], held: Mapping[str, set[str]]) -> str:
    who = names.get(uid) or f"run of uid {uid}"
    return f"{who} (work of it on {', '.join(sorted(held[uid]))})" if uid in held else who
