"""Where the objects lie, as an operator writes it: `dir:PATH` or `s3://BUCKET/PREFIX?endpoint=URL&region=NAME`.

An address is logged and shown, so no secret belongs into it: credentials come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) or from the role of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from control_plane.artifacts.base import check_key

_OPTIONS = ("endpoint", "region")


@dataclass(frozen=True, slots=True)
class S3Address:
    """A bucket, what all keys begin with, and who serves it; empty is the library's default."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""


def parse(text: str) -> Path | S3Address:
    """Reads an address. Raises ValueError saying what is wrong; never repeats a secret that somebody put into it."""
    if text.startswith("dir:"):
        if not (path := text.removeprefix("dir:")):
            raise ValueError("names no directory: write dir:PATH")
        return Path(path)
    parts = urlsplit(text)
    if parts.scheme != "s3" or not parts.netloc:
        raise ValueError("is neither dir:PATH nor s3://BUCKET/PREFIX?endpoint=URL")
    if "@" in parts.netloc:
        raise ValueError(
            "holds credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    options = parse_qs(parts.query, keep_blank_values=True)
    if set(options) - set(_OPTIONS):
        raise ValueError(f"has options other than {' and '.join(_OPTIONS)}; credentials come from the environment")
    endpoint = options.get("endpoint", [""])[-1]
    if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or "@" in endpoint):
        raise ValueError("has an endpoint that is no plain http:// or https:// URL")
    prefix = parts.path.strip("/")
    if prefix:
        check_key(prefix)
    return S3Address(parts.netloc, prefix, endpoint, options.get("region", [""])[-1])
