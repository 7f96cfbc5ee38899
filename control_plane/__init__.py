"""The control plane: replicas that own shards of runs, decide by pure cores, and make decisions true by fenced transactions.

Never imports `cluster_agent`; the two planes meet only in `baton.v1`.
"""
