"""`python -m pipeline.sweep.report SWEEP` writes the report of a sweep's folder again."""

import sys
from pathlib import Path

import tyro

from pipeline.errors import ConfigError
from pipeline.sweep.report import write_report


def main(sweep: tyro.conf.Positional[Path]) -> int:
    """Writes SWEEP/report.html, SWEEP/report.md and SWEEP/plots/.

    Args:
        sweep: output folder of jobs/sweep.py.
    """
    try:
        print(write_report(sweep))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
