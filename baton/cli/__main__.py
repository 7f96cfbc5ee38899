"""`python -m baton.cli`: the same as `baton`, where the script is not on PATH."""

from __future__ import annotations

from baton.cli import main

main(prog_name="baton")
