"""Measures a model's profile for `key_score=profile`: `python jobs/calibrate.py --help`."""

import sys

from pipeline.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
