"""`baton doctor`: is everything there that a run needs, and if not, what to do.

Looks at this machine first (contexts, and what a local federation needs), then at the federation, unless none is named. Every
look has a deadline of seconds. What is well and what is not is said in `checks`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from baton import contexts
from baton.cli import checks, render, session
from baton.cli.checks import FAIL, OK, WARN, Check, Reached
from baton.client import AsyncClient, Tls
from baton.clock import SystemClock
from baton.contexts import Context
from baton.errors import BatonError

LOOK_SECONDS = 3.0
"""For one look at an endpoint: its first connection included, even over a slow line."""

_ETCD_FINDER = "lab.etcd_binary"
"""Module that knows which etcd a local federation would run; asked by name, since `baton` imports nothing of `lab`."""

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


@click.command()
@click.option("--server", is_flag=True, help="Look at the federation only; fail if none is named.")
@session.json_output
@session.connection_options
@click.pass_context
def doctor(
    ctx: click.Context, server: bool, as_json: bool, endpoint: tuple[str, ...], context: str, namespace: str
) -> None:
    """Check this machine and the federation; each line says ok, warn or fail, and what to do. Exit code 1 on fail.

    \b
    Example:
      baton doctor
      baton doctor --server --json
    """
    found = [] if server else list(_machine())
    outer = ctx.find_root().params
    try:
        to = contexts.resolve(
            endpoints=endpoint or outer.get("endpoint", ()),
            context=context or outer.get("context", ""),
            namespace=namespace or outer.get("namespace", ""),
            env=os.environ,
        )
    except BatonError as error:
        found.append(
            Check("context", FAIL if server else WARN, error.message, "baton local up, or --endpoint HOST:PORT")
        )
    else:
        found.append(Check("context", OK, f"{', '.join(to.endpoints)}, namespace {to.namespace}"))
        found += asyncio.run(_federation(to))
    if as_json:
        render.echo_data({"verdict": checks.worst(found), "checks": [asdict(check) for check in found]}, "json")
    else:
        _tell(found)
    raise click.exceptions.Exit(session.FAILED if checks.worst(found) == FAIL else session.SUCCEEDED)


def _tell(found: list[Check]) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        status = click.style(check.status.ljust(4), fg=_COLOURS[check.status])
        click.echo(f"{status}  {check.name.ljust(width)}  {session.clean(check.detail)}")
        if check.status != OK and check.fix:
            click.echo(f"{' ' * (width + 8)}fix: {check.fix}")


# --- this machine -----------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    number = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", OK, f"{number}, baton {session.own_version() or 'not installed'}")
    yield _etcd()


def _etcd() -> Check:
    """What `baton local up` would run."""
    try:
        finder: Any = importlib.import_module(_ETCD_FINDER)
    except ImportError as error:
        return Check("etcd", WARN, f"`baton local` is not installed: {error}", "needed only for a local federation")
    try:
        binary = finder.find_etcd()
    except finder.EtcdNotFound as error:
        return Check("etcd", WARN, str(error), "scripts/tools etcd; needed only for a local federation")
    told = f"{binary.etcd} {binary.version}"
    if binary.support is not finder.Support.SUPPORTED:
        return Check(
            "etcd", WARN, f"{told} has bugs that later releases fixed", "scripts/tools etcd builds a current one"
        )
    return Check("etcd", OK, told)


# --- the federation ---------------------------------------------------------------------------------------------------


async def _federation(to: Context) -> list[Check]:
    try:
        reached = await asyncio.gather(*(_reach(address, to) for address in to.endpoints))
    except BatonError as error:  # certificates that cannot be read, an address that is none
        return [Check("reachable", FAIL, error.message, "mend the context, or --endpoint")]
    found = list(checks.reachable(reached))
    if to.ca or to.certificate or to.key:
        found.append(await asyncio.to_thread(_certificate, to, next((each.address for each in reached), "")))
    else:
        found.append(checks.tls(certificates=False, days=None, problem=""))
    if not any(each.seconds is not None for each in reached):
        return found
    try:
        found += await _inside(to)
    except BatonError as error:
        found.append(Check("answers", FAIL, error.message, "look at the replicas' logs"))
    return found


async def _reach(address: str, to: Context) -> Reached:
    """Raises BatonError for what no network has to do with."""
    tls = Tls(to.ca, to.certificate, to.key) if to.ca or to.certificate or to.key else None
    clock = SystemClock()
    async with AsyncClient([address], tls=tls, timeout=LOOK_SECONDS) as client:
        begin = clock.boot()
        try:
            await client.list_shards()
        except BatonError as error:
            if error.reason in {"INVALID_FIELD", "DENIED"}:
                raise
            return Reached(address, None, error.message.partition(";")[0])
        return Reached(address, clock.boot() - begin)


async def _inside(to: Context) -> list[Check]:
    """What one replica tells of all. Raises BatonError."""
    async with session.open_client(to) as client:
        replicas, shards = await client.list_replicas(), await client.list_shards()
        clusters = [cluster async for cluster in client.list_clusters()]
    now = SystemClock().wall()
    return [
        checks.versions(session.own_version(), replicas),
        checks.feature_level(replicas),
        checks.clocks(clusters, now),
        checks.replicas(replicas),
        *checks.shards(shards),
        *checks.clusters(clusters),
    ]


def _certificate(to: Context, address: str) -> Check:
    """Shakes hands as the client does, and reads when the server's certificate ends."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        shake = ssl.create_default_context(cafile=to.ca or None)
        if to.certificate:
            shake.load_cert_chain(to.certificate, to.key or None)
        shake.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, int(port)), LOOK_SECONDS) as plain,
            shake.wrap_socket(plain, server_hostname=host) as secret,
        ):
            seen = secret.getpeercert() or {}
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        return checks.tls(certificates=True, days=None, problem=f"no handshake with {address}: {error}")
    ends = ssl.cert_time_to_seconds(str(seen["notAfter"]))
    return checks.tls(certificates=True, days=(ends - SystemClock().wall()) / 86400, problem="")
