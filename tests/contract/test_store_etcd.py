"""What only the etcd adapter has: endpoints and their rotation, TLS, sure and unsure failures, fragments, the threaded
lease keeper (PROTOCOL J6, O2; reliability.md section 6, pitfalls 12, 19, 20, 31)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trustme

from baton.clock import SystemClock
from baton.time_limits import time_limit
from control_plane.store.base import (
    Ambiguous,
    Compare,
    Get,
    NoSpace,
    NotApplied,
    Put,
    Txn,
    TxnResult,
    Unavailable,
    WatchBatch,
)
from control_plane.store.etcd import EtcdStore, ThreadedLeaseKeeper, TlsFiles
from lab.etcd_binary import find_etcd
from lab.etcd_server import EtcdServer, free_ports
from tests.contract.conftest import next_prefix

T = 10.0
CLOCK = SystemClock()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An endpoint that takes connections and never answers, like a frozen member."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class Valve:
    """A way to etcd that can be closed without closing a connection: bytes then vanish, as with a frozen member."""

    def __init__(self, target: str) -> None:
        self.open = True
        self.endpoint = ""
        self._target = target
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.partition(":")
        back_reader, back_writer = await asyncio.open_connection(host, int(port))
        for source, sink in ((reader, back_writer), (back_reader, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(source, sink)))

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                if self.open:
                    sink.write(data)
        except ConnectionError:
            pass  # the peer left
        finally:
            sink.close()


@pytest.fixture
async def valve(etcd_server: EtcdServer) -> AsyncIterator[Valve]:
    made = Valve(etcd_server.endpoint)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def closed_port() -> str:
    """An endpoint where nobody listens."""
    return f"127.0.0.1:{free_ports()[0]}"


@pytest.fixture
async def store(etcd_server: EtcdServer) -> AsyncIterator[EtcdStore]:
    client = EtcdStore([etcd_server.endpoint], key_prefix=next_prefix(), clock=CLOCK, watch_stall=0.3)
    yield client
    await client.close()


async def take(watch: AsyncIterator[WatchBatch], count: int) -> list[bytes]:
    found: list[bytes] = []
    async with time_limit(20):
        while len(found) < count:
            found += [event.kv.value for event in (await anext(watch)).events]
    return found


async def until(true: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Look every 50 ms; fails after T."""
    deadline = CLOCK.boot() + T
    while not true():
        assert CLOCK.boot() < deadline
        meanwhile()
        await asyncio.sleep(0.05)


async def test_nobody_listens_is_surely_not_applied(closed_port: str) -> None:
    store = EtcdStore([closed_port], clock=CLOCK)
    with pytest.raises(NotApplied, match="failed to connect"):
        await store.txn(Txn((), (Put("a", b""),)), timeout=T)
    with pytest.raises(Unavailable):
        await store.get("a", timeout=0.3)
    await store.close()


async def test_a_connection_that_never_answers_is_ambiguous(black_hole: str) -> None:
    store = EtcdStore([black_hole], clock=CLOCK)
    with pytest.raises(Ambiguous):
        await store.txn(Txn((), (Put("a", b""),)), timeout=0.3)
    await store.close()


async def test_a_dead_first_endpoint_is_skipped(closed_port: str, etcd_server: EtcdServer) -> None:
    store = EtcdStore([closed_port, etcd_server.endpoint], key_prefix=next_prefix(), clock=CLOCK)
    assert (await store.txn(Txn((), (Put("a", b"1"),)), timeout=T)).succeeded
    await store.close()


async def test_an_endpoint_that_never_answers_is_skipped(black_hole: str, etcd_server: EtcdServer) -> None:
    store = EtcdStore([f"http://{black_hole}", etcd_server.endpoint], key_prefix=next_prefix(), clock=CLOCK)
    assert (await store.txn(Txn((), (Put("a", b"1"),)), timeout=T)).succeeded
    await store.close()


async def test_an_endpoint_that_falls_silent_is_left(valve: Valve, etcd_server: EtcdServer) -> None:
    store = EtcdStore([valve.endpoint, etcd_server.endpoint], key_prefix=next_prefix(), clock=CLOCK)
    write = Txn((), (Put("a", b"1"),))
    await store.txn(write, timeout=T)
    lease = await store.lease_grant(5, timeout=T)
    valve.open = False
    kv, _ = await store.get("a", timeout=1.0)  # a read moves on by itself
    assert kv is not None
    assert (await store.txn(write, timeout=T)).succeeded
    with pytest.raises(Unavailable):  # anything else fails first, and the next call goes elsewhere
        await store.lease_keepalive(lease.id, timeout=0.3)
    assert await store.lease_keepalive(lease.id, timeout=T) == 5.0
    await store.close()


