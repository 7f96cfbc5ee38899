"""Session messages joined into one, and taken apart in order (baton.bundles, services.agents, transport_grpc)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bundles import BUNDLE_BYTES, BUNDLE_MESSAGES, join
from baton.errors import LimitExceeded
from baton.v1 import agent_pb2 as pb
from control_plane.services.agents import GrpcAgentStream
from control_plane.sessions import StreamClosed


def response(number: int, size: int = 0) -> pb.SessionResponse:
    return pb.SessionResponse(dispatches=pb.Dispatches(dispatch_no=number, shard="x" * size))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_joined_messages_are_read_in_order(sizes: list[int]) -> None:
    sent = [response(number, size) for number, size in enumerate(sizes)]
    joined = pb.SessionResponse.FromString(join(pb.SessionResponse, [each.SerializeToString() for each in sent]))
    more = list(joined.more)
    del joined.more[:]
    assert [joined, *more] == sent


def test_requests_are_joined_too() -> None:
    first, second = (
        pb.SessionRequest(heartbeat=pb.Heartbeat(seq=1)),
        pb.SessionRequest(receipt=pb.DispatchReceipt(shard="01")),
    )
    joined = pb.SessionRequest.FromString(join(pb.SessionRequest, [m.SerializeToString() for m in (first, second)]))
    assert joined.heartbeat.seq == 1
    assert list(joined.more) == [second]


class Agent:
    """The other side of a server's stream."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self.stream = GrpcAgentStream(self._requests(), None)
        self.down = self.stream.outgoing()

    async def _requests(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._said.get()

    async def hello(self, *, bundles: bool) -> None:
        self._said.put_nowait(pb.SessionRequest(hello=pb.Hello(bundles=bundles)).SerializeToString())
        await self.stream.receive()

    def say(self, *messages: pb.SessionRequest) -> None:
        self._said.put_nowait(join(pb.SessionRequest, [m.SerializeToString() for m in messages]))

    async def hear(self) -> pb.SessionResponse:
        return pb.SessionResponse.FromString(await anext(self.down))


async def test_what_waits_goes_down_as_one_message() -> None:
    agent = Agent()
    await agent.hello(bundles=True)
    for number in range(5):
        assert agent.stream.send(response(number))
    heard = await agent.hear()
    assert [heard.dispatches.dispatch_no, *(m.dispatches.dispatch_no for m in heard.more)] == [0, 1, 2, 3, 4]


async def test_an_agent_that_does_not_read_bundles_gets_none() -> None:
    agent = Agent()
    await agent.hello(bundles=False)
    agent.stream.send(response(1))
    agent.stream.send(response(2))
    heard = [await agent.hear(), await agent.hear()]
    assert [m.dispatches.dispatch_no for m in heard] == [1, 2]
    assert not any(m.more for m in heard)


@pytest.mark.parametrize(("count", "size"), [(BUNDLE_MESSAGES + 3, 0), (5, BUNDLE_BYTES // 2)])
async def test_bundles_are_bounded(count: int, size: int) -> None:
    agent = Agent()
    await agent.hello(bundles=True)
    for number in range(count):
        agent.stream.send(response(number, size))
    heard: list[int] = []
    while len(heard) < count:
        message = await agent.hear()
        assert message.ByteSize() <= BUNDLE_BYTES + size + 100
        assert len(message.more) < BUNDLE_MESSAGES
        heard += [message.dispatches.dispatch_no, *(m.dispatches.dispatch_no for m in message.more)]
    assert heard == list(range(count))


async def test_a_bundle_from_an_agent_is_heard_in_order() -> None:
    agent = Agent()
    await agent.hello(bundles=True)
    agent.say(*(pb.SessionRequest(heartbeat=pb.Heartbeat(seq=number)) for number in range(1, 4)))
    assert [(await agent.stream.receive()).heartbeat.seq for _ in range(3)] == [1, 2, 3]


async def test_a_bundle_of_too_many_ends_the_stream() -> None:
    agent = Agent()
    await agent.hello(bundles=True)
    agent.say(*(pb.SessionRequest(heartbeat=pb.Heartbeat(seq=1)) for _ in range(BUNDLE_MESSAGES + 2)))
    with pytest.raises(StreamClosed):
        await agent.stream.receive()
    assert isinstance(agent.stream.broken, LimitExceeded)


async def test_a_welcome_says_that_bundles_are_read() -> None:
    agent = Agent()
    agent.stream.send(pb.SessionResponse(welcome=pb.Welcome(generation=1)))
    assert (await agent.hear()).welcome.bundles
