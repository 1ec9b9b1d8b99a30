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


def modules(folder: str) -> dict[str, Path]:
    """Module name -> file, for all of a folder."""
    paths = (ROOT / folder).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def edges(folder: str) -> dict[str, set[str]]:
    """Module -> the modules of the folder that it imports, those under TYPE_CHECKING and in functions counted.

    A module's own package face is left out: it hands on what the modules below it define.
    """
    known = modules(folder)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [part if part in known else node.module or "" for part in parts]
            else:
                continue
            found[name] |= {target for target in targets if target in known and not f"{name}.".startswith(f"{target}.")}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := visit(target, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_imports_of_the_library_go_in_a_circle() -> None:
    assert circle(edges("vitcop")) == []


def test_a_circle_of_imports_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circle(graph) == ["b", "c"]
    assert circle(graph | {"c": set()}) == []


def test_the_folders_of_the_library_import_downwards() -> None:
    """Operations know no method, family or hook; families know no method, and methods know no family or hook.

    Methods read profiles, so profiles know none of them; what chooses among methods stands above all.
    """
    rules = {
        "vitcop.ops": ("vitcop.methods", "vitcop.families", "vitcop.language", *HOOKS),
        "vitcop.families": ("vitcop.methods", "vitcop.calibration", *HOOKS),
        "vitcop.methods": ("vitcop.families", *HOOKS),
        "vitcop.calibration.profiles": ("vitcop.methods", "vitcop.families", *HOOKS),
        "vitcop.calibration.measure": ("vitcop.methods", "vitcop.pruning"),
        "vitcop.language": ("vitcop.methods", "vitcop.families", *HOOKS),
    }
    graph = edges("vitcop")
    for below, above in rules.items():
        mine = [name for name in graph if f"{name}.".startswith(f"{below}.")]
        assert mine
        for name in mine:
            wrong = [target for target in graph[name] if f"{target}.".startswith(tuple(f"{part}." for part in above))]
            assert not wrong, f"{name} imports {wrong}"


HOOKS = ("vitcop.pruning", "vitcop.prefill", "vitcop.cache", "vitcop.inputs", "vitcop.vision")
"""What `prune` is made of."""


def test_the_library_imports_nothing_of_the_pipelines() -> None:
    wrong = {"ray", "decord", "av", "pyarrow", "matplotlib", "tyro", "PIL", "pipeline", "jobs", "benchmarks", "tests"}
    assert not {(path, name) for path, name in imported("vitcop") if name in wrong}


@pytest.mark.parametrize(("folder", "above"), [("vitcop", {"pipeline", "jobs"}), ("pipeline", {"jobs"})])
def test_nothing_is_imported_from_above(folder: str, above: set[str]) -> None:
    assert not {(path, name) for path, name in imported(folder) if name in above}


def test_ray_is_imported_in_one_folder_of_the_pipeline() -> None:
    assert {str(Path(path).parent) for path, name in imported("pipeline") if name == "ray"} == {"pipeline/cluster"}


@pytest.mark.parametrize("package", ["ray", "decord", "av"])
def test_importing_vitcop_does_not_load(package: str) -> None:
    code = f"import sys, vitcop; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
