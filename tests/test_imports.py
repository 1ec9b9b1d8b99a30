"""Imports go jobs -> pipeline -> vitcop, and the library stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(folder: str) -> set[tuple[str, str]]:
    """(file, top-level package) of every import in a folder."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(str(path.relative_to(ROOT)), name.split(".")[0]) for name in names}
    return found


@pytest.mark.parametrize(("folder", "above"), [("vitcop", {"pipeline", "jobs"}), ("pipeline", {"jobs"})])
def test_nothing_is_imported_from_above(folder: str, above: set[str]) -> None:
    assert not {(path, name) for path, name in imported(folder) if name in above}


def test_ray_is_imported_in_one_folder_of_the_pipeline() -> None:
    assert {str(Path(path).parent) for path, name in imported("pipeline") if name == "ray"} == {"pipeline/cluster"}


@pytest.mark.parametrize("package", ["ray", "decord", "av"])
def test_importing_vitcop_does_not_load(package: str) -> None:
    code = f"import sys, vitcop; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
