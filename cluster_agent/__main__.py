"""The agent's process: flags in, JSON lines on stderr, an exit code out (`--help` lists them)."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import traceback
from collections.abc import Sequence

from baton.clock import SystemClock, SystemEntropy
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig, BadConfig, from_arguments
from cluster_agent.disk import DiskFailure, RealDisk
from cluster_agent.executors.process import ProcessExecutor
from cluster_agent.journal import JournalCorrupt
from cluster_agent.metrics import AgentPage
from cluster_agent.transport_grpc import BadEndpoint, GrpcTransport, TlsFiles

FAILED, BAD_CONFIG, BAD_JOURNAL, BAD_DISK = 1, 2, 3, 4

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName"}


class JsonLines(logging.Formatter):
    """One object a line: a fixed sentence and its fields."""

    def __init__(self, cluster: str) -> None:
        super().__init__()
        self._cluster = cluster

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        extra = {key: value for key, value in vars(record).items() if key not in _PLAIN}
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "cluster": self._cluster,
            **extra,
        }
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(config.cluster))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    log = logging.getLogger("baton.agent")
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
    executor = ProcessExecutor(config.directory / "guard", clock)
    agent = Agent(config, clock, SystemEntropy(), transport, executor, disk, boot_id=boot_id)
    page = AgentPage(config, agent, executor, clock)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: agent.stop(drain=config.drain_on_term))
    loop.add_signal_handler(signal.SIGINT, agent.stop)
    await page.start()
    try:
        await agent.run()
    finally:
        await page.close()


if __name__ == "__main__":
    sys.exit(main())
