"""The command that compares with recorded vectors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

COMMAND = Path(__file__).with_name("check_reference.py")
RECORDED = Path(__file__).parents[3] / "shared" / "reference"


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, COMMAND, *paths], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not RECORDED.is_dir(), reason="recorded vectors are not beside the checkout")
def test_all_recorded_selections_are_equal() -> None:
    result = run(RECORDED / "vitcop_vectors.npz", RECORDED / "rivals")
    assert result.returncode == 0, result.stdout
    assert "vitcop 12/12 equal" in result.stdout


@pytest.mark.skipif(not RECORDED.is_dir(), reason="recorded vectors are not beside the checkout")
def test_a_changed_vector_is_noticed(tmp_path: Path) -> None:
    with np.load(RECORDED / "vitcop_vectors.npz") as arrays:
        changed = dict(arrays)
    changed["03/kept_indices"] = changed["03/kept_indices"] + 1
    np.savez(tmp_path / "vitcop_vectors.npz", **changed)
    result = run(tmp_path / "vitcop_vectors.npz")
    assert result.returncode == 1
    assert "case 03: kept_indices" in result.stdout and "11/12 cases equal" in result.stdout


def test_a_file_of_no_known_method_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "unknown.npz", a=np.zeros(1))
    result = run(tmp_path / "unknown.npz")
    assert result.returncode == 1 and "no check of that name" in result.stderr
