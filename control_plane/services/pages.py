"""Page tokens (PROTOCOL O7): where a list goes on, tied to the list it belongs to.

A token is base64 of JSON: the last key that was answered, and a hash of the question. It is opaque, not secret: whoever forges
one sees only what a list from the start would show. One of another question, or of no question, is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

from control_plane.services.failures import invalid

MAX_TOKEN = 1024
"""Characters of a token that are looked at; ours are under 200."""


def filter_hash(*question: object) -> str:
    """A hash of everything but size and token that makes a list what it is."""
    return hashlib.blake2b(json.dumps(question, default=str).encode(), digest_size=9).hexdigest()


def write(after: str, question: str) -> str:
    """The token of a list that goes on after key `after`."""
    return base64.urlsafe_b64encode(json.dumps({"after": after, "filter": question}).encode()).decode()


def read(token: str, question: str) -> str:
    """The key after which to go on; empty for an empty token. Raises InvalidField."""
    if not token:
        return ""
    try:
        if len(token) > MAX_TOKEN:
            raise ValueError(token[:20])
        fields = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        after, of = fields["after"], fields["filter"]
        if not isinstance(after, str):
            raise TypeError(after)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise invalid("page_token", "is not one that this service gave out") from None
    if of != question:
        raise invalid("page_token", "belongs to a list with another filter: start that list anew")
    return after
