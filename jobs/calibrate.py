"""Measures a model's profile for pruning on a few unlabelled videos: `python jobs/calibrate.py --help`."""

import sys

from pipeline.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
