"""Work in processes of its own, whose memory ends with them.

Theory. A simulated world is one great tangle of references: only the garbage collector frees it, which costs a fifth of the time that
the world took to live. The end of a process frees it for nothing. So the work is done a part at a time in children that never
collect; `fork` shares all that was imported, and costs a hundredth of a seed.

Children die with whoever started them, also by SIGKILL: nobody is left to be told what they find.
"""

from __future__ import annotations

import gc
import os
import pickle
import selectors
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from cluster_agent.guard import host

T = TypeVar("T")

INTERRUPTED = 130
"""Exit code of a child that was interrupted: 128 and the number of SIGINT, as shells have it."""

PIECE_BYTES = 1 << 16
"""Bytes read at a time: what a pipe holds."""


class Died(Exception):
    """A child ended without an answer: it was killed, had no memory, or its work raised (the traceback is on standard error)."""


@dataclass(slots=True)
class _Child:
    """A child at work."""

    place: int
    pid: int
    heard: bytearray = field(default_factory=bytearray)


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, which must be picklable. Raises Died."""
    ((_, answer),) = each([work], 1)
    return answer


def each(works: Iterable[Callable[[], T]], jobs: int) -> Iterator[tuple[int, T]]:
    """What each returns, and its place among `works`, in the order of their ends; `jobs` at a time. Whoever stops asking, or is
    interrupted, ends them all. Raises Died."""
    waiting = enumerate(works)
    with selectors.DefaultSelector() as pipes:
        try:
            while True:
                while len(pipes.get_map()) < max(1, jobs) and (more := next(waiting, None)) is not None:
                    _start(pipes, *more)
                if not pipes.get_map():
                    return
                for key, _ in pipes.select():
                    child = cast(_Child, key.data)
                    piece = os.read(key.fd, PIECE_BYTES)
                    child.heard += piece
                    if not piece:
                        pipes.unregister(key.fd)
                        os.close(key.fd)
                        yield child.place, _answer(child)
        finally:
            for key in list(pipes.get_map().values()):
                child = cast(_Child, key.data)
                os.close(key.fd)
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)


def _start(pipes: selectors.BaseSelector, place: int, work: Callable[[], object]) -> None:
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _live(work, writing, parent)
    os.close(writing)
    pipes.register(reading, selectors.EVENT_READ, _Child(place, pid))


def _live(work: Callable[[], object], writing: int, parent: int) -> None:
    """The child. Never returns: the caller's stack, and what is buffered for standard output, are the parent's."""
    status = 1
    try:
        host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(status)  # it was gone before it could be said
        gc.freeze()
        gc.disable()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(work(), pipe)
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:  # noqa: BLE001 - the parent is told by the status, a person by this
        traceback.print_exc()
    finally:
        os._exit(status)


def _answer(child: _Child) -> Any:
    _, status = os.waitpid(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise Died(f"a process of the work ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
    return pickle.loads(bytes(child.heard))  # noqa: S301 - our own child wrote it
