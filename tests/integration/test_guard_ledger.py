"""The guard's durable memory (PROTOCOL F4, F8): what was started or barred stays so, through crashes and rotation."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_agent.guard.ledger import SEGMENT, Ledger, LedgerCorrupt


class TestLedger:
    """Durable memory (F4, F8)."""

    KEY = "run.1.1.beef"

    def test_records_survive(self, tmp_path: Path) -> None:
        first = Ledger(tmp_path, "boot")
        first.started(self.KEY, 3, 1.0)
        first.kept(self.KEY, 42, 99)
        first.tombstone(["run.2.1.beef"])
        again = Ledger(tmp_path, "boot")
        assert again.same_boot
        assert (again.started_keys[self.KEY].generation, again.started_keys[self.KEY].keeper_pid) == (3, 42)
        assert again.knows("run.2.1.beef")
        assert not again.knows("run.3.1.beef")

    def test_another_boot_is_seen(self, tmp_path: Path) -> None:
        Ledger(tmp_path, "boot").started(self.KEY, 1, 1.0)
        assert not Ledger(tmp_path, "other").same_boot

    def test_a_torn_tail_is_cut_off_at_every_length(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path, "boot")
        ledger.tombstone(["run.1.1.beef"])
        whole = (tmp_path / "ledger").read_bytes()
        ledger.tombstone(["run.2.1.beef"])
        longer = (tmp_path / "ledger").read_bytes()
        for size in range(len(whole), len(longer)):
            (tmp_path / "ledger").write_bytes(longer[:size] + b"\0" * (size % 3))
            again = Ledger(tmp_path, "boot")
            assert (again.knows("run.1.1.beef"), again.knows("run.2.1.beef")) == (True, False)
            again.tombstone(["run.3.1.beef"])
            assert Ledger(tmp_path, "boot").knows("run.3.1.beef")

    def test_a_damaged_middle_is_an_error(self, tmp_path: Path) -> None:
        Ledger(tmp_path, "boot").tombstone([f"run.{n}.1.beef" for n in range(3)])
        data = bytearray((tmp_path / "ledger").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "ledger").write_bytes(data)
        with pytest.raises(LedgerCorrupt, match="unreadable record at byte"):
            Ledger(tmp_path, "boot")

    def test_forgotten_keys_stay_barred_through_rotation_and_cost_eight_bytes(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path, "boot")
        ledger.started("live.0.1.beef", 1, 1.0)
        keys = [f"run.{n}.1.beef" for n in range(SEGMENT + 10)]
        ledger.tombstone(keys)
        ledger.forget(keys)
        assert (tmp_path / "ledger.old").stat().st_size == 8 * len(keys)
        assert (tmp_path / "ledger").stat().st_size < 1000
        again = Ledger(tmp_path, "boot")
        assert all(again.knows(key) for key in [*keys[:100], *keys[-100:], "live.0.1.beef"])
        assert not again.knows("run.0.2.beef")
