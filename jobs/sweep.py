"""Compares pruning methods at several keep ratios on one manifest: `python jobs/sweep.py --help`."""

import sys

from pipeline.commands import sweep as main

if __name__ == "__main__":
    sys.exit(main())
