"""The agent's process: flags in, log lines on stderr, an exit code out (`--help` lists them)."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from baton import collector
from baton.clock import SystemClock, SystemEntropy
from baton.telemetry import logs
from cluster_agent.agent import Agent
from cluster_agent.carrier_grpc import GrpcCarrier
from cluster_agent.carrying.cache import Cache
from cluster_agent.carrying.courier import Courier
from cluster_agent.carrying.fetching import Fetcher
from cluster_agent.carrying.shelf import Shelf
from cluster_agent.carrying.tally import Tally
from cluster_agent.config import AgentConfig, BadConfig, from_arguments
from cluster_agent.disk import DiskFailure, RealDisk
from cluster_agent.executors.carrying import Carrying
from cluster_agent.executors.process import ProcessExecutor
from cluster_agent.journal import JournalCorrupt
from cluster_agent.metrics import AgentPage
from cluster_agent.transport_grpc import BadEndpoint, GrpcTransport, TlsFiles

FAILED, BAD_CONFIG, BAD_JOURNAL, BAD_DISK = 1, 2, 3, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one agent; the exit code."""
    try:
        config = from_arguments(sys.argv[1:] if argv is None else argv)
        transport = GrpcTransport(config.endpoints, _tls(config), learns=not config.fixed_endpoints)
        boot_id = config.boot_id_file.read_text(encoding="ascii").strip()
    except (BadConfig, BadEndpoint) as error:
        sys.stderr.write(f"cluster_agent: {error}\n")
        return BAD_CONFIG
    except OSError as error:
        sys.stderr.write(f"cluster_agent: the boot id cannot be read: {error}\n")
        return BAD_CONFIG
    logs.set_up(config.log_format, config.log_level, {"cluster": config.cluster})
    log = logging.getLogger("baton.agent")
    collector.tune()
    try:
        asyncio.run(_serve(config, transport, boot_id))
    except JournalCorrupt as error:
        log.error("The journal is damaged.", extra={"cause": str(error)})
        return BAD_JOURNAL
    except DiskFailure as error:
        log.error("The disk does not serve.", extra={"cause": str(error)})
        return BAD_DISK
    except Exception:
        log.exception("The agent failed.")
        return FAILED
    return 0


def _tls(config: AgentConfig) -> TlsFiles | None:
    tls = config.tls
    return None if tls is None else TlsFiles(tls.ca, tls.certificate, tls.key, tls.server_name)


async def _serve(config: AgentConfig, transport: GrpcTransport, boot_id: str) -> None:
    clock = SystemClock()
    disk = RealDisk(config.directory)
    tally, carrier, guard = Tally(), GrpcCarrier(transport), config.directory / "guard"
    shelf = Shelf(guard, config.directory / "carried")
    courier = Courier(carrier, clock, tally)
    fetcher = Fetcher(shelf, Cache(shelf.cache, courier, tally, config.cache_bytes), courier)
    inner = ProcessExecutor(guard, clock)
    executor = Carrying(inner, shelf, fetcher, courier, clock, tally, cluster_uid=lambda: agent.cluster_uid)
    agent = Agent(config, clock, SystemEntropy(), transport, executor, disk, boot_id=boot_id)
    page = AgentPage(config, agent, executor, clock, tally)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: agent.stop(drain=config.drain_on_term))
    loop.add_signal_handler(signal.SIGINT, agent.stop)
    await page.start()
    try:
        await agent.run()
    finally:
        await page.close()
        await carrier.close()


if __name__ == "__main__":
    sys.exit(main())
