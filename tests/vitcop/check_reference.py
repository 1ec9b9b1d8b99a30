"""Run recorded reference vectors through the functions that the models use.

    python tests/vitcop/check_reference.py FILE_OR_FOLDER [...]

A file is named after its method (`fastv.npz`, `vitcop_vectors.npz`); a folder is searched for such files. Prints a
line for each file (`fastv 3/3 equal`) and what differs where something does; exit 1 if anything differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.vitcop.reference_checks import Check, before_model, inside_model, load_cases
from tests.vitcop.reference_checks.vitcop_stages import vitcop

CHECKS: dict[str, Check] = {"vitcop_vectors": vitcop} | before_model.CHECKS | inside_model.CHECKS


def matching(path: Path) -> list[str]:
    """The names of checks that a file's name begins with, up to a boundary (`fastvid` does not begin with `fastv`)."""
    return [name for name in CHECKS if re.match(rf"{name}(?![a-z0-9])", path.stem)]


def find_check(path: Path) -> Check:
    """The check whose name begins the file's name, the longest such."""
    names = matching(path)
    if not names:
        raise SystemExit(f"{path}: no check of that name; known are {', '.join(sorted(CHECKS))}")
    return CHECKS[max(names, key=len)]


def files(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*.npz") if matching(file))
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"{path}: no such file or folder")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    total = equal = 0
    for path in files(parser.parse_args(arguments).paths):
        check = find_check(path)
        results = {number: check(case) for number, case in load_cases(path).items()}
        good = sum(not differing for differing in results.values())
        label = path.stem.removesuffix("_vectors")
        print(f"{label} {good}/{len(results)} equal")
        for number, differing in results.items():
            if differing:
                print(f"  case {number}: {', '.join(differing)} differ")
        total, equal = total + len(results), equal + good
    print(f"{equal}/{total} cases equal")
    return 0 if total and equal == total else 1


if __name__ == "__main__":
    raise SystemExit(main())
