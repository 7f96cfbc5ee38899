"""`python -m lab.chaos`: see `scripts/chaos`."""

import sys

from lab.chaos.ending import Ending, Interrupted


def _main() -> int:
    ending = Ending()
    try:
        ending.listen()
        from lab.chaos.cli import main  # noqa: PLC0415 - it takes a second, in which a signal may come already

        return main(sys.argv[1:], ending)
    except Interrupted as interrupted:
        print("chaos: interrupted; nothing is left running", file=sys.stderr)
        return int(interrupted.code or 0)
    finally:
        ending.over()


if __name__ == "__main__":
    sys.exit(_main())
