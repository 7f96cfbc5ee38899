"""What chaos strikes is drawn from the seed alone; how a campaign is asked for, what it leaves, and how signals end it."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from lab import processes
from lab.chaos import cli
from lab.chaos.campaign import Plan, Result
from lab.chaos.ending import Ending, Interrupted
from lab.chaos.ground import Ground
from lab.chaos.nemesis import Nemesis
from lab.chaos.strikes import BRIEF, ETCD, GUARD_PAUSE, KINDS, LONG, MENDING, SIEGES, Deck, Strike, Targets
from lab.checking.history import Violation
from lab.layout import Settings
from lab.parts import PartFailed

TARGETS = Targets(("c1", "c2", "c3"), ("replica-1", "replica-2", "replica-3"), ("etcd-1", "etcd-2", "etcd-3"))

START_SECONDS = 60
"""For a child to import its modules on a machine that has much else to do."""


def rounds(seed: int, count: int, targets: Targets = TARGETS) -> list[list[Strike]]:
    """The strikes of a campaign whose odd rounds are long."""
    deck = Deck(seed, targets)
    return [deck.deal(number, 2, 5, long=number % 2 == 1) for number in range(1, count + 1)]


# -- drawing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 38, 2_169_103_879])
def test_a_seed_deals_the_same_strikes_whatever_else_is_drawn_meanwhile(seed: int) -> None:
    first = rounds(seed, 20)
    random.seed(1)
    assert rounds(seed, 20) == first
    assert rounds(seed + 1, 20) != first
    assert rounds(seed, 5) == first[:5]


def test_every_kind_of_strike_comes_before_any_comes_again() -> None:
    deck = Deck(1, TARGETS)
    drawn: list[Strike] = []
    number = 0
    while len(drawn) < len(deck.kinds):
        number += 1
        drawn += deck.deal(number, 1, 1, long=False)
    assert sorted(strike.kind for strike in drawn) == sorted(KINDS)
    assert all(strike.seconds in BRIEF or strike.seconds == GUARD_PAUSE for strike in drawn)
    sieges = [deck.deal(number + place, 1, 1, long=True)[0] for place in range(len(SIEGES))]
    assert sorted(strike.kind for strike in sieges) == sorted(SIEGES)
    assert all(strike.seconds in LONG for strike in sieges)


@pytest.mark.parametrize("seed", range(20))
def test_no_part_is_struck_by_two_things_at_once_and_etcd_is_one_part(seed: int) -> None:
    for strikes in rounds(seed, 20):
        now, until = 0.0, dict.fromkeys([*TARGETS.clusters, *TARGETS.replicas, ETCD], 0.0)
        for strike in strikes:
            now += strike.after
            part = TARGETS.group(strike.target)
            assert until[part] <= now
            until[part] = now + strike.seconds + MENDING


def test_a_small_federation_gets_what_it_can_suffer() -> None:
    small = Targets(("c1",), ("replica-1",), ("etcd-1",))
    assert "etcd without quorum" not in Deck(3, small).kinds
    dealt = rounds(3, 40, small)
    assert all(1 <= len(strikes) <= 5 for strikes in dealt)
    assert {strike.kind for strikes in dealt for strike in strikes} == set(KINDS) - {"etcd without quorum"}


def test_the_nemesis_knows_how_to_strike_every_kind_that_is_dealt(tmp_path: Path) -> None:
    ground = Ground(tmp_path / "fed", Settings(3, ("c1", "c2", "c3"), "fast", 4), 3, {})
    nemesis = Nemesis(ground)
    assert sorted(nemesis.kinds) == sorted(KINDS)
    assert nemesis.targets == TARGETS


# -- asking ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--rounds", "2", "--minutes", "3"],
            "--rounds says exactly how long, and so does --minutes: give one of them",
        ),
        (["--rounds", "-1"], "--rounds is -1; it must be 1 or more"),
        (["--rounds", "0"], "--rounds is 0; it must be 1 or more"),
        (["--minutes", "-1"], "--minutes is -1; it must be more than 0"),
        (["--minutes", "nan"], "--minutes is nan; it must be more than 0"),
        (["--replicas", "0"], "--replicas is 0; it must be 1 to 9"),
        (["--clusters", "0"], "--clusters is 0; it must be 1 to 32"),
        (["--clusters", "99"], "--clusters is 99; it must be 1 to 32"),
        (["--etcd", "2"], "argument --etcd: invalid choice: 2 (choose from 1, 3, 5)"),
        (["--directory", ""], "--directory is empty; leave it out, or name one"),
        (["--directory", "/etc/passwd"], "--directory /etc/passwd is no directory"),
        (["--directory", "/dev/null/x"], "--directory /dev/null/x cannot be used: Not a directory"),
        (["--sees", "1"], "unrecognized arguments: --sees 1"),
    ],
)
def test_a_flag_without_sense_is_refused_with_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags, Ending()) == 2
    assert capsys.readouterr() == ("", f"chaos: {said}\n")


def test_a_directory_that_was_used_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fed").mkdir()
    assert cli.main(["--directory", str(tmp_path)], Ending()) == 2
    assert capsys.readouterr().err == (
        f"chaos: --directory {tmp_path} is not empty: a campaign starts in a new or empty one\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["fed"]


def test_a_directory_is_made_and_known_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = cli.parse(["--directory", "new/one"])
    assert asked.directory == tmp_path / "new" / "one"
    assert asked.directory.is_dir()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--rounds", "7", "--brief"],
        ["--minutes", "2.5", "--replicas", "2", "--clusters", "4", "--etcd", "1", "--seed", "-12"],
    ],
)
def test_the_line_that_repeats_a_campaign_asks_for_the_same_one(flags: list[str]) -> None:
    asked = cli.parse(flags)
    name, *again = asked.again.split()
    assert name == "scripts/chaos"
    assert cli.parse(again) == asked


# -- what is left ----------------------------------------------------------------------------------------------------------


class Played:
    """A campaign that leaves a file, and comes out as `how` says."""

    etcd_version = "0"
    how: ClassVar[Result | BaseException]

    def __init__(self, plan: Plan, directory: Path, tell: Callable[[str], None]) -> None:
        self.directory = directory

    async def run(self) -> Result:
        (self.directory / "log").write_text("what happened\n")
        if isinstance(self.how, Result):
            return self.how
        raise self.how


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs one with these flags, in a scratch place that is `tmp_path`; the exit code."""
    monkeypatch.setattr(cli, "Campaign", Played)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def play(how: Result | BaseException, *flags: str, ending: Ending | None = None) -> int:
        Played.how = how
        return cli.main(flags, ending or Ending())

    return play


