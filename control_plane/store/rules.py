"""What a transaction must look like before any adapter sends it, and the size arithmetic behind it. Pure.

Theory: a refusal by the server and a refusal by us mean the same (`NotApplied`), but ours costs no round trip, can
never be mistaken for an ambiguous answer, and is the same in memory as on etcd. The rules are etcd's own
(reliability.md 1.1), plus one of ours: the else branch only reads (PROTOCOL J6).
"""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.store.base import MAX_REQUEST_BYTES, MAX_TXN_OPS, Delete, Get, NotApplied, Put, Txn

_OP_OVERHEAD = 64
"""Bytes of framing we count for each compare and operation: tags, lengths, lease, revision. Real ones are under 40; too
small would let a request pass that etcd refuses, too large would only waste a little of the 1.4 MB."""


def check_txn(txn: Txn) -> None:
    """Refuse what etcd would refuse. Raises NotApplied with the rule that is broken."""
    for name, size in (("compares", len(txn.compares)), ("success", len(txn.success)), ("failure", len(txn.failure))):
        if size > MAX_TXN_OPS:
            raise NotApplied(f"{name} holds {size} entries, more than {MAX_TXN_OPS}")
    if not _reads(txn.failure):
        raise NotApplied("the failure branch may only read")
    items = (*txn.compares, *txn.success, *txn.failure)
    written = [item.key for item in items]
    if not all(written) and not all(item.key or (isinstance(item, Delete) and item.prefix) for item in items):
        raise NotApplied("a key is empty")
    if not "".join(written).isascii():
        raise NotApplied(f"key {next(key for key in written if not key.isascii())!r} is not ASCII")
    if not _reads(txn.success):
        _refuse_double_writes(txn.success)
    size = txn_bytes(txn)
    if size > MAX_REQUEST_BYTES:
        raise NotApplied(f"the transaction is {size} bytes, more than {MAX_REQUEST_BYTES}")


def txn_bytes(txn: Txn) -> int:
    """An upper bound of the request's size on the wire, without a key prefix of more than a few bytes."""
    parts = (*txn.compares, *txn.success, *txn.failure)
    values = sum([len(compare.value) for compare in txn.compares])
    values += sum([len(op.value) for op in txn.success if isinstance(op, Put)])
    return sum([len(part.key) for part in parts]) + values + _OP_OVERHEAD * len(parts)


def _reads(ops: Sequence[Put | Delete | Get]) -> bool:
    """Whether it changes nothing."""
    return {type(op) for op in ops} <= {Get}


def granted_ttl(ttl: float) -> int:
    """What etcd makes of a wanted TTL: whole seconds, rounded up so that a lease never lives less than asked, and at
    least 2 s (1.5 election time-outs of 1 s, rounded up)."""
    whole = int(ttl) + (1 if ttl > int(ttl) else 0)
    return max(2, whole)


def _refuse_double_writes(ops: Sequence[Put | Delete | Get]) -> None:
    written: set[str] = set()
    for op in ops:
        if isinstance(op, Get) or (isinstance(op, Delete) and op.prefix):
            continue
        if op.key in written:
            raise NotApplied(f"key {op.key} is written twice")
        written.add(op.key)
    prefixes = [op.key for op in ops if isinstance(op, Delete) and op.prefix]
    for number, prefix in enumerate(prefixes):
        others = (other for place, other in enumerate(prefixes) if place != number)
        if any(key.startswith(prefix) for key in written) or any(other.startswith(prefix) for other in others):
            raise NotApplied(f"a key under {prefix} is written twice")
