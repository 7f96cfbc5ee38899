"""A replica's configuration: flags over a file, nothing guessed, nothing unsafe."""

from __future__ import annotations

from pathlib import Path

import pytest

from control_plane.config import BadConfig, Config, TlsPaths, build, from_arguments, is_loopback

LEAST = ["--replica", "r1", "--history", "/tmp/h.db"]
TLS = ["--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-ca", "ca.pem"]


def refused(*argv: str) -> str:
    with pytest.raises(BadConfig) as caught:
        from_arguments([*LEAST, *argv])
    return str(caught.value)


def test_the_least_configuration_is_loopback_plain_text_with_reflection() -> None:
    config = from_arguments(LEAST)
    assert config == Config(replica="r1", history=Path("/tmp/h.db"))
    assert config.serves_reflection
    assert (config.listen, config.etcd) == ("127.0.0.1:0", ("127.0.0.1:2379",))


def test_flags_win_over_the_file_and_tables_merge(tmp_path: Path) -> None:
    file = tmp_path / "replica.toml"
    file.write_text(
        'replica = "file"\nlisten = "127.0.0.1:7000"\netcd = ["10.0.0.1:2379"]\nlease_ttl = 8\n'
        '[tls]\ncert = "a"\nkey = "b"\nca = "c"\n'
    )
    config = from_arguments(["--config", str(file), *LEAST, "--etcd", "h1:1", "--etcd", "h2:2", "--tls-ca", "mine"])
    assert (config.replica, config.listen, config.lease_ttl) == ("r1", "127.0.0.1:7000", 8.0)
    assert config.etcd == ("h1:1", "h2:2")
    assert config.tls == TlsPaths(Path("a"), Path("b"), Path("mine"))


def test_unknown_keys_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "replica.toml"
    file.write_text('replica = "r"\nhistroy = "x"\n')
    with pytest.raises(BadConfig, match="unknown key 'histroy'; did you mean 'history'"):
        from_arguments(["--config", str(file)])
    with pytest.raises(BadConfig, match=r"unknown key tls\.'crt'"):
        build({"replica": "r", "history": "h", "tls": {"crt": "x"}})


def test_a_file_that_is_missing_or_no_toml_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        from_arguments(["--config", str(tmp_path / "none.toml")])
    (tmp_path / "bad.toml").write_text("replica = ")
    with pytest.raises(BadConfig, match="is no TOML"):
        from_arguments(["--config", str(tmp_path / "bad.toml")])


def test_plain_text_never_leaves_this_machine() -> None:
    assert "plain text is spoken on loopback only" in refused("--listen", "0.0.0.0:7000")
    assert "advertise is missing" in refused("--listen", "0.0.0.0:7000", *TLS)
    config = from_arguments([*LEAST, "--listen", "0.0.0.0:7000", "--advertise", "db1:7000", *TLS])
    assert not config.serves_reflection
    assert from_arguments([*LEAST, "--listen", "h:1", *TLS, "--reflection"]).serves_reflection
    assert not from_arguments([*LEAST, "--no-reflection"]).serves_reflection


def test_half_of_tls_is_none() -> None:
    assert "needs key and ca too" in refused("--tls-cert", "c.pem")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--replica", "Bad Name", "replica"),
        ("--listen", "127.0.0.1", "not host:port"),
        ("--listen", "127.0.0.1:99999", "not host:port"),
        ("--listen", "127.0.0.1:٣", "not host:port"),
        ("--advertise", "h:0", "not host:port"),
        ("--etcd", "localhost", "not host:port"),
        ("--etcd-prefix", "baton", "end in /"),
        ("--lease-ttl", "0.5", "2 to 60"),
        ("--lease-ttl", "nan", "2 to 60"),
        ("--log-level", "loud", "none of"),
    ],
)
def test_values_that_cannot_be_are_refused_by_key(flag: str, value: str, said: str) -> None:
    assert said in refused(flag, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("etcd", "h:1"), ("etcd", []), ("lease_ttl", True), ("reflection", "yes"), ("listen", 7), ("tls", "x")],
)
def test_values_of_another_type_are_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(BadConfig, match=key):
        build({"replica": "r", "history": "h", key: value})


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(BadConfig, match="replica is missing"):
        from_arguments(["--history", "h"])


def test_usage_exits_with_2_and_help_with_0() -> None:
    for argv, code in ((["--nonsense"], 2), (["--hist", "x"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            from_arguments(argv)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("0.0.0.0:1", False), ("example.org:1", False)],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize(
    "where", ["dir:/var/lib/baton", "dir:rel", "s3://bucket", "s3://b/p/q?endpoint=http://127.0.0.1:9&region=eu"]
)
def test_a_store_of_artifacts_is_a_directory_or_a_bucket(where: str) -> None:
    assert from_arguments([*LEAST, "--artifacts", where]).artifacts == where


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("/var/lib/baton", "is neither dir:PATH nor s3://"),
        ("dir:", "names no directory"),
        ("s3:///x", "is neither"),
        ("s3://key:secret@bucket/x", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"),
        ("s3://bucket?secret_access_key=hidden", "credentials come from the environment"),
        ("s3://bucket?endpoint=ftp://x", "no plain http:// or https://"),
        ("s3://bucket/a/../b", "no key of an object"),
    ],
)
def test_a_bad_store_of_artifacts_is_refused_without_repeating_secrets(where: str, words: str) -> None:
    said = refused("--artifacts", where)
    assert words in said
    assert said.startswith("artifacts: ")
    assert "secret@" not in said
    assert "hidden" not in said
