"""Processes inside one process: every callback belongs to a node, and a node can be frozen or killed like a real process.

Theory. A process is what it runs. Each task inherits the node of whoever started it (a context variable), and every callback
of the loop carries that context. So the loop can do what a kernel does: a frozen node's callbacks wait, in order, until it is
thawed (SIGSTOP: its timers fire late, its clocks go on); a killed node's callbacks never run again (SIGKILL: no `finally`, no
flush, no goodbye). Production code takes part without knowing.

Sets of tasks are walked in the order of their hashes; here a task's hash is its number, so that equal seeds stay equal.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from enum import Enum
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack

from lab.virtual_time import Deadlock, Spinning, VirtualLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STILL = 100_000
"""Loop turns without time passing after which a world spins. A whole seed has 20,000."""

SWEEP = 512
"""Tasks from which on ended ones are thrown out, whenever there are twice as many as lived at the last sweep. Smaller: more sweeps;
larger: memory."""

NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)


class Life(Enum):
    """What the kernel does with a node's callbacks."""

    RUNS = "runs"
    FROZEN = "frozen"
    DEAD = "dead"


class Node:
    """One life of one process. `name` is the process's, and the same in its next life."""

    def __init__(self, name: str, loop: SimLoop) -> None:
        self.name = name
        self.life = Life.RUNS
        self._loop = loop
        self._held: deque[asyncio.Handle] = deque()
        self._asleep_since: float | None = None
        self._context = contextvars.copy_context()
        self._context.run(NODE.set, self)
        loop.nodes.append(self)

    def context(self) -> contextvars.Context:
        """A context whose callbacks belong to this node."""
        return self._context.copy()

    @property
    def runs(self) -> bool:
        """Whether its callbacks run now."""
        return self.life is Life.RUNS

    def run(self, call: Callable[[], T]) -> T:
        """Call something as this node: what it starts is this node's."""
        return self.context().run(call)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A task of this node, which lives until it ends or the node does."""
        task = self._loop.create_task(work, context=self.context())
        self._loop.spawned.add(task)
        task.add_done_callback(self._loop.spawned.discard)

    def freeze(self) -> None:
        """SIGSTOP."""
        if self.life is Life.RUNS:
            self.life = Life.FROZEN

    def suspend(self) -> None:
        """The machine sleeps: as SIGSTOP, but its timers do not count the time until it is thawed."""
        if self.life is Life.RUNS:
            self._asleep_since = self._loop.time()
            self.freeze()

    def thaw(self) -> None:
        """SIGCONT, or waking up: what came due meanwhile runs next, in order: what one link delivered must not be shuffled."""
        if self.life is Life.FROZEN:
            self._loop.call_soon(self._catch_up, context=contextvars.Context())

    def _catch_up(self) -> None:
        if self.life is Life.FROZEN:
            self.life = Life.RUNS
            since, self._asleep_since = self._asleep_since, None
            if since is not None:
                self._held = self._loop.postpone(self, since, self._held)
            while self._held and self.life is Life.RUNS:
                self._loop.call(self._held.popleft())

    def kill(self) -> None:
        """SIGKILL."""
        self.life = Life.DEAD
        self._loop.graveyard += [task for task in self._loop.living() if task.node is self]

    def hold(self, handle: asyncio.Handle) -> None:
        """Keep a callback for the thaw; a dead node's for its burial."""
        self._held.append(handle)

    def bury(self) -> None:
        """The run is over: let everything be cancelled in order."""
        self._loop.make_ready(self._held)
        self._held.clear()


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its number."""

    def __init__(self, work: Any, *, number: int, node: Node | None, **options: Any) -> None:
        self._number = number
        self.node = node
        super().__init__(work, **options)

    def __hash__(self) -> int:
        return self._number


class SimHandle(asyncio.TimerHandle):
    """A callback to be run, at once or at a time: asyncio's, without what its debug mode wants to know. A seed makes 35,000."""

    __slots__ = ()
    _repr = None
    _source_traceback = None
    _scheduled = False

    def __init__(
        self, when: float, callback: Any, args: Any, loop: SimLoop, context: contextvars.Context | None
    ) -> None:
        self._when, self._callback, self._args, self._loop = when, callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False

    def cancel(self) -> None:
        """See asyncio. The loop throws it away when it comes up."""
        self._cancelled = True
        self._callback, self._args = None, ()  # what it holds must not live as long as its timer


class SimTimer(SimHandle):
    """One that waits for its time."""

    __slots__ = ()


