"""The agent plane: one agent per cluster runs work locally, holds its session with the control plane, and obeys its
fences.

Never imports `control_plane`; the two planes meet only in `baton.v1`.
"""
