"""`python -m pipeline.sweep.report SWEEP ...` writes the reports of sweeps' folders again."""

import sys
from pathlib import Path

import tyro

from pipeline.errors import ConfigError
from pipeline.sweep.report import write_report


def main(sweeps: tyro.conf.Positional[tuple[Path, ...]]) -> int:
    """Writes report.html, report.md and plots/ into each of the folders.

    Args:
        sweeps: output folders of jobs/sweep.py.
    """
    if not sweeps:
        print("error: name the output folder of a sweep that has finished", file=sys.stderr)
        return 1
    try:
        for sweep in sweeps:
            print(write_report(sweep))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
