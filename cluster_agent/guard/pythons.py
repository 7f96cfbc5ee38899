"""Warm Python workers as the guard holds them: spawned as workloads, lent to one attempt at a time.

Theory: a worker *is* a workload (keeper, cgroup, PID namespace, pidfd), so whatever ends a workload ends it, with the same
proof of death (G1, G4). Lending it to an attempt means that the workload bears the attempt's request from then on, and
the attempt's timers act on it. A worker serves one environment: tenant, requirements, code and limits. When a task is over
the worker goes back to the idle ones only if nothing of the task is left: no process beside the worker itself, no
thread, no order to end. Else it is killed, and the attempt's end is told when it is dead (contract 7: a workload leaves
nothing behind). A worker that dies costs the one attempt it was lent to. There is no prefetch, so G5 has nothing to say.

python/venvs/{hash}/   one virtual environment per set of requirements, made by the worker that needs it first
python/code/{sha256}.zip, python/code/{sha256}/   packed code, and unpacked
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster_agent.executors.base import AttemptKey, Cause, Exited, Limits, Phase, PythonCall, StartRequest
from cluster_agent.executors.wording import signal_name
from cluster_agent.guard import host, proctree
from cluster_agent.guard.keeper import dropped_marker
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import for_pip
from cluster_agent.guard.workload import Spawner, Workload, bury_keeper

SCRIPT = Path(__file__).with_name("python_worker.py")

IDLE_SECONDS = 60.0
"""An idle worker lives so long. Smaller: a graph with pauses starts cold; larger: memory nobody reserved stays taken."""

MAX_IDLE = max(2, os.cpu_count() or 1)
"""Idle workers kept, of all environments: no more can be busy at once for long. More would only hold memory."""

HANG_UP_SECONDS = 1.0
"""From the end of a worker's socket to its own end. Killed sooner, its exit code would be lost with its keeper; later, a
function that closed all descriptors would hold its attempt for ever."""

CODE_SECONDS = 86_400.0
"""Unused packed code stays for a day; the agent sends it again every hour (executors.process.CODE_SECONDS)."""

MAX_ANSWER = 1 << 20
"""Bytes of an answer: head and result. The worker holds results to the attempt's limit; this is only our buffer."""

Kind = tuple[str, tuple[str, ...], str, Limits]


@dataclass(slots=True)
class Worker:
    """One worker process. `workload` bears the request of the attempt it is lent to, or was lent to last."""

    kind: Kind
    name: str
    workload: Workload
    control: socket.socket
    keeper_ticks: int
    busy: bool = True
    idle_since: float = 0.0
    answer: Answer | None = None
    """How its attempt ended, told only when the worker is dead."""
    hung_up: float | None = None
    """When its socket ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A message of a worker: `head` as python_worker writes it."""

    head: dict[str, Any]
    result: bytes

    @property
    def ready(self) -> bool:
        """Not an end: the environment is made, the function is about to be called."""
        return "ready" in self.head


