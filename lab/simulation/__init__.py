"""The simulator: a whole federation in one process, under virtual time, with seeded faults and checked promises (DESIGN 12.3).

`world` builds it from a seed, `faults` harms it, `workload` uses it, `checkers` read only what was recorded, `story` tells it.
"""
