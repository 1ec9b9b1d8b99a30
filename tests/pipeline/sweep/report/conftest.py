"""A sweep with all its parts, and its report."""

from pathlib import Path

import pytest

from pipeline.sweep.report import write_report
from pipeline.sweep.report.data import Sweep, load_sweep
from tests.pipeline.sweep.sweeps import make_sweep


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with the report in it."""
    path = make_sweep(tmp_path_factory.mktemp("sweep"))
    assert write_report(path) == path / "report.html"
    return path


@pytest.fixture(scope="session")
def sweep(folder: Path) -> Sweep:
    return load_sweep(folder)
