"""The Carrier port: how content reaches the artifact store and comes back. The store is behind the control plane.

Contract:

1. `put` answers only when the content is stored durably under the attempt's fence (F1); the same content may be put again. A failure
   is *unknown*: it may be stored or come to be. That does no harm, for nobody sees content that no report names.
2. What `get` and `get_code` write has been proved, chunk by chunk, against the digest in the source (or the hash of the code).
3. Each call is one try at one replica, and never waits for ever on a silent one. After `CarrierDown` or `CarrierCorrupt` a `Download`
   goes on at the chunk where it stopped, another replica being asked.
4. Memory is bounded by a few chunks, whatever the size.

What a failure means to the attempt is in its class: `CarrierDown` may be better in a moment; `CarrierFull` and `CarrierRefused` are
the operator's to mend; `CarrierLacks` is content that is not there; `NotConfigured` is a federation without a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Protocol

from cluster_agent.core.model import ArtifactRef, ArtifactSource
from cluster_agent.executors.base import AttemptKey


class CarrierError(Exception):
    """It was not done, as far as is known. The text is fit for users and says what failed. `moved`: content came through before."""

    def __init__(self, message: str, *, moved: bool = False) -> None:
        super().__init__(message)
        self.moved = moved


class CarrierDown(CarrierError):
    """The store, or the way to it, does not answer now."""


class CarrierFull(CarrierError):
    """The store is full."""


class CarrierCorrupt(CarrierError):
    """What came is not what the digest names."""


class CarrierRefused(CarrierError):
    """The control plane refuses this agent."""


class CarrierLacks(CarrierError):
    """The content is not in the store."""


class NameUsed(CarrierError):
    """The attempt has other content under that name already."""


class NotConfigured(CarrierError):
    """The federation has no artifact store."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Who stores: an attempt of a run in a namespace, on a cluster (uid)."""

    namespace: str
    key: AttemptKey
    cluster_uid: str


@dataclass(slots=True)
class Wanted:
    """What is fetched: an artifact by its source, or a code archive by namespace and hash."""

    source: ArtifactSource | None = None
    namespace: str = ""
    code_sha256: str = ""

    @property
    def words(self) -> str:
        """For messages."""
        if self.source is None:
            return f"code {self.code_sha256[:12]}"
        return f"artifact {self.source.ref.name} of task {self.source.task_id}"


class Download(Protocol):
    """One download, across as many tries as it takes."""

    async def run(self) -> None:
        """One try; returns when everything has been written. Raises CarrierError, and OSError of the file."""
        ...


class Carrier(Protocol):
    """See the module's contract."""

    async def put(self, maker: Maker, name: str, file: BinaryIO) -> ArtifactRef:
        """Store an open file from its beginning. Raises CarrierError, TooLarge (baton.artifacts), and OSError of the file."""
        ...

    def download(self, wanted: Wanted, into: BinaryIO) -> Download:
        """A download into an open, empty file."""
        ...

    async def close(self) -> None:
        """Give up what is held."""
        ...