async def test_a_name_is_resolved_and_a_dead_one_left(closed_port: str, etcd_server: EtcdServer) -> None:
    port = etcd_server.endpoint.rpartition(":")[2]
    store = EtcdStore([closed_port, f"localhost:{port}"], key_prefix=next_prefix(), clock=CLOCK)
    kv, _ = await store.get("a", timeout=T)
    assert kv is None
    await store.close()


def test_endpoints_are_checked() -> None:
    for wrong in ([], ["localhost"], ["http://"]):
        with pytest.raises(ValueError, match="host:port"):
            EtcdStore(wrong, clock=CLOCK)
    with pytest.raises(ValueError, match="key_prefix"):
        EtcdStore(["localhost:1"], key_prefix="baton", clock=CLOCK)


async def test_a_prefix_hides_all_other_keys(etcd_server: EtcdServer) -> None:
    prefix = next_prefix()
    inner = EtcdStore([etcd_server.endpoint], key_prefix=f"{prefix}in/", clock=CLOCK)
    outer = EtcdStore([etcd_server.endpoint], key_prefix=prefix, clock=CLOCK)
    await outer.txn(Txn((), (Put("in0", b""), Put("im", b""), Put("in/key", b"1"))), timeout=T)
    assert [kv.key for kv in (await inner.range("", timeout=T)).kvs] == ["key"]
    assert (await inner.txn(Txn([Compare.equals("key", b"1")], (Get("key"),)), timeout=T)).succeeded
    await inner.close()
    await outer.close()


async def test_a_large_catch_up_comes_whole(store: EtcdStore) -> None:
    """10 MB of missed changes exceed what the server puts in one message: it fragments, and batches stay whole."""
    written = [await store.txn(Txn((), (Put("w", bytes([n]) * 400_000),)), timeout=T) for n in range(25)]
    watch = store.watch("w", from_revision=written[0].revision)
    assert [value[0] for value in await take(watch, 25)] == list(range(25))
    await watch.aclose()


async def test_a_range_larger_than_one_answer_comes_in_pages(store: EtcdStore) -> None:
    for n in range(40):
        await store.txn(Txn((), (Put(f"big/{n:02}", bytes([n]) * 1_000_000),)), timeout=T)
    found = await store.range("big/", timeout=30)
    assert [kv.value[0] for kv in found.kvs] == list(range(40))
    await store.txn(Txn((), [Put(f"big/{n:02}", b"") for n in range(40)]), timeout=T)


async def test_an_idle_watch_reports_progress(store: EtcdStore) -> None:
    now = await store.txn(Txn((), (Put("w", b"1"),)), timeout=T)
    watch = store.watch("w", from_revision=now.revision + 1)
    other = await store.txn(Txn((), (Put("elsewhere", b"1"),)), timeout=T)
    async with time_limit(T):
        batch = await anext(watch)
    assert batch.events == ()
    assert batch.revision >= other.revision
    await watch.aclose()


async def test_a_watch_leaves_a_server_that_fell_silent(etcd_server: EtcdServer, store: EtcdStore) -> None:
    now = await store.txn(Txn((), (Put("w", b"1"),)), timeout=T)
    watch = store.watch("w", from_revision=now.revision)
    assert await take(watch, 1) == [b"1"]
    waiting = asyncio.create_task(take(watch, 1))
    etcd_server.pause()
    await asyncio.sleep(1.0)  # three times the stall bound: given up and opened again, in vain
    etcd_server.resume()
    await store.txn(Txn([], (Put("w", b"2"),)), timeout=T)
    assert await waiting == [b"2"]
    await watch.aclose()


async def test_cancelling_a_watch_frees_its_stream(store: EtcdStore) -> None:
    now = await store.txn(Txn((), (Put("w", b"1"),)), timeout=T)
    watch = store.watch("w", from_revision=now.revision + 1)
    waiting = asyncio.create_task(take(watch, 1))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await store.txn(Txn((), (Put("w", b"2"),)), timeout=T)).succeeded


