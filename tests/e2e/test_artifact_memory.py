"""Content through a real replica with flat memory: the bound has nothing to do with the size (DESIGN 10)."""

from __future__ import annotations

from pathlib import Path

from bench.artifacts import measure

MEGABYTES = 96
BOUND = 60
"""Three chunks in flight, as many being read, proved and written, gRPC's windows and the arenas of a few threads. Seen: 10 to 35 MB,
with 64 MB of content as with 1 GB (`python -m bench.artifacts`)."""


async def test_an_artifact_passes_a_replica_with_flat_memory(tmp_path: Path) -> None:
    figures = await measure(tmp_path / "federation", MEGABYTES)
    print(figures)
    assert figures.replica_put_growth_mb < BOUND
    assert figures.replica_get_growth_mb < BOUND
    assert figures.client_put_growth_mb < BOUND
    assert figures.client_get_growth_mb < BOUND
