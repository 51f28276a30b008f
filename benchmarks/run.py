"""Measure attention against its peers: ``hf-flash-mc bench`` with its file in benchmarks/results.

python -m benchmarks.run --quick --time-limit 150
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_flash_mc.measure.run import main as run

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    return run(sys.argv[1:] if arguments is None else arguments, "python -m benchmarks.run", RESULTS)


if __name__ == "__main__":
    sys.exit(main())
