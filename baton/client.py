"""The client: everything a user may ask of a federation, from asyncio.

    async with AsyncClient() as client:                    # the current context, as the command line
        run = await client.create_run(spec, deadline=time_of_the_deadline)
        async for message in client.watch_run(run.name):
            ...

Theory: a client is where the promises meet a network that breaks. It knows several replicas and any of them will do
(PROTOCOL O5); each mutation gets its `request_id` here, once, and keeps it over all tries (O8); failures come out as
`baton.errors`, with `applied` saying whether repeating by hand is safe (J6). Answers are the messages of `baton.v1`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from google.protobuf.timestamp_pb2 import Timestamp

from baton import client_results, client_streams, contexts, names, requestid
from baton.client_artifacts import Artifacts
from baton.client_call import TRY_SECONDS, Answer, Caller, Endpoint, Tls, full_name
from baton.client_streams import FINAL_STATES
from baton.clock import Clock, Entropy, SystemClock, SystemEntropy
from baton.errors import InvalidField
from baton.v1 import admin_pb2, cluster_pb2, graph_pb2, run_pb2, trace_pb2

__all__ = ["FINAL_STATES", "AsyncClient", "Tls"]

CALL_SECONDS = 10.0
"""Deadline of a call unless the client was given another: longer than a replica's lease (5 s) plus its take-over."""

PIECES_SECONDS = 60.0
"""Least deadline of a graph that goes in pieces: a million tasks are some 100 MB to send, check and commit."""

TRACE_SECONDS = 60.0
"""Deadline of a trace, half of it for one try: the largest has 80,000 spans, some 40 MB."""

PATIENCE_SECONDS = 60.0
"""How long a stream looks for a replica before it gives up; longer than the store may be away in good health."""

LARGE_BYTES = 2 * 1024 * 1024
"""Requests above this go in pieces: half of what the server takes in one message, so framing never decides."""

PIECE_BYTES = 1024 * 1024
"""Bytes of tasks in one piece."""

PAGE = 1000
"""Items asked for per page: the server's maximum."""


