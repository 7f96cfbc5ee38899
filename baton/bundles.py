"""Several session messages in one: `more` of SessionRequest and SessionResponse (baton.v1.agent).

Theory. A message on a gRPC stream costs its sender and its receiver some 100 us each in Python, whatever it holds; parsing a few
hundred bytes costs 2 us. So whatever waits when a stream can be written leaves as one message: the first, with the others as its
`more`. Both sides say that they read it (Hello, Welcome) before any is sent.

Messages are joined as bytes: a repeated field's entry may stand anywhere in its message, so appending one needs no parsing.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from baton.v1 import agent_pb2

BUNDLE_BYTES = 1 << 20
"""Bytes after which a bundle is full: a quarter of what either side takes in one message."""

BUNDLE_MESSAGES = 256
"""Messages in a bundle: one commit of all shards. More would only let what comes first wait for what comes last."""


def join(kind: type[Message], payloads: Sequence[bytes]) -> bytes:
    """Serialized messages of one kind as a single one, which `split` takes apart. One alone stays as it is."""
    if len(payloads) == 1:
        return payloads[0]
    tag = _TAGS[kind]
    parts = [payloads[0]]
    for payload in payloads[1:]:
        parts += (tag, _varint(len(payload)), payload)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_TAGS: dict[type[Message], bytes] = {
    kind: _varint(kind.DESCRIPTOR.fields_by_name["more"].number << 3 | 2)
    for kind in (agent_pb2.SessionRequest, agent_pb2.SessionResponse)
}
"""What precedes each entry of `more`: field number and wire type."""
