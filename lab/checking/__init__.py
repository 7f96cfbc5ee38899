"""Checkers of Baton's promises: each reads a recorded history, knows one invariant, and says in words where it was broken.

They ask nothing of a replica or an agent: a program that deceives itself must not deceive its judge. The same checkers
judge simulated and real histories (`history.Record` is what both have to write down).
"""
