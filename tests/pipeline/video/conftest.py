"""Each video of the cases is written once for all tests."""

from pathlib import Path

import pytest

from tests.pipeline.video.cases import FRAMES, MADE, Make
from tests.pipeline.videos import write_video


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes the named video once."""
    folder = tmp_path_factory.mktemp("videos")

    def write(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, FRAMES, **MADE[name])

    return write
