"""The object store's port: whole objects of about a megabyte under keys, durable, never seen in part.

Theory. Content is cut into chunks before it comes here (`baton.artifacts`), so a port of whole objects is enough, and memory is
bounded by how many are in flight. Every call has a time-out; a call that was not answered in time may have happened, or may
happen later. That is harmless by construction: data objects are named by the hash of their content, so a late copy writes the
same bytes, and what makes an artifact visible, its manifest, is created only where there is none.

What the failures mean to a user: `ObjectStoreDown` and `ObjectStoreFull` are the infrastructure's fault, `ObjectStoreRefused`
the operator's. None is ever the application's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_OBJECT_BYTES = 4 << 20
"""Of one object: a chunk is 1 MiB, the largest manifest 2 MiB."""

LIST_LIMIT = 1000
"""Keys of one listing: the page of S3."""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,191}")


class ObjectStoreError(Exception):
    """The store did not do it, as far as it says. The text names the store and is fit for users."""


class ObjectStoreDown(ObjectStoreError):
    """No answer in time, or a failure of its own: whether a write happened is unknown."""


class ObjectStoreFull(ObjectStoreError):
    """There is no room left."""


class ObjectStoreRefused(ObjectStoreError):
    """It refuses us: credentials, permissions, a bucket that is not there. Only an operator can mend it."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as listed. `modified`: when it was last written, in seconds since the epoch by the store's own clock."""

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """Objects under keys such as `ns/run/0/1-abc/result/manifest`. All methods raise ObjectStoreError; `timeout` is in seconds."""

    @property
    def name(self) -> str:
        """What people call it: `the directory PATH`, `bucket B at URL`; holds no secret."""
        ...

    async def put(self, key: str, data: bytes, *, timeout: float, if_absent: bool = False) -> bool:
        """Store an object whole and durably, over an older one; with `if_absent` only where there is none: False says that there
        was one. The same call may be sent again after ObjectStoreDown: with `if_absent` it may then meet its own first try."""
        ...

    async def get(self, key: str, *, timeout: float) -> bytes | None:
        """An object's bytes; None if there is none."""
        ...

    async def page(self, prefix: str, *, timeout: float, after: str = "") -> Sequence[ObjectInfo]:
        """Objects whose key begins with `prefix` (whole parts: it ends with a slash) and comes after `after`, in order of key, at
        most LIST_LIMIT; fewer than that may be all, none means that there are no more."""
        ...

    async def folders(self, prefix: str, *, timeout: float) -> Sequence[str]:
        """The parts that follow `prefix` (empty, or ending with a slash) and have something below them, in order."""
        ...

    async def delete(self, keys: Sequence[str], *, timeout: float) -> None:
        """Remove objects, at most LIST_LIMIT; those that are not there count as removed."""
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


def check_key(key: str) -> str:
    """The key itself. Raises ValueError for one that a file system or a URL could read otherwise; callers make keys from
    checked names, so this is the second lock."""
    if len(key) > 900 or not all(_PART.fullmatch(part) for part in key.split("/")):
        raise ValueError(f"{key[:100]!r} is no key of an object")
    return key
