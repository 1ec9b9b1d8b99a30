"""pyproject.toml against the sources: every import is declared in the group of its code, and nothing in vain."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline.commands import EXTRAS
from tests.sources import PACKAGES, ROOT, modules, top_level

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIBRARY, PIPELINE, REPORT = "", "pipeline", "report"


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(group: str) -> set[str]:
    """The distributions that a group of pyproject.toml lists itself; the library's have no group."""
    listed = PROJECT["dependencies"] if group == LIBRARY else PROJECT["optional-dependencies"][group]
    names = {normalised(re.match(r"[\w.-]+", each).group()) for each in listed}
    return names - {normalised(PROJECT["name"])}


def group_of(module: str) -> str:
    """The group that a module's imports belong to: it and those before it are installed where the module is used."""
    if module.split(".")[0] == "vitcop":
        return LIBRARY
    return REPORT if module.startswith("pipeline.sweep") else PIPELINE


def third_party(group: str) -> set[str]:
    """Top-level modules from other projects that the modules of a group import."""
    found = {each for name, path in modules().items() if group_of(name) == group for each in top_level(path)}
    return found - set(sys.stdlib_module_names) - set(PACKAGES)


def distributions(names: set[str]) -> set[str]:
    """The distributions that these modules come from."""
    known = packages_distributions()
    return {normalised(known[name][0]) for name in names}


def test_the_library_declares_what_it_imports_and_no_more() -> None:
    assert distributions(third_party(LIBRARY)) == declared(LIBRARY)


def test_the_pipeline_declares_what_it_imports_and_no_more() -> None:
    assert distributions(third_party(PIPELINE)) - declared(LIBRARY) == declared(PIPELINE)


def test_the_report_declares_what_else_the_sweep_imports_and_no_more() -> None:
    assert distributions(third_party(REPORT)) - declared(LIBRARY) - declared(PIPELINE) == declared(REPORT)


def test_the_commands_check_for_the_modules_of_their_extras() -> None:
    assert {group: distributions(set(names)) for group, names in EXTRAS.items()} == {
        group: declared(group) for group in (PIPELINE, REPORT)
    }


def test_the_makefile_installs_all() -> None:
    installs = re.findall(r"-e (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert installs == ["'.[all]'", "'.[test]'"]
    assert "vitcop-pipeline[all]" in PROJECT["optional-dependencies"]["test"]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_commands_are_there(command: str) -> None:
    module, name = PROJECT["scripts"][command].split(":")
    code = f"from {module} import {name}; {name}(['--help'])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "usage" in ran.stdout


def test_the_working_directory_of_a_job_wins_over_an_installed_package(tmp_path: Path) -> None:
    """A Ray job runs in a copy of the working directory, which Ray puts first on PYTHONPATH."""
    installed, job = tmp_path / "site-packages", tmp_path / "working_dir"
    for folder in (installed, job):
        (folder / "pipeline").mkdir(parents=True)
        (folder / "pipeline/__init__.py").touch()
        says = f"def videoqa(arguments=None):\n    print({folder.name!r})\n    return 0\n"
        (folder / "pipeline/commands.py").write_text(says)
    (job / "jobs").mkdir()
    (job / "jobs/videoqa.py").write_bytes((ROOT / "jobs/videoqa.py").read_bytes())
    # A directory added as site-packages are, after PYTHONPATH.
    code = (
        "import runpy, site, sys; site.addsitedir(sys.argv[1]); runpy.run_path('jobs/videoqa.py', run_name='__main__')"
    )
    for path, expected in ((str(job), "working_dir"), ("", "site-packages")):
        ran = subprocess.run(
            [sys.executable, "-P", "-c", code, str(installed)],
            cwd=job,
            env={"PATH": "", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stdout.strip()) == (0, expected), ran.stderr
