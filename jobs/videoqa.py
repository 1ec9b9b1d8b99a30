"""Answers the questions of a manifest about its videos: `python jobs/videoqa.py --help`."""

import sys

from pipeline.commands import videoqa as main

if __name__ == "__main__":
    sys.exit(main())
