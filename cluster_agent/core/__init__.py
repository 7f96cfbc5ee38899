"""The pure core of the agent: events in, records and actions out.

What belongs here: every rule about what may start, what must stop and what may be forgotten, as functions of values.
What never enters: asyncio, clocks, chance, files, gRPC, protobuf, logging. `now` is an argument, in seconds of the
boot clock.
"""
