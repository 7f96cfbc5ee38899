"""The version gate, bound by bound (reliability.md 1.1)."""

from __future__ import annotations

import pytest

from control_plane.store.base import Unsupported
from control_plane.store.versions import Support, check_version, require_version

UNSAFE = ["2.3.8", "3.3.27", "3.4.23", "3.4.99", "3.5.0", "3.5.1", "3.5.27", "3.6.0", "3.6.8", "4.0.0", "", "3.5", "x"]
OLD = ["3.5.28", "3.5.30", "3.5.32", "3.6.9", "3.6.13", "3.7.0", "3.7.1-rc.0"]
SUPPORTED = ["3.5.33", "3.5.40", "3.6.14", "3.7.1", "3.7.3", "v3.7.3", "3.7.3+build.1", "3.8.0", "3.10.2"]


@pytest.mark.parametrize("version", UNSAFE)
def test_refused(version: str) -> None:
    assert check_version(version) is Support.UNSAFE
    with pytest.raises(Unsupported, match="refused"):
        require_version(version)


@pytest.mark.parametrize("version", OLD)
def test_run_with_a_warning(version: str) -> None:
    assert check_version(version) is require_version(version) is Support.OLD


@pytest.mark.parametrize("version", SUPPORTED)
def test_supported(version: str) -> None:
    assert check_version(version) is require_version(version) is Support.SUPPORTED


def test_a_pre_release_is_older_than_its_release() -> None:
    assert check_version("3.5.33-rc.1") is Support.OLD
    assert check_version("3.7.0-alpha.0") is Support.UNSAFE
    assert check_version("3.8.0-rc.0") is Support.OLD
