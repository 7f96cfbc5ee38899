"""Who calls, by certificate and nothing else (DESIGN 11, S1): roles come from a SPIFFE-style URI SAN.

    spiffe://baton/cluster/NAME    an agent of that cluster: may open its session and carry its artifacts, nothing else
    spiffe://baton/replica/NAME    a replica: may join the peer stream, nothing else
    spiffe://baton/user/NAME       a person or program: may use the public services

Without TLS, which is spoken on loopback only, the caller is `local` and may do anything. A certificate of our CA without such a
name is nobody: a common name is never looked at, and no request can say who it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

TRUST = "spiffe://baton/"
"""Beginning of every identity."""


class Role(Enum):
    """What a caller is."""

    LOCAL = "local"
    USER = "user"
    AGENT = "cluster"
    REPLICA = "replica"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller."""

    role: Role
    name: str = ""

    @property
    def principal(self) -> str:
        """As events and audit name it."""
        return f"{self.role.value}/{self.name}" if self.name else self.role.value

    @property
    def may_use_api(self) -> bool:
        """The public services."""
        return self.role in (Role.LOCAL, Role.USER)

    @property
    def may_be_agent(self) -> bool:
        """AgentService."""
        return self.role in (Role.LOCAL, Role.AGENT)

    @property
    def may_be_replica(self) -> bool:
        """PeerService."""
        return self.role in (Role.LOCAL, Role.REPLICA)


NOBODY = Identity(Role.NOBODY)
"""A caller that may do nothing."""


def identify(auth: Mapping[str, Iterable[bytes]], *, tls: bool) -> Identity:
    """The caller of a connection, from what gRPC knows of its certificate. `tls`: the listener demands one."""
    if not tls:
        return Identity(Role.LOCAL)
    for name in auth.get("x509_subject_alternative_name", ()):
        found = parse(name.decode("utf-8", "replace"))
        if found is not None:
            return found
    return NOBODY


def parse(uri: str) -> Identity | None:
    """The identity a URI names; None if it names none of ours."""
    if not uri.startswith(TRUST):
        return None
    role, _, name = uri.removeprefix(TRUST).partition("/")
    if not name or "/" in name or role not in (Role.USER.value, Role.AGENT.value, Role.REPLICA.value):
        return None
    return Identity(Role(role), name)
