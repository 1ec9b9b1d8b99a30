"""Measures a model's profile for `key_score=profile`: `python jobs/calibrate.py --help`."""

import sys

from pipeline.commands import calibrate as main

if __name__ == "__main__":
    sys.exit(main())
