"""`baton.Client`: the client for plain scripts, the same calls without `await`.

    with baton.Client() as client:                       # the current context, as the command line
        run = client.create_run(spec, deadline=time_of_the_deadline)
        for message in client.watch_run(run.name):
            ...

Theory: there is one client, `AsyncClient`; this is a face of it, so that both can never differ in what they retry, when they
give up or which errors they raise. All faces of a process share one event loop in a thread of its own, since gRPC wants one loop per
process; a call hands its coroutine over there and waits. Every wait ends by the deadline inside the coroutine; ctrl-C cancels it
there, too. It works beside a loop of the caller's (a notebook), which it blocks; a coroutine takes AsyncClient.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from baton import contexts
from baton.client import CALL_SECONDS, AsyncClient, Tls, tls_of
from baton.client_artifacts import Artifacts
from baton.clock import Clock, Entropy
from baton.errors import InvalidField

__all__ = ["Client", "drain", "wait"]

P = ParamSpec("P")
R = TypeVar("R")

END_SECONDS = 2.0
"""For streams and calls to be cancelled when the process ends. Longer holds up an exit; shorter cuts what only needs a moment."""

_END: Any = object()
"""What a step of a stream answers at its end: StopAsyncIteration cannot travel through a future."""


class _Loop:
    """The event loop that all clients of this process share, on a daemon thread: an exit of the script is not held up."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection of garbage in `running` may close a stream, which asks again
        self.ended = False
        """The process ends: nothing can be waited for any more."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def running(self) -> asyncio.AbstractEventLoop:
        """The loop, started on first use. Raises RuntimeError on its own thread, where a wait would never end."""
        with self._lock:
            if self.ended:
                raise RuntimeError("the process ends: its clients are closed")
            if self._thread is not None and threading.current_thread() is self._thread:
                raise RuntimeError("this is the client's own loop: await the method of AsyncClient instead")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="baton-client", daemon=True)
                self._thread.start()
            return self._loop

    def is_here(self) -> bool:
        """Whether the caller runs on the loop's thread."""
        return threading.current_thread() is self._thread

    def forget(self) -> None:
        """In the child of a fork: the thread is not there."""
        self._lock, self._loop, self._thread = threading.RLock(), None, None

    def end(self) -> None:
        """At the process's exit, while threads still run: what is under way is cancelled, what is open is closed."""
        with self._lock:
            loop, thread, self.ended = self._loop, self._thread, True
        if loop is None or thread is None:
            return
        tidying = asyncio.run_coroutine_threadsafe(_tidy(), loop)
        try:
            tidying.result(END_SECONDS)
        except (TimeoutError, concurrent.futures.CancelledError):
            pass
        loop.call_soon_threadsafe(loop.stop)
        thread.join(END_SECONDS)


async def _tidy() -> None:
    """Cancels everything on this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


_shared = _Loop()
os.register_at_fork(after_in_child=_shared.forget)
atexit.register(_shared.end)


def wait(work: Coroutine[Any, Any, R]) -> R:
    """Runs a coroutine on the clients' loop and waits for it; an interruption cancels it. Raises what it raises."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, _shared.running())
    except BaseException:
        work.close()
        raise
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def drain(stream: AsyncIterator[R]) -> Iterator[R]:
    """An asynchronous iterator as a plain one; leaving the loop early closes it."""

    async def step() -> R:
        return await anext(stream, _END)

    try:
        while (item := wait(step())) is not _END:
            yield item
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            if _shared.ended:
                pass  # closed with its loop
            elif _shared.is_here():  # the garbage collector ran there: waiting for itself would never end
                asyncio.ensure_future(close())  # noqa: RUF006 - nobody is left to hold it
            else:
                wait(close())


class _Face(Protocol):
    """What methods are looked up on: the asynchronous thing behind it."""

    @property
    def asyncio(self) -> Any: ...


class _Call(Generic[P, R]):
    """A method that waits for AsyncClient's of the same name, with its parameters, its answer and its words."""

    def __init__(self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: _Face, owner: type) -> Callable[P, R]: ...
    def __get__(self, client: _Face | None, owner: type) -> Self | Callable[P, R]:
        if client is None:
            return self

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return wait(self._method(client.asyncio, *args, **kwargs))

        return _dressed(call, self._method)