class SimLoop(VirtualLoop):
    """A VirtualLoop that knows nodes, and nothing of the outside: no descriptors, no threads."""

    def __init__(self, shuffle: random.Random | None = None) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.turns = self._moved = 0
        """Loop turns, and how many there were when time last went on."""
        self.buried = False
        """The run is over: even dead nodes' callbacks run now, so that their tasks can be cancelled."""
        self.spawned: set[asyncio.Task[Any]] = set()
        self.graveyard: list[SimTask] = []
        """Tasks of dead nodes, kept from the garbage collector, which would run their `finally`."""
        self._made: list[SimTask] = []
        """All that live, and what ended since the last sweep: a weak set costs a microsecond for each of them, twice."""
        self._sweep_at = SWEEP
        self._order = shuffle
        self._numbers = self._set = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self.set_task_factory(self._make_task)
        # asyncio asks both for every future there is: without a frame of Python's they cost a third.
        self.get_debug = bool  # type: ignore[method-assign]
        self.create_future = partial(asyncio.Future, loop=self)  # type: ignore[method-assign]

    def _make_task(
        self,
        _loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        **options: Any,
    ) -> asyncio.Future[Any]:
        self._numbers += 1
        context = options.get("context")
        node = NODE.get() if context is None else context.get(NODE)
        task = SimTask(work, loop=self, number=self._numbers, node=node, **options)
        self._made.append(task)
        if len(self._made) >= self._sweep_at:
            self.living()
        return task

    def living(self) -> list[SimTask]:
        """Tasks that have not ended. (asyncio's own set is of all loops there ever were.)"""
        self._made = [task for task in self._made if not task.done()]
        self._sweep_at = max(SWEEP, 2 * len(self._made))
        return list(self._made)

    def bury(self) -> None:
        """The run is over: cancel what is left, the tasks of dead nodes too."""
        self.living()  # what failed and nobody asked is told before nobody listens any more
        self.buried = True
        for node in self.nodes:
            node.bury()
        left = {*self.graveyard, *self.living()}
        for task in sorted(left, key=hash):
            task.cancel()
        if left:
            self.run_until_complete(asyncio.wait(left, timeout=60.0))
        self.run_until_complete(self.shutdown_asyncgens())

    def make_ready(self, handles: deque[asyncio.Handle]) -> None:
        """Run these next."""
        self._ready.extend(handles)  # type: ignore[attr-defined]  # BaseEventLoop's queue, private and stable

    def postpone(self, node: Node, since: float, held: deque[asyncio.Handle]) -> deque[asyncio.Handle]:
        """Let all timers that `node` had set come later by the time since then; what else it has missed."""
        slept = self.now - since
        due = [timer for timer in held if isinstance(timer, SimTimer)]
        kept = [entry for entry in self._timers if entry[2]._context.get(NODE) is not node]  # type: ignore[attr-defined]  # noqa: SLF001
        late = [entry for entry in self._timers if entry[2]._context.get(NODE) is node]  # type: ignore[attr-defined]  # noqa: SLF001
        self._timers = kept + [(when + slept, number, timer) for when, number, timer in late]
        heapq.heapify(self._timers)
        for timer in due:
            self._set += 1
            heapq.heappush(self._timers, (timer.when() + slept, self._set, timer))
        return deque(handle for handle in held if not isinstance(handle, SimTimer))

    def call(self, handle: Any) -> None:
        """Run a callback, unless it was cancelled, as `Handle._run` does."""
        if handle._cancelled:  # noqa: SLF001 - as above
            return
        try:
            handle._context.run(handle._callback, *handle._args)  # noqa: SLF001 - as above
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as above
            self._tell(handle, error)

    def _tell(self, handle: Any, error: BaseException) -> None:
        self.call_exception_handler(
            {"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle}
        )

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody needs waking."""

    # -- asyncio's own loop, without what nobody needs here: debug mode, threads, descriptors --------------------------------

    def call_soon(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """See asyncio."""
        handle = SimHandle(self.now, callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]  # as above
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        when = self.now + delay
        timer = SimTimer(when, callback, args, self, context)
        self._set += 1
        heapq.heappush(self._timers, (when, self._set, timer))
        return timer

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """See asyncio. Timers of one moment come in the order of their setting."""
        timer = SimTimer(when, callback, args, self, context)
        self._set += 1
        heapq.heappush(self._timers, (when, self._set, timer))
        return timer

    def _run_once(self) -> None:
        """Turns, until somebody stops the loop: let time jump if there is nothing to do, then run what is ready, in seeded order."""
        ready: deque[Any] = self._ready  # type: ignore[attr-defined]  # as above
        # `Random.shuffle` asks for bits one by one, which costs three calls for each.
        chance = None if self._order is None else self._order.random
        runs = Life.RUNS
        while True:
            self.turns += 1
            if self.turns - self._moved > STILL:
                raise Spinning(f"{STILL} loop turns, and the virtual time is still {self.now}")
            count = self._make_due(ready)
            if count > 1 and chance is not None:
                for last in range(count - 1, 0, -1):
                    other = int(chance() * (last + 1))
                    ready[last], ready[other] = ready[other], ready[last]
            for _ in range(count):
                handle = ready.popleft()
                if handle._cancelled:  # noqa: SLF001 - asyncio.Handle's own state
                    continue
                context = handle._context  # noqa: SLF001 - as above
                node = context.get(NODE)
                if node is not None and node.life is not runs and not self.buried:
                    node.hold(handle)
                    continue
                try:
                    context.run(handle._callback, *handle._args)  # noqa: SLF001 - as above
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - as `call`, which this is but for the cost of calling it
                    self._tell(handle, error)
            if self._stopping:  # type: ignore[attr-defined]  # as above
                return

    def _make_due(self, ready: deque[Any]) -> int:
        """Let time jump if nothing is ready, and make ready what is due now; how much is ready."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:  # noqa: SLF001 - as above
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]  # as above
            if not timers:
                raise Deadlock("nothing is ready and no timer is set")
            if timers[0][0] > self.now:
                self.now, self._moved = timers[0][0], self.turns
        end = self.now + 1e-9
        while timers and timers[0][0] < end:
            ready.append(heapq.heappop(timers)[2])
        return len(ready)
