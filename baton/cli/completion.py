"""`baton completion`: scripts for shells, and the names they complete: runs, tasks and clusters of the federation.

Theory. The command tree completes itself (click asks it, plug-ins included), so the script is a few lines that call `baton` at
each TAB. Names come from the federation that the same flags would reach, and only if it answers at once: whoever presses TAB waits
for nothing, and an error in the middle of a line helps nobody, so every failure means "no names".
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from baton import contexts
from baton.cli import session
from baton.client import AsyncClient
from baton.contexts import Context
from baton.errors import BatonError
from baton.time_limits import time_limit

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_BATON_COMPLETE"
"""Environment variable by which the script asks `baton`; click derives it from the command's name."""

PATIENCE_SECONDS = 0.7
"""For names from the federation. Longer is felt at every TAB; shorter than a call over a slow line, and there are never any."""

PATIENCE_VARIABLE = "BATON_COMPLETION_SECONDS"
"""Environment variable with another patience, for slow lines; 0 asks nobody."""

MOST = 200
"""Names offered. Nobody reads more, and a federation may have a million runs."""

Names = Callable[[AsyncClient, Context, str], AsyncIterator[str]]


async def _run_names(client: AsyncClient, to: Context, _typed: str) -> AsyncIterator[str]:
    async for run in client.list_runs(to.namespace):
        yield run.name.rpartition("/")[2]


async def _task_names(client: AsyncClient, to: Context, typed: str) -> AsyncIterator[str]:
    run, slash, _ = typed.partition("/")
    if not slash:
        async for name in _run_names(client, to, typed):
            yield f"{name}/"
        return
    async for task in client.list_tasks(f"namespaces/{to.namespace}/runs/{run}"):
        yield f"{run}/{task.id}"


async def _cluster_names(client: AsyncClient, _to: Context, _typed: str) -> AsyncIterator[str]:
    async for cluster in client.list_clusters():
        yield cluster.name.rpartition("/")[2]


def _completer(names: Names) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _known(names, ctx, incomplete)]

    return complete


def _known(names: Names, ctx: click.Context, typed: str) -> list[str]:
    """Names that begin as typed; none if there is no federation, or it is slow."""
    flags = {**ctx.find_root().params, **{key: value for key, value in ctx.params.items() if value}}

    async def ask() -> list[str]:
        to = contexts.resolve(
            endpoints=flags.get("endpoint") or (),
            context=flags.get("context") or "",
            namespace=flags.get("namespace") or "",
            env=os.environ,
        )
        found: list[str] = []
        patience = float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE_SECONDS)
        async with session.open_client(to) as client, time_limit(patience):
            async for name in names(client, to, typed):
                if name.startswith(typed):
                    found.append(name)
                if len(found) >= MOST:
                    break
        return found

    try:
        return asyncio.run(ask())
    except (BatonError, TimeoutError, OSError, ValueError):
        return []


complete_runs = _completer(_run_names)
complete_tasks = _completer(_task_names)
complete_clusters = _completer(_cluster_names)


def complete_things(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of `baton get WHAT NAME`: what WHAT is about."""
    by_kind = {"run": complete_runs, "cluster": complete_clusters, "task": complete_tasks, "tasks": complete_runs}
    what = str(ctx.params.get("what", ""))
    found = by_kind.get(what) or by_kind.get(what.removesuffix("s"))
    return found(ctx, param, incomplete) if found else []


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: commands, flags, names of runs, tasks and clusters.

    Names are asked for at each TAB and wait 0.7 s at most (BATON_COMPLETION_SECONDS; 0 asks nobody).

    \b
    Example:
      eval "$(baton completion bash)"                                     # in ~/.bashrc
      eval "$(baton completion zsh)"                                      # in ~/.zshrc, after compinit
      baton completion fish > ~/.config/fish/completions/baton.fish
    """
    kind: Any = get_completion_class(shell)
    maker = kind(ctx.find_root().command, {}, "baton", VARIABLE)
    # `source()` would run bash to learn its version; whoever asks for a script has the shell it is for.
    click.echo(maker.source_template % maker.source_vars())
