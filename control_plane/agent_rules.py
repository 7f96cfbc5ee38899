"""What an agent may say, field by field (PROTOCOL S1, S2, C4).

Theory. What a Hello says is folded into fleet's table, which every replica gets, and what a heartbeat says is put into the store and
read by placement and by every list of clusters. So both are foreign text until they were looked at: an agent may lie about itself,
but not with names that are none, numbers that nothing could mean, or bytes that others have to carry. The grammar is `baton.names`,
the one that users are held to. Pure: each function returns the first (field, problem), None if there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from baton import names
from baton.v1 import agent_pb2 as pb
from baton.v1 import cluster_pb2

Problem = tuple[str, str]

MAX_WORD = 128
"""Characters of ids that agents make (instance, boot id, journal uid, nonces). UUIDs have 36."""

MAX_VERSION = 64
"""Characters of an agent's version."""

MAX_WORDS = 64
"""Taints, and namespaces, of a cluster: like labels, they are in the table that every replica gets."""

MAX_MARKS = 256
"""Marks of shards: there are 33 shards. Each is compared with the store before a session opens."""

MAX_HELD = 200_000
"""Attempts in a Hello: twenty times the most that an agent queues, and more than its largest message could carry."""

MAX_NODES = 100_000
"""Nodes of a cluster, of one shape and of all (DESIGN: federations are far smaller)."""

MAX_AMOUNT = 1 << 53
"""Of any resource of one node: 8 PiB of memory, and a number that floats and other languages still hold exactly."""

MAX_BEAT = 256 * 1024
"""Bytes of a heartbeat: some thousand nodes that all differ. It is stored with every beat; the store takes 1.5 MiB at a time."""

MAX_NUMBER = 1 << 62
"""Of a generation or a seq that an agent cites: the next one must still be a 64-bit number."""


def hello_problem(hello: pb.Hello) -> Problem | None:
    """What is wrong with a Hello by itself."""
    if problem := names.id_problem(hello.cluster):
        return "hello.cluster", problem
    ids = {"instance": hello.instance, "boot_id": hello.boot_id, "journal_uid": hello.journal_uid}
    for field, text in ids.items():
        if not text:
            return f"hello.{field}", f"is empty: use 1 to {MAX_WORD} characters"
    longest = {
        **dict.fromkeys(ids, MAX_WORD),
        "profile": MAX_WORD,
        "federation_uid": MAX_WORD,
        "agent_version": MAX_VERSION,
    }
    for field, most in longest.items():
        if len(getattr(hello, field)) > most:
            return f"hello.{field}", f"has {len(getattr(hello, field))} characters; at most {most} are allowed"
    if not 0 <= hello.last_generation <= MAX_NUMBER:
        return "hello.last_generation", f"is {hello.last_generation}: use 0 to {MAX_NUMBER}"
    if found := names.labels_problem(dict(hello.labels)):
        return f'hello.labels["{found[0][:MAX_WORD]}"]' if found[0] else "hello.labels", found[1]
    return (
        _words_problem("hello.taints", hello.taints, names.taint_problem)
        or _words_problem("hello.namespaces", hello.namespaces, names.id_problem)
        or shapes_problem("hello.shapes", hello.shapes)
        or _marks_problem(hello.marks)
        or _inventory_problem(hello.inventory)
    )


def heartbeat_problem(beat: pb.Heartbeat) -> Problem | None:
    """What is wrong with a heartbeat by itself."""
    if beat.ByteSize() > MAX_BEAT:
        return "heartbeat", f"has {beat.ByteSize()} bytes; at most {MAX_BEAT} are allowed"
    if beat.attempts < 0:
        return "heartbeat.attempts", f"is {beat.attempts}: it cannot be negative"
    if beat.queue_limit < 0:
        return "heartbeat.queue_limit", f"is {beat.queue_limit}: it cannot be negative"
    return shapes_problem("heartbeat.shapes", beat.shapes)


def shapes_problem(field: str, shapes: Sequence[cluster_pb2.NodeShape]) -> Problem | None:
    """What is wrong with node shapes (C4)."""
    nodes = 0
    for place, shape in enumerate(shapes):
        where = f"{field}[{place}]"
        if not 1 <= shape.count <= MAX_NODES:
            return f"{where}.count", f"is {shape.count}: use 1 to {MAX_NODES}"
        nodes += shape.count
        if len(shape.extended) > names.MAX_LABELS:
            return f"{where}.extended", f"has {len(shape.extended)} entries; at most {names.MAX_LABELS} are allowed"
        for name, amount in shape.extended.items():
            if problem := names.extended_problem(name):
                return f"{where}.extended", problem
            if not 0 <= amount <= MAX_AMOUNT:
                return f'{where}.extended["{name}"]', f"is {amount}: use 0 to {MAX_AMOUNT}"
        for part in ("cpu_millis", "memory_bytes", "disk_bytes", "total_cpu_millis", "total_memory_bytes"):
            if not 0 <= getattr(shape, part) <= MAX_AMOUNT:
                return f"{where}.{part}", f"is {getattr(shape, part)}: use 0 to {MAX_AMOUNT}"
    return (field, f"have {nodes} nodes together; at most {MAX_NODES} are allowed") if nodes > MAX_NODES else None


def _words_problem(field: str, words: Sequence[str], problem_of: Callable[[str], str | None]) -> Problem | None:
    if len(words) > MAX_WORDS:
        return field, f"has {len(words)} entries; at most {MAX_WORDS} are allowed"
    for place, word in enumerate(words):
        if problem := problem_of(word):
            return f"{field}[{place}]", problem
    return None


def _marks_problem(marks: Sequence[pb.ShardMark]) -> Problem | None:
    if len(marks) > MAX_MARKS:
        return "hello.marks", f"has {len(marks)} entries; at most {MAX_MARKS} are allowed"
    for place, mark in enumerate(marks):
        if max(len(mark.shard), len(mark.nonce)) > MAX_WORD:
            return f"hello.marks[{place}]", f"has a shard or nonce of more than {MAX_WORD} characters"
        if not 0 <= mark.seq <= MAX_NUMBER or not 0 <= mark.incarnation <= MAX_NUMBER:
            return f"hello.marks[{place}]", f"has a seq or incarnation that is not 0 to {MAX_NUMBER}"
    return None


def _inventory_problem(inventory: Iterable[pb.ShardInventory]) -> Problem | None:
    shards: set[str] = set()
    held = 0
    for place, listed in enumerate(inventory):
        where = f"hello.inventory[{place}]"
        if listed.shard in shards:
            return f"{where}.shard", f"{names.quote(listed.shard)} occurs twice"
        shards.add(listed.shard)
        columns = (listed.run, listed.task, listed.n, listed.nonce, listed.generation, listed.phase)
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            return where, f"has columns of different length: {', '.join(map(str, lengths))}"
        held += len(listed.run)
        if held > MAX_HELD:
            return "hello.inventory", f"has more than {MAX_HELD} attempts"
        if any(not 0 <= run < len(listed.run_uids) for run in listed.run):
            return f"{where}.run", f"has an index that is not 0 to {len(listed.run_uids) - 1}"
        for part, numbers in (("task", listed.task), ("n", listed.n), ("generation", listed.generation)):
            if min(numbers, default=0) < 0:
                return f"{where}.{part}", f"has a negative number: {min(numbers)}"
        for part, texts in (("run_uids", listed.run_uids), ("nonce", listed.nonce)):
            if max(map(len, texts), default=0) > MAX_WORD:
                return f"{where}.{part}", f"has a text of more than {MAX_WORD} characters"
    return None
