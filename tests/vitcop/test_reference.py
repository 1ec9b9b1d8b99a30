"""Selections against those that the published code made of the same inputs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.vitcop import check_reference
from tests.vitcop.check_reference import CHECKS
from tests.vitcop.reference_checks import load_cases

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
RECORDED = Path(__file__).parents[3] / "shared" / "reference"
"""The full recordings, of which `VECTORS` holds a part."""
NOT_COMPARED = {"kept_with_newline"}  # newline tokens after each row of a frame, which no supported family has


@pytest.mark.parametrize("name", CHECKS)
def test_selections_equal_those_of_the_published_code(name: str) -> None:
    differing = {number: CHECKS[name](case) for number, case in load_cases(VECTORS / f"{name}.npz").items()}
    assert differing and not any(differing.values()), differing


@pytest.mark.parametrize("name", CHECKS)
def test_a_changed_selection_is_noticed(name: str) -> None:
    """Each recorded list of kept tokens is told apart from one with its last token exchanged."""
    for number, case in load_cases(VECTORS / f"{name}.npz").items():
        kept = {key for key in case if {"kept", "keep"} & set(key.split("_"))} - NOT_COMPARED
        lists = [key for key in sorted(kept) if case[key].dim() and case[key].numel()]
        assert lists
        for key in lists:
            changed = case[key].clone()
            changed.view(-1)[-1] += 1
            assert CHECKS[name](case | {key: changed}), f"case {number}: {key}"


def test_the_command_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vitcop_vectors.npz"
    with np.load(VECTORS / path.name) as arrays:
        np.savez(path, **{**arrays, "05/kept_indices": arrays["05/kept_indices"] + 1})
        cases = {key.split("/")[0] for key in arrays}
    assert check_reference.main([str(path)]) == 1
    told = capsys.readouterr().out
    assert "case 05: kept_indices" in told and f"{len(cases) - 1}/{len(cases)} cases equal" in told


def test_a_file_of_no_known_method_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "unknown.npz", a=np.zeros(1))
    with pytest.raises(SystemExit, match="no check of that name"):
        check_reference.main([str(tmp_path / "unknown.npz")])


def test_the_command_runs_by_itself() -> None:
    command = [sys.executable, check_reference.__file__, VECTORS / "evs.npz"]
    assert subprocess.check_output(command, text=True, timeout=60).endswith("2/2 cases equal\n")


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the full recordings are not beside the checkout")
def test_all_recorded_selections_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_reference.main([str(RECORDED / "vitcop_vectors.npz"), str(RECORDED / "rivals")]) == 0
    assert "vitcop 12/12 equal" in capsys.readouterr().out
