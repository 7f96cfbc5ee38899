"""Work in a process of its own, whose memory ends with it.

Theory. A simulated world is one great tangle of references: it is freed by the garbage collector alone, which costs a fifth of the
time the world took to live. The end of a process frees it for nothing. So seeds are tried a few at a time in a child that never
collects; `fork` shares all that was imported, and costs a hundredth of a seed.
"""

from __future__ import annotations

import gc
import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SEEDS = 8
"""Seeds that one child tries: some 50 MB of dead worlds. More: memory; fewer: forks, and pages copied because they are counted in."""


class Died(Exception):
    """The child ended without an answer: killed, out of memory, or the work raised (its traceback is on standard error)."""


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, done in a child process. It must be picklable. Raises Died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise Died(f"a child of the simulation ended with status {os.waitstatus_to_exitcode(status)}")
    result: T = pickle.loads(answer)  # noqa: S301 - our own child wrote it
    return result


def _answer(work: Callable[[], object], writing: int) -> None:
    """Never returns: the caller's stack, and what is buffered for standard output, are the parent's."""
    status = 1
    try:
        gc.freeze()
        gc.disable()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(work(), pipe)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:  # noqa: BLE001 - the parent is told by the status, a person by this
        traceback.print_exc()
    finally:
        os._exit(status)
