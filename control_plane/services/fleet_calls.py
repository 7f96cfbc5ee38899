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
from control_plane.refusals import OutcomeUnknown, StoreDown
from control_plane.session_calls import LOSE, OPEN, decode_lose, decode_open, encode_grant


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
        await self._submit(decode_lose(payload), context)
        yield b""

    async def _submit(self, command: Command, context: CallContext) -> object:
        """Raises NotOwned, CallFailed."""
        try:
            return await self._controller.submit(FLEET, command, timeout=context.timeout)
        except Refused as refused:
            raise _failed(refused.reason, refused.message) from refused
        except (OutcomeUnknown, StoreDown) as error:
            raise _failed("UNAVAILABLE", str(error)) from error


def _failed(reason: str, message: str) -> CallFailed:
    told = of_reason(reason, message, applied="unknown")
    return CallFailed(told.code, f"{reason}: {message}", to_status(told).SerializeToString())
