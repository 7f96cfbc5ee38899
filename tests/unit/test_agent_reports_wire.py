"""What an agent reports of an end can always be sent, whatever words the task put into it (PROTOCOL F8)."""

from __future__ import annotations

import json

from cluster_agent import translate
from cluster_agent.core.commands import SendReports
from cluster_agent.core.model import AttemptKey, Ended, Outcome
from cluster_agent.journal_codec import _ended, _read_ended

KEY = AttemptKey("0123456789abcdef01234567", 0, 1, "0a1b2c3d")


def ended(message: str) -> Ended:
    return Ended(Outcome.FAILED, 1, b"", message, 0, 1)


def test_words_with_half_a_surrogate_pair_cannot_end_the_agent() -> None:
    """An exception's text may hold one; the attempt moved on and took every agent of the federation down with it."""
    [request] = translate.reports(SendReports(1, "05", 1, finished=((KEY, ended("ValueError: \ud800!")),)))
    assert request.reports.finished[0].message == "ValueError: \\ud800!"
    request.SerializeToString()


def test_an_agent_that_has_such_words_in_its_journal_gets_over_them() -> None:
    kept = _read_ended(json.loads(json.dumps(_ended(ended("\udcff")))))
    [request] = translate.reports(SendReports(1, "05", 1, finished=((KEY, kept),)))
    assert request.reports.finished[0].message == "\\udcff"


def test_the_words_of_rejections_and_of_logs_too() -> None:
    [request] = translate.reports(SendReports(1, "05", 1, rejected=((KEY, "no \ud800"),)))
    assert request.reports.rejected[0].reason == "no \\ud800"
    assert translate.log_chunk("r", 0, end=True, error="\udcff").log.error == "\\udcff"
