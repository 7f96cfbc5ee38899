"""Work in processes of its own: answers, ends and interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lab import processes
from lab.apart import Died, apart, each

pytestmark = pytest.mark.timeout(60)


def test_each_part_answers_from_another_process() -> None:
    answers = dict(each((partial(_told, number) for number in range(5)), 2))
    assert {place: number for place, (number, _) in answers.items()} == {place: place * place for place in range(5)}
    pids = {pid for _, pid in answers.values()}
    assert len(pids) == 5
    assert os.getpid() not in pids


def _told(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_a_large_answer_is_whole() -> None:
    assert apart(lambda: b"x" * 5_000_000) == b"x" * 5_000_000


def test_a_child_that_is_killed_is_told() -> None:
    with pytest.raises(Died, match="signal 9"):
        apart(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_whose_work_raises_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Died, match="exit code 1"):
        apart(lambda: 1 // 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_whoever_stops_asking_ends_them_all(tmp_path: Path) -> None:
    asked = each([partial(_after, tmp_path), partial(_linger, tmp_path)], 2)
    assert next(asked) == (0, "somebody lingers")
    asked.close()  # type: ignore[attr-defined]  # a generator
    (lingering,) = tmp_path.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(lingering.name), 0)


def _after(folder: Path) -> str:
    while not list(folder.iterdir()):
        time.sleep(0.01)
    return "somebody lingers"


def _linger(folder: Path) -> str:
    (folder / str(os.getpid())).touch()
    time.sleep(60)
    return "alone"


@pytest.mark.parametrize("killer", [signal.SIGINT, signal.SIGKILL])
def test_children_end_with_who_started_them(tmp_path: Path, killer: signal.Signals) -> None:
    words = (
        "import sys; from functools import partial; from pathlib import Path; from lab.apart import each;"
        "from tests.unit.test_apart import _linger; list(each([partial(_linger, Path(sys.argv[1]))] * 2, 2))"
    )
    command = [sys.executable, "-c", words, str(tmp_path)]
    with subprocess.Popen(command, cwd=processes.ROOT, stderr=subprocess.DEVNULL) as parent:
        while len(children := list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        parent.send_signal(killer)
        parent.wait()
    assert parent.returncode == -killer
    while any(_alive(int(child.name)) for child in children):
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    """Whether it runs. One that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
