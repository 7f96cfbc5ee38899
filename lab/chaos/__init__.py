"""Chaos on real processes: real etcd members, replicas, agents and guards are killed, frozen and cut off while work goes on.

The simulator explores many orders of few things; this explores few orders of everything: kernels, sockets, disks, real
clocks. Both are judged by the same checkers (`lab.checking`), from what others than Baton's processes wrote down.
"""
