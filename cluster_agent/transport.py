"""The Transport port: how an agent reaches the control plane (PROTOCOL S1).

Contract:

1. `connect` dials the next endpoint of the list, round robin: a failed or finished stream is followed by another
   endpoint.
2. A stream delivers in order or not at all; after any failure every call raises TransportClosed.
3. `send` and `receive` carry batches. Neither buffers without bound: `send` waits while the peer is slow.
4. No call waits for ever on a dead peer: adapters bound `connect` and notice silence by keepalives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from baton.v1 import agent_pb2


class TransportClosed(Exception):
    """The stream is gone; the text says why. Whether what was sent last arrived is unknown."""


class Stream(Protocol):
    """One session stream."""

    @property
    def endpoint(self) -> str:
        """Where it leads, for logs."""
        ...

    async def send(self, messages: Sequence[agent_pb2.SessionRequest]) -> None:
        """Send in order. Raises TransportClosed."""
        ...

    async def receive(self) -> Sequence[agent_pb2.SessionResponse]:
        """Wait for at least one message. Raises TransportClosed."""
        ...

    async def close(self) -> None:
        """End it; calls that wait raise TransportClosed. Never raises."""
        ...


class Transport(Protocol):
    """Makes streams."""

    async def connect(self) -> Stream:
        """Dial the next endpoint. Raises TransportClosed."""
        ...

    def learn(self, endpoints: Sequence[str]) -> None:
        """More endpoints to try (a Welcome names all replicas); those the adapter may not use are ignored."""
        ...

    async def close(self) -> None:
        """Give up everything held."""
        ...