async def test_keeper_keeps_a_lease_and_says_since_when(etcd_server: EtcdServer, store: EtcdStore) -> None:
    before = CLOCK.boot()
    lease = await store.lease_grant(2, timeout=T)
    await store.txn(Txn((), (Put("mine", b"", lease.id),)), timeout=T)
    keeper = ThreadedLeaseKeeper([etcd_server.endpoint], clock=CLOCK)
    keeper.start(lease)
    for _ in range(35):
        await asyncio.sleep(0.1)
        keeper.tick()
    assert before < keeper.last_ack_sent <= CLOCK.boot()
    assert CLOCK.boot() - keeper.last_ack_sent < 2.0
    assert not keeper.lost
    assert (await store.get("mine", timeout=T))[0] is not None
    await store.lease_revoke(lease.id, timeout=T)
    await until(lambda: keeper.lost, keeper.tick)
    await keeper.stop()


async def test_keeper_lets_the_lease_of_a_hung_loop_die(etcd_server: EtcdServer, store: EtcdStore) -> None:
    lease = await store.lease_grant(2, timeout=T)
    put = await store.txn(Txn((), (Put("mine", b"", lease.id),)), timeout=T)
    keeper = ThreadedLeaseKeeper([etcd_server.endpoint], clock=CLOCK, max_tick_age=0.2)
    keeper.start(lease)
    watch = store.watch("mine", from_revision=put.revision + 1)
    assert await take(watch, 1) == [b""]  # no tick, no renewal: gone
    await watch.aclose()
    await keeper.stop()
    assert CLOCK.boot() - keeper.last_ack_sent >= 2.0


async def test_keeper_moves_to_a_living_endpoint(black_hole: str, etcd_server: EtcdServer, store: EtcdStore) -> None:
    lease = await store.lease_grant(6, timeout=T)
    keeper = ThreadedLeaseKeeper([black_hole, etcd_server.endpoint], clock=CLOCK, max_tick_age=60)
    keeper.start(lease)
    await until(lambda: keeper.last_ack_sent > 0)
    await keeper.stop()
    with pytest.raises(RuntimeError):
        keeper.start(lease)


async def test_what_is_said_at_the_edge_of_the_quota_is_true(tmp_path: Path) -> None:
    """etcd may apply a write and answer "no space" (see codec.surely_not_applied): then it must not be NoSpace here."""
    with EtcdServer(tmp_path / "data", flags=["--quota-backend-bytes", str(6 << 20)]) as server:
        store = EtcdStore([server.endpoint], clock=CLOCK)
        answers: dict[str, TxnResult | BaseException] = {}
        while not any(isinstance(answer, Exception) for answer in answers.values()):
            names = [f"k{len(answers) + n:03}" for n in range(8)]
            puts = (store.txn(Txn((), (Put(name, bytes(100_000)),)), timeout=T) for name in names)
            answers |= zip(names, await asyncio.gather(*puts, return_exceptions=True), strict=True)
            await asyncio.sleep(0.05)  # etcd looks at its size every 100 ms
        present = {kv.key for kv in (await store.range("k", timeout=T, keys_only=True)).kvs}
        for name, answer in answers.items():
            assert isinstance(answer, (TxnResult, NoSpace, Ambiguous)), answer
            assert isinstance(answer, Ambiguous) or (name in present) == isinstance(answer, TxnResult)
        with pytest.raises(NoSpace):  # once it is full, the answer is sure
            await store.txn(Txn((), (Put("more", bytes(600_000)),)), timeout=T)
        await store.close()


async def test_mutual_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = TlsFiles(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    authority.cert_pem.write_to_path(files.ca)
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.cert_chain_pems[0].write_to_path(files.cert)
    issued.private_key_pem.write_to_path(files.key)
    with EtcdServer(tmp_path / "data", tls=files) as server:
        store = EtcdStore([server.endpoint], tls=files, clock=CLOCK)
        await store.txn(Txn((), (Put("a", b"1"),)), timeout=T)
        lease = await store.lease_grant(3, timeout=T)
        keeper = ThreadedLeaseKeeper([server.endpoint], tls=files, clock=CLOCK)
        keeper.start(lease)
        await until(lambda: keeper.last_ack_sent > 0)
        await keeper.stop()
        await store.close()
        stranger = EtcdStore([server.endpoint], clock=CLOCK)
        with pytest.raises((NotApplied, Ambiguous)):
            await stranger.txn(Txn((), (Put("a", b"2"),)), timeout=2.0)
        await stranger.close()


def test_the_named_binary_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = find_etcd()
    monkeypatch.setenv("BATON_ETCD", str(chosen.etcd))
    assert find_etcd() == chosen
    monkeypatch.setenv("BATON_ETCD", "/nonexistent/etcd")
    with pytest.raises(Exception, match="BATON_ETCD"):
        find_etcd()
