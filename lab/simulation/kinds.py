"""The rows of the table of faults: what a seed may be struck with, and what is seen to have come of it.

Theory. A class of faults that never hits proves nothing, and neither does one that hits nothing: so a strike counts only if it did
something, what follows from strikes is counted where it takes effect, and every row is told, the silent ones too. Together the rows
name every fault that the simulator promises (issue 5: messages, processes, clocks, store, disks, versions).
"""

from __future__ import annotations

SECOND = "second agent of one name"
REPLICA_BEHIND = "a replica one version behind"
AGENT_BEHIND = "an agent one version behind"
SUSPENDED = "host suspended"
STORM = "over a third of the clusters gone"
STEP_AT_DEADLINE = "wall clock stepped at a deadline"
OUT_OF_SPACE = "store out of space"
LYING = "keepalive that lies"
RING_FLAP = "ring flapping"
LINK_FLAP = "link of a cluster flapping"

KINDS = (
    "replica killed",
    "replica frozen",
    "replica left in order",
    "agent killed",
    "agent frozen",
    "agent left in order",
    "agent drained",
    "agent's disk full",
    "wall clock stepped",
    STEP_AT_DEADLINE,
    "guard killed",
    "guard frozen",
    "host rebooted",
    "host frozen",
    SUSPENDED,
    "partition of a cluster",
    "one-way cut of a cluster",
    LINK_FLAP,
    STORM,
    "glimpse of a cluster",
    "partition of replicas",
    RING_FLAP,
    "message repeated",
    "message reordered",
    "request repeated",
    "store storm",
    "store sluggish",
    "store cut off",
    "store without quorum",
    "store leader changed",
    LYING,
    OUT_OF_SPACE,
    "store compacted",
    "store restored",
    "lease expired",
    "watch trouble",
    SECOND,
    REPLICA_BEHIND,
    AGENT_BEHIND,
)
"""What the nemesis strikes with: a strike that did nothing is not one."""

CLOCK_RATE = "clock rate off"
MESSAGE_LATE = "message late"
MESSAGE_LOST = "message lost"
OVERTOOK = "message overtook another"
REPEATED = "message repeated late"
CUT_OFF = "store call cut off"
NO_SPACE = "store write refused for want of space"
STALE_LEADER = "keepalive acknowledged by a stale leader"
AFTER_REVOKE = "keepalive acknowledged after a revoke"
TAIL_LOST = "un-synced tail of a disk lost"
REFUSED_OLDER = "older replica refused"
STALE_WORK = "lost cluster back with stale work"

DERIVED = (
    CLOCK_RATE,
    MESSAGE_LATE,
    MESSAGE_LOST,
    OVERTOOK,
    REPEATED,
    CUT_OFF,
    "store refused",
    "store refused (txn)",
    "store lost request",
    "store lost request (txn)",
    "store lost reply",
    "store lost reply (txn)",
    "store late",
    "store late (txn)",
    "store slow",
    NO_SPACE,
    STALE_LEADER,
    AFTER_REVOKE,
    "watch lag",
    "watch duplicate",
    "watch broken",
    "watch compacted",
    TAIL_LOST,
    REFUSED_OLDER,
    STALE_WORK,
)
"""What came of strikes, and what a world had from its beginning: counted where it takes effect."""
