"""Warm Python workers as the guard holds them: spawned as workloads, each with a line of calls that it serves one by one.

Theory: a worker *is* a workload (keeper, cgroup, PID namespace, pidfd), so whatever ends a workload ends it, with the same
proof of death (G1, G4). The call at the head of its line is what it runs: the workload bears that call's request, and the call's
timers act on it. A worker serves one environment: tenant, requirements, code and limits. When a call is over the next in
line is the head; a worker that has none rests, if nothing of the call is left: no process beside the worker itself, no thread,
no order to end. Else it is killed, and the attempt's end is told when it is dead (contract 7: a workload leaves nothing behind).

**Prefetch and recall (G5).** At most `slots` calls of one environment run at once; what is more waits, first here and then in the
pipes of busy workers, so that a worker goes on without asking. A pipe is a SEQPACKET socket, and the guard keeps a copy of the
end that the worker reads. To recall is to receive there: the kernel gives a message to one receiver only, so a call that came back
was never begun and may go to another worker, and this also of a worker that hangs, is stopped or is dead. A call
that did not come back was begun. Either way nobody has to be believed. A worker that dies or hangs costs the one attempt at its head.

python/venvs/{hash}/   one virtual environment per set of requirements, made by the worker that needs it first
python/code/{sha256}.zip, python/code/{sha256}/   packed code, and unpacked
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cluster_agent.executors.base import AttemptKey, Phase, PythonCall, StartRequest
from cluster_agent.guard import host, proctree
from cluster_agent.guard.answers import MAX_ANSWER, Answer, read_answer
from cluster_agent.guard.calls import Call, Kind, Pool, Worker
from cluster_agent.guard.codes import Codes
from cluster_agent.guard.keeper import dropped_marker
from cluster_agent.guard.places import Places
from cluster_agent.guard.protocol import for_pip
from cluster_agent.guard.workload import Spawner, Workload

SCRIPT = Path(__file__).with_name("python_worker.py")

IDLE_SECONDS = 60.0
"""An idle worker lives so long. Smaller: a graph with pauses starts cold; larger: memory nobody reserved stays taken."""

MAX_IDLE = max(2, os.cpu_count() or 1)
"""Idle workers kept, of all environments: no more can be busy at once for long. More would only hold memory."""

HANG_UP_SECONDS = 1.0
"""From the end of a worker's socket to its own end. Killed sooner, its exit code would be lost with its keeper; later, a
function that closed all descriptors would hold its attempt for ever."""

STALL_SECONDS = 0.1
"""A call that runs this long keeps no others behind it: they are recalled and go to whoever is free. The agent prefetches a
few milliseconds of work; smaller would recall at every hiccup of the host, larger holds up work that could run."""

DEEP = 12
"""Calls in line that keep a worker busy for a millisecond, at 0.1 ms for the shortest. Fewer: it would run dry while answers
gather."""

LINE = 64
"""Calls in one pipe. The agent's allowance is what counts (core/lanes.py); this only keeps the socket's buffer (about 200 KiB,
some 250 small messages) from filling."""

MAX_WAITING = 4096
"""Calls that wait here, of all environments. The agent prefetches a hundred; a peer that sends without end meets this bound."""

MAX_MESSAGE = 190_000
"""Bytes of one call: what fits into the socket's default buffer. Arguments and environment may have 64 and 32 KiB."""

