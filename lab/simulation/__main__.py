"""`python -m lab.simulation`: see `scripts/sim`."""

import sys

from lab.simulation.cli import main

if __name__ == "__main__":
    sys.exit(main())
