"""The calls that serving replicas make to the owner of fleet: opening a session, and goodbye (PROTOCOL S1, S5, S6).

Their failures travel with the reason at the head of the message, also to a caller on this very replica: sessions read that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

from baton.errors import of_reason, to_status
from control_plane.controller import Controller
from control_plane.core.commands import Command, Refused, SessionGrant
from control_plane.core.model import FLEET
from control_plane.peers import CallContext, CallFailed, Calls
from control_plane.refusals import ConditionFailed, OutcomeUnknown, StoreDown
from control_plane.session_calls import LOSE, OPEN, decode_lose, decode_open, encode_grant
from control_plane.store.base import Compare


class FleetCalls:
    """Serves OPEN and LOSE where fleet is owned."""

    def __init__(self, controller: Controller, calls: Calls) -> None:
        self._controller = controller
        calls.register(OPEN, self._open)
        calls.register(LOSE, self._lose)

    async def _open(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        grant = cast(SessionGrant, await self._submit(decode_open(payload), context))
        yield encode_grant(grant)

    async def _lose(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        command, condition = decode_lose(payload)
        await self._submit(command, context, condition)
        yield b""

    async def _submit(self, command: Command, context: CallContext, condition: Compare | None = None) -> object:
        """Raises NotOwned, CallFailed."""
        try:
            return await self._controller.submit(FLEET, command, timeout=context.timeout, condition=condition)
        except Refused as refused:
            raise _failed(refused.reason, refused.message) from refused
        except ConditionFailed as failed:
            raise _failed("WRONG_STATE", "the agent has come back since, or the generation has ended") from failed
        except (OutcomeUnknown, StoreDown) as error:
            raise _failed("UNAVAILABLE", str(error)) from error


def _failed(reason: str, message: str) -> CallFailed:
    told = of_reason(reason, message, applied="unknown")
    return CallFailed(told.code, f"{reason}: {message}", to_status(told).SerializeToString())