class Pythons:
    """All workers of one guard."""

    def __init__(self, directory: Path, spawner: Spawner, places: Places) -> None:
        self._directory = directory / "python"
        self._spawner, self._places = spawner, places
        (self._directory / "code").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._workers: dict[int, Worker] = {}
        """By the pid of their keepers."""
        self._made = 0

    # --- code ------------------------------------------------------------------------------------------------------

    def keep_code(self, sha256: str, data: bytes) -> None:
        """Store packed code under its hash, whole or not at all. Raises OSError."""
        path = self._code(sha256)
        if path.exists():
            os.utime(path)
            return
        draft = path.with_suffix(".draft")
        draft.write_bytes(data)
        draft.rename(path)

    def refusal(self, request: StartRequest) -> str | None:
        """What a start lacks, of either kind; None when it is complete."""
        call = request.python
        if call is None:
            return None if request.argv and request.argv[0] else "argv is empty"
        if call.code and not self._code(call.code).exists():
            return f"its code {call.code[:12]} did not arrive"
        return None

    def sweep(self) -> None:
        """Every minute: packed code nobody used for long goes."""
        used = {worker.kind[2] for worker in self._workers.values()}
        for entry in os.scandir(self._directory / "code"):
            sha256 = entry.name.partition(".")[0]
            if sha256 not in used and host.wall() - entry.stat().st_mtime > CODE_SECONDS:
                self._places.throw_away(Path(entry.path))  # an archive, its folder, or a draft of it

    def _code(self, sha256: str) -> Path:
        return self._directory / "code" / f"{sha256}.zip"

    # --- lending ---------------------------------------------------------------------------------------------------

    def lend(self, request: StartRequest, call: PythonCall, paths: dict[str, str]) -> Worker:
        """Give the attempt to an idle worker of its environment, or to a new one. Raises OSError; then nothing has it."""
        kind = (call.tenant, call.requirements, call.code, replace(request.limits, output_bytes=0, result_bytes=0))
        worker = self._idle(kind)
        if worker is not None:
            try:
                self._hand_over(worker, request, call, paths)
            except OSError:  # it died a moment ago; its death is about to be seen
                self.kill(worker)
            else:
                return worker
        worker = self._spawn(kind, request, call)
        try:
            self._hand_over(worker, request, call, paths)
        except OSError:
            workload = worker.workload
            bury_keeper(workload.keeper_pid)  # nobody watches it yet
            self.bury(worker)
            workload.close()
            if workload.group is not None:
                workload.group.remove()
            raise
        return worker

    def of(self, workload: Workload) -> Worker | None:
        """The worker that this workload is; None for a process task's."""
        return self._workers.get(workload.keeper_pid)

    def receive(self, worker: Worker) -> Answer | None:
        """What it said; None if nothing (yet), or nothing about its present task. See `hung_up`."""
        try:
            data = worker.control.recv(MAX_ANSWER)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            worker.hung_up = worker.hung_up or host.boot()
            return None
        try:
            head, _, result = data.partition(b"\n")
            answer = Answer(json.loads(head), result)
        except ValueError:
            nonsense = {"key": worker.workload.name, "fault": "raised", "soiled": True}
            answer = Answer({**nonsense, "message": "something else than the worker wrote to its guard"}, b"")
        key = answer.head.get("key") or answer.head.get("ready")
        return answer if worker.busy and key == worker.workload.name else None

    def clean(self, worker: Worker, answer: Answer) -> bool:
        """Whether nothing of its task is left but the worker itself."""
        workload = worker.workload
        if answer.head.get("soiled") or (workload.group is not None and workload.group.breach()):
            return False
        alone = proctree.childless(workload.pid) and proctree.only_child(workload.keeper_pid, workload.pid)
        if alone is None:
            below = proctree.descendants(workload.keeper_pid, proctree.everything())
            return [process.pid for process in below] == [workload.pid]
        return alone

    def rest(self, worker: Worker, now: float) -> None:
        """Its task is over and left nothing: it waits for the next one."""
        worker.busy, worker.idle_since = False, now
        worker.workload.meter = None
        idle = [each for each in self._workers.values() if not each.busy]
        for oldest in sorted(idle, key=lambda each: each.idle_since)[: max(0, len(idle) - MAX_IDLE)]:
            self.kill(oldest)

    def kill(self, worker: Worker) -> None:
        """End it and all below it; its death is seen at its pidfd."""
        if not worker.busy:
            worker.idle_since = float("inf")  # never lent again, never expired twice
        worker.workload.phase = Phase.STOPPING
        namespace = self._spawner.isolation.namespace
        worker.workload.signal_keeper(signal.SIGKILL if namespace else signal.SIGUSR2)

    def dismiss(self, before: float) -> None:
        """End the workers that are idle since before that time."""
        for worker in self._workers.values():
            if not worker.busy and worker.idle_since < before:
                self.kill(worker)

    def bury(self, worker: Worker) -> None:
        """It is dead: forget it. Closes its socket, which the caller has stopped watching."""
        del self._workers[worker.workload.keeper_pid]
        worker.control.close()
        self._places.discard(worker.name)
        self._places.drop_log(worker.name)

    def tick(self, now: float) -> None:
        """Every 150 ms: logs kept to their caps (a worker writes into its attempt's log by itself), idle ones end."""
        for worker in self._workers.values():
            if worker.busy:
                self.cap_log(worker.workload.request)
            if worker.hung_up is not None and now - worker.hung_up > HANG_UP_SECONDS:
                self.kill(worker)
        self.dismiss(now - IDLE_SECONDS)

    def cap_log(self, request: StartRequest) -> None:
        """Cut the attempt's log to its cap."""
        cap = request.limits.output_bytes
        self._places.cap_log(request.key.text(), cap, dropped_marker(cap))

    @property
    def extra_load(self) -> int:
        """What workers hold beyond the live workloads, in workloads' worth of descriptors: the idle ones, and sockets."""
        count = len(self._workers)
        return sum(not worker.busy for worker in self._workers.values()) + (count + 3) // 4

    @property
    def keepers(self) -> set[int]:
        """Pids of all keepers."""
        return set(self._workers)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _idle(self, kind: Kind) -> Worker | None:
        """The idle worker used last: its caches are warm, and the others may expire."""
        fit = [
            worker
            for worker in self._workers.values()
            if not worker.busy and worker.kind == kind and worker.workload.phase is Phase.RUNNING
        ]
        return max(fit, key=lambda worker: worker.idle_since, default=None)

    def _hand_over(self, worker: Worker, request: StartRequest, call: PythonCall, paths: dict[str, str]) -> None:
        """Send the task; its log goes with it. Raises OSError."""
        key, workload = request.key.text(), worker.workload
        head = {
            "key": key,
            "function": call.function,
            "env": {**request.env, **paths},
            "inputs": paths["BATON_INPUTS"],
            "directory": str(self._places.work_of(key)),
            "result_bytes": request.limits.result_bytes,
        }
        log = self._places.open_log(key)
        try:
            message = json.dumps(head).encode() + b"\n" + call.args_json.encode()
            socket.send_fds(worker.control, [message], [log])
        finally:
            os.close(log)
        workload.request, workload.start_wall = request, host.wall()
        workload.meter = self._places.meter(request.key) if request.limits.disk_bytes else None
        workload.confirm_stop, workload.owed_term, workload.breach = False, False, ""
        worker.busy, worker.answer = True, None

    def _spawn(self, kind: Kind, request: StartRequest, call: PythonCall) -> Worker:
        key = AttemptKey("worker", self._made, 0, str(os.getpid()))
        self._made += 1
        name = key.text()
        plan = {
            "code": str(self._code(call.code)) if call.code else "",
            "code_dir": str(self._directory / "code" / call.code) if call.code else "",
            "requirements": list(call.requirements),
            "venvs": str(self._directory / "venvs"),
            "venv": str(self._directory / "venvs" / _environment_name(call.requirements)),
            "packages": str(Path(__file__).resolve().parents[2]),
        }
        env = {**for_pip(os.environ), "PATH": request.env.get("PATH", os.defpath)}
        argv = (sys.executable, "-I", "-u", str(SCRIPT), json.dumps(plan))
        own = replace(request, key=key, argv=argv, env=env, inputs=b"")
        self._places.work_of(name).mkdir(mode=0o700)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            workload = self._spawner.spawn(own, {}, sys.executable, theirs.fileno())
        except BaseException:
            ours.close()
            self._places.discard(name)
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        process = proctree.read(workload.keeper_pid)
        ticks = process.start_ticks if process is not None else 0
        worker = self._workers[workload.keeper_pid] = Worker(kind, name, workload, ours, ticks)
        return worker


