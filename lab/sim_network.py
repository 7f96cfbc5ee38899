"""The simulator's network: ordered links between named nodes, with delay, loss by break, partition, and nothing else.

A link is what TCP gives: ordered bytes, or a break that both ends notice some time later. Messages are really serialized, so that no
object is shared between nodes. All chance comes from one seeded generator; all waiting from the virtual loop.

What arrives somewhere runs as the node that lives there (`lab.simulation.nodes`): so a frozen node's mail waits, and a dead one's is
lost. A stream that lost a message never delivers a later one.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import partial

from baton.internal import peer_pb2 as peer
from baton.v1 import agent_pb2 as agent
from cluster_agent.transport import TransportClosed
from control_plane.peers import MessageHandler
from control_plane.sessions import StreamClosed
from lab.simulation.nodes import Node

NOBODY = Context()
"""Of callbacks that are no node's."""

NOTICE = 1.0
"""Seconds until an end of a cut link notices it, at most: a keepalive's worth, shortened so that a seed sees more."""


REPEAT = 6.0
"""Seconds by which a repeated message may be late: three times what an owner waits before it sends again."""


OVERTAKEN = 5.0
"""Seconds by which a call may be late under `Links.disorder`: below a client's patience (6 s), far above a call's length."""


class Links:
    """Which nodes can hear each other, and how slowly. `cut(a, b)` is one-way: messages from a to b are lost."""

    def __init__(self, rng: random.Random, hits: Counter[str], max_delay: float = 0.02) -> None:
        self.rng, self.max_delay = rng, max_delay
        self.nodes: dict[str, Node] = {}
        """Who lives where just now."""
        self.repeats = 0.0
        """How likely a relayed message arrives a second time, up to REPEAT seconds later and out of order."""
        self.disorder = 0.0
        """How likely a call of its own is late, so that later ones overtake it."""
        self._alone: dict[tuple[str, str], float] = {}
        self._hits = hits
        self._cut: set[tuple[str, str]] = set()
        self._last: dict[tuple[str, str], float] = {}
        self._pipes: list[Pipe] = []
        self._severed: dict[frozenset[str], tuple[float, float]] = {}
        """Pair of peers -> when their last stream broke, and when both had noticed."""
        self.peers: dict[str, MemoryPeers] = {}

    def cut(self, source: str, target: str) -> None:
        """Lose everything from `source` to `target` from now on; streams over it break."""
        self._cut.add((source, target))
        for pipe in list(self._pipes):
            if {source, target} == {pipe.left, pipe.right}:
                pipe.break_soon(self.rng.uniform(0.0, NOTICE))
        if source in self.peers and target in self.peers:
            self._sever(source, target)

    def _sever(self, source: str, target: str) -> None:
        """The stream between two peers breaks: what was sent on it before both notice is lost, later cuts prolong that."""
        loop, pair = asyncio.get_running_loop(), frozenset((source, target))
        since, until = self._severed.get(pair, (loop.time(), 0.0))
        noticed = loop.time() + self.rng.uniform(0.0, NOTICE)
        self._severed[pair] = (since if until > loop.time() else loop.time(), max(until, noticed))
        for one, other in ((source, target), (target, source)):
            loop.call_at(noticed, partial(self.peers[one].peer_broke, other), context=self._at(one))

    def connected(self, one: str, other: str) -> bool:
        """Whether two peers have a stream, or still believe so: a new one needs both directions."""
        unnoticed = asyncio.get_running_loop().time() < self._severed.get(frozenset((one, other)), (0.0, 0.0))[1]
        return unnoticed or (self.heard(one, other) and self.heard(other, one))

    def severed(self, source: str, target: str, sent: float) -> bool:
        """Whether what a peer sent at `sent`, and arrives now, was sent on a stream that broke meanwhile."""
        since, until = self._severed.get(frozenset((source, target)), (0.0, 0.0))
        return since <= asyncio.get_running_loop().time() and sent < until

    def heal(self, source: str, target: str) -> None:
        """`target` hears `source` again."""
        self._cut.discard((source, target))

    def heal_all(self) -> None:
        """Everybody hears everybody."""
        self._cut.clear()

    def heard(self, source: str, target: str) -> bool:
        """Whether a message sent now arrives."""
        return (source, target) not in self._cut

    def deliver(self, source: str, target: str, action: Callable[[], None]) -> None:
        """Run `action` at `target` after a delay, in order of sending, unless the link is cut now or then."""
        if not self.heard(source, target):
            self._hits["message lost"] += 1
            return
        loop = asyncio.get_running_loop()
        at = max(loop.time() + self.rng.uniform(0.0, self.max_delay), self._last.get((source, target), 0.0) + 1e-6)
        self._last[source, target] = at
        # The way itself belongs to nobody: only what happens at its end is the target's, whoever lives there by then.
        loop.call_at(at, partial(self._arrive, source, target, self.nodes.get(target), action), context=NOBODY)

    def deliver_alone(self, source: str, target: str, action: Callable[[], None]) -> None:
        """`deliver` what travels by itself, as each call of a channel does: in no order with the rest."""
        if not self.heard(source, target):
            self._hits["message lost"] += 1
            return
        loop, link = asyncio.get_running_loop(), (source, target)
        at = loop.time() + self.rng.uniform(0.0, self.max_delay)
        if self.disorder and self.rng.random() < self.disorder:
            at += self.rng.uniform(0.0, OVERTAKEN)
            self._hits["message late"] += 1
        if self.disorder and at < self._alone.get(link, 0.0):
            self._hits["message overtook another"] += 1
        self._alone[link] = max(at, self._alone.get(link, 0.0))
        loop.call_at(at, partial(self._arrive, source, target, self.nodes.get(target), action), context=NOBODY)

    def relay(self, source: str, target: str, action: Callable[[], None]) -> None:
        """`deliver` something that may come twice."""
        self.deliver(source, target, action)
        if self.repeats and self.rng.random() < self.repeats:
            self._hits["message repeated late"] += 1
            again = partial(self._arrive, source, target, self.nodes.get(target), action)
            asyncio.get_running_loop().call_later(self.rng.uniform(0.0, REPEAT), again, context=NOBODY)

    def _arrive(self, source: str, target: str, addressee: Node | None, action: Callable[[], None]) -> None:
        if not self.heard(source, target):
            self._hits["message lost"] += 1
        elif addressee is not None and addressee is self.nodes.get(target):
            if addressee.runs:
                addressee.run(action)  # now, not in a turn of its own: half of all turns would be such
            else:
                asyncio.get_running_loop().call_soon(action, context=addressee.context())

    def _at(self, name: str) -> Context:
        node = self.nodes.get(name)
        return node.context() if node is not None else NOBODY

    def open(self, pipe: Pipe) -> None:
        """Register a stream, to be broken with its link."""
        self._pipes.append(pipe)

    def closed(self, pipe: Pipe) -> None:
        """Forget a stream."""
        if pipe in self._pipes:
            self._pipes.remove(pipe)

    def node_died(self, node: str) -> None:
        """The kernel of a dead process closes its sockets."""
        for pipe in list(self._pipes):
            if node in (pipe.left, pipe.right):
                pipe.break_soon(0.0)
        peers = self.peers.get(node)
        if peers is not None:
            peers.die()


