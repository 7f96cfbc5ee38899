"""The guard's rules: requests in, events out, one thread (PROTOCOL G1-G5, F3-F5, F8). The socket is in `server`.

Order is safety here. The clock is read before each request and first thing after a pause, and what the clock orders is
carried out before what the agent asks (G1). A start is on disk before its spawn (F4); a refusal or a stop is on disk,
fsynced, before anybody hears of it (F8). An exit is told when the last process of the attempt is gone, and kept until
`forget`.
"""

from __future__ import annotations

import base64
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from cluster_agent.core.lease import Action, Bounds, Leases, Order, Reason
from cluster_agent.executors.base import AttemptKey, Cause, Exited, Features, Phase, PythonCall, StartRequest
from cluster_agent.executors.wording import worded
from cluster_agent.guard import host, proctree, strays
from cluster_agent.guard.census import census, greeting
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.meters import tree_breach
from cluster_agent.guard.places import Places, checkpoint_name
from cluster_agent.guard.protocol import Message, code_from_wire, exit_from_wire, exit_to_wire, start_from_wire
from cluster_agent.guard.pythons import Pythons, Worker, died, ended
from cluster_agent.guard.workload import Spawner, Workload, needs_tree_polling, outcome, resolve

MAX_WORKLOADS = 4096
"""Running at once; fewer where the host permits fewer open files. Each takes FILES_PER_WORKLOAD and a keeper of about 2
MiB; more would meet the host's limits unannounced."""

FILES_PER_WORKLOAD = 4
SPARE_FILES = 64
"""Sockets, ledger, pipes of a spawn under way, a walk of the meters. Fewer, and a full guard could not take a call."""

FOREVER = 1e9
"""Time-out while a worker makes its environment, which it bounds itself (python_worker.INSTALL_SECONDS)."""

Emit = Callable[[Message], None]


