"""`baton cordon`, `uncordon`, `drain`: what an operator does to a cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import click

from baton.cli import completion, render, session
from baton.client import AsyncClient
from baton.contexts import Context
from baton.v1 import cluster_pb2


def _change(
    name: str, to: Context, as_json: bool, change: Callable[[AsyncClient, str], Awaitable[cluster_pb2.Cluster]]
) -> None:
    full = str(session.cluster_name(name))
    cluster = session.ask(to, lambda client: change(client, full))
    admission = render.word(cluster_pb2.ClusterAdmission, cluster.admission, "CLUSTER_ADMISSION_")
    if as_json:
        render.echo_data(render.plain(cluster), "json")
    else:
        click.echo(f"{cluster.name} {admission}")


@click.command()
@click.argument("cluster", shell_complete=completion.complete_clusters)
@session.json_output
@session.connected
def cordon(cluster: str, as_json: bool, to: Context) -> None:
    """Give a cluster no new work; what runs there goes on.

    \b
    Example:
      baton cordon eu
    """
    _change(cluster, to, as_json, lambda client, name: client.cordon_cluster(name))


@click.command()
@click.argument("cluster", shell_complete=completion.complete_clusters)
@session.json_output
@session.connected
def uncordon(cluster: str, as_json: bool, to: Context) -> None:
    """Let a cluster take work again.

    \b
    Example:
      baton uncordon eu
    """
    _change(cluster, to, as_json, lambda client, name: client.uncordon_cluster(name))


@click.command()
@click.argument("cluster", shell_complete=completion.complete_clusters)
@session.json_output
@session.connected
def drain(cluster: str, as_json: bool, to: Context) -> None:
    """Give a cluster no new work, stop gracefully what runs there and place it elsewhere.

    \b
    Example:
      baton drain eu
    """
    _change(cluster, to, as_json, lambda client, name: client.drain_cluster(name))
