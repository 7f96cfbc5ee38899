"""A federation of several replicas in one event loop: real gRPC on loopback, one shared state, faults on demand.

It keeps the promises of the API that a client relies on (request ids, paging, numbered events, errors with `applied`), and
nothing of how the real one keeps them. Tests use it where they must choose the very moment at which an answer is lost.
"""

# ruff: noqa: N802 - the methods' names are the protocol's
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_status import rpc_status

from baton import errors, validate
from baton.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
)
from tests import backup_file

MESSAGE_BYTES = 4 * 1024 * 1024


@dataclass
class Record:
    run: run_pb2.Run
    tasks: list[run_pb2.TaskStatus]
    events: list[run_pb2.RunEvent] = field(default_factory=list)
    log: bytes = b""


class State:
    """What all replicas share."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.by_request: dict[str, str] = {}
        self.requests: list[Any] = []
        self.clusters = {
            name: cluster_pb2.Cluster(
                name=f"clusters/{name}",
                health=cluster_pb2.CLUSTER_HEALTH_READY,
                admission=cluster_pb2.CLUSTER_ADMISSION_OPEN,
            )
            for name in ("eu", "us")
        }
        self.changed = asyncio.Condition()
        self.backup = backup_file.backup(backup_file.batch(1_700_000_000.0))

    async def create(self, request: run_pb2.CreateRunRequest) -> run_pb2.Run:
        self.requests.append(request)
        if request.request_id in self.by_request:
            return self.records[self.by_request[request.request_id]].run
        found = validate.request_violations(request, time.time())
        if found:
            fields = [errors.FieldViolation(each.field, each.message) for each in found]
            raise errors.InvalidField("the graph is refused", field_violations=fields)
        name = f"namespaces/{request.namespace}/runs/{request.run_id or 'r' + request.request_id[-8:]}"
        if name in self.records:
            raise errors.NameTaken(f"{name} is taken")
        run = run_pb2.Run(name=name, uid=request.request_id, state=run_pb2.RUN_STATE_RUNNING, labels=request.labels)
        run.create_time.GetCurrentTime()
        run.deadline_time.CopyFrom(request.deadline_time)
        run.task_count = len(request.spec.tasks)
        tasks = [
            run_pb2.TaskStatus(id=task.id, index=index, parents=task.parents, state=run_pb2.TASK_STATE_READY)
            for index, task in enumerate(request.spec.tasks)
        ]
        self.records[name] = Record(run, tasks)
        self.by_request[request.request_id] = name
        outcome = request.labels.get("outcome", "SUCCEEDED")
        if outcome != "HANG":
            await self.play(name, outcome)
        return run

    async def emit(self, name: str, kind: str, *changes: run_pb2.TaskChange, state: str = "") -> None:
        record = self.records[name]
        if state:
            record.run.state = run_pb2.RunState.Value(f"RUN_STATE_{state}")
            record.run.finish_time.GetCurrentTime()
        record.run.event_number += 1
        event = run_pb2.RunEvent(number=record.run.event_number, state=record.run.state, changes=changes, kind=kind)
        event.time.GetCurrentTime()
        record.events.append(event)
        async with self.changed:
            self.changed.notify_all()

    async def play(self, name: str, outcome: str) -> None:
        """All tasks succeed, the first after a move; then the run ends with `outcome`."""
        record = self.records[name]
        for task in record.tasks:
            clusters = ["eu", "us"] if task.index == 0 else ["us"]
            for n, cluster in enumerate(clusters, 1):
                attempt = task.attempts.add(n=n, cluster=cluster, fence=f"1.{n}", state=run_pb2.ATTEMPT_STATE_SUCCEEDED)
                for stamp in (attempt.place_time, attempt.start_time, attempt.finish_time):
                    stamp.GetCurrentTime()
                if n < len(clusters):
                    attempt.state = run_pb2.ATTEMPT_STATE_LOST
                    attempt.evidence = run_pb2.EVIDENCE_TIMED
                    attempt.refused_results = 1
                change = run_pb2.TaskChange(
                    index=task.index, id=task.id, state=run_pb2.TASK_STATE_RUNNING, attempt=n, cluster=cluster
                )
                await self.emit(name, "started", change)
            task.state, task.accepted_results, task.result = (
                run_pb2.TASK_STATE_SUCCEEDED,
                1,
                f"result of {task.id}".encode(),
            )
            change = run_pb2.TaskChange(index=task.index, id=task.id, state=task.state)
            await self.emit(name, "finished", change)
        record.log = b"line\n" * 10
        await self.emit(name, "finished", state=outcome)

    def record(self, name: str) -> Record:
        if name not in self.records:
            raise errors.NotFound(f"there is no run {name}")
        return self.records[name]


@dataclass
class Fault:
    """What one call meets: `error` before or after it took effect, silence after it, or a bare status."""

    error: errors.BatonError | None = None
    code: grpc.StatusCode | None = None
    after: bool = False
    silent: bool = False


class Replica(
    run_pb2_grpc.RunServiceServicer, cluster_pb2_grpc.ClusterServiceServicer, admin_pb2_grpc.AdminServiceServicer
):
    """One server. `faults[method]` are met by the next calls of it, in order; `calls` counts what came."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.faults: dict[str, list[Fault]] = {}
        self.calls: list[str] = []
        self.cut_watch_after = 0
        self.mute_watch = False
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0) -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.so_reuseport", 0)])
        run_pb2_grpc.add_RunServiceServicer_to_server(self, server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(self, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{bound}"
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server:
            await self._server.stop(0)
            self._server = None

    async def called(self, method: str, times: int = 1) -> None:
        """Waits until a method was called so often."""
        async with self.state.changed:
            await self.state.changed.wait_for(lambda: self.calls.count(method) >= times)

    async def _answer(self, method: str, context: Any, effect: Callable[[], Any]) -> Any:
        self.calls.append(method)
        async with self.state.changed:
            self.state.changed.notify_all()
        fault = self.faults[method].pop(0) if self.faults.get(method) else Fault()
        answer = None
        try:
            if fault.error and not fault.after:
                raise fault.error
            if fault.code and not fault.after:
                await context.abort(fault.code, "cut before")
            answer = effect()
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if fault.silent:
                await asyncio.sleep(3600)
            if fault.error:
                raise fault.error
            if fault.code:
                await context.abort(fault.code, "cut after")
        except errors.BatonError as error:
            await context.abort_with_status(rpc_status.to_status(errors.to_status(error)))
        return answer

    # --- runs

    async def CreateRun(self, request: Any, context: Any) -> Any:
        async def effect() -> Any:
            return run_pb2.CreateRunResponse(run=await self.state.create(request))

        return await self._answer("CreateRun", context, effect)

    async def CreateRunInPieces(self, request_iterator: Any, context: Any) -> Any:
        async def effect() -> Any:
            whole, last = run_pb2.CreateRunRequest(), False
            async for piece in request_iterator:
                last = piece.last
                if piece.HasField("request"):
                    whole.CopyFrom(piece.request)
                whole.spec.tasks.extend(piece.tasks)
            assert last
            return run_pb2.CreateRunInPiecesResponse(run=await self.state.create(whole))

        return await self._answer("CreateRunInPieces", context, effect)

    async def GetRun(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "GetRun", context, lambda: run_pb2.GetRunResponse(run=self.state.record(request.name).run)
        )

    async def ListRuns(self, request: Any, context: Any) -> Any:
        def effect() -> Any:
            prefix = f"namespaces/{request.namespace}/"
            runs = [each.run for name, each in sorted(self.state.records.items()) if name.startswith(prefix)]
            first, page = int(request.page_token or 0), 2
            more = str(first + page) if first + page < len(runs) else ""
            return run_pb2.ListRunsResponse(runs=runs[first : first + page], next_page_token=more)

        return await self._answer("ListRuns", context, effect)

    async def CancelRun(self, request: Any, context: Any) -> Any:
        async def effect() -> Any:
            record = self.state.record(request.name)
            if record.run.state == run_pb2.RUN_STATE_RUNNING:
                await self.state.emit(request.name, "cancel", state="CANCELLED")
            elif record.run.state != run_pb2.RUN_STATE_CANCELLED:
                raise errors.WrongState(f"{request.name} is final")
            return run_pb2.CancelRunResponse(run=record.run)

        return await self._answer("CancelRun", context, effect)

    async def ListTasks(self, request: Any, context: Any) -> Any:
        def effect() -> Any:
            tasks = self.state.record(request.run).tasks
            first = int(request.page_token or 0)
            more = str(first + 500) if first + 500 < len(tasks) else ""
            return run_pb2.ListTasksResponse(tasks=tasks[first : first + 500], next_page_token=more)

        return await self._answer("ListTasks", context, effect)

    async def GetTask(self, request: Any, context: Any) -> Any:
        def effect() -> Any:
            run, _, task = request.name.partition("/tasks/")
            for each in self.state.record(run).tasks:
                if each.id == task:
                    return run_pb2.GetTaskResponse(task=each)
            raise errors.NotFound(f"there is no task {request.name}")

        return await self._answer("GetTask", context, effect)

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._answer("WatchRun", context, lambda: self.state.record(request.name))
        record = self.state.record(request.name)
        yield run_pb2.WatchRunResponse(run=record.run)
        if self.mute_watch:
            await asyncio.sleep(3600)
        # One event earlier than asked for: a client must drop what it has.
        at, sent = max(0, request.after_event - 1), 0
        while True:
            for event in record.events[at:]:
                yield run_pb2.WatchRunResponse(events=[event])
                at, sent = at + 1, sent + 1
                if self.cut_watch_after and sent >= self.cut_watch_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            if record.run.state > run_pb2.RUN_STATE_CANCELLING:
                yield run_pb2.WatchRunResponse(run=record.run)
                return
            async with self.state.changed:
                while len(record.events) <= at:
                    await self.state.changed.wait()

    async def FollowLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._answer("FollowLogs", context, lambda: None)
        run = request.task.partition("/tasks/")[0]
        log = self.state.record(run).log
        at = max(0, request.offset - 2)  # overlaps: a client must cut it
        while at < len(log):
            yield run_pb2.FollowLogsResponse(offset=at, data=log[at : at + 7], attempt=request.attempt or 2)
            at += 7
            if self.cut_watch_after and at < len(log):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    # --- clusters and operators

    async def ListClusters(self, request: Any, context: Any) -> Any:
        clusters = self.state.clusters.values()
        return await self._answer("ListClusters", context, lambda: cluster_pb2.ListClustersResponse(clusters=clusters))

    async def GetCluster(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "GetCluster", context, lambda: cluster_pb2.GetClusterResponse(cluster=self._cluster(request))
        )

    def _cluster(self, request: Any, admission: int = 0) -> cluster_pb2.Cluster:
        found = self.state.clusters.get(request.name.partition("/")[2])
        if found is None:
            raise errors.NotFound(f"there is no {request.name}")
        if admission:
            found.admission = cluster_pb2.ClusterAdmission.ValueType(admission)
        return found

    async def CordonCluster(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "Cordon", context, lambda: cluster_pb2.CordonClusterResponse(cluster=self._cluster(request, 2))
        )

    async def UncordonCluster(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "Uncordon", context, lambda: cluster_pb2.UncordonClusterResponse(cluster=self._cluster(request, 1))
        )

    async def DrainCluster(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "Drain", context, lambda: cluster_pb2.DrainClusterResponse(cluster=self._cluster(request, 3))
        )

    async def ListReplicas(self, request: Any, context: Any) -> Any:
        replicas = [admin_pb2.Replica(id="r1", address=self.address, shards=33)]
        return await self._answer("ListReplicas", context, lambda: admin_pb2.ListReplicasResponse(replicas=replicas))

    async def ListShards(self, request: Any, context: Any) -> Any:
        shards = [admin_pb2.Shard(id="00", replica="r1", preferred="r1")]
        return await self._answer(
            "ListShards", context, lambda: admin_pb2.ListShardsResponse(shards=shards, incarnation=1)
        )

    async def ListNamespaces(self, request: Any, context: Any) -> Any:
        spaces = [admin_pb2.Namespace(name="default", weight=1)]
        return await self._answer(
            "ListNamespaces", context, lambda: admin_pb2.ListNamespacesResponse(namespaces=spaces)
        )

    async def PutNamespace(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "PutNamespace", context, lambda: admin_pb2.PutNamespaceResponse(namespace=request.namespace)
        )

    async def ConfirmRestored(self, request: Any, context: Any) -> Any:
        return await self._answer(
            "ConfirmRestored", context, lambda: admin_pb2.ConfirmRestoredResponse(incarnation=3 if request.now else 2)
        )

    async def Backup(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._answer("Backup", context, lambda: None)
        for at in range(0, len(self.state.backup), 3):
            yield admin_pb2.BackupResponse(data=self.state.backup[at : at + 3])