class Guard:
    """State of one guard. `watch(fd, callback)` and `unwatch(fd)` are the server's."""

    def __init__(
        self,
        ledger: Ledger,
        places: Places,
        spawner: Spawner,
        emit: Emit,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        min_free_bytes: int,
    ) -> None:
        self._ledger, self._places, self._spawner = ledger, places, spawner
        self._emit, self._watch, self._unwatch = emit, watch, unwatch
        self._min_free_bytes = min_free_bytes
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(MAX_WORKLOADS, (files - SPARE_FILES) // FILES_PER_WORKLOAD))
        self._leases: Leases[str] = Leases()
        self._live: dict[str, Workload] = {}
        self._unwritten: dict[str, tuple[str | None, bool]] = {}
        """Tombstones a full disk would not take: key -> (refusal to tell then, stop to confirm then); barred till then."""
        self._busy_groups: list[Workload] = []
        self._unrecorded: dict[str, Message] = {}
        """Exits a full disk would not take; told already, written when there is room."""
        self._ending = False
        self._pythons = Pythons(places.directory, spawner, places)
        self.lost_before = False
        """An earlier guard died with work; told with the first hello."""

    # --- what the clock orders -------------------------------------------------------------------------------------

    def enforce(self, now: float) -> None:
        """Send what is due."""
        for order in self._leases.due(now):
            self._carry_out(order)

    def next_wakeup(self) -> float | None:
        """When `enforce` is needed next."""
        return self._leases.next_wakeup()

    def tick(self, now: float) -> None:
        """Every 100-200 ms: meters, retention, and what a full disk held up."""
        self._measure(now)
        self._pythons.tick(now)
        self._busy_groups = [w for w in self._busy_groups if w.group is not None and not w.group.remove()]
        if self._unwritten:
            self._write_tombstones(list(self._unwritten))
        for key in list(self._unrecorded):
            with suppress(OSError):
                self._ledger.exited(key, self._unrecorded[key])
                del self._unrecorded[key]
        self._places.empty_trash()
        if not self._spawner.isolation.namespace:
            strays.reap(self._ours())

    def sweep(self) -> None:
        """Every minute: retention, and the ledger's reserve."""
        self._places.sweep()
        self._pythons.sweep()
        self._places.sweep_checkpoints({checkpoint_name(w.request.key) for w in self._live.values()})
        with suppress(OSError):
            self._ledger.keep_reserve()

    # --- what the agent asks ---------------------------------------------------------------------------------------

    def hello(self, features: Features) -> Iterator[Message]:
        """The answer to a new connection: who we are and what we know (G3)."""
        lost_before, self.lost_before = self.lost_before, False
        entries = census(self._live, self._leases, self._ledger, self._unrecorded)
        return greeting(features, entries, lost_before=lost_before)

    def handle(self, message: Message, now: float) -> None:
        """One request but start batches (`starts`). Raises KeyError, TypeError or ValueError on nonsense."""
        match message["op"]:
            case "configure":
                self._leases.configure(float(message["fence"]), float(message["kill"]))
            case "renew":
                self._leases.renew(int(message["gen"]), float(message["sent"]), now)
            case "adopt":
                moved = [key for key in message["keys"] if self._leases.adopt(key, int(message["gen"]))]
                with suppress(OSError):  # only the census of a later guard would show the older generation
                    self._ledger.adopted(moved, int(message["gen"]))
            case "stop":
                self._stop([AttemptKey.parse(key).text() for key in message["keys"]], float(message["grace"]), now)
            case "forget":
                self._forget(message["keys"])
            case "log":
                self._tell_log(message)
            case "code":
                self._pythons.keep_code(*code_from_wire(message))
            case "kill_all":
                self.end_all(Reason.STOP, now, 0.0)
            case other:
                raise ValueError(f"unknown request {other!r}")

    def start(self, wire: Message, now: float) -> None:
        """Spawn one attempt, or refuse it for ever."""
        request = start_from_wire(wire)
        key = request.key.text()
        if key in self._live or key in self._unwritten:
            return
        refusal, paths = self._refusal(request, now), {}
        if refusal is None:
            try:
                paths = self._places.prepare(request.key, request.inputs)
                self._ledger.started(key, request.generation, host.wall())
            except OSError as error:
                self._places.discard(key)
                refusal = f"the executor's disk refused it: {error.strerror}"
        if refusal is not None:
            self._unwritten[key] = (refusal, False)
            self._write_tombstones([key])
            return
        try:
            if request.python is not None:
                self._lend(request, request.python, paths, now)
                return
            program = resolve(request.argv[0], request.env, self._places.work_of(key))
            workload = self._spawner.spawn(request, paths, program)
        except (OSError, ValueError) as error:
            if not self._spawner.isolation.namespace:
                strays.hunt(self._ours())  # a keeper that could not be supervised was killed
            wall = host.wall()
            self._exited(Exited(request.key, Cause.SPAWN, None, None, wall, wall, message=str(error)))
            return
        process = proctree.read(workload.keeper_pid)
        self._took(workload, now, process.start_ticks if process is not None else 0)
        self._listen(workload)

    def end_all(self, reason: Reason, now: float, grace_seconds: float) -> None:
        """End every workload; told by events."""
        for key in self._live:
            self._leases.cut(key, reason, now, grace_seconds)
        self._pythons.dismiss(float("inf"))
        self.enforce(now)

    def end(self, now: float, grace_seconds: float) -> None:
        """This guard was told to go: nothing starts any more, what runs ends as stopped."""
        self._ending = True
        self.end_all(Reason.STOP, now, grace_seconds)

    @property
    def idle(self) -> bool:
        """Nothing runs."""
        return not self._live and not self._pythons.keepers

    # --- inside ----------------------------------------------------------------------------------------------------

    def _refusal(self, request: StartRequest, now: float) -> str | None:
        if self._ledger.knows(request.key.text()):
            return "this attempt was started, refused or stopped before"
        if self._ending:
            return "the guard is ending"
        lease = self._leases.refusal(request.generation, now)
        if lease is not None:
            return lease
        if request.stop_at is not None and now >= request.stop_at:
            return "its deadline has passed"
        incomplete = self._pythons.refusal(request)
        if incomplete is not None:
            return incomplete
        if len(self._live) + self._pythons.extra_load >= self._most:
            return f"the guard runs {self._most} workloads, its limit"
        if (free := self._places.free_bytes()) < self._min_free_bytes:
            return f"the executor's disk is full: {free} bytes free, {self._min_free_bytes} needed"
        return None

    def _took(self, workload: Workload, now: float, keeper_ticks: int, timeout: float | None = None) -> None:
        """A keeper runs it: hold its timers."""
        key, request = workload.name, workload.request
        self._live[key] = workload
        seconds = timeout if timeout is not None else request.timeout_seconds
        grace, keep = request.grace_seconds, request.keep_at_fence
        self._leases.add(key, Bounds(request.generation, now, request.stop_at, seconds, grace, keep))
        with suppress(OSError):  # without the record only the keepers' lock proves its death to a later guard
            self._ledger.kept(key, workload.keeper_pid, keeper_ticks)

    def _listen(self, workload: Workload) -> None:
        self._watch(workload.status_fd, lambda: self._heard(workload))
        self._watch(workload.pidfd, lambda: self._buried(workload))

    def _lend(self, request: StartRequest, call: PythonCall, paths: dict[str, str], now: float) -> None:
        """Give it to a Python worker. Raises OSError, and then no worker has it."""
        worker = self._pythons.lend(request, call, paths)
        workload = worker.workload
        warm = workload.phase is Phase.RUNNING
        self._took(workload, now, worker.keeper_ticks, None if warm or not call.requirements else FOREVER)
        if warm:
            self._emit({"ev": "started", "key": workload.name, "pid": workload.pid, "wall": workload.start_wall})
        else:
            self._listen(workload)
            self._watch(worker.control.fileno(), lambda: self._answered(worker))

    def _answered(self, worker: Worker) -> None:
        """A worker spoke, or closed its socket."""
        answer, workload, now = self._pythons.receive(worker), worker.workload, host.boot()
        if worker.hung_up is not None:
            self._unwatch(worker.control.fileno())
        if answer is None or worker.answer is not None:
            return
        key = workload.name
        if answer.ready:
            self._leases.restart(key, now, workload.request.timeout_seconds)
        elif self._leases.reason(key) is None and self._pythons.clean(worker, answer):
            self._concluded(workload, ended(workload, answer, late=self._leases.remove(key, now)))
            self._pythons.rest(worker, now)
        else:
            worker.answer = answer
            self._pythons.kill(worker)

    def _heard(self, workload: Workload) -> None:
        pid = workload.hear()
        if workload.wait_status is not None or workload.failure:
            self._unwatch(workload.status_fd)
        if pid is not None:
            self._emit({"ev": "started", "key": workload.name, "pid": pid, "wall": workload.start_wall})
            if workload.owed_term:
                workload.signal_keeper(signal.SIGTERM)

    def _buried(self, workload: Workload) -> None:
        """The keeper is dead, and with it everything (see keeper.py)."""
        if os.waitpid(workload.keeper_pid, os.WNOHANG)[0] == 0:
            return  # a stale readiness: its descriptor number was used again within one poll
        self._unwatch(workload.pidfd)
        self._heard(workload)
        self._unwatch(workload.status_fd)
        worker = self._pythons.of(workload)
        if worker is not None:
            self._answered(worker)  # it may have answered right before it died
            self._unwatch(worker.control.fileno())
            self._pythons.bury(worker)
        if workload.wait_status is None:
            workload.salvage_output()
            if not self._spawner.isolation.namespace:
                strays.hunt(self._ours())
        if worker is None or worker.busy:
            reason = self._leases.reason(workload.name)
            late = self._leases.remove(workload.name, host.boot())
            if worker is not None and worker.answer is not None and reason is None:
                exited = ended(workload, worker.answer, late=late)
            else:
                exited = outcome(workload, reason, late, self._places)
                exited = exited if worker is None else died(exited)
            self._concluded(workload, exited)
        workload.close()
        if workload.group is not None and not workload.group.remove():
            self._busy_groups.append(workload)

    def _concluded(self, workload: Workload, exited: Exited) -> None:
        """The attempt is over, and nothing of it runs."""
        key = workload.name
        del self._live[key]
        if workload.request.python is not None:
            self._pythons.cap_log(workload.request)
        self._exited(worded(exited, workload.request))
        if workload.confirm_stop and key in self._unwritten:
            self._unwritten[key] = (None, True)
        elif workload.confirm_stop:
            self._emit({"ev": "stopped", "keys": [key]})

    def _exited(self, exited: Exited) -> None:
        key, wire = exited.key.text(), exit_to_wire(exited)
        self._places.finished(key)
        self._drop_checkpoint(exited.key, full=False)
        try:
            self._ledger.exited(key, wire)
        except OSError:
            self._unrecorded[key] = wire
        self._emit({"ev": "exited", "exit": wire})

    def _carry_out(self, order: Order[str]) -> None:
        workload = self._live.get(order.key)
        if workload is None:
            return
        first = workload.phase is not Phase.STOPPING
        if order.action is Action.KILL:
            namespace = self._spawner.isolation.namespace
            workload.signal_keeper(signal.SIGKILL if namespace else signal.SIGUSR2)
        elif workload.phase is Phase.STARTING:
            workload.owed_term = True
        elif first:
            workload.signal_keeper(signal.SIGTERM)
        workload.phase = Phase.STOPPING

    def _stop(self, keys: list[str], grace: float, now: float) -> None:
        for key in keys:
            refusal = self._unwritten.get(key, (None, False))[0]
            self._unwritten[key] = (refusal, key not in self._live)
            if key in self._live:
                self._leases.cut(key, Reason.STOP, now, grace)
                self._live[key].confirm_stop = True
        self._write_tombstones(keys)
        self.enforce(now)

    def _write_tombstones(self, keys: list[str]) -> None:
        """One fsync for all; what waits for it is told after it, or stays barred until a later tick succeeds."""
        try:
            self._ledger.tombstone(keys)
        except OSError:
            return
        stopped = []
        for key in keys:
            refusal, confirm = self._unwritten.pop(key, (None, False))
            if refusal is not None:
                self._emit({"ev": "refused", "key": key, "reason": refusal})
            if confirm:
                stopped.append(key)
        if stopped:
            self._emit({"ev": "stopped", "keys": stopped})

    def _forget(self, keys: Iterable[str]) -> None:
        done = [key for key in keys if key not in self._live]
        for exited in (exit_from_wire(self._ledger.exits[key][1]) for key in done if key in self._ledger.exits):
            if exited.succeeded:
                self._drop_checkpoint(exited.key, full=True)
        with suppress(OSError):  # the agent forgets again after its next census
            self._ledger.forget(done)
        for key in done:
            self._unrecorded.pop(key, None)
            self._places.discard(key)

    def _drop_checkpoint(self, key: AttemptKey, *, full: bool) -> None:
        """Unless another attempt of the same task runs here."""
        others = (workload.request.key for workload in self._live.values())
        if not any(other.task == key.task and other.run_uid == key.run_uid for other in others):
            self._places.drop_checkpoint(key, full=full)

    def _tell_log(self, message: Message) -> None:
        key = AttemptKey.parse(message["key"]).text()
        data, at_end = self._places.read_log(key, int(message["offset"]), int(message["limit"]))
        text, complete = base64.b64encode(data).decode(), at_end and key not in self._live
        self._emit({"ev": "log", "id": message["id"], "data": text, "complete": complete})

    def _measure(self, now: float) -> None:
        """Find workloads over limits that the kernel does not hold for us."""
        found = self._spawner.groups.found
        polled = [w for w in self._live.values() if needs_tree_polling(w.request.limits, found)]
        processes = proctree.everything() if polled else {}
        for workload in polled:
            self._over(workload, tree_breach(workload.request.limits, workload.keeper_pid, processes), now)
        for workload in list(self._live.values()):
            limit = workload.request.limits.disk_bytes
            if workload.meter is not None and workload.meter.step() > limit:
                used = workload.meter.used_bytes
                self._over(workload, f"it uses {used} bytes of disk, over its limit of {limit} bytes", now)

    def _over(self, workload: Workload, breach: str, now: float) -> None:
        if breach and self._leases.reason(workload.name) is None:
            workload.breach = breach
            self._leases.cut(workload.name, Reason.LIMIT, now, 0.0)
            self.enforce(now)

    def _ours(self) -> set[int]:
        """Children of the guard that are no strays."""
        return {w.keeper_pid for w in self._live.values()} | self._pythons.keepers | {self._places.janitor}
