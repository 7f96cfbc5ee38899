"""Which removals the small worlds can show (PROTOCOL; issue 5, point 3), and the world that shows each by a shortest story.

Theory. As in `lab.simulation.removal`: a part of the loaded product is replaced in this process while the world is explored, and put
back. Most parts are the very ones that the simulator removes. Three rules lie in what slice B models and not in a core (the condition
of a loss, the guard process, a guard's memory): those are taken out of the model, and the table says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster_agent.core.events import WorkEnded
from cluster_agent.core.holdings import ALIVE, Holdings
from cluster_agent.core.model import AttemptKey, Phase
from control_plane.core import inventory, losses
from control_plane.core.commands import Held, TakeInventory
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptId
from control_plane.core.reports import confirm_stops
from control_plane.core.state import ShardState
from lab.exhaustive.explorer import STUCK
from lab.exhaustive.journal_facts import JournalBounds
from lab.exhaustive.session_world import SessionBounds
from lab.simulation import removals_agent, removals_fleet, removals_store
from lab.simulation.removal import Swap

SMALL_A = JournalBounds(faults=2, tries=3, takings=2)
SMALL_B = SessionBounds(faults=2, kinds=("cut", "crash", "pause", "loss"))


@dataclass(frozen=True, slots=True)
class Missing:
    """A removal. `bounds` say the slice. `swaps` take it out of the product; `modelled`: it is taken out of the model (too)."""

    name: str
    rule: str
    text: str
    bounds: JournalBounds | SessionBounds
    swaps: tuple[Swap, ...] = field(default=())
    modelled: bool = False


# -- F4: at most one spawn -------------------------------------------------------------------------------------------------

_census = Holdings.census


def _census_again(self: Holdings, running: Mapping[AttemptKey, int], ended: Iterable[WorkEnded]) -> None:
    """`Holdings.census`, taking what has a `Starting` record and no process for something that never started."""
    ended = tuple(ended)
    gone = {exit_.key for exit_ in ended}
    for attempt in self.state.attempts.values():
        if (
            attempt.phase in ALIVE
            and attempt.phase is not Phase.STOPPING
            and attempt.key not in running
            and attempt.key not in gone
        ):
            attempt.phase = Phase.VOID
    _census(self, running, ended)


# -- F8: what confirms a stop ----------------------------------------------------------------------------------------------


def _confirmed_by_absence(state: ShardState, command: TakeInventory, held: dict[AttemptId, Held], batch: Batch) -> None:
    """`inventory._confirmed`, taking absence from any inventory for a confirmation."""
    gone = [
        i
        for i in state.stops_on.get(command.cluster, {})
        if i not in held or held[i].phase == inventory.Phase.TOMBSTONED
    ]
    confirm_stops(state, command.cluster, gone, batch)


# -- F7: kept work ---------------------------------------------------------------------------------------------------------


def _keeps_nothing(run: Any, task: int) -> bool:  # noqa: ARG001 - the signature of `keeps`
    """`losses.keeps`, for an owner who copies everything."""
    return False


def _taken(name: str, bounds: JournalBounds | SessionBounds, removal: Any, *, modelled: bool = False) -> Missing:
    """One of the simulator's removals, in a small world. Settings belong to seeds; here time is events."""
    return Missing(name, removal.rule, removal.text, bounds, () if modelled else removal.swaps, modelled)


REMOVALS: tuple[Missing, ...] = (
    _taken("owner-compare", SMALL_A, removals_store.OWNER_COMPARE),
    _taken("unclear-answers", SMALL_A, removals_store.UNCLEAR_ANSWERS),
    _taken("effects-after-commit", SMALL_A, removals_store.EFFECTS_FIRST),
    _taken("lease-of-reads", SMALL_A, removals_store.READS),
    _taken("restore-detection", JournalBounds(faults=0, takings=3, restore=True), removals_store.RESTORES),
    _taken("request-dedupe", SMALL_A, removals_store.DEDUPE),
    _taken("request-floor", JournalBounds(faults=2, tries=3, takings=2, prune=True), removals_store.FLOOR),
    _taken("loss-condition", SMALL_B, removals_fleet.CONDITION, modelled=True),
    _taken("generation-check", SMALL_B, removals_fleet.GENERATIONS),
    _taken("adoption-event", SMALL_B, removals_fleet.ADOPTION),
    _taken("live-set", SMALL_B, removals_fleet.LIVE_SET),
    _taken("guard-time", SMALL_B, removals_fleet.GUARD_TIME),
    _taken("start-rule", SessionBounds(faults=2, kinds=("cut",)), removals_agent.START_RULE),
    _taken("self-fence", SMALL_B, removals_agent.SELF_FENCE),
    _taken("guard-process", SMALL_B, removals_agent.GUARD, modelled=True),
    Missing(
        "late-requests",
        "G3, F4",
        removals_agent.LATE_REQUESTS.text,
        SMALL_B,
        (Swap(Holdings, "census", removals_agent._census_unfenced),),  # noqa: SLF001 - its agent half; the guard's is modelled
        modelled=True,
    ),
    Missing(
        "at-most-one-spawn",
        "F4",
        "what was started and has no process is started again, and the guard has forgotten it",
        SessionBounds(faults=2, kinds=("guard", "cut")),
        (Swap(Holdings, "census", _census_again),),
        modelled=True,
    ),
    Missing(
        "stop-confirmation",
        "F8",
        "absence from an inventory made before the stop confirms the stop",
        SessionBounds(faults=1, owners=1, kinds=("cancel",)),
        (Swap(inventory, "_confirmed", _confirmed_by_absence),),
    ),
    Missing(
        "kept-work",
        "F7",
        "a task that waits for its cluster is copied like any other",
        SessionBounds(faults=2, kinds=("cut", "loss"), kept=True),
        (Swap(losses, "keeps", _keeps_nothing),),
    ),
)

__all__ = ["REMOVALS", "STUCK", "Missing"]
