"""Measures which key score marks the visual tokens that a model's text looks at, and writes that model's profile.

The profile goes beside the model, where `--method vitcop --method-options key_score=profile` finds it.
Exits with 0 when it is written, and 1 when a setting, the model or a video is no good.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.calibrate import CalibrateConfig, write_profile
from pipeline.errors import ConfigError, RowError
from pipeline.video import VideoError
from vitcop import UnsupportedModelError
from vitcop.calibration import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrates as the command line says; returns its exit code."""
    config = tyro.cli(CalibrateConfig, args=arguments, description=__doc__)
    try:
        profile = write_profile(config)
    except (ConfigError, RowError, VideoError, UnsupportedModelError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
