"""The fault proxy does to connections what a network does, and keeps no more than it may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from baton.time_limits import time_limit
from lab.proxy import HELD, PIECE_BYTES, Mode, Proxy

SOON = 20.0
QUIET = 0.2


class Echo:
    """A server that sends back what it hears, and counts its connections."""

    def __init__(self) -> None:
        self.accepted = 0
        self.heard = b""
        """The last bytes of all connections, in order."""
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            while data := await reader.read(PIECE_BYTES):
                self.heard = (self.heard + data)[-100:]
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    server = Echo()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    between = Proxy(lambda: ("127.0.0.1", echo.port))
    await between.start()
    yield between
    await between.close()
    assert between.connections == 0


async def dial(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def say(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], words: bytes) -> None:
    streams[1].write(words)
    await streams[1].drain()


async def hear(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], count: int, seconds: float = SOON) -> bytes:
    async with time_limit(seconds):
        return await streams[0].readexactly(count)


async def test_passes_bytes_both_ways_and_an_orderly_end(proxy: Proxy) -> None:
    near = await dial(proxy)
    await say(near, b"hello")
    assert await hear(near, 5) == b"hello"
    near[1].write_eof()
    async with time_limit(SOON):
        assert await near[0].read() == b""
    near[1].close()


async def test_much_data_arrives_whole_and_in_order(proxy: Proxy) -> None:
    near = await dial(proxy)
    data = bytes(range(256)) * (8 * PIECE_BYTES // 256 + 3)
    sending = asyncio.create_task(say(near, data))
    assert await hear(near, len(data)) == data
    await sending
    near[1].close()


async def test_drop_keeps_sockets_and_moves_nothing_until_it_heals(proxy: Proxy, echo: Echo) -> None:
    near = await dial(proxy)
    await say(near, b"a")
    assert await hear(near, 1) == b"a"
    proxy.set(Mode.DROP)
    await say(near, b"b")
    with pytest.raises(TimeoutError):
        await hear(near, 1, QUIET)
    assert proxy.connections == 1
    proxy.set(Mode.PASS)
    assert await hear(near, 1) == b"b"
    near[1].close()


async def test_drop_takes_new_connections_no_further(proxy: Proxy, echo: Echo) -> None:
    proxy.set(Mode.DROP)
    near = await dial(proxy)
    await say(near, b"c")
    with pytest.raises(TimeoutError):
        await hear(near, 1, QUIET)
    assert echo.accepted == 0
    proxy.set(Mode.PASS)
    assert await hear(near, 1) == b"c"
    near[1].close()


async def test_a_flood_into_a_cut_network_is_not_kept(proxy: Proxy) -> None:
    near = await dial(proxy)
    await say(near, b"d")
    assert await hear(near, 1) == b"d"
    proxy.set(Mode.DROP)
    near[1].write(b"x" * (4 * HELD * PIECE_BYTES))
    with pytest.raises(TimeoutError):
        async with time_limit(QUIET):
            await near[1].drain()
    near[1].transport.abort()


@pytest.mark.parametrize(("mode", "heard"), [(Mode.DROP_UP, b""), (Mode.DROP_DOWN, b"ping")])
async def test_a_one_way_cut_moves_bytes_in_the_other_direction_only(
    proxy: Proxy, echo: Echo, mode: Mode, heard: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), SOON) == b"hello"
    proxy.set(mode)
    writer.write(b"ping")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), QUIET)
    assert echo.heard == b"hello" + heard
    proxy.set(Mode.PASS)
    assert await asyncio.wait_for(reader.readexactly(4), SOON) == b"ping"
    writer.close()


async def test_a_stranded_connection_is_silent_and_new_ones_are_served(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), SOON) == b"hello"
    proxy.strand()
    writer.write(b"nobody hears")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), QUIET)
    fresh_reader, fresh_writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    fresh_writer.write(b"new")
    assert await asyncio.wait_for(fresh_reader.readexactly(3), SOON) == b"new"
    assert echo.heard == b"hellonew"
    writer.close()
    fresh_writer.close()


async def test_reset_breaks_old_connections_and_refuses_new_ones(proxy: Proxy, echo: Echo) -> None:
    near = await dial(proxy)
    await say(near, b"e")
    assert await hear(near, 1) == b"e"
    proxy.set(Mode.RESET)
    with pytest.raises(ConnectionResetError):
        await hear(near, 1)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await hear(await dial(proxy), 1)
    assert echo.accepted == 1
    proxy.set(Mode.PASS)
    again = await dial(proxy)
    await say(again, b"f")
    assert await hear(again, 1) == b"f"
    again[1].close()


async def test_delay_holds_each_piece_and_keeps_the_order(proxy: Proxy) -> None:
    near = await dial(proxy)
    proxy.set(Mode.DELAY, delay_seconds=QUIET)
    began = asyncio.get_running_loop().time()
    await say(near, b"1")
    await asyncio.sleep(0)
    await say(near, b"2")
    assert await hear(near, 2) == b"12"
    assert asyncio.get_running_loop().time() - began >= 2 * QUIET  # there and back
    near[1].close()


async def test_a_far_side_that_is_gone_resets_the_near_one(echo: Echo) -> None:
    nobody = Proxy(lambda: None)
    await nobody.start()
    near = await dial(nobody)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await hear(near, 1)
    await nobody.close()


async def test_the_port_can_be_asked_for_again(echo: Echo) -> None:
    first = Proxy(lambda: ("127.0.0.1", echo.port))
    await first.start()
    port = first.port
    await first.close()
    second = Proxy(lambda: ("127.0.0.1", echo.port))
    await second.start(port)
    assert second.port == port
    await second.close()