def _environment_name(requirements: tuple[str, ...]) -> str:
    """The folder of a set of requirements under this interpreter."""
    words = "\n".join((sys.version, *sorted(requirements)))
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def ended(workload: Workload, answer: Answer, *, late: bool) -> Exited:
    """How an attempt ended whose worker answered."""
    fault, message = answer.head.get("fault", ""), str(answer.head.get("message", ""))
    cause, code = {"": (Cause.EXIT, 0), "raised": (Cause.EXIT, 1), "result": (Cause.RESULT, None)}.get(
        fault, (Cause.SPAWN, None)
    )
    return Exited(
        workload.request.key,
        cause,
        code,
        None,
        workload.start_wall,
        host.wall(),
        answer.result if not fault else b"",
        message,
        late,
    )


def died(exited: Exited) -> Exited:
    """How an attempt ended whose worker died without an answer; `exited` is what its process's end says."""
    if exited.cause is Cause.SPAWN:
        return replace(exited, message=f"no Python worker could be started: {exited.message}")
    if exited.cause is not Cause.EXIT:
        return exited
    how = f"exit code {exited.exit_code}" if exited.signal is None else signal_name(exited.signal)
    message = exited.message or f"the worker process ended in mid-task, by {how}"
    return replace(exited, cause=Cause.RESULT if exited.exit_code == 0 else Cause.EXIT, result=b"", message=message)