class _Stream(Generic[P, R]):
    """As _Call, for what answers with a stream."""

    def __init__(self, method: Callable[Concatenate[Any, P], AsyncIterator[R]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: _Face, owner: type) -> Callable[P, Iterator[R]]: ...
    def __get__(self, client: _Face | None, owner: type) -> Self | Callable[P, Iterator[R]]:
        if client is None:
            return self

        def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
            return drain(self._method(client.asyncio, *args, **kwargs))

        return _dressed(call, self._method)


def _dressed(call: Callable[P, R], method: Callable[..., Any]) -> Callable[P, R]:
    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class SyncArtifacts:
    """`Client.artifacts`: files that tasks made, and code archives. What each method means is said at `Artifacts` of the client."""

    def __init__(self, of: Artifacts) -> None:
        self.asyncio = of

    list = _Stream(Artifacts.list)
    download = _Call(Artifacts.download)
    save = _Call(Artifacts.save)
    read = _Call(Artifacts.read)
    has_code = _Call(Artifacts.has_code)
    put_code = _Call(Artifacts.put_code)


class Client:
    """A federation's client without asyncio. Names are full ones, or short ones of its namespace; all failures are BatonError.

    Safe to share between threads. What each method means and raises is said at AsyncClient's of the same name.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        context: str = "",
        namespace: str = "",
        tls: Tls | None = None,
        timeout: float = CALL_SECONDS,
        clock: Clock | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        """`endpoints` are host:port of replicas; without any, those of `context` or of the current one, as the command line
        finds them; what is not given of namespace and certificates is that context's. `timeout`: deadline of each call, in seconds.

        Raises InvalidField or Denied for endpoints that cannot be used. Connects on the first call.
        """
        given = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints or ())
        if endpoints is not None and not given:
            raise InvalidField("no endpoint is given: name at least one host:port, or none for the current context")
        to = contexts.resolve(endpoints=given, context=context, namespace=namespace, env=os.environ)
        self.asyncio = AsyncClient(
            to.endpoints,
            namespace=to.namespace,
            tls=tls or tls_of(to),
            timeout=timeout,
            clock=clock,
            entropy=entropy,
        )
        """The client whose face this is; its coroutines run on the clients' loop only."""
        self.namespace = to.namespace
        """Where short names are looked up and runs are created, unless a call says otherwise."""
        self.clock = self.asyncio.clock
        self.artifacts = SyncArtifacts(self.asyncio.artifacts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def new_request_id(self) -> str:
        """A request id, for callers that keep it over restarts of their own and pass it as `request_id`."""
        return self.asyncio.new_request_id()

    close = _Call(AsyncClient.close)

    create_run = _Call(AsyncClient.create_run)
    get_run = _Call(AsyncClient.get_run)
    list_runs = _Stream(AsyncClient.list_runs)
    cancel_run = _Call(AsyncClient.cancel_run)
    list_tasks = _Stream(AsyncClient.list_tasks)
    get_task = _Call(AsyncClient.get_task)
    watch_run = _Stream(AsyncClient.watch_run)
    wait_run = _Call(AsyncClient.wait_run)
    as_completed = _Stream(AsyncClient.as_completed)
    follow_logs = _Stream(AsyncClient.follow_logs)
    get_trace = _Call(AsyncClient.get_trace)

    put_graph = _Call(AsyncClient.put_graph)
    get_graph = _Call(AsyncClient.get_graph)

    list_clusters = _Stream(AsyncClient.list_clusters)
    get_cluster = _Call(AsyncClient.get_cluster)
    cordon_cluster = _Call(AsyncClient.cordon_cluster)
    uncordon_cluster = _Call(AsyncClient.uncordon_cluster)
    drain_cluster = _Call(AsyncClient.drain_cluster)

    list_replicas = _Call(AsyncClient.list_replicas)
    list_shards = _Call(AsyncClient.list_shards)
    list_namespaces = _Call(AsyncClient.list_namespaces)
    put_namespace = _Call(AsyncClient.put_namespace)
    confirm_restored = _Call(AsyncClient.confirm_restored)
    backup = _Stream(AsyncClient.backup)
