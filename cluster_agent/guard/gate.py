"""Whether an attempt may start here: everything that makes the guard refuse one for ever (PROTOCOL F4, F5, G1, C3)."""

from __future__ import annotations

import resource

from cluster_agent.core.lease import Leases
from cluster_agent.executors.base import StartRequest
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.places import Places
from cluster_agent.guard.pythons import Pythons

MAX_WORKLOADS = 4096
"""Running at once; fewer where the host permits fewer open files. Each takes FILES_PER_WORKLOAD and a keeper of about 2
MiB; more would meet the host's limits unannounced."""

FILES_PER_WORKLOAD = 4
SPARE_FILES = 64
"""Sockets, ledger, pipes of a spawn under way, a walk of the meters. Fewer, and a full guard could not take a call."""


class Gate:
    """Reads, and leaves nothing but inputs."""

    def __init__(
        self, ledger: Ledger, leases: Leases[str], pythons: Pythons, places: Places, min_free_bytes: int
    ) -> None:
        self._ledger, self._leases, self._pythons, self._places = ledger, leases, pythons, places
        self._min_free_bytes = min_free_bytes
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(MAX_WORKLOADS, (files - SPARE_FILES) // FILES_PER_WORKLOAD))
        self.ending = False
        """The guard was told to go: nothing starts any more."""

    def refusal(self, request: StartRequest, now: float, live: int, full: str | None) -> str | None:
        """Why it may not start; None when it may. `live`: workloads that run or are about to. `full`: what `full` said."""
        if self._ledger.knows(request.key.text()):
            return "this attempt was started, refused or stopped before"
        if self.ending:
            return "the guard is ending"
        lease = self._leases.refusal(request.generation, now)
        if lease is not None:
            return lease
        if request.stop_at is not None and now >= request.stop_at:
            return "its deadline has passed"
        incomplete = self._pythons.refusal(request)
        if incomplete is not None:
            return incomplete
        if live + self._pythons.extra_load >= self._most:
            return f"the guard runs {self._most} workloads, its limit"
        return full

    def full(self) -> str | None:
        """Why nothing may be written to the executor's disk; None when it may."""
        if (free := self._places.free_bytes()) < self._min_free_bytes:
            return f"the executor's disk is full: {free} bytes free, {self._min_free_bytes} needed"
        return None

    def inputs_refused(self, request: StartRequest) -> str | None:
        """Why the inputs of a call cannot be put into its directory; None when they are there, or need not be."""
        if self._places.inlined(request.inputs):
            return None
        try:
            self._places.leave_inputs(request.key, request.inputs)
        except OSError as error:
            self._places.discard(request.key.text())
            return f"the executor's disk refused it: {error.strerror}"
        return None
