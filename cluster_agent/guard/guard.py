"""The guard's rules: requests in, events out, one thread (PROTOCOL G1-G5, F3-F5, F8). The socket is in `server`, python calls in
`lines`.

Order is safety here. The clock is read before each request and first thing after a pause, and what the clock orders is
carried out before what the agent asks (G1). A start is on disk before its spawn (F4); a refusal or a stop is on disk,
fsynced, before anybody hears of it (F8). An exit is told when the last process of the attempt is gone, and kept until
`forget`.
"""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from cluster_agent.core.lease import Action, Bounds, Leases, Order, Reason
from cluster_agent.executors.base import AttemptKey, Cause, Exited, Features, Phase, StartRequest
from cluster_agent.executors.wording import worded
from cluster_agent.guard import host, proctree, strays
from cluster_agent.guard.census import census, greeting
from cluster_agent.guard.gate import Gate
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.lines import Lines
from cluster_agent.guard.news import Emit, News
from cluster_agent.guard.places import Places, checkpoint_name
from cluster_agent.guard.protocol import Message, code_from_wire, exit_from_wire, start_from_wire
from cluster_agent.guard.pythons import Pythons
from cluster_agent.guard.workload import Spawner, Workload, breaches, outcome, resolve


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
        self._leases: Leases[str] = Leases()
        self._live: dict[str, Workload] = {}
        self._unwritten: dict[str, tuple[str | None, bool]] = {}
        """Tombstones a full disk would not take: key -> (refusal to tell then, stop to confirm then); barred till then."""
        self._stopping: set[str] = set()
        """Told to stop while they ran; confirmed when they are over."""
        self._busy_groups: list[Workload] = []
        self._news = News(ledger, emit)
        self._pythons = Pythons(places.directory, spawner, places)
        self._gate = Gate(ledger, self._leases, self._pythons, places, min_free_bytes)
        self._lines = Lines(self._pythons, self._leases, self, watch, unwatch)
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
        self._lines.tick(now)
        self._busy_groups = [w for w in self._busy_groups if w.group is not None and not w.group.remove()]
        if self._unwritten:
            self._write_tombstones(list(self._unwritten))
        self._news.catch_up()
        self._places.empty_trash()
        if not self._spawner.isolation.namespace:
            strays.reap(self._ours())

    def settle(self, now: float) -> None:
        """At the end of each turn: calls that wait go to workers that are free, and what happened is told."""
        wakeup = self.next_wakeup()
        if wakeup is not None and wakeup <= now:
            self.enforce(now)  # before anything begins: the guard may have been paused within the turn (G1)
        self._lines.deal(now)
        self._news.tell()

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
        self._news.supersede()
        waiting = [call.request.key for call in self._pythons.calls.values() if not call.begun]
        entries = census(self._live, waiting, self._leases, self._ledger, self._news.unrecorded)
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
                self._pythons.codes.keep(*code_from_wire(message))
            case "widen":
                self._pythons.widen(AttemptKey.parse(message["key"]).text(), int(message["slots"]))
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
        refusal, paths = self._gate.refusal(request, now, len(self._live), self._gate.full()), {}
        if refusal is None:
            try:
                paths = self._places.prepare(request.key, request.inputs)
                self._ledger.started(key, request.generation, host.wall())
            except OSError as error:
                self._places.discard(key)
                refusal = f"the executor's disk refused it: {error.strerror}"
        if refusal is not None:
            self._refuse([(key, refusal)])
            return
        try:
            program = resolve(request.argv[0], request.env, self._places.work_of(key))
            workload = self._spawner.spawn(request, paths, program)
        except (OSError, ValueError) as error:
            if not self._spawner.isolation.namespace:
                strays.hunt(self._ours())  # a keeper that could not be supervised was killed
            wall = host.wall()
            self.ended_unbegun(Exited(request.key, Cause.SPAWN, None, None, wall, wall, message=str(error)))
            return
        self._live[key] = workload
        grace, keep = request.grace_seconds, request.keep_at_fence
        bounds = Bounds(request.generation, now, request.stop_at, request.timeout_seconds, grace, keep)
        self._leases.add(key, bounds)
        process = proctree.read(workload.keeper_pid)
        with suppress(OSError):  # without the record only the keepers' lock proves its death to a later guard
            self._ledger.kept(key, workload.keeper_pid, process.start_ticks if process is not None else 0)
        self.listen(workload)

    def start_calls(self, wires: Sequence[Message], now: float) -> None:
        """Take python calls together: one look at the disk and one record for all. Each is dealt to a worker, or refused for ever."""
        taken: dict[int, list[StartRequest]] = {}
        refused: list[tuple[str, str]] = []
        full, names, calls = self._gate.full(), set(), self._pythons.calls
        for wire in wires:
            request = start_from_wire(wire)
            key = request.key.text()
            if key in calls or key in self._unwritten or key in names:
                continue
            names.add(key)
            live = len(self._live) + (0 if request.slots else len(names))
            refusal = self._gate.refusal(request, now, live, full) or self._gate.inputs_refused(request)
            if refusal is None:
                taken.setdefault(request.generation, []).append(request)
            else:
                refused.append((key, refusal))
        for generation, requests in taken.items():
            try:
                keys = [request.key.text() for request in requests]
                self._ledger.started_together(keys, generation, host.wall())
            except OSError as error:
                refused.extend((key, f"the executor's disk refused it: {error.strerror}") for key in keys)
            else:
                self._lines.admit(requests, now)
        if refused:
            self._refuse(refused)

    def end_all(self, reason: Reason, now: float, grace_seconds: float) -> None:
        """End every workload; told by events."""
        for key in [*self._live, *self._pythons.calls]:
            self._leases.cut(key, reason, now, grace_seconds)
        self._pythons.dismiss(float("inf"))
        self.enforce(now)

    def end(self, now: float, grace_seconds: float) -> None:
        """This guard was told to go: nothing starts any more, what runs ends as stopped."""
        self._gate.ending = True
        self.end_all(Reason.STOP, now, grace_seconds)

    def next_telling(self) -> float | None:
        """When `settle` has something to tell though nothing happened."""
        return self._news.next_wakeup

    @property
    def unhurried(self) -> bool:
        """Calls run, and no worker can run out of them within a millisecond."""
        return self._pythons.deep

    @property
    def idle(self) -> bool:
        """Nothing runs."""
        return not self._live and not self._pythons.keepers

    # --- inside ----------------------------------------------------------------------------------------------------

    def _refuse(self, refused: Iterable[tuple[str, str]]) -> None:
        """Tombstone each, then say so."""
        fresh = {key: (refusal, False) for key, refusal in refused}
        self._unwritten.update(fresh)
        self._write_tombstones(list(fresh))

    def took(self, workload: Workload, pid: int) -> None:
        """See lines.Owner."""
        self._live[workload.name] = workload
        if pid:
            self._news.started(workload.name, pid, workload.start_wall)

    def gave_back(self, key: str) -> None:
        """See lines.Owner."""
        self._live.pop(key, None)
        self._news.unstarted(key)

    def listen(self, workload: Workload) -> None:
        """See lines.Owner."""
        self._watch(workload.status_fd, lambda: self._heard(workload))
        self._watch(workload.pidfd, lambda: self._buried(workload))

    def _heard(self, workload: Workload) -> None:
        pid = workload.hear()
        if workload.wait_status is not None or workload.failure:
            self._unwatch(workload.status_fd)
        if pid is not None:
            if workload.name in self._live:  # a call may be over before its new worker is heard of
                self._news.started(workload.name, pid, workload.start_wall)
            if workload.owed_term:
                workload.signal_keeper(signal.SIGTERM)

    def _buried(self, workload: Workload) -> None:
        """The keeper is dead, and with it everything (see keeper.py)."""
        if os.waitpid(workload.keeper_pid, os.WNOHANG)[0] == 0:
            return  # a stale readiness: its descriptor number was used again within one poll
        self._unwatch(workload.pidfd)
        self._heard(workload)
        self._unwatch(workload.status_fd)
        if workload.wait_status is None:
            workload.salvage_output()
            if not self._spawner.isolation.namespace:
                strays.hunt(self._ours())
        worker = self._pythons.of(workload)
        if worker is not None:
            self._lines.buried(worker, lambda: self._outcome(workload), host.boot())
        else:
            self.concluded(workload, self._outcome(workload))
        workload.close()
        if workload.group is not None and not workload.group.remove():
            self._busy_groups.append(workload)

    def _outcome(self, workload: Workload) -> Exited:
        """How its process says that it ended; its timers go."""
        reason = self._leases.reason(workload.name)
        return outcome(workload, reason, self._leases.remove(workload.name, host.boot()), self._places)

    def concluded(self, workload: Workload, exited: Exited, *, bare: bool = False) -> None:
        """The attempt is over, and nothing of it runs. `bare`: it left no log and no directory."""
        key = exited.key.text()
        del self._live[key]
        if workload.request.python is not None and not bare:
            self._pythons.cap_log(workload.request)
        self._exited(key, worded(exited, workload.request), bare=bare)

    def ended_unbegun(self, exited: Exited) -> None:
        """See lines.Owner; also how a spawn ends that came to nothing."""
        self._exited(exited.key.text(), exited)

    def _exited(self, key: str, exited: Exited, *, bare: bool = False) -> None:
        if not bare:
            self._places.finished(key)
            self._drop_checkpoint(exited.key, full=False)
        self._news.exited(key, exited, bare=bare)
        if key in self._stopping:
            self._stopping.discard(key)
            if key in self._unwritten:
                self._unwritten[key] = (None, True)
            else:
                self._tell({"ev": "stopped", "keys": [key]})

    def _tell(self, message: Message) -> None:
        """Say it after what happened before it."""
        self._news.tell()
        self._emit(message)

    def _carry_out(self, order: Order[str]) -> None:
        workload = self._live.get(order.key)
        if workload is None:
            self._lines.withdraw(order.key, order.reason, host.boot())
            return
        first = workload.phase is not Phase.STOPPING
        if first and not self._lines.alone(workload, order.key):
            self._lines.withdraw(order.key, order.reason, host.boot())
            return
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
            self._lines.withdraw(key, Reason.STOP, now)
            refusal = self._unwritten.get(key, (None, False))[0]
            self._unwritten[key] = (refusal, key not in self._live)
            if key in self._live:
                self._leases.cut(key, Reason.STOP, now, grace)
                self._stopping.add(key)
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
                self._tell({"ev": "refused", "key": key, "reason": refusal})
            if confirm:
                stopped.append(key)
        if stopped:
            self._tell({"ev": "stopped", "keys": stopped})

    def _forget(self, keys: Iterable[str]) -> None:
        done = [key for key in keys if key not in self._live and key not in self._pythons.calls]
        self._news.record()
        left: list[str] = []
        for key in done:
            wire = self._ledger.exits[key][1] if key in self._ledger.exits else self._news.unrecorded.pop(key, None)
            if wire is None or not wire.get("bare"):
                left.append(key)
                if wire is not None and exit_from_wire(wire).succeeded:
                    self._drop_checkpoint(AttemptKey.parse(key), full=True)
        with suppress(OSError):  # the agent forgets again after its next census
            self._ledger.forget(done)
        for key in left:
            self._places.discard(key)

    def _drop_checkpoint(self, key: AttemptKey, *, full: bool) -> None:
        """Unless another attempt of the same task runs here."""
        others = (workload.request.key for workload in self._live.values())
        if not any(other.task == key.task and other.run_uid == key.run_uid for other in others):
            self._places.drop_checkpoint(key, full=full)

    def _tell_log(self, message: Message) -> None:
        key = AttemptKey.parse(message["key"]).text()
        self._news.tell()
        data, at_end = self._places.read_log(key, int(message["offset"]), int(message["limit"]))
        text, complete = base64.b64encode(data).decode(), at_end and key not in self._live
        self._emit({"ev": "log", "id": message["id"], "data": text, "complete": complete})

    def _measure(self, now: float) -> None:
        """End workloads over limits that the kernel does not hold for us."""
        for workload, breach in breaches(list(self._live.values()), self._spawner.groups.found):
            if self._leases.reason(workload.name) is None:
                workload.breach = breach
                self._leases.cut(workload.name, Reason.LIMIT, now, 0.0)
                self.enforce(now)

    def _ours(self) -> set[int]:
        """Children of the guard that are no strays."""
        return {w.keeper_pid for w in self._live.values()} | self._pythons.keepers | {self._places.janitor}
