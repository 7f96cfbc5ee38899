"""Objects in S3, or in what speaks like it; the only importer of obstore.

Theory. obstore runs its requests on threads of its own and is asked through awaitables; time-outs are ours, so its own retries
end within them. Deciding once is S3's conditional create (`If-None-Match: *`), which makes the first manifest the only one.
Credentials come from the process's environment in the usual AWS variables (or the machine's role), never from the URL, which
is logged. What an error means is read from its kind, and from S3's code in its text where it has none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore import exceptions
from obstore.store import S3Store as Client

from baton.time_limits import time_limit
from control_plane.artifacts.address import S3Address
from control_plane.artifacts.base import (
    LIST_LIMIT,
    ObjectInfo,
    ObjectStoreDown,
    ObjectStoreError,
    ObjectStoreFull,
    ObjectStoreRefused,
    check_key,
)

RETRIES = 2
RETRY_SECONDS = 10.0
"""Of the library, within our time-outs: it hides a lost connection; whoever calls knows better what is worth more tries."""

CONNECT_SECONDS = 3.0
REQUEST_SECONDS = 15.0
"""Of one request: a megabyte at 100 KB/s. Smaller fails on a slow line, larger hides a dead one for longer."""

if TYPE_CHECKING:
    from obstore.store import S3Config

T = TypeVar("T")

_FULL = ("507 Insufficient Storage", "InsufficientStorage", "QuotaExceeded", "StorageFull")
_REFUSED = (
    "NoSuchBucket",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "403 Forbidden",
    "401 Unauthorized",
)


class S3Store:
    """See `ObjectStore`."""

    def __init__(self, address: S3Address) -> None:
        """Connects on the first call. Raises ObjectStoreRefused for options that cannot be used."""
        at = f" at {address.endpoint}" if address.endpoint else ""
        self.name = f"bucket {address.bucket}{at}"
        config: S3Config = {}
        if address.endpoint:
            # Path style with an endpoint of one's own: such servers seldom have a DNS name for each bucket.
            config = {"endpoint": address.endpoint, "virtual_hosted_style_request": False}
        if address.region:
            config["region"] = address.region
        try:
            self._client = Client(
                address.bucket,
                prefix=address.prefix or None,
                config=config,
                client_options={
                    "allow_http": address.endpoint.startswith("http://"),
                    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                    "timeout": timedelta(seconds=REQUEST_SECONDS),
                },
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            )
        except (exceptions.BaseError, ValueError) as error:
            raise ObjectStoreRefused(f"{self.name} cannot be used: {_first_line(error)}") from None

    async def put(self, key: str, data: bytes, *, timeout: float, if_absent: bool = False) -> bool:
        """See `ObjectStore`."""
        path, mode = check_key(key), "create" if if_absent else "overwrite"

        async def send() -> bool:
            try:
                await obstore.put_async(self._client, path, data, mode=mode, use_multipart=False)  # type: ignore[arg-type]
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
            return True

        return await self._do(send, timeout)

    async def get(self, key: str, *, timeout: float) -> bytes | None:
        """See `ObjectStore`."""
        path = check_key(key)

        async def fetch() -> bytes | None:
            try:
                return bytes(await (await obstore.get_async(self._client, path)).bytes_async())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

        return await self._do(fetch, timeout)

    async def page(self, prefix: str, *, timeout: float, after: str = "") -> Sequence[ObjectInfo]:
        """See `ObjectStore`."""

        async def page() -> list[ObjectInfo]:
            found: list[ObjectInfo] = []
            stream = obstore.list(self._client, prefix.rstrip("/"), offset=after or None, chunk_size=LIST_LIMIT)
            async for batch in stream:
                found += [ObjectInfo(each["path"], each["size"], each["last_modified"].timestamp()) for each in batch]
                if len(found) >= LIST_LIMIT:
                    break
            return found[:LIST_LIMIT]

        return await self._do(page, timeout)

    async def folders(self, prefix: str, *, timeout: float) -> Sequence[str]:
        """See `ObjectStore`."""

        async def ask() -> list[str]:
            found = await obstore.list_with_delimiter_async(self._client, prefix.rstrip("/") or None)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

        return await self._do(ask, timeout)

    async def delete(self, keys: Sequence[str], *, timeout: float) -> None:
        """See `ObjectStore`."""
        paths = [check_key(key) for key in keys]

        async def remove() -> None:
            try:
                await obstore.delete_async(self._client, paths)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise

        await self._do(remove, timeout)

    async def close(self) -> None:
        """See `ObjectStore`: the library closes connections with the object."""

    async def _do(self, request: Callable[[], Awaitable[T]], timeout: float) -> T:
        """One request. Raises ObjectStoreError."""
        try:
            async with time_limit(timeout):
                return await request()
        except TimeoutError:
            raise ObjectStoreDown(f"{self.name} did not answer within {timeout:g} s") from None
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> ObjectStoreError:
        text = str(error)
        if any(word in text for word in _FULL):
            return ObjectStoreFull(f"{self.name} is full")
        refused = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
        if refused or any(word in text for word in _REFUSED):
            return ObjectStoreRefused(f"{self.name} refuses: {_first_line(error)}")
        return ObjectStoreDown(f"{self.name} does not answer: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The library's messages are pages with its own structures in them."""
    return str(error).partition("\n")[0][:200]
