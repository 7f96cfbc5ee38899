"""Inline results: what they weigh, and how much of them a run may hold (DESIGN 14).

Theory. All inline results of a run may meet in one dispatch, that of a join over all its tasks, and a message has a limit at every
border it crosses (between replicas, to the agent, to the guard). There a result is a text inside JSON, where a quote takes two bytes
and a control character six. So the run's limit counts results as they are written there: a limit on the bytes themselves would let
16 MiB of control characters become a dispatch of 96 MiB, which breaks the agent's stream whenever it is sent (J7 sends it again).
"""

from __future__ import annotations

from json.encoder import encode_basestring

RESULT_LIMIT = 16 * 1024
"""Bytes of one inline result, as it came (DESIGN 14); agents enforce it too."""

RUN_RESULTS_LIMIT = 16 * 1024 * 1024
"""Weight of all inline results of a run (DESIGN 14). The messages' limits (48 MiB on streams, 64 MiB to the guard) leave room for
the ids beside them."""


def weight(result: bytes) -> int:
    """Bytes of a result as a text inside JSON in UTF-8, quotes included; 0 if there is none."""
    return 0 if not result else len(encode_basestring(result.decode("utf-8", "replace")).encode())
