"""The program: `dots-align`, and `python -m dots_align`, which `accelerate launch` runs on every process."""

import sys

from dots_align.cli import main


def run() -> None:
    main()
    if "dots_align.runtime" in sys.modules:  # not imported by what needs no torch
        from dots_align.runtime import leave

        leave()


if __name__ == "__main__":
    run()
