"""Baton's public package: the wire contract (`v1`), the client SDK, the command line and the words both planes share.

Imports neither plane. What lives here is what a user may import; `clock` and `random` sources come from here so that
nothing else in the tree reads a clock or rolls a die on its own.
"""
