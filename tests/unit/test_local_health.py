"""The headline of a local federation: computed from its parts, with what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from control_plane.store.versions import Support
from lab import etcd_binary
from lab.federation import Federation
from lab.health import headline, part_word
from lab.layout import Layout, Settings


def status(stage: str = "running", **parts: tuple[str, str]) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        state, network = parts.get(name.replace("-", "_"), ("running", "up"))
        return {"name": name, "state": state, "network": network}

    return {"stage": stage, "store": part("etcd"), "replicas": [part("replica-1")], "clusters": [part("eu")]}


def test_all_is_well() -> None:
    assert headline(status()) == "running"
    assert headline(status("starting", etcd=("dead", "up"))) == "starting"


def test_whatever_is_wrong_is_said_with_its_cure() -> None:
    assert headline(status(etcd=("dead", "up"))) == "degraded: etcd is dead; baton local start etcd"
    found = headline(status(replica_1=("frozen", "cut"), eu=("agent dead", "up")), "scripts/baton", " --directory d")
    assert found == (
        "degraded: replica-1 is frozen, replica-1 is cut off, the agent of eu is dead;"
        " scripts/baton local thaw replica-1 --directory d; scripts/baton local heal replica-1 --directory d;"
        " scripts/baton local start eu --directory d"
    )


def test_how_one_part_is() -> None:
    assert part_word(status(eu=("dead", "up")), "eu") == "dead"
    assert part_word(status(), "mars") == ""


def test_an_unsupported_etcd_beside_go_is_a_command_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("etcd", "echo etcd Version: 3.4.0"), ("go", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv(etcd_binary.ENVIRONMENT, str(tmp_path / "etcd"))
    monkeypatch.setenv("PATH", str(tmp_path))
    federation = Federation(Layout(tmp_path / "state"), Settings())
    assert federation.binary.support is not Support.SUPPORTED
    assert "; run `scripts/tools etcd`" in federation.warning
    (tmp_path / "go").unlink()
    assert "with Go, `scripts/tools etcd`" in federation.warning
