"""PURE. Every rule of the control plane lives here: values in, values out.

No asyncio, clock, chance, I/O, logging, protobuf, third party. `now` is an argument (wall seconds, UTC), nonces come in with
the batch. `apply` is the only thing that changes a state, deterministically; `handle` decides by emitting events, each of
which is applied at once, so that the next decision of the batch sees it (PROTOCOL J1, J2).
"""
