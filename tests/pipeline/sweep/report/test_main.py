"""The report's command."""

from pathlib import Path

import pytest

from pipeline.sweep.report.__main__ import main
from tests.pipeline.sweep.sweeps import SMALL, make_sweep


def test_each_folder_gets_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        make_sweep(tmp_path / name, skills=SMALL, ratios=(0.1,), questions=8, gallery=False) for name in ("a", "b")
    ]
    assert main(tuple(folders)) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html") for folder in folders]
    assert all((folder / "report.md").is_file() for folder in folders)


def test_a_folder_without_a_sweep_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main((tmp_path,)) == 1 and str(tmp_path) in capsys.readouterr().err
    assert main(()) == 1 and "output folder of a sweep" in capsys.readouterr().err