BROKEN = Result(violations=[Violation("I9 no overlap", 1.0, "two of them")])


def test_after_success_nothing_is_left_unless_somebody_wants_it(
    played: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert played(Result(rounds=1)) == 0
    assert list(tmp_path.iterdir()) == []
    assert played(Result(rounds=1), "--directory", str(tmp_path / "mine")) == 0
    assert played(Result(rounds=1), "--keep") == 0
    kept = sorted(path.parent for path in tmp_path.glob("*/log"))
    assert len(kept) == 2
    out, err = capsys.readouterr()
    assert all(f"all of it is kept in {path}\n" in out for path in kept)
    assert err == ""


def test_after_a_failure_all_is_kept_and_named(
    played: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert played(BROKEN) == 1
    (kept,) = tmp_path.iterdir()
    out, _ = capsys.readouterr()
    assert f"all of it is kept in {kept}\n" in out
    assert out.splitlines()[-1] == "chaos: 0 rounds survived, 0 faults of 0 kinds, 1 violations"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PartFailed('etcd-1: etcd did not start:\n{"level": "fatal"}'), "etcd-1: etcd did not start"),
        (PartFailed("replica-1 ended at start; the end of its log:\nTraceback"), "replica-1 ended at start"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("odd"), "stopped by a fault of its own, nothing was judged"),
    ],
)
def test_what_was_not_judged_has_an_exit_code_of_its_own(
    played: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    assert played(error) == 2
    (kept,) = tmp_path.iterdir()
    assert capsys.readouterr().err.splitlines()[-1] == f"chaos: {said}; all of it is kept in {kept}"


def test_after_an_interruption_nothing_is_left_unless_something_could_not_be_ended(
    played: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = Ending()
    ending.number = signal.SIGTERM
    with pytest.raises(Interrupted) as interrupted:
        played(asyncio.CancelledError(), ending=ending)
    assert interrupted.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert played(PartFailed("c1: something of it could not be killed"), ending=ending) == 143
    (kept,) = tmp_path.iterdir()
    said = "chaos: interrupted, but c1: something of it could not be killed"
    assert capsys.readouterr().err == f"{said}; all of it is kept in {kept}\n"


# -- ending ----------------------------------------------------------------------------------------------------------------

LISTENER = """
import signal, sys
from lab.chaos.ending import Ending, Interrupted

ending = Ending()
ending.listen()
try:
    print("listening", flush=True)
    while True:
        signal.pause()
except Interrupted:
    print("ended", flush=True)
    signal.raise_signal(signal.SIGTERM)  # a second signal must not disturb the cleaning
    print("cleaned", flush=True)
    raise
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_process_with_the_code_of_a_shell_and_no_traceback(number: int, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTENER],
        env=processes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "listening\n"
            child.send_signal(number)
            out, err = child.communicate(timeout=START_SECONDS)
        finally:
            child.kill()
    assert (child.returncode, out, err) == (code, "ended\ncleaned\n", "")
