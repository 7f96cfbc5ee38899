"""The lab: a local federation of real processes, a fault proxy, the simulator and the history checkers.

The only package that may import both planes. Nothing imports it, except the CLI through an entry point.
"""
