"""The command line `baton`: a thin face over `baton.client`. `main` is the entry point."""

from __future__ import annotations

from baton.cli.root import main

__all__ = ["main"]
