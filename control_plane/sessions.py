"""Serving agents' streams: Hello, heartbeats acknowledged by a committed put, and messages up and down (PROTOCOL S1, S2, S6).

Theory. An agent dials any replica, the *serving* replica. What makes the session true is not the stream but two keys:

* `sessions/{uid}/owner`: generation and serving replica. Fleet's transaction writes it when it opens a generation, and marks it
  ended in the transaction of ClusterLost; a replica that takes over a live session swaps the replica by comparing the value.
* `sessions/{uid}/beat`: the last heartbeat, put by the serving replica under a compare of the owner key.

So a heartbeat that was acknowledged is in the store, and none of an ended generation ever can be (S2, S4): `heartbeats.py`.

Messages up (reports, inventories, receipts) go to the owners of their shards; inventories are delivered by a call that is repeated
until the owner has journaled what follows from it, and again whenever a shard changes hands, because adoption (S6) and every
dispatch on a new stream (F3) wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from baton.clock import Clock, Entropy
from baton.internal import peer_pb2 as peer
from baton.leases import LeaseValues
from baton.time_limits import time_limit
from baton.v1 import agent_pb2 as pb
from control_plane.core.commands import OpenSession, Refused, SessionGrant
from control_plane.core.model import FLEET, RUN_SHARDS
from control_plane.heartbeats import BEAT_TIMEOUT, Beating, Heartbeats
from control_plane.peers import CallContext, CallFailed, CallLost, single
from control_plane.refusals import NotOwned, OutcomeUnknown, StoreDown
from control_plane.router import Router
from control_plane.session import AgentStream, Refuse, Session, SessionsConfig, StreamClosed, check_hello, welcome
from control_plane.session_calls import ALIVE, INVENTORY, LOSE, OPEN, decode_grant, encode_lose, encode_open
from control_plane.store import keys
from control_plane.store.base import Ambiguous, Compare, NotApplied, Put, Store, Txn, Unavailable
from control_plane.view import View

__all__ = ["Refuse", "Sessions", "SessionsConfig", "StreamClosed"]

log = logging.getLogger(__name__)

HELLO_WAIT = 10.0
"""Seconds for the first message. Too small: slow links never join; too large: idle sockets pile up."""

RESTORED = "the store was restored; an operator must run `baton admin restored`"

RESTORE_PAUSE = 2.0
"""Seconds until a refused agent asks again whether an operator has confirmed. Each try costs one read of all heads."""

CALL_TIMEOUT = 5.0
"""Seconds for one try of an internal call; a takeover in between costs one more try."""

ALIVE_TIMEOUT = 1.0
"""Seconds for another replica to say whom it serves. Larger: a frozen replica delays every Hello of the agents it served; smaller:
a slow one lets a second instance in."""

RETRY_PAUSE = 0.2
"""Seconds between tries of an internal call: far below a heartbeat, far above a loop turn."""

MAX_PAUSE = 1.0
"""Longest pause between tries to bring an inventory: every shard of every agent tries. Longer delays dispatches after an outage."""
_EXPECTED = (Refused, NotOwned, OutcomeUnknown, StoreDown, CallLost, CallFailed, TimeoutError)


class Sessions:
    """All streams this replica serves."""

    def __init__(
        self, store: Store, clock: Clock, entropy: Entropy, router: Router, view: View, config: SessionsConfig
    ) -> None:
        self._store, self._clock, self._entropy = store, clock, entropy
        self._router, self._view, self._config = router, view, config
        self._by_cluster: dict[str, Session] = {}
        self._heartbeats = Heartbeats(store, clock, self._moved)
        self._owners_seen: dict[str, str] = {}
        self._draining = False
        router.on_to_cluster(self._deliver)
        router.serve(ALIVE, self._alive)
        view.subscribe(self._view_changed)

    def serving(self) -> dict[str, str]:
        """Cluster uid -> name of every session served here."""
        return {uid: session.name for uid, session in self._by_cluster.items()}

    def alive_instance(self, name: str) -> str | None:
        """Instance id of the stream this replica serves under that cluster name."""
        return next((s.hello.instance for s in self._by_cluster.values() if s.name == name), None)

    async def serve(self, stream: AgentStream) -> None:
        """Run one agent's stream to its end. Never raises, except when cancelled."""
        session: Session | None = None
        try:
            session = await self._open(stream)
            while True:
                self._take(session, await stream.receive())
        except Refuse as refusal:
            log.info("agent stream refused", extra={"reason": refusal.reason, "detail": refusal.message})
            message = pb.Refusal(
                reason=refusal.reason, message=refusal.message, retry_after_ms=int(refusal.retry_after * 1000)
            )
            stream.send(pb.SessionResponse(refusal=message))
        except (StreamClosed, TimeoutError):
            pass
        finally:
            if session is not None:
                self._close(session)

    def drain(self) -> None:
        """Send every agent elsewhere (the replica is leaving)."""
        self._draining = True
        for session in list(self._by_cluster.values()):
            self._refuse(session, "DRAINING", "this replica is shutting down; use another", 0.0)

    # -- opening ------------------------------------------------------------------------------------------------------

    async def _open(self, stream: AgentStream) -> Session:
        """1 Hello; 2 identity; 3 J12 marks; 4 generation from fleet; 5 claim the session key; 6 Welcome; 7 inventories."""
        async with time_limit(HELLO_WAIT):
            first = await stream.receive()
        if first.WhichOneof("message") != "hello":
            raise Refuse("INVALID_ARGUMENT", "the first message of a session must be hello", 10.0)
        hello, incarnation = first.hello, self._view.incarnation
        lease = self._admit(stream, hello)
        if self._view.restore_suspected or await self._config.check_marks(list(hello.marks), hello.federation_uid):
            raise Refuse("RESTORE_SUSPECTED", RESTORED, RESTORE_PAUSE)
        grant = await self._generation(hello, lease, rival=await self._rival(hello))
        lease = self._granted(grant)
        owner_value, claimed = await self._claim(grant.cluster, grant.generation, hello.feature_level)
        # Claims of one key are ordered by their revisions, so stream ids sort by age on whichever replica they were made.
        stream_id = f"{claimed:016x}.{self._entropy.token(4)}"
        if incarnation != self._view.incarnation:
            raise Refuse("RESTORE_SUSPECTED", RESTORED, RETRY_PAUSE)
        previous = self._by_cluster.get(grant.cluster)
        if previous is not None:
            if previous.stream_id > stream_id:
                raise Refuse("SESSION_MOVED", "a newer stream of this cluster took over", 0.0)
            self._refuse(previous, "SECOND_INSTANCE", "a newer stream of this cluster took over", 5.0)
            self._close(previous)
        session = Session(
            cluster=grant.cluster,
            name=hello.cluster,
            generation=grant.generation,
            stream_id=stream_id,
            stream=stream,
            hello=hello,
            owner_value=owner_value,
            claimed=claimed,
            incarnation=incarnation,
            inventories={inventory.shard: inventory for inventory in hello.inventory},
        )
        self._by_cluster[grant.cluster] = session
        addresses = [member.address for member in self._view.members.values()]
        said = welcome(grant, lease, self._clock.wall(), self._config.federation_uid, self._router.replica, addresses)
        stream.send(pb.SessionResponse(welcome=said))
        log.info("session open", extra={"cluster": hello.cluster, "generation": grant.generation})
        for shard in RUN_SHARDS:
            self._tell_inventory(session, shard)
        return session

    def _admit(self, stream: AgentStream, hello: pb.Hello) -> LeaseValues:
        if self._draining:
            raise Refuse("DRAINING", "this replica is shutting down; use another", 0.0)
        check_hello(stream, hello, self._config.federation_uid)
        try:
            return self._config.leases(hello.profile or "balanced")
        except KeyError:
            raise Refuse("INVALID_ARGUMENT", f"hello.profile: no lease profile {hello.profile!r}", 30.0) from None

    async def _rival(self, hello: pb.Hello) -> bool:
        """Whether another instance's stream of that name is alive, here or where we heard it is served (S1)."""
        here = self.alive_instance(hello.cluster)
        if here is not None:
            return here != hello.instance
        uid = next((uid for uid, facts in self._view.table.clusters.items() if facts.name == hello.cluster), "")
        served = self._view.sessions.get(uid)
        if served is None or served.ended or served.replica in ("", self._router.replica):
            return False
        try:
            asking = self._router.ask(served.replica, ALIVE, hello.cluster.encode(), timeout=ALIVE_TIMEOUT)
            there = (await single(asking)).decode()
        except (CallLost, CallFailed):
            return False  # nobody that serves it can be asked: the agent may well have come from there
        return there not in ("", hello.instance)

    async def _alive(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:  # noqa: ARG002 - a CallHandler
        """Which instance we serve under that name; empty if none."""
        yield (self.alive_instance(payload.decode()) or "").encode()

    def _granted(self, grant: SessionGrant) -> LeaseValues:
        """The lease of the grant's generation: never longer than what fleet and owners wait for it (F5, S8)."""
        try:
            lease = self._config.leases(grant.profile)
        except KeyError:
            lease = None
        if lease is None or lease.lost + lease.guard > grant.recovery_seconds:
            raise Refuse("GENERATION_ENDING", f"it was opened with another profile {grant.profile}; it must end first")
        return lease

    async def _generation(self, hello: pb.Hello, lease: LeaseValues, *, rival: bool) -> SessionGrant:
        command = OpenSession(
            cluster_name=hello.cluster,
            cluster_uid=self._entropy.token(8),
            instance=hello.instance,
            boot_id=hello.boot_id,
            journal_uid=hello.journal_uid,
            replica=self._router.replica,
            profile=lease.profile,
            lost_seconds=lease.lost,
            guard_seconds=lease.guard,
            labels=tuple(sorted(hello.labels.items())),
            taints=tuple(sorted(hello.taints)),
            isolation=hello.isolation,
            orphan_killer=hello.orphan_killer,
            namespaces=tuple(sorted(hello.namespaces)),
            agent_version=hello.agent_version,
            last_generation=hello.last_generation,
            first_session_alive=rival,
        )
        try:
            answer = await single(self._router.call(FLEET, OPEN, encode_open(command), timeout=CALL_TIMEOUT))
        except CallFailed as failed:
            reason = failed.message.partition(":")[0]
            raise Refuse(reason if reason.isupper() else "UNAVAILABLE", failed.message) from failed
        except (NotOwned, CallLost, TimeoutError) as error:
            raise Refuse("UNAVAILABLE", "the fleet shard cannot be reached", RETRY_PAUSE) from error
        return decode_grant(answer)

    async def _claim(self, cluster: str, generation: int, level: int) -> tuple[bytes, int]:
        """Become the serving replica, by comparing the value that holds the generation (S2): the new value, its revision. `level`
        is the agent's: it may have been upgraded, or put back, within its generation."""
        key = keys.session_owner(cluster)
        for _ in range(5):
            try:
                current, _revision = await self._store.get(key, timeout=BEAT_TIMEOUT)
                if current is None:
                    break
                fields = json.loads(current.value)
                if fields["generation"] != generation or fields.get("ended"):
                    raise Refuse("GENERATION_ENDED", f"generation {generation} has ended", 0.0)
                fields |= {"replica": self._router.replica, "nonce": self._entropy.token(8), "level": level}
                value = json.dumps(fields, sort_keys=True).encode()
                unchanged = Compare.equals(key, current.value)
                swap = Txn([unchanged, Compare.absent(keys.RESTORED_SUSPECTED)], [Put(key, value)])
                result = await self._store.txn(swap, timeout=BEAT_TIMEOUT)
                if result.succeeded:
                    return value, result.revision
            except (NotApplied, Ambiguous, Unavailable):
                continue
        raise Refuse("UNAVAILABLE", "the session's key could not be claimed", RETRY_PAUSE)

    # -- up -----------------------------------------------------------------------------------------------------------

    def _take(self, session: Session, message: pb.SessionRequest) -> None:
        if session.closed.is_set():
            raise StreamClosed
        kind = message.WhichOneof("message")
        if kind == "heartbeat":
            if session.renewed_by(message.heartbeat):
                self._heartbeats.add(session, message.heartbeat)
        elif kind == "reports":
            self._up(session, message.reports.shard, reports=message.reports)
        elif kind == "receipt":
            self._up(session, message.receipt.shard, receipt=message.receipt)
        elif kind == "log":
            asker = message.log.request.partition(":")[0]
            up = peer.FromCluster(cluster_uid=session.cluster, generation=session.generation, log=message.log)
            self._router.to_replica(asker, peer.PeerMessage(from_cluster=up))
        elif kind == "goodbye":
            self._spawn(session, self._goodbye(session))

    def _up(self, session: Session, shard: str, **what: object) -> None:
        up = peer.FromCluster(
            cluster_uid=session.cluster,
            generation=session.generation,
            stream=session.stream_id,
            shard=shard,
            **what,  # type: ignore[arg-type]
        )
        # Lost on the way is fine: agents send again what is not acknowledged (J7).
        self._router.to_owner(shard, peer.PeerMessage(from_cluster=up))

    async def _goodbye(self, session: Session) -> None:
        payload = encode_lose(session.cluster, session.generation, session.claimed)
        for _ in range(10):
            try:
                await single(self._router.call(FLEET, LOSE, payload, timeout=CALL_TIMEOUT))
                break
            except CallFailed as failed:
                if failed.message.startswith("WRONG_STATE"):
                    break  # it has ended already, or the agent has come back since
            except (NotOwned, CallLost, TimeoutError):
                pass
            await self._clock.sleep(RETRY_PAUSE)
        self._refuse(session, "GENERATION_ENDED", "goodbye", 0.0)

    def _tell_inventory(self, session: Session, shard: str) -> None:
        if shard not in session.telling:
            session.telling.add(shard)
            self._spawn(session, self._inventory(session, shard))

    async def _inventory(self, session: Session, shard: str) -> None:
        """Until the owner has journaled what follows from it, or the session is over."""
        up = peer.FromCluster(
            cluster_uid=session.cluster,
            generation=session.generation,
            stream=session.stream_id,
            shard=shard,
            inventory=session.inventories.get(shard) or pb.ShardInventory(shard=shard),
            boot_id=session.hello.boot_id,
            journal_uid=session.hello.journal_uid,
            incarnation=session.incarnation,
        )
        payload = self._router.replica.encode() + b"\n" + up.SerializeToString()
        pause = RETRY_PAUSE
        try:
            while not session.closed.is_set():
                owner = self._owners_seen.get(shard)
                try:
                    answered = await single(self._router.call(shard, INVENTORY, payload, timeout=CALL_TIMEOUT))
                except Exception as error:
                    if not isinstance(error, _EXPECTED):  # without telling the shard has no link (J7)
                        log.exception("an inventory failed", extra={"shard": shard, "cluster": session.name})
                    await self._clock.sleep(pause * (0.5 + self._entropy.uniform()))
                    pause = min(2 * pause, MAX_PAUSE)
                    continue
                if self._owners_seen.get(shard) != owner:
                    continue  # who answered may have been the owner before: its successor knows nothing of this stream
                if not answered or json.loads(answered)["nonce"] == owner:
                    break  # empty: from an older replica, which does not say as which owner it answered
                # A former owner that has not noticed yet, such as this replica, or one that is ahead of our view.
                await self._clock.sleep(RETRY_PAUSE * (0.5 + self._entropy.uniform()))
        finally:
            session.telling.discard(shard)

    def _view_changed(self, what: str) -> None:
        """A shard with a new owner has no link to our agents yet: tell it (J7). Owners in a restored store know nothing of
        what was placed after the backup, so agents come again with fresh inventories in the new incarnation (J12)."""
        if what == "restore":
            for session in list(self._by_cluster.values()):
                if self._view.restore_suspected or session.incarnation != self._view.incarnation:
                    self._refuse(session, "RESTORE_SUSPECTED", RESTORED, RESTORE_PAUSE)
        if what != "owners":
            return
        seen, owners = self._owners_seen, self._view.owners
        changed = [shard for shard, info in owners.items() if seen.get(shard) != info.nonce and shard != FLEET]
        for shard in sorted(changed, key=RUN_SHARDS.index):
            seen[shard] = owners[shard].nonce
            for session in self._by_cluster.values():
                self._tell_inventory(session, shard)

    # -- down ---------------------------------------------------------------------------------------------------------

    def _deliver(self, message: peer.ToCluster) -> None:
        session = self._by_cluster.get(message.cluster_uid)
        if session is None:
            return
        if message.stream and message.stream != session.stream_id:
            # The owner is tied to an older stream (its calls crossed): tell it of this one.
            if message.message.WhichOneof("message") == "dispatches":
                self._tell_inventory(session, message.message.dispatches.shard)
            return
        if not session.stream.send(session.readable(message.message)):
            log.warning("agent reads too slowly; its stream is ended", extra={"cluster": session.name})
            self._close(session)

    async def run(self) -> None:
        """Commit heartbeats until cancelled."""
        await self._heartbeats.run()

    # -- closing ------------------------------------------------------------------------------------------------------

    def _moved(self, session: Beating) -> None:
        if isinstance(session, Session):
            self._refuse(session, "SESSION_MOVED", "another replica serves this session, or it has ended", 0.0)

    def _refuse(self, session: Session, reason: str, message: str, retry_after: float) -> None:
        refusal = pb.Refusal(reason=reason, message=message, retry_after_ms=int(retry_after * 1000))
        session.stream.send(pb.SessionResponse(refusal=refusal))
        session.closed.set()
        if self._by_cluster.get(session.cluster) is session:
            del self._by_cluster[session.cluster]

    def _close(self, session: Session) -> None:
        session.closed.set()
        for task in list(session.tasks):
            task.cancel()
        if self._by_cluster.get(session.cluster) is session:
            del self._by_cluster[session.cluster]

    @staticmethod
    def _spawn(session: Session, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        session.tasks.add(task)
        task.add_done_callback(session.tasks.discard)