class AsyncClient:
    """A federation's client. Names are full (`namespaces/default/runs/r1`) or short ones of its namespace (run `r1`, task `r1/t`,
    cluster `eu`), as on the command line; all failures are BatonError."""

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
        """`endpoints` are host:port of replicas, all equal, plain text only on loopback, else `tls`. Without any, those, the
        namespace and the certificates of `context` or of the current one, as the command line finds them; endpoints that are
        given without a context are asked as they are, and no file is read. `timeout`: deadline of each call, in seconds.

        Raises InvalidField or Denied for endpoints that cannot be used. Connects on the first call.
        """
        given = (endpoints,) if isinstance(endpoints, str) else endpoints
        if given is None or context:
            to = contexts.resolve(endpoints=given or (), context=context, namespace=namespace, env=os.environ)
            given, namespace, tls = to.endpoints, to.namespace, tls or tls_of(to)
        elif namespace and (problem := names.id_problem(namespace)):
            raise InvalidField(f"namespace {problem}")
        if not timeout > 0:
            raise InvalidField(f"timeout is {timeout!r}: give more than 0 seconds")
        self.namespace = namespace or names.DEFAULT_NAMESPACE
        """Where short names are looked up and runs are created, unless a call says otherwise."""
        self.clock = clock or SystemClock()
        self._entropy = entropy or SystemEntropy()
        self._timeout = timeout
        self._caller = Caller(given, tls=tls, clock=self.clock, entropy=self._entropy)
        self.artifacts = Artifacts(self._caller, self.namespace)
        """Files that tasks made, and code archives: see `baton.client_artifacts`."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; calls under way fail."""
        await self._caller.close()

    def new_request_id(self) -> str:
        """A request id, for callers that keep it over restarts of their own and pass it as `request_id`."""
        return requestid.new(self.clock, self._entropy)

    async def _call(self, send: Callable[[Endpoint, float], Awaitable[Answer]]) -> Answer:
        return await self._caller.call(send, timeout=self._timeout, try_seconds=TRY_SECONDS)

    # --- runs ----------------------------------------------------------------------------------------------------

    async def create_run(
        self,
        spec: graph_pb2.GraphSpec | None = None,
        *,
        deadline: float,
        graph: str = "",
        graph_version: int = 0,
        namespace: str = "",
        run_id: str = "",
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> run_pb2.Run:
        """Creates a run of `spec` or of a stored `graph`. `deadline` is absolute, in seconds since the epoch. `namespace`: the
        client's, unless another is given. Code over 64 KiB is stored first (`artifacts.store_codes`).

        Raises InvalidField (fields named), NameTaken, Infeasible, LimitExceeded, QuotaExceeded, Unreachable.
        """
        space = namespace or self.namespace
        request = run_pb2.CreateRunRequest(
            request_id=request_id or self.new_request_id(),
            namespace=space,
            run_id=run_id,
            deadline_time=_timestamp(deadline),
            spec=spec and await self.artifacts.store_codes(space, spec),
            graph=graph and full_name("graph", graph, space),
            graph_version=graph_version,
            priority=priority,
            labels=labels,
            annotations=annotations,
        )
        if request.ByteSize() > LARGE_BYTES:
            return await self._create_in_pieces(request)
        answer = await self._call(lambda to, s: to.runs.CreateRun(request, timeout=s))
        return answer.run

    async def _create_in_pieces(self, request: run_pb2.CreateRunRequest) -> run_pb2.Run:
        head = run_pb2.CreateRunRequest()
        head.CopyFrom(request)
        head.spec.ClearField("tasks")

        async def send(to: Endpoint, seconds: float) -> run_pb2.CreateRunInPiecesResponse:
            return await to.runs.CreateRunInPieces(_pieces(head, request.spec.tasks), timeout=seconds)

        timeout = max(self._timeout, PIECES_SECONDS)
        return (await self._caller.call(send, timeout=timeout, try_seconds=timeout)).run

    async def get_run(self, name: str) -> run_pb2.Run:
        """Reads a run. Raises NotFound."""
        request = run_pb2.GetRunRequest(name=full_name("run", name, self.namespace))
        answer = await self._call(lambda to, s: to.runs.GetRun(request, timeout=s))
        return answer.run

    async def list_runs(
        self,
        namespace: str = "",
        *,
        states: Iterable[run_pb2.RunState.ValueType] = (),
        labels: Mapping[str, str] | None = None,
    ) -> AsyncIterator[run_pb2.Run]:
        """All runs of a namespace (the client's) in one of the states that carry the labels; page by page."""
        space = namespace or self.namespace
        request = run_pb2.ListRunsRequest(namespace=space, page_size=PAGE, states=list(states), labels=labels)
        while True:
            page = await self._call(lambda to, s: to.runs.ListRuns(request, timeout=s))
            for run in page.runs:
                yield run
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel_run(self, name: str, *, reason: str = "", request_id: str = "") -> run_pb2.Run:
        """Asks a run to stop. Raises NotFound, WrongState (it is final otherwise)."""
        full = full_name("run", name, self.namespace)
        request = run_pb2.CancelRunRequest(request_id=request_id or self.new_request_id(), name=full, reason=reason)
        answer = await self._call(lambda to, s: to.runs.CancelRun(request, timeout=s))
        return answer.run

    async def list_tasks(
        self, run: str, *, states: Iterable[run_pb2.TaskState.ValueType] = ()
    ) -> AsyncIterator[run_pb2.TaskStatus]:
        """All tasks of a run in one of the states, in order of index; page by page. Raises NotFound."""
        full = full_name("run", run, self.namespace)
        request = run_pb2.ListTasksRequest(run=full, page_size=PAGE, states=list(states))
        while True:
            page = await self._call(lambda to, s: to.runs.ListTasks(request, timeout=s))
            for task in page.tasks:
                yield task
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_task(self, name: str) -> run_pb2.TaskStatus:
        """Reads a task with its attempts and its result. Raises NotFound."""
        request = run_pb2.GetTaskRequest(name=full_name("task", name, self.namespace))
        answer = await self._call(lambda to, s: to.runs.GetTask(request, timeout=s))
        return answer.task

    def watch_run(
        self, name: str, *, after_event: int = 0, patience: float = PATIENCE_SECONDS
    ) -> AsyncIterator[run_pb2.WatchRunResponse]:
        """The run's events after a number, each once, in order, over the death of replicas, until the run is final.

        Raises NotFound, WatchCompacted, and Unreachable after `patience` seconds without any replica.
        """
        full = full_name("run", name, self.namespace)
        return client_streams.watch_run(self._caller, full, after_event=after_event, patience=patience)

    async def wait_run(self, name: str, *, patience: float = PATIENCE_SECONDS) -> run_pb2.Run:
        """Waits until a run is final and reads it. Raises as watch_run."""
        run = await self.get_run(name)
        async for message in self.watch_run(name, after_event=run.event_number, patience=patience):
            if message.HasField("run"):
                run = message.run
        return run

    async def as_completed(self, run: str, *, patience: float = PATIENCE_SECONDS) -> AsyncIterator[run_pb2.TaskStatus]:
        """Each task of a run once, with its result, as soon as it is final; ends with the run. Raises as watch_run."""
        now = await self.get_run(run)
        watched = self.watch_run(run, after_event=now.event_number, patience=patience)
        async for task in client_results.as_completed(now, self.get_task, lambda: self.list_tasks(run), watched):
            yield task

    def follow_logs(
        self, task: str, *, attempt: int = 0, offset: int = 0, follow: bool = True, patience: float = PATIENCE_SECONDS
    ) -> AsyncIterator[run_pb2.FollowLogsResponse]:
        """An attempt's output from a byte offset, each byte once; `attempt` 0 is the newest. Raises NotFound."""
        full = full_name("task", task, self.namespace)
        return client_streams.follow_logs(
            self._caller, full, attempt=attempt, offset=offset, follow=follow, patience=patience
        )

    async def get_trace(self, run: str) -> list[trace_pb2.Span]:
        """All spans of a run's trace, live or finished: the root first. Raises NotFound."""
        request = trace_pb2.GetTraceRequest(run=full_name("run", run, self.namespace))

        async def send(to: Endpoint, seconds: float) -> list[trace_pb2.Span]:
            parts = to.traces.GetTrace(request, timeout=seconds)
            return [span async for part in parts for span in part.spans]

        return await self._caller.call(send, timeout=TRACE_SECONDS, try_seconds=TRACE_SECONDS / 2)

    # --- graphs --------------------------------------------------------------------------------------------------

    async def put_graph(
        self,
        graph_id: str,
        spec: graph_pb2.GraphSpec,
        *,
        namespace: str = "",
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        etag: str = "",
        request_id: str = "",
    ) -> graph_pb2.Graph:
        """Creates a graph in a namespace (the client's) or adds a version to it. Raises InvalidField, EtagMismatch."""
        space = namespace or self.namespace
        request = graph_pb2.PutGraphRequest(
            request_id=request_id or self.new_request_id(),
            namespace=space,
            graph_id=graph_id,
            spec=await self.artifacts.store_codes(space, spec),
            labels=labels,
            annotations=annotations,
            etag=etag,
        )
        answer = await self._call(lambda to, s: to.graphs.PutGraph(request, timeout=s))
        return answer.graph

    async def get_graph(self, name: str, version: int = 0) -> graph_pb2.Graph:
        """Reads a version of a graph, 0 for the newest. Raises NotFound."""
        request = graph_pb2.GetGraphRequest(name=full_name("graph", name, self.namespace), version=version)
        answer = await self._call(lambda to, s: to.graphs.GetGraph(request, timeout=s))
        return answer.graph

    # --- clusters ------------------------------------------------------------------------------------------------

    async def list_clusters(self) -> AsyncIterator[cluster_pb2.Cluster]:
        """All clusters, in order of name; page by page."""
        request = cluster_pb2.ListClustersRequest(page_size=PAGE)
        while True:
            page = await self._call(lambda to, s: to.clusters.ListClusters(request, timeout=s))
            for cluster in page.clusters:
                yield cluster
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_cluster(self, name: str) -> cluster_pb2.Cluster:
        """Reads a cluster. Raises NotFound."""
        request = cluster_pb2.GetClusterRequest(name=full_name("cluster", name, self.namespace))
        answer = await self._call(lambda to, s: to.clusters.GetCluster(request, timeout=s))
        return answer.cluster

    async def cordon_cluster(self, name: str, *, request_id: str = "") -> cluster_pb2.Cluster:
        """No new work there; what runs goes on. Raises NotFound."""
        full = full_name("cluster", name, self.namespace)
        request = cluster_pb2.CordonClusterRequest(request_id=request_id or self.new_request_id(), name=full)
        answer = await self._call(lambda to, s: to.clusters.CordonCluster(request, timeout=s))
        return answer.cluster

    async def uncordon_cluster(self, name: str, *, request_id: str = "") -> cluster_pb2.Cluster:
        """Takes work again. Raises NotFound."""
        full = full_name("cluster", name, self.namespace)
        request = cluster_pb2.UncordonClusterRequest(request_id=request_id or self.new_request_id(), name=full)
        answer = await self._call(lambda to, s: to.clusters.UncordonCluster(request, timeout=s))
        return answer.cluster

    async def drain_cluster(self, name: str, *, request_id: str = "") -> cluster_pb2.Cluster:
        """No new work there; what runs is stopped gracefully and placed elsewhere. Raises NotFound."""
        full = full_name("cluster", name, self.namespace)
        request = cluster_pb2.DrainClusterRequest(request_id=request_id or self.new_request_id(), name=full)
        answer = await self._call(lambda to, s: to.clusters.DrainCluster(request, timeout=s))
        return answer.cluster

    # --- operators -----------------------------------------------------------------------------------------------

    async def list_replicas(self) -> list[admin_pb2.Replica]:
        """All registered replicas, in order of id."""
        request = admin_pb2.ListReplicasRequest()
        answer = await self._call(lambda to, s: to.admin.ListReplicas(request, timeout=s))
        return list(answer.replicas)

    async def list_shards(self) -> admin_pb2.ListShardsResponse:
        """All shards with their owners, the incarnation, and whether a restore is suspected."""
        request = admin_pb2.ListShardsRequest()
        return await self._call(lambda to, s: to.admin.ListShards(request, timeout=s))

    async def list_namespaces(self) -> list[admin_pb2.Namespace]:
        """All namespaces."""
        request = admin_pb2.ListNamespacesRequest()
        answer = await self._call(lambda to, s: to.admin.ListNamespaces(request, timeout=s))
        return list(answer.namespaces)

    async def put_namespace(self, namespace: admin_pb2.Namespace, *, request_id: str = "") -> admin_pb2.Namespace:
        """Creates or changes a namespace. Raises InvalidField, EtagMismatch."""
        request = admin_pb2.PutNamespaceRequest(request_id=request_id or self.new_request_id(), namespace=namespace)
        answer = await self._call(lambda to, s: to.admin.PutNamespace(request, timeout=s))
        return answer.namespace

    async def confirm_restored(self, *, now: bool = False, request_id: str = "") -> int:
        """Says that etcd was restored on purpose (PROTOCOL J12); the new incarnation. Raises WrongState, with `retry_after`, while
        work from after the backup may still run; `now` does not wait for its end: it may overlap with its repetition."""
        request = admin_pb2.ConfirmRestoredRequest(request_id=request_id or self.new_request_id(), now=now)
        answer = await self._call(lambda to, s: to.admin.ConfirmRestored(request, timeout=s))
        return answer.incarnation

    def backup(self) -> AsyncIterator[bytes]:
        """A backup of the store, piece by piece, from one replica: a broken one is begun again by the caller."""
        return client_streams.backup(self._caller)


def tls_of(to: contexts.Context) -> Tls | None:
    """The certificates of a context; None: plain text."""
    return Tls(to.ca, to.certificate, to.key) if to.ca or to.certificate or to.key else None


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    try:
        stamp.FromMilliseconds(round(seconds * 1000))
    except (TypeError, ValueError, OverflowError):
        raise InvalidField(
            f"deadline: {seconds!r} is no moment: give seconds since the epoch, such as time.time() + 300"
        ) from None
    return stamp


async def _pieces(
    head: run_pb2.CreateRunRequest, tasks: Sequence[graph_pb2.Task]
) -> AsyncIterator[run_pb2.CreateRunInPiecesRequest]:
    """The request, then its tasks in pieces of about 1 MiB."""
    yield run_pb2.CreateRunInPiecesRequest(request=head)
    piece, size = run_pb2.CreateRunInPiecesRequest(), 0
    for task in tasks:
        piece.tasks.append(task)
        size += task.ByteSize()
        if size >= PIECE_BYTES:
            yield piece
            piece, size = run_pb2.CreateRunInPiecesRequest(), 0
    piece.last = True
    yield piece
