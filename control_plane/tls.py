"""Certificates of a listener: read, checked, and read anew when they change (DESIGN 11: mTLS with rotation).

Theory. A rotated certificate must be taken up without a restart, and a half-written one must not take the listener down. So files
are looked at for each new connection, only when their times changed; what does not fit together (key and certificate differ, a
file is cut) keeps the old ones in force, and is logged. No grpc here: the composition root makes credentials of the bytes.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass

from control_plane.config import BadConfig, TlsPaths

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """PEM bytes that fit together."""

    cert: bytes
    key: bytes
    ca: bytes


def load(paths: TlsPaths) -> Material:
    """Read and check. Raises BadConfig that names the file, never its content."""
    parts = {}
    for word, path in (("cert", paths.cert), ("key", paths.key), ("ca", paths.ca)):
        try:
            parts[word] = path.read_bytes()
        except OSError as error:
            raise BadConfig(f"tls.{word} {path} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password makes an encrypted key an error instead of a question on a terminal.
        context.load_cert_chain(paths.cert, paths.key, password="")
    except ssl.SSLError as error:
        raise BadConfig(f"tls.cert {paths.cert} and tls.key {paths.key} do not fit together: {error.reason}") from None
    try:
        context.load_verify_locations(cafile=paths.ca)
    except ssl.SSLError as error:
        raise BadConfig(f"tls.ca {paths.ca} holds no certificate: {error.reason}") from None
    return Material(**parts)


class Reloader:
    """The newest good material of some files. Called from grpc's threads: one at a time is all it needs."""

    def __init__(self, paths: TlsPaths) -> None:
        """Raises BadConfig."""
        self._paths = paths
        self.current = load(paths)
        self._seen = self._times()

    def changed(self) -> Material | None:
        """New material since the last call, None if there is none, or none that is good."""
        try:
            seen = self._times()
        except OSError:
            return None  # being replaced at this very moment: the next connection looks again
        if seen == self._seen:
            return None
        try:
            material = load(self._paths)
        except BadConfig as error:
            log.warning("new certificates are not used", extra={"error": str(error)})
            return None
        self._seen = seen
        if material == self.current:
            return None
        self.current = material
        log.info("new certificates are used from the next connection on")
        return material

    def _times(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in (self._paths.cert, self._paths.key, self._paths.ca))
