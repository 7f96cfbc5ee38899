"""Artifacts in the control plane: the object store's port and adapters, the gateway in front of it, the sweeper behind it."""
