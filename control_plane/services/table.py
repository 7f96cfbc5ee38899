"""The one table of public methods (see `methods`), and the internal calls beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from baton import names
from baton.v1 import admin_pb2, artifact_pb2, cluster_pb2, graph_pb2, run_pb2, trace_pb2
from control_plane.artifacts.gateway import Gateway
from control_plane.peers import Calls
from control_plane.services import admin, artifacts, clusters, graphs, logs, runs, trace, watch
from control_plane.services.admin import Admin, Confirm, Forgotten, Snapshot
from control_plane.services.artifact_list import ArtifactLists, check_list_artifacts
from control_plane.services.artifacts import Artifacts
from control_plane.services.clusters import Clusters
from control_plane.services.create import Creation
from control_plane.services.desk import Desk, shard_of_run
from control_plane.services.graphs import Graphs
from control_plane.services.logs import Logs
from control_plane.services.methods import Kind, Method
from control_plane.services.runs import Runs
from control_plane.services.trace import Traces
from control_plane.services.watch import Bells, Watches


class Services:
    """All services of one replica. `methods` is the table; `bells` listens to the controller; `logs` takes chunks;
    `traces` serves the web port too, `artifacts` the sweeper."""

    def __init__(
        self,
        desk: Desk,
        *,
        confirm_restored: Confirm,
        snapshot: Snapshot | None,
        forgotten: Forgotten,
        gateway: Gateway | None = None,
    ) -> None:
        self.bells = Bells()
        self.logs = Logs(desk)
        self.traces = Traces(desk)
        self._runs = Runs(desk)
        self.artifacts = Artifacts(desk, gateway)
        self._creation = Creation(desk, self.artifacts.missing_codes)
        self._admin = Admin(desk, confirm_restored, snapshot, forgotten)
        self.methods: Sequence[Method] = (
            *self._run_methods(Watches(desk, self.bells)),
            *_graph_methods(Graphs(desk)),
            *_cluster_methods(Clusters(desk)),
            *self._admin_methods(),
            _trace_method(self.traces),
            _list_artifacts_method(ArtifactLists(desk)),
            *_artifact_methods(self.artifacts),
        )

    def serve_peers(self, calls: Calls) -> None:
        """Register the internal calls."""
        for service in (self._runs, self._creation, self._admin, self.logs, self.traces, self.artifacts):
            service.serve_peers(calls)

    def _run_methods(self, watches: Watches) -> Sequence[Method]:
        def of_name(request: Any) -> str:
            return shard_of_run(names.parse_run(request.name))

        def of_task(request: Any) -> str:
            return shard_of_run(names.parse_task(request.name).parent)

        def of_run(request: Any) -> str:
            return shard_of_run(names.parse_run(request.run))

        creation, reads = self._creation, self._runs
        return (
            _method("RunService", "CreateRun", run_pb2, creation.create_run),
            _method("RunService", "CreateRunInPieces", run_pb2, creation.create_run_in_pieces, kind=Kind.STREAM_IN),
            _method("RunService", "GetRun", run_pb2, reads.get_run, route=of_name, validate=runs.check_name),
            _method("RunService", "ListRuns", run_pb2, reads.list_runs, validate=runs.check_list_runs),
            _method("RunService", "CancelRun", run_pb2, reads.cancel_run, route=of_name, validate=runs.check_cancel),
            _method("RunService", "ListTasks", run_pb2, reads.list_tasks, route=of_run, validate=runs.check_list_tasks),
            _method("RunService", "GetTask", run_pb2, reads.get_task, route=of_task, validate=runs.check_task),
            _method(
                "RunService",
                "WatchRun",
                run_pb2,
                watches.watch_run,
                route=of_name,
                validate=watch.check_watch,
                kind=Kind.STREAM_OUT,
                resume=watch.go_on,
            ),
            _method(
                "RunService",
                "FollowLogs",
                run_pb2,
                self.logs.follow_logs,
                validate=logs.check_logs,
                kind=Kind.STREAM_OUT,
            ),
        )

    def _admin_methods(self) -> Sequence[Method]:
        of = self._admin
        put = admin.shard_of_namespace
        return (
            _method("AdminService", "ListReplicas", admin_pb2, of.list_replicas),
            _method("AdminService", "ListShards", admin_pb2, of.list_shards),
            _method("AdminService", "PutNamespace", admin_pb2, of.put_namespace, route=put, validate=admin.check_put),
            _method("AdminService", "ListNamespaces", admin_pb2, of.list_namespaces),
            _method("AdminService", "Backup", admin_pb2, of.backup, kind=Kind.STREAM_OUT),
            _method("AdminService", "ConfirmRestored", admin_pb2, of.confirm_restored, validate=admin.check_confirm),
        )


def _graph_methods(of: Graphs) -> Sequence[Method]:
    by_request, by_name = graphs.shard_of_request, graphs.shard_of_name
    return (
        _method("GraphService", "PutGraph", graph_pb2, of.put_graph, route=by_request, validate=graphs.check_put),
        _method("GraphService", "GetGraph", graph_pb2, of.get_graph, route=by_name, validate=graphs.check_get),
        _method("GraphService", "ListGraphs", graph_pb2, of.list_graphs, route=by_request, validate=graphs.check_list),
    )


def _cluster_methods(of: Clusters) -> Sequence[Method]:
    change = clusters.check_change

    def method(name: str, handler: Any, validate: Any) -> Method:
        return _method("ClusterService", name, cluster_pb2, handler, route=clusters.at_fleet, validate=validate)

    return (
        method("ListClusters", of.list_clusters, clusters.check_list),
        method("GetCluster", of.get_cluster, clusters.check_get),
        method("CordonCluster", of.cordon_cluster, change),
        method("UncordonCluster", of.uncordon_cluster, change),
        method("DrainCluster", of.drain_cluster, change),
    )


def _trace_method(of: Traces) -> Method:
    return _method(
        "TraceService",
        "GetTrace",
        trace_pb2,
        of.get_trace,
        route=lambda request: shard_of_run(names.parse_run(request.run)),
        validate=trace.check_trace,
        kind=Kind.STREAM_OUT,
        resume=trace.go_on,
    )


def _list_artifacts_method(of: ArtifactLists) -> Method:
    return _method(
        "ArtifactService",
        "ListArtifacts",
        artifact_pb2,
        of.list_artifacts,
        route=lambda request: shard_of_run(names.parse_run(request.run)),
        validate=check_list_artifacts,
    )


def _artifact_methods(of: Artifacts) -> Sequence[Method]:
    """Content goes through the replica that is asked."""

    def method(name: str, handler: Any, **how: Any) -> Method:
        return _method("ArtifactService", name, artifact_pb2, handler, **how)

    return (
        method("PutArtifact", of.put_artifact, kind=Kind.STREAM_IN, agents=True),
        method("GetArtifact", of.get_artifact, kind=Kind.STREAM_OUT, agents=True, validate=artifacts.check_get),
        method("HasCode", of.has_code, validate=artifacts.check_has_code),
    )


def _method(service: str, name: str, module: Any, handler: Any, **how: Any) -> Method:
    """A method by the naming rule of our protos: NameRequest, NameResponse."""
    request: type[Message] = getattr(module, f"{name}Request")
    response: type[Message] = getattr(module, f"{name}Response")
    return Method(f"/baton.v1.{service}/{name}", request, response, handler, **how)
