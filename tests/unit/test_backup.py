"""A backup file read without etcd: whole or not, and what it knows last (PROTOCOL J12)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from baton import etcd_tools
from baton.backup import NotABackup, read_backup
from baton.cli.restore import member_flags
from baton.errors import InvalidField
from control_plane.batches import BatchWriter
from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import Stamp
from tests.backup_file import backup, batch


def test_j12_a_backup_says_what_it_knows_last_also_after_a_copy(tmp_path: Path) -> None:
    made, copied = tmp_path / "b.db", tmp_path / "c.db"
    other = ("baton/sessions/eu/beat", b"x" * 200)
    # Replicas' clocks differ: the last batch need not have the latest time.
    made.write_bytes(backup(batch(1000.0), batch(1002.5, shard="01"), batch(1002.0, seq=2), other))
    shutil.copy(made, copied)
    assert read_backup(made) == read_backup(copied)
    assert (read_backup(made).revision, read_backup(made).wall) == (5, 1002.5)


def test_batches_as_replicas_write_them_are_read(tmp_path: Path) -> None:
    """Compressed, and in several parts of which the first alone says when."""
    file = tmp_path / "b.db"
    writer = BatchWriter(Stamp(wall=7777.25, nonce="ab" * 8, seq=1, incarnation=1), FEATURE_LEVEL)
    for number in range(200):
        writer.add([], f"{number * 7919:09}" * 3, "")
    values = writer.values(400)
    assert len(values) > 1
    changes = [(f"baton/shards/00/log/{seq:016}", value) for seq, value in enumerate(values, 1)]
    file.write_bytes(backup(*changes))
    assert read_backup(file).wall == 7777.25


def test_a_backup_of_nothing_has_no_time(tmp_path: Path) -> None:
    file = tmp_path / "b.db"
    file.write_bytes(backup(("baton/federation", b"{}")))
    assert read_backup(file).wall == 0


def test_what_is_no_whole_backup_is_told_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "b.db"
    whole = backup(batch(1000.0))
    flipped = bytearray(whole)
    flipped[13_000] ^= 1
    wrong = {
        b"": "is empty",
        bytes(range(256)) * 64: "is no backup",
        b"snapshot": "is no backup",
        whole[:9_000]: "is not whole",
        whole[:-32]: "is not whole",
        bytes(flipped): "is damaged",
    }
    for content, says in wrong.items():
        file.write_bytes(content)
        with pytest.raises(NotABackup, match=says) as error:
            read_backup(file)
        assert "\n" not in str(error.value)


def test_the_flags_of_a_member_belong_together() -> None:
    assert member_flags("", "", "") == []
    two = "n1=http://a:2380,n2=http://b:2380"
    full = ["--name", "n1", "--initial-cluster", two, "--initial-advertise-peer-urls", "http://a:2380"]
    assert member_flags("n1", two, "") == member_flags("n1", two, "http://a:2380") == full
    for name, cluster, urls, says in (
        ("n1", "", "", "--initial-cluster n1=http://HOST:2380"),
        ("", "", "http://a:2380", "--initial-cluster default=http://a:2380"),
        ("", two, "", "say with --name"),
        ("n3", two, "", "--name n3 is not in it"),
        ("n1", two, "http://b:2380", "is not what --initial-cluster says"),
        ("n1", "n1", "", "write it as NAME=URL"),
    ):
        with pytest.raises(InvalidField, match=says):
            member_flags(name, cluster, urls)


def test_etcds_tools_are_found_where_the_local_federation_finds_etcd(tmp_path: Path) -> None:
    builds = tmp_path / "baton" / "tools"
    for name in ("etcd-3.9.1-aa", "etcd-3.10.0-bb", "promlint-cc"):
        (builds / name).mkdir(parents=True)
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    assert [path.parent.name for path in etcd_tools.beside_etcd("etcdutl", env)] == ["etcd-3.10.0-bb", "etcd-3.9.1-aa"]
    env[etcd_tools.ENVIRONMENT] = "/opt/etcd/etcd"
    assert etcd_tools.beside_etcd("etcdutl", env)[0] == Path("/opt/etcd/etcdutl")
