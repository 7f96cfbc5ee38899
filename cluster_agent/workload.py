"""Between the core's values and the Executor port: what a workload is given, and what its end means."""

from __future__ import annotations

from cluster_agent.core import events as on
from cluster_agent.core.commands import StartOrder
from cluster_agent.core.model import AttemptKey, Ended, Outcome, WorkSpec
from cluster_agent.executors import base
from cluster_agent.executors.base import (
    Cause,
    CensusEntry,
    ExecutorEvent,
    Exited,
    Limits,
    Phase,
    Refused,
    Saved,
    Started,
    StartRequest,
    Stopped,
)

DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
"""What a task finds its program on unless its own environment says otherwise. Nothing of the agent's is inherited."""

_OUTCOMES = {
    Cause.STOP: Outcome.STOPPED,
    Cause.FENCE: Outcome.FENCED,
    Cause.DEADLINE: Outcome.DEADLINE,
    Cause.TIMEOUT: Outcome.TIMED_OUT,
    Cause.LOST: Outcome.LOST,
    Cause.CARRIAGE: Outcome.LOST,
}


def outer(key: AttemptKey) -> base.AttemptKey:
    """The executor port's name for an attempt."""
    return base.AttemptKey(key.run_uid, key.task, key.n, key.nonce)


def inner(key: base.AttemptKey) -> AttemptKey:
    """The core's name for an attempt."""
    return AttemptKey(key.run_uid, key.task, key.n, key.nonce)


def start_request(order: StartOrder, cluster: str) -> StartRequest:
    """All an executor needs. The environment carries the fence (F1) and the deadline (D1)."""
    spec, need = order.spec, order.spec.demand
    env = {
        "PATH": DEFAULT_PATH,
        **spec.env,
        "BATON_RUN": spec.run,
        "BATON_TASK": spec.task_id,
        "BATON_ATTEMPT": str(order.key.n),
        "BATON_FENCE": spec.fence,
        "BATON_CLUSTER": cluster,
    }
    if spec.deadline_wall_ms:
        env["BATON_DEADLINE"] = f"{spec.deadline_wall_ms / 1000:.3f}"
    if spec.traceparent:
        env["TRACEPARENT"] = spec.traceparent
    return StartRequest(
        key=outer(order.key),
        generation=order.generation,
        argv=spec.argv,
        env=env,
        limits=Limits(need.cpu_millis, need.memory_bytes, spec.processes, need.disk_bytes),
        stop_at=order.stop_boot,
        timeout_seconds=spec.timeout_seconds,
        grace_seconds=spec.grace_seconds,
        keep_at_fence=spec.keep_at_fence,
        inputs=spec.inputs,
        python=_python_call(spec),
        artifacts=spec.artifacts,
        checkpoint=spec.checkpoint,
        slots=order.slots,
    )


def _python_call(spec: WorkSpec) -> base.PythonCall | None:
    """The call, with the namespace of its run (`namespaces/{namespace}/runs/{run}`) as its tenant."""
    call = spec.python
    if call is None:
        return None
    tenant = spec.run.removeprefix("namespaces/").partition("/")[0]
    extended = spec.demand.extended
    return base.PythonCall(call.function, call.args_json, call.requirements, call.code, call.code_zip, tenant, extended)


def work_event(event: ExecutorEvent) -> on.Event | None:
    """What the core is told; None for the news that the guard died: the end of the events says the same."""
    match event:
        case Started(key, _, at_wall):
            return on.WorkStarted(inner(key), round(at_wall * 1000))
        case Refused(key, reason):
            return on.WorkRefused(inner(key), reason)
        case Exited():
            return _work_ended(event)
        case Saved(key, checkpoint):
            return on.WorkSaved(inner(key), checkpoint)
        case Stopped(key):
            return on.WorkStopped(inner(key))
    return None


def census(entries: list[CensusEntry]) -> on.Census:
    """What the executor holds. A tombstoned key has no process: what the journal thinks of it decides (F4)."""
    held = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
    running = {inner(entry.key): entry.generation for entry in entries if entry.phase in held}
    return on.Census(running, tuple(_work_ended(entry.exited) for entry in entries if entry.exited is not None))


def _work_ended(exited: Exited) -> on.WorkEnded:
    return on.WorkEnded(inner(exited.key), _ended(exited), exited.end_wall - exited.start_wall)


def _ended(exited: Exited) -> Ended:
    outcome = _OUTCOMES.get(exited.cause, Outcome.FAILED)
    if exited.succeeded:
        outcome = Outcome.SUCCEEDED
    return Ended(
        outcome,
        exited.exit_code,
        exited.result,
        exited.message,
        round(exited.start_wall * 1000),
        round(exited.end_wall * 1000),
        exited.late,
        exited.artifacts,
    )
