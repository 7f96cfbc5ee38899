"""The agent's configuration: file, flags, refusals; and where plain text may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.leases import PROFILES
from cluster_agent.config import BadConfig, from_arguments, parse_cpus, parse_size
from cluster_agent.transport_grpc import BadEndpoint, GrpcTransport, check_endpoint

LEAST = ["--cluster", "eu", "--endpoint", "127.0.0.1:1", "--directory", "d", "--cpus", "4"]


def test_the_least_that_is_needed() -> None:
    config = from_arguments(LEAST)
    assert (config.cluster, config.endpoints, config.directory) == ("eu", ("127.0.0.1:1",), Path("d"))
    assert config.nodes[0].cpu_millis == 4000
    assert config.lease == PROFILES["balanced"]
    assert config.tls is None


def test_flags_of_every_kind() -> None:
    more = "--profile fast --memory 4Gi --disk 1G --extended gpus=2 --label a=b --label c=d --taint spot --namespace n"
    tls = "--tls-ca a --tls-certificate b --tls-key c --boot-id-file f --drain --drain-seconds 5 --log-level debug"
    config = from_arguments([*LEAST, *more.split(), *tls.split()])
    assert config.lease == PROFILES["fast"]
    assert (config.nodes[0].memory_bytes, config.nodes[0].disk_bytes) == (4 << 30, 10**9)
    assert config.nodes[0].extended == (("gpus", 2),)
    assert config.labels == {"a": "b", "c": "d"}
    assert (config.taints, config.namespaces) == (("spot",), ("n",))
    assert config.tls is not None
    assert config.tls.key == Path("c")
    assert config.drain_on_term
    assert config.boot_id_file == Path("f")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(
        'cluster = "us"\nendpoints = ["127.0.0.1:2"]\ndirectory = "x"\ncpus = 0.5\nprofile = "fast"\n'
        '[labels]\nzone = "a"\nkeep = "1"\n[lease]\nlost = 20\n'
    )
    config = from_arguments(["--config", str(path), "--cluster", "eu", "--label", "zone=b"])
    assert (config.cluster, config.endpoints, config.nodes[0].cpu_millis) == ("eu", ("127.0.0.1:2",), 500)
    assert config.labels == {"zone": "b", "keep": "1"}
    assert config.lease.lost == 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('clutser = "x"', "did you mean 'cluster'"),
        ("[lease]\nfense = 1", "did you mean 'fence'"),
        ('[tls]\nkeys = "x"', "did you mean 'key'"),
        ("cluster = ", "agent.toml"),
        ("lease = 3", "must be a table"),
    ],
)
def test_unknown_and_broken_keys_are_refused_with_the_nearest_name(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=says):
        from_arguments([*LEAST, "--config", str(path)])


def test_f5_unsafe_timing_is_refused_with_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[lease]\nlost = 1\n")
    with pytest.raises(BadConfig, match=r"\(L \+ G\)/\(1 \+ rho\): .* s against .* s"):
        from_arguments([*LEAST, "--config", str(path)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--cluster", "Eu"],
        ["--cluster", "a/b"],
        ["--cpus", "0"],
        ["--cpus", "-1"],
        ["--cpus", "many"],
        ["--memory", "4 Gigs"],
        ["--label", "novalue"],
        ["--extended", "gpus=some"],
        ["--tls-ca", "only"],
        ["--log-level", "loud"],
        ["--drain-seconds", "0"],
        ["--config", "does-not-exist.toml"],
    ],
)
def test_bad_values_are_refused(flags: list[str]) -> None:
    with pytest.raises(BadConfig):
        from_arguments([*LEAST, *flags])


@pytest.mark.parametrize("missing", [0, 2, 4, 6])
def test_what_is_missing_is_named(missing: int) -> None:
    with pytest.raises(BadConfig, match="missing"):
        from_arguments(LEAST[:missing] + LEAST[missing + 2 :])


def test_sizes_and_cpus() -> None:
    assert [parse_size(text) for text in ("1024", "1Ki", "2M", "1GiB", 7)] == [1024, 1024, 2 * 10**6, 1 << 30, 7]
    assert [parse_cpus(text) for text in ("4", "0.5", 2, 1.25)] == [4000, 500, 2000, 1250]


def test_the_cache_of_artifacts_has_a_size() -> None:
    given = ["--cluster", "eu", "--endpoint", "127.0.0.1:1", "--directory", "d", "--cpus", "1"]
    assert from_arguments(given).cache_bytes == 5 << 30
    assert from_arguments([*given, "--cache", "20Gi"]).cache_bytes == 20 << 30
    assert from_arguments([*given, "--cache", "0"]).cache_bytes == 0
    with pytest.raises(BadConfig, match="size"):
        from_arguments([*given, "--cache", "much"])


@pytest.mark.parametrize("endpoint", ["127.0.0.1:80", "[::1]:80", "localhost:80"])
def test_plain_text_stays_on_loopback(endpoint: str) -> None:
    check_endpoint(endpoint, tls=False)


@pytest.mark.parametrize("endpoint", ["10.0.0.1:80", "example.org:80", "0.0.0.0:80"])
def test_plain_text_goes_no_further(endpoint: str) -> None:
    with pytest.raises(BadEndpoint, match="loopback"):
        check_endpoint(endpoint, tls=False)
    check_endpoint(endpoint, tls=True)


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":80", "127.0.0.1:99999", "127.0.0.1:http"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(BadEndpoint):
        check_endpoint(endpoint, tls=True)


def test_learned_endpoints_are_bounded_and_checked() -> None:
    transport = GrpcTransport(["127.0.0.1:1"])
    transport.learn(["10.0.0.1:2", "127.0.0.1:1", "127.0.0.1:3", *(f"127.0.0.1:{port}" for port in range(100, 200))])
    assert transport._endpoints[:2] == ["127.0.0.1:1", "127.0.0.1:3"]
    assert len(transport._endpoints) == 32
    with pytest.raises(BadEndpoint):
        GrpcTransport([])