HELLO = b"h"
"""First message in each pipe: it carries the socket for answers, and is no call."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Pythons:
    """All workers of one guard, and all calls that are not over."""

    def __init__(self, directory: Path, spawner: Spawner, places: Places) -> None:
        self._directory = directory / "python"
        self._spawner, self._places = spawner, places
        self.codes = Codes(self._directory, places)
        self.calls: dict[str, Call] = {}
        """By their keys."""
        self._pools: dict[Kind, Pool] = {}
        self._dirty: dict[Pool, None] = {}
        """Pools that may have calls to deal out."""
        self._workers: dict[int, Worker] = {}
        """By the pid of their keepers."""
        self._made = 0

    # --- calls in ----------------------------------------------------------------------------------------------------

    def refusal(self, request: StartRequest) -> str | None:
        """What a start lacks, of either kind; None when it is complete."""
        call = request.python
        if call is None:
            return None if request.argv and request.argv[0] else "argv is empty"
        if call.code and not self.codes.has(call.code):
            return f"its code {call.code[:12]} did not arrive"
        if len(self.calls) >= MAX_WAITING:
            return f"the guard holds {MAX_WAITING} calls, its limit"
        return None

    def admit(self, request: StartRequest, python: PythonCall) -> Call:
        """Take a call; `deal` gives it to a worker. Raises OSError when it can never be given to one."""
        limits = request.limits
        kept = replace(limits, output_bytes=0, result_bytes=0)
        kind = (python.tenant, python.requirements, python.code, kept, python.extended)
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = Pool(kind)
        name = request.key.text()
        call = Call(request, python, pool, name, self._message(name, request, python))
        pool.slots = request.slots or max(pool.slots, pool.busy + len(pool.waiting) + 1)
        pool.waiting.append(call)
        self.calls[name] = call
        self._dirty[pool] = None
        return call

    def widen(self, name: str, slots: int) -> None:
        """So many calls may run at once in this one's environment."""
        call = self.calls.get(name)
        if call is not None:
            call.pool.slots = slots
            self._dirty[call.pool] = None

    def deal(self, now: float) -> tuple[list[Call], list[tuple[Call, OSError]]]:
        """Give waiting calls to workers; which of them began, and which could not be given to any."""
        begun: list[Call] = []
        failed: list[tuple[Call, OSError]] = []
        dirty, self._dirty = self._dirty, {}
        for pool in dirty:
            while pool.waiting and pool.busy < pool.slots:
                call = pool.waiting.popleft()
                try:
                    worker = self._idle(pool)
                    if worker is not None:
                        self._put(worker, call)
                    else:
                        worker = self._spawn(pool, call)
                except OSError as error:  # also a call too large for the pipes of this host
                    del self.calls[call.name]
                    failed.append((call, error))
                    continue
                self.take_up(worker, now)
                begun.append(call)
            self._prefetch(pool, now)
            if not pool.waiting and not pool.workers:
                self._pools.pop(pool.kind, None)
        return begun, failed

    def _prefetch(self, pool: Pool, now: float) -> None:
        """Put what waits into the pipes of busy workers, evenly; first come, first served within each."""
        while pool.waiting:
            open_lines = [
                worker
                for worker in pool.workers
                if 0 < len(worker.line) < LINE
                and worker.warm
                and worker.fit
                and now - worker.head_since < STALL_SECONDS
            ]
            if not open_lines:
                return
            worker = min(open_lines, key=lambda each: len(each.line))
            try:
                self._put(worker, pool.waiting[0])
            except OSError:  # large ones: the next answer makes room, or `deal` says that none ever will
                return
            pool.waiting.popleft()

    def _put(self, worker: Worker, call: Call) -> None:
        """Into its pipe. The guard holds both ends, so it cannot break. Raises OSError when there is no room in it."""
        worker.pipe.send(call.message)
        worker.line.append(call)
        call.worker = worker

    def take_up(self, worker: Worker, now: float) -> None:
        """The head of its line is a new one."""
        request, workload = worker.line[0].request, worker.workload
        workload.request, workload.start_wall = request, host.wall()
        workload.meter = self._places.meter(request.key) if request.limits.disk_bytes else None
        workload.owed_term, workload.breach = False, ""
        worker.answer, worker.head_since = None, now

    # --- calls out ---------------------------------------------------------------------------------------------------

    def receive(self, worker: Worker) -> Answer | None:
        """What it said; None if nothing (yet). See `hung_up`."""
        try:
            data = worker.control.recv(MAX_ANSWER)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            worker.hung_up = worker.hung_up or host.boot()
            return None
        return read_answer(data, worker.workload.name)

    def over(self, worker: Worker, now: float, *, bare: bool) -> Call | None:
        """The call at the head is over; the next one, which has begun, if there is one. `bare`: it left nothing."""
        call = worker.line.popleft()
        worker.bare = call.name if bare else ""
        del self.calls[call.name]
        worker.warm = True
        self._dirty[call.pool] = None
        if worker.line:
            self.take_up(worker, now)
            return worker.line[0]
        self.rest(worker, now)
        return None

    def rest(self, worker: Worker, now: float) -> None:
        """Its line is empty."""
        worker.idle_since = now
        worker.workload.meter = None
        if worker.retired:
            self.kill(worker)

    def trim(self) -> None:
        """More workers idle than are kept: the oldest end."""
        idle = [each for each in self._workers.values() if not each.line and each.fit]
        for oldest in sorted(idle, key=lambda each: each.idle_since)[: max(0, len(idle) - MAX_IDLE)]:
            self.kill(oldest)

    def recall(self, worker: Worker) -> None:
        """Take back what it did not receive; it waits here again, before what came later. What is left in its line it has
        received, and nothing else can follow: the caller must look whether the head is still the same (`Lines`)."""
        held = {call.name: call for call in worker.line}
        back = [held[name] for name in _unread(worker.unread) if name in held]
        for call in reversed(back):
            worker.line.remove(call)
            call.worker = None
            call.pool.waiting.appendleft(call)
        if back:
            self._dirty[worker.pool] = None

    def withdraw(self, call: Call) -> None:
        """It waits here, and shall not run."""
        call.pool.waiting.remove(call)
        del self.calls[call.name]

    def lose(self, call: Call) -> None:
        """It was in the line of a worker that is dead."""
        self.calls.pop(call.name, None)
        if call.worker is not None and call in call.worker.line:
            call.worker.line.remove(call)
        self._dirty[call.pool] = None

    # --- workers -----------------------------------------------------------------------------------------------------

    def of(self, workload: Workload) -> Worker | None:
        """The worker that this workload is; None for a process task's."""
        return self._workers.get(workload.keeper_pid)

    def kill(self, worker: Worker) -> None:
        """End it and all below it; its death is seen at its pidfd."""
        worker.workload.phase = Phase.STOPPING
        namespace = self._spawner.isolation.namespace
        worker.workload.signal_keeper(signal.SIGKILL if namespace else signal.SIGUSR2)

    def dismiss(self, before: float) -> None:
        """End the workers that are idle since before that time."""
        for worker in self._workers.values():
            if not worker.line and worker.fit and worker.idle_since < before:
                self.kill(worker)

    def bury(self, worker: Worker) -> None:
        """It is dead: forget it. Closes its sockets; the caller has stopped watching the one for answers."""
        del self._workers[worker.workload.keeper_pid]
        worker.pool.workers.remove(worker)
        self._dirty[worker.pool] = None
        for each in (worker.control, worker.pipe, worker.unread):
            each.close()
        for name in (worker.name, worker.bare):  # its own, and what its last call left it empty
            if name:
                self._places.discard(name)
                self._places.drop_log(name)

    def stalled(self, now: float) -> list[Worker]:
        """Workers whose head takes long, and which have others in line."""
        return [
            worker
            for worker in self._workers.values()
            if len(worker.line) > 1 and (worker.hung_up is not None or now - worker.head_since > STALL_SECONDS)
        ]

    def tick(self, now: float) -> None:
        """Every 150 ms: logs kept to their caps (a worker writes into its attempt's log by itself), lines kept moving, idle
        workers ended."""
        for worker in self._workers.values():
            if worker.line:
                self.cap_log(worker.workload.request)
            if worker.hung_up is not None and now - worker.hung_up > HANG_UP_SECONDS:
                self.kill(worker)
        self.dismiss(now - IDLE_SECONDS)
        self._dirty.update((pool, None) for pool in self._pools.values() if pool.waiting)

    def sweep(self) -> None:
        """Every minute: packed code nobody used for long goes."""
        self.codes.sweep({worker.pool.kind[2] for worker in self._workers.values()})

    def cap_log(self, request: StartRequest) -> None:
        """Cut the attempt's log to its cap."""
        cap = request.limits.output_bytes
        self._places.cap_log(request.key.text(), cap, dropped_marker(cap))

    @property
    def extra_load(self) -> int:
        """What workers hold beyond the live workloads, in workloads' worth of descriptors: the idle ones, and sockets."""
        count = len(self._workers)
        return sum(not worker.line for worker in self._workers.values()) + (3 * count + 3) // 4

    @property
    def deep(self) -> bool:
        """Calls run, and each of their workers has more of them than it ends in a millisecond."""
        lines = [len(worker.line) for worker in self._workers.values() if worker.line]
        return bool(lines) and min(lines) >= DEEP

    @property
    def keepers(self) -> set[int]:
        """Pids of all keepers."""
        return set(self._workers)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _idle(self, pool: Pool) -> Worker | None:
        """The idle worker used last: its caches are warm, and the others may expire."""
        fit = [each for each in pool.workers if not each.line and each.fit and each.workload.phase is Phase.RUNNING]
        return max(fit, key=lambda each: each.idle_since, default=None)

    def _message(self, name: str, request: StartRequest, python: PythonCall) -> bytes:
        """The call as the worker gets it. Raises OSError when it is too long for a pipe."""
        paths, args = self._places.paths(request.key), python.args_json.encode()
        head = {
            "key": name,
            "function": python.function,
            "env": {**request.env, **paths},
            "inputs": paths["BATON_INPUTS"],
            "directory": f"{self._places.work}/{name}",
            "checkpoint": paths["BATON_CHECKPOINT_DIR"],
            "artifacts": paths["BATON_ARTIFACTS_DIR"],
            "log": self._places.log_of(name),
            "result_bytes": request.limits.result_bytes,
            "args": len(args),
        }
        inputs = request.inputs if self._places.inlined(request.inputs) else b""
        message = b"%b\n%b%b" % (_encode(head).encode(), args, inputs)
        if len(message) > MAX_MESSAGE:
            words = f"arguments and environment have {len(message)} bytes together, over the limit of {MAX_MESSAGE}"
            raise OSError(errno.EMSGSIZE, words)
        return message

    def _spawn(self, pool: Pool, call: Call) -> Worker:
        """A new worker, which will find the call in its pipe. Raises OSError, and then nothing runs."""
        key = AttemptKey("worker", self._made, 0, str(os.getpid()))
        self._made += 1
        name, python = key.text(), call.python
        env = {**for_pip(os.environ), "PATH": call.request.env.get("PATH", os.defpath)}
        argv = (sys.executable, "-I", "-u", str(SCRIPT), _encode(self.codes.plan(python)))
        own = replace(call.request, key=key, argv=argv, env=env, inputs=b"")
        self._places.work_of(name).mkdir(mode=0o700)
        pipe, unread = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            socket.send_fds(pipe, [HELLO], [theirs.fileno()])
            pipe.setblocking(False)
            pipe.send(call.message)  # before anything runs: if it does not fit, nothing has to be ended
            workload = self._spawner.spawn(own, {}, sys.executable, unread.fileno())
        except BaseException:
            for each in (pipe, unread, control):
                each.close()
            self._places.discard(name)
            raise
        finally:
            theirs.close()
        control.setblocking(False)
        process = proctree.read(workload.keeper_pid)
        ticks = process.start_ticks if process is not None else 0
        worker = Worker(pool, name, workload, pipe, unread, control, ticks)
        self._workers[workload.keeper_pid] = worker
        pool.workers.append(worker)
        worker.line.append(call)
        call.worker = worker
        return worker


def _unread(pipe: socket.socket) -> Iterator[str]:
    """Take all messages out of a pipe; which calls they were. A living worker may take one, too, at any moment."""
    with suppress(BlockingIOError):
        while True:
            head, _, _ = pipe.recv(MAX_MESSAGE, socket.MSG_DONTWAIT).partition(b"\n")
            if head != HELLO:  # that one is left if it died before it was a Python
                yield str(json.loads(head)["key"])
