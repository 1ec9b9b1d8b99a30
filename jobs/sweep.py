"""Compares pruning methods at several keep ratios on one manifest, and writes a report to look at.

Every cell (method, ratio, frames, seed) answers the same questions: one Ray run loads the model once a worker, decodes
each clip once, and runs the vision tower once for all methods that can share it. Then one worker, alone on the machine,
times the cells in turn. Without --manifest it renders a small set of videos with questions.

OUTPUT/answers holds a row for each question and cell, OUTPUT/cells.parquet a row for each cell, OUTPUT/report.html,
report.md and plots/ what people read. Exit codes are those of jobs/videoqa.py; the same command continues.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import SweepJobConfig, parse
from pipeline.errors import ConfigError
from pipeline.sweep.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sweep that the command line describes; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return run(parse(SweepJobConfig, arguments, __doc__))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