class MemoryPeers:
    """The Peers port of one replica."""

    def __init__(self, replica: str, links: Links) -> None:
        self._replica, self._links = replica, links
        self._handler: MessageHandler = lambda _replica, _message: None
        self._break: Callable[[str], None] = lambda _replica: None
        self.alive = True
        links.peers[replica] = self

    def on_message(self, handler: MessageHandler) -> None:
        """See `control_plane.peers.Peers`."""
        self._handler = handler

    def on_break(self, handler: Callable[[str], None]) -> None:
        """See `control_plane.peers.Peers`."""
        self._break = handler

    def send(self, replica: str, message: peer.PeerMessage) -> bool:
        """See `control_plane.peers.Peers`."""
        target = self._links.peers.get(replica)
        if target is None or not target.alive or not self.alive or not self._links.connected(self._replica, replica):
            return False
        payload = message.SerializeToString()
        idempotent = message.WhichOneof("message") in ("to_cluster", "from_cluster")
        send = self._links.relay if idempotent else self._links.deliver
        sent = asyncio.get_running_loop().time()
        send(self._replica, replica, lambda: target.receive(self._replica, payload, sent))
        return True

    def receive(self, replica: str, payload: bytes, sent: float) -> None:
        """A message arrives, unless this replica is dead, or the stream it came on: one that lost a message brings no later one."""
        if self.alive and not self._links.severed(replica, self._replica, sent):
            self._handler(replica, peer.PeerMessage.FromString(payload))

    def peer_broke(self, replica: str) -> None:
        """The stream to a peer broke."""
        self._break(replica)

    def die(self) -> None:
        """The process is gone; the others notice a broken stream."""
        self.alive = False
        if self._links.peers.get(self._replica) is self:
            del self._links.peers[self._replica]
        for name, other in list(self._links.peers.items()):
            self._links.deliver(self._replica, name, partial(other.peer_broke, self._replica))

    async def close(self) -> None:
        """See `die`."""
        self.die()


