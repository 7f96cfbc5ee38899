"""Receipts that wait for something to travel with (`cluster_agent/conversation.py`)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton.v1 import agent_pb2
from cluster_agent.conversation import RECEIPT_SECONDS, Conversation


class Clock:
    """Time stands still until a timer is let go of, early or late."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def boot(self) -> float:
        return self.now

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.timers.append((seconds, action))

    def fire(self, early: float) -> None:
        seconds, action = self.timers.pop()
        self.now += seconds - early
        action()


@pytest.mark.parametrize(("early", "sent"), [(0.0, True), (3.6e-13, True), (0.02, False)])
async def test_a_timer_that_rounds_does_not_set_itself_again(early: float, sent: bool) -> None:
    """Seeds 172, 467 and 497 of 2026-11-22 spun for ever: a reminder for what was left of a femtosecond (simulation-findings.md)."""
    clock = Clock()
    talk = Conversation(cast("Any", SimpleNamespace(clock=clock, lease=None)), cast("Any", None), cast("Any", None), 1)
    talk.put_receipt("07", agent_pb2.SessionRequest())
    clock.fire(early)
    assert (talk._out.qsize() == 1) == sent
    assert (not clock.timers) == sent
    if not sent:
        clock.fire(0.0)
        assert talk._out.qsize() == 1
    assert clock.now <= 1000.0 + RECEIPT_SECONDS + 1e-9
    talk._dropped.cancel()
