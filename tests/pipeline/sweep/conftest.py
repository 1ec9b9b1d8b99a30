"""Two rendered videos with questions."""

from pathlib import Path

import pytest

from pipeline.embedded.demo import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of two rendered videos with three questions each."""
    return write_dataset(tmp_path_factory.mktemp("dataset"), 2, questions_per_clip=3)
