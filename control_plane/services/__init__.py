"""The gRPC edge: validate, translate, delegate. No decisions (DESIGN 2)."""
