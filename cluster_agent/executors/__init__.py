"""Executors: what spawns, watches and kills workloads. One port (`base`), several adapters under one contract suite."""
