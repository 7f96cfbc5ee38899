"""The loop that keeps a session with the control plane (PROTOCOL S1, S2, F5, G2).

For ever: dial the next endpoint; say Hello with the inventory the machine gives; on Welcome send a heartbeat every h;
bring what arrives to the machine and what the machine wants said to the stream; when the stream ends, for whatever
reason, wait a little (jittered, growing while no heartbeat is answered) and begin again. The queue, the lease and the
work are the machine's.

* The send time of a heartbeat is read *before* it is sent; only its acknowledgement renews anything (F5).
* A heartbeat leaves only if the guard has ticked since the last one; else it says `guard_silent`, and its
  acknowledgement renews nothing, so that F comes as if nobody had answered (G2).
* No answer for a while, though F is far: another replica may be better off, so the stream is changed early (S2).
"""

from __future__ import annotations

import logging
from contextlib import suppress

from cluster_agent import translate
from cluster_agent.conversation import Conversation, GuardWatch, Parts, StreamDropped
from cluster_agent.core import events as on
from cluster_agent.core.commands import Action, DropStream, SendHello, SendReceipt, SendReports
from cluster_agent.transport import Stream, TransportClosed
from cluster_agent.waiting import within

log = logging.getLogger("baton.agent")

CONNECT_SECONDS = 5.0
"""To dial one endpoint; several must be tried within F."""

BACKOFF_SECONDS = 0.2
"""First pause between streams, with full jitter; it doubles until a heartbeat is answered."""

BACKOFF_LEASED_SECONDS = 1.0
"""Longest pause while a lease is left. After an outage there are T_rpc + E (3 s) to be heard before F; much longer, and
the profile would not ride out what it promises (F5)."""

BACKOFF_UNLEASED_SECONDS = 5.0
"""Longest pause when there is nothing left to save: a thousand agents must not be a storm on a replica that comes up."""


FAREWELL_SECONDS = 2.0
"""After a goodbye, for the control plane to end the stream; it commits a loss first. Shorter, and a goodbye may be cut
off with the stream (the session then ends by time); longer only delays the exit."""


class Session:
    """Keeps one session; `run` is the loop, `send` is where the reconciler's actions come in."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._guard = GuardWatch(parts)
        self._number = 0
        self._left = False
        self._conversation: Conversation | None = None

    async def run(self) -> None:
        """Until cancelled, or until the stream of a goodbye has ended."""
        failures = 0
        while True:
            pause = 0.0
            answered = False
            try:
                stream = await within(self._parts.clock, CONNECT_SECONDS, self._parts.transport.connect())
            except (TransportClosed, TimeoutError) as error:
                log.warning("The control plane cannot be reached.", extra={"cause": str(error)})
            else:
                answered, pause = await self._converse(stream)
                if self._left:
                    return  # the control plane ends a stream after a goodbye; another one would open a session anew
            failures = 0 if answered else failures + 1
            unleased = self._parts.reconciler.machine.link.renewed_at is None
            most = BACKOFF_UNLEASED_SECONDS if unleased else BACKOFF_LEASED_SECONDS
            bound = min(most, BACKOFF_SECONDS * 2 ** min(failures, 10))
            await self._parts.clock.sleep(pause + self._parts.entropy.uniform() * bound)

    async def _converse(self, stream: Stream) -> tuple[bool, float]:
        """One stream from Hello to its end: whether a heartbeat was answered, and the pause that was asked for."""
        self._number += 1
        number = self._number
        talk = self._conversation = Conversation(self._parts, self._guard, stream, number)
        pause = 0.0
        try:
            await self._parts.reconciler.post(on.StreamOpened(number))
            await talk.run()
        except* StreamDropped as group:
            pause = max(each.pause for each in group.exceptions if isinstance(each, StreamDropped))
            log.warning("The stream was given up.", extra={"stream": number, "cause": str(group.exceptions[0])})
        except* (TransportClosed, TimeoutError) as lost:
            log.warning("The stream was lost.", extra={"stream": number, "cause": str(lost.exceptions[0])})
        finally:
            self._conversation = None
            await stream.close()
        await self._parts.reconciler.post(on.StreamClosed(number))
        return talk.answered, pause

    def send(self, action: Action) -> None:
        """What the machine wants said. Never waits; what is for a stream that is gone is dropped (it goes again)."""
        talk = self._conversation
        if talk is None or getattr(action, "stream", talk.number) != talk.number:
            return
        match action:
            case SendHello():
                talk.put(translate.hello(action, self._parts.facts, self._parts.reconciler.machine.vitals()))
            case SendReports():
                for message in translate.reports(action):
                    talk.put(message)
            case SendReceipt():
                talk.put_receipt(action.shard, translate.receipt(action))
            case DropStream(_, reason):
                talk.drop(StreamDropped(reason))

    async def goodbye(self, seconds: float) -> bool:
        """Say that all work is dead (S5), and wait until it has left; False if there is no session to say it in.

        The stream's end is its acknowledgement. It is waited for, as an end of our own could overtake the goodbye.
        """
        talk = self._conversation
        if talk is None or talk.generation is None:
            return False
        self._left = True
        talk.put(translate.goodbye(talk.generation))
        try:
            await within(self._parts.clock, seconds, talk.sent())
        except TimeoutError:
            return False
        with suppress(TimeoutError):
            await within(self._parts.clock, FAREWELL_SECONDS, talk.ended.wait())
        return True
