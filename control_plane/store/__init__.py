"""The store: a port (`base`), the key layout (`keys`), and two adapters under one contract suite (`etcd`, `memory`).

Nothing outside this package knows that etcd exists; no vendor exception leaves it.
"""
