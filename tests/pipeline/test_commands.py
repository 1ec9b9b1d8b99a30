"""Commands where their extra is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands import EXTRAS, installed

ROOT = Path(__file__).parents[2]

WITHOUT = """
import importlib.util, sys
find_spec, missing = importlib.util.find_spec, set(sys.argv[1].split(","))
importlib.util.find_spec = lambda name, *rest: None if name in missing else find_spec(name, *rest)

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
import pipeline.commands
sys.exit(getattr(pipeline.commands, sys.argv[2])([]))
"""


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("videoqa", EXTRAS["pipeline"], "pipeline"),
        ("videoqa", ("ray",), "pipeline"),
        ("sweep", ("matplotlib", "scipy"), "report"),
        ("sweep", ("decord", "scipy"), "report"),
        ("calibrate", ("av",), "pipeline"),
    ],
)
def test_a_command_without_its_packages_names_them_and_what_installs_them(
    command: str, missing: tuple[str, ...], extra: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(missing), command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert f"needs {', '.join(missing)}, not installed" in line
    assert f"'vitcop-pipeline[{extra}]'" in line


def test_nothing_is_said_where_all_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert installed("videoqa-sweep", "pipeline", "report")
    assert capsys.readouterr() == ("", "")
