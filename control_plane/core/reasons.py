"""Which clusters may run a group, and in one sentence why its tasks wait (DESIGN 11: every decision can be explained). Pure.

Theory. A group passes through filters in a fixed order, from what a user wrote to what a cluster lacks at the moment. The
first filter that leaves no cluster over is the reason, and its sentence names the missing thing and the nearest miss. The same
filters choose the candidates, so a reason can never contradict a placement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from control_plane.core.capacity import Need, Room, need_of, size_of
from control_plane.core.model import Admission, Group, Health
from control_plane.core.offers import Offer

NAMED = 5
"""Clusters named in one sentence; the others are counted. A sentence of a hundred names is not read."""

Filter = tuple[Callable[[Group, Offer], bool], Callable[[Group, Sequence[Offer]], str]]


def candidates(group: Group, offers: Sequence[Offer]) -> list[int]:
    """Indices of the clusters that may run the group, whatever room they have."""
    return [i for i, offer in enumerate(offers) if all(passes(group, offer) for passes, _ in _FILTERS)]


def reason_for(group: Group, offers: Sequence[Offer], rooms: Sequence[Room], *, kept: bool) -> str:
    """Why tasks of the group wait, given the rooms that are left. `kept`: some room is left, but only for urgent work."""
    if not offers:
        return "no cluster has joined the federation"
    left = list(range(len(offers)))
    for passes, sentence in _FILTERS:
        passed = [i for i in left if passes(group, offers[i])]
        if not passed:
            return sentence(group, [offers[i] for i in left])
        left = passed
    return _no_room(group, [offers[i] for i in left], [rooms[i] for i in left], kept)


def _no_room(group: Group, offers: Sequence[Offer], rooms: Sequence[Room], kept: bool) -> str:
    need = need_of(group.resources)
    if any(room.fit(need) for room in rooms):
        if kept:
            return f"waits for room on {_names(offers)}: the rest is kept for urgent work"
        return "permitted in part; the rest follows with the next plan"
    for name, amount in need:
        empty = [(_largest_node(offer, name), offer.facts.name) for offer in offers]
        biggest, where = max(empty, key=lambda entry: entry[0])
        if biggest < amount:
            return (
                f"needs {_amount(name, amount)} on one node; the largest node has {_amount(name, biggest)}, on {where}"
            )
    for name, amount in need:
        holes = [(room.largest(name), offer.facts.name) for room, offer in zip(rooms, offers, strict=True)]
        biggest, where = max(holes, key=lambda entry: entry[0])
        if biggest < amount:
            return f"needs {_amount(name, amount)} on one node; the largest hole is {_amount(name, biggest)} on {where}"
    wanted = " and ".join(_amount(name, amount) for name, amount in need)
    return f"needs {wanted} together on one node; no node of {_names(offers)} has all of it free"


def _largest_node(offer: Offer, name: str) -> int:
    """The largest node when empty, as far as that is known; resources without a known total count as they are free."""
    return max((size_of([shape]).get(name, 0) // max(shape.count, 1) for shape in offer.shapes or ()), default=0)


# -- filters, in the order in which a user would ask ------------------------------------------------------------------


def _named(group: Group, offer: Offer) -> bool:
    return not group.clusters or offer.facts.name in group.clusters


def _not_named(group: Group, offers: Sequence[Offer]) -> str:
    return f"no cluster is named {_or(group.clusters)}; there is {_names(offers)}"


def _labelled(group: Group, offer: Offer) -> bool:
    return set(group.selector) <= set(offer.facts.labels)


def _not_labelled(group: Group, offers: Sequence[Offer]) -> str:
    for pair in group.selector:
        if not any(pair in offer.facts.labels for offer in offers):
            return f"no cluster has label {pair[0]}={pair[1]}"
    return "no cluster has all of the labels " + ", ".join(f"{key}={value}" for key, value in group.selector)


def _tolerated(group: Group, offer: Offer) -> bool:
    return set(offer.facts.taints) <= set(group.tolerations)


def _not_tolerated(group: Group, offers: Sequence[Offer]) -> str:
    taints = sorted({taint for offer in offers for taint in offer.facts.taints} - set(group.tolerations))
    return f"{_names(offers)} {_has(offers)} a taint that is not tolerated: {', '.join(taints)}"


def _isolated(group: Group, offer: Offer) -> bool:
    return offer.facts.isolation or not group.require_isolation


def _not_isolated(_group: Group, offers: Sequence[Offer]) -> str:
    return f"needs isolation, and {_names(offers)} cannot enforce limits"


def _serves(group: Group, offer: Offer) -> bool:
    return not offer.facts.namespaces or group.namespace in offer.facts.namespaces


def _not_served(group: Group, offers: Sequence[Offer]) -> str:
    return f"{_names(offers)} may not serve namespace {group.namespace}"


def _open(_group: Group, offer: Offer) -> bool:
    return offer.facts.health is Health.READY and offer.facts.admission is Admission.OPEN


def _not_open(_group: Group, offers: Sequence[Offer]) -> str:
    states = []
    for offer in offers[:NAMED]:
        facts = offer.facts
        state = facts.health.name if facts.health is not Health.READY else facts.admission.name
        states.append(f"{facts.name} is {state}")
    more = f" and {len(offers) - NAMED} more are closed" if len(offers) > NAMED else ""
    return ", ".join(states) + more


def _able(group: Group, offer: Offer) -> bool:
    return offer.level >= group.level


def _not_able(group: Group, offers: Sequence[Offer]) -> str:
    versions = [f"{each.facts.name} runs {each.facts.agent_version or 'an unknown version'}" for each in offers[:NAMED]]
    more = f" and {len(offers) - NAMED} more are as old" if len(offers) > NAMED else ""
    return (
        f"starts from artifacts, a checkpoint or stored code: no cluster with an agent of feature level {group.level}; "
        + ", ".join(versions)
        + more
    )


def _reported(_group: Group, offer: Offer) -> bool:
    return offer.shapes is not None


def _not_reported(_group: Group, offers: Sequence[Offer]) -> str:
    return f"{_names(offers)} {_has(offers)} not reported free room yet"


_FILTERS: tuple[Filter, ...] = (
    (_named, _not_named),
    (_labelled, _not_labelled),
    (_tolerated, _not_tolerated),
    (_isolated, _not_isolated),
    (_serves, _not_served),
    (_open, _not_open),
    (_able, _not_able),
    (_reported, _not_reported),
)


# -- words ------------------------------------------------------------------------------------------------------------


def _names(offers: Sequence[Offer]) -> str:
    names = sorted(offer.facts.name for offer in offers)
    if len(names) > NAMED:
        return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _has(offers: Sequence[Offer]) -> str:
    return "has" if len(offers) == 1 else "have"


def _amount(name: str, amount: int) -> str:
    """An amount for people: 20 CPUs, 1.5 GiB memory, 2 gpu."""
    if name == "cpu":
        return f"{amount / 1000:g} CPU" + ("" if amount == 1000 else "s")
    if name in ("memory", "disk"):
        for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if amount >= size:
                return f"{amount / size:.4g} {unit} {name}"
        return f"{amount} bytes {name}"
    return f"{amount} {name.removeprefix('extended ')}"


def slots(size: Mapping[str, int], need: Need) -> int:
    """About how many such tasks a cluster holds when empty."""
    return min((size[name] // amount for name, amount in need if size.get(name)), default=0)
