"""The headline of a local federation: computed from its parts, with what to type."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from baton import contexts, etcd_tools
from baton.errors import InvalidField
from control_plane.store.versions import Support
from lab import hints
from lab.federation import Federation
from lab.health import headline, part_word
from lab.layout import Layout, Settings
from lab.supervisor import context_name, why


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


def test_j12_an_etcd_that_looks_restored_is_said_with_what_to_type() -> None:
    found = headline({**status(), "restored": "replica-1 found ..."}, "baton", "", " --context local-x")
    assert found == (
        "degraded: etcd looks restored, and nothing is written; baton admin restored --backup FILE --context local-x"
    )
    assert headline({**status(), "restored": ""}) == "running"


def test_hints_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BATON_CONTEXT", "BATON_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATON_COMMAND", "baton")
    monkeypatch.setenv("BATON_CONFIG", str(tmp_path / "contexts"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    usual, elsewhere = Layout(tmp_path / "state" / "baton" / "local"), Layout(tmp_path / "my fed")
    assert hints.suffix(usual) == ""
    assert hints.suffix(elsewhere) == f" --directory '{elsewhere.directory}'"
    env = {"BATON_CONFIG": str(tmp_path / "contexts")}
    contexts.write_context(context_name(usual), ["127.0.0.1:1"], env=env)
    assert hints.context_flag(usual) == ""
    contexts.write_context("prod", ["127.0.0.1:2"], env=env)  # now the current one
    assert hints.context_flag(usual) == " --context local"
    settings = {"clusters": ["eu", "us"]}
    told = {"directory": str(usual.directory), "endpoints": ["127.0.0.1:1"], "logs": "logs", "settings": settings}
    hints.say(told)
    assert "  baton init - | baton run - --wait --context local\n" in capsys.readouterr().out
    Path(hints.EXAMPLE).parent.mkdir(parents=True)
    Path(hints.EXAMPLE).touch()
    hints.say(told)
    assert f"baton run {hints.EXAMPLE} --wait --context local\n" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    contexts.check_writable({"BATON_CONFIG": str(tmp_path / "new" / "contexts")})
    for write in (contexts.check_writable, lambda env: contexts.write_context("a", ["127.0.0.1:1"], env=env)):
        with pytest.raises(
            InvalidField, match=r"^/proc/none/contexts: cannot be written: .*; name another file with BATON_CONFIG"
        ):
            write({"BATON_CONFIG": "/proc/none/contexts"})
    full = OSError(errno.ENOSPC, "No space left on device")
    assert why(full, Layout(tmp_path)) == f"{tmp_path}: No space left on device"
    assert why(OSError(errno.EROFS, "Read-only", "/x"), Layout(tmp_path)) == "/x: Read-only"
    assert why(InvalidField("in words"), Layout(tmp_path)) == "in words"


def test_how_one_part_is() -> None:
    assert part_word(status(eu=("dead", "up")), "eu") == "dead"
    assert part_word(status(), "mars") == ""


def test_an_unsupported_etcd_beside_go_is_a_command_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("etcd", "echo etcd Version: 3.4.0"), ("go", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv(etcd_tools.ENVIRONMENT, str(tmp_path / "etcd"))
    monkeypatch.setenv("PATH", str(tmp_path))
    federation = Federation(Layout(tmp_path / "state"), Settings())
    assert federation.binary.support is not Support.SUPPORTED
    assert "; run `scripts/tools etcd`" in federation.warning
    (tmp_path / "go").unlink()
    assert "with Go, `scripts/tools etcd`" in federation.warning
