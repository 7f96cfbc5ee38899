"""The guard: the process outside the agent that spawns workloads, holds their lease timers and kills them (PROTOCOL
G1-G5).

Standard library only, and no asyncio: it forks for every workload, so it stays small, and what it does not load cannot
hold a lock or a thread at that moment.
"""