class Pipe:
    """One agent's stream: two ordered directions and a break."""

    CAPACITY = 10_000

    def __init__(self, left: str, right: str, links: Links, certificate: str | None = None) -> None:
        self.left, self.right, self._links = left, right, links
        self.peer_cluster = certificate
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue(self.CAPACITY)
        self.down: asyncio.Queue[bytes | None] = asyncio.Queue(self.CAPACITY)
        self.doomed = False
        self.broken = False
        links.open(self)

    def break_soon(self, delay: float) -> None:
        """Nothing more goes through; both ends notice after `delay` seconds."""
        self.doomed = True
        asyncio.get_running_loop().call_later(delay, self.close, context=NOBODY)

    def finish(self) -> None:
        """The right end is done: what it sent arrives, then the end."""
        if not self.doomed:
            self._links.deliver(self.right, self.left, self.close)

    def close(self) -> None:
        """Both ends see the end of the stream after what has arrived."""
        if self.broken:
            return
        self.broken = True
        self._links.closed(self)
        for queue in (self.up, self.down):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    def push(self, queue: asyncio.Queue[bytes | None], source: str, target: str, payload: bytes) -> None:
        """Send one message along a direction."""
        if not self.doomed:
            self._links.deliver(source, target, partial(self._put, queue, payload))

    def _put(self, queue: asyncio.Queue[bytes | None], payload: bytes) -> None:
        if self.broken or self.doomed:
            return
        if queue.full():
            self.break_soon(0.0)
        else:
            queue.put_nowait(payload)


class AgentEnd:
    """The agent's end: `cluster_agent.transport.Stream`."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    @property
    def endpoint(self) -> str:
        """The replica's name."""
        return self._pipe.right

    async def send(self, messages: Sequence[agent.SessionRequest]) -> None:
        """Queue messages. Raises TransportClosed."""
        if self._pipe.broken:
            raise TransportClosed("the stream broke")
        for message in messages:
            self._pipe.push(self._pipe.up, self._pipe.left, self._pipe.right, message.SerializeToString())

    async def receive(self) -> list[agent.SessionResponse]:
        """At least one message. Raises TransportClosed."""
        payload = await self._pipe.down.get()
        if payload is None:
            self._pipe.down.put_nowait(None)
            raise TransportClosed("the stream broke")
        return [agent.SessionResponse.FromString(payload)]

    async def close(self) -> None:
        """End the stream."""
        self._pipe.break_soon(0.0)


class ReplicaEnd:
    """The serving replica's end: `control_plane.sessions.AgentStream`."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self.peer_cluster = pipe.peer_cluster

    async def receive(self) -> agent.SessionRequest:
        """The next message. Raises StreamClosed."""
        payload = await self._pipe.up.get()
        if payload is None:
            self._pipe.up.put_nowait(None)
            raise StreamClosed
        return agent.SessionRequest.FromString(payload)

    def send(self, message: agent.SessionResponse) -> bool:
        """Queue a message."""
        if self._pipe.broken:
            return False
        self._pipe.push(self._pipe.down, self._pipe.right, self._pipe.left, message.SerializeToString())
        return True

    def end(self) -> None:
        """The server's handler returned: the stream ends after what was sent."""
        self._pipe.finish()
