"""Writes the sampled frames of a file, or a contact sheet of them."""

import sys

from pipeline.video.decode import main

sys.exit(main())
