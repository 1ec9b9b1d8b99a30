"""The installed commands: `videoqa`, `videoqa-sweep` and `videoqa-calibrate`. `jobs/` runs the same functions.

Each command checks first that the packages of its extra are installed, and imports its job only then. So the library
alone can be installed, and a command still says which packages it lacks and how to get them.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

MISSING_PACKAGES = 1

EXTRAS = {
    "pipeline": (
        "PIL",
        "av",
        "decord",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "pyarrow",
        "ray",
        "safetensors",
        "tokenizers",
        "tqdm",
        "tyro",
        "yaml",
    ),
    "report": ("matplotlib", "scipy"),
}
"""By extra (see pyproject.toml), the modules that it installs; `report` brings those of `pipeline` with it."""


def videoqa(arguments: Sequence[str] | None = None) -> int:
    """Answer the questions of a manifest; returns the exit code."""
    if not installed("videoqa", "pipeline"):
        return MISSING_PACKAGES
    from pipeline.videoqa import main

    return main(arguments)


def sweep(arguments: Sequence[str] | None = None) -> int:
    """Compare pruning methods and write the report; returns the exit code."""
    if not installed("videoqa-sweep", "pipeline", "report"):
        return MISSING_PACKAGES
    from pipeline.sweep.run import main

    return main(arguments)


def calibrate(arguments: Sequence[str] | None = None) -> int:
    """Measure a model's profile; returns the exit code."""
    if not installed("videoqa-calibrate", "pipeline"):
        return MISSING_PACKAGES
    from pipeline.calibrate import main

    return main(arguments)


def installed(command: str, *extras: str) -> bool:
    """Whether all modules of these extras are there; says on stderr which are not, and what installs them.

    Args:
        extras: the last of them is the one to install; it brings the others with it.
    """
    missing = [name for extra in extras for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        fix = f"pip install 'vitcop-pipeline[{extras[-1]}]', or '.[{extras[-1]}]' in a checkout"
        print(f"error: {command} needs {', '.join(missing)}, not installed here: {fix}", file=sys.stderr)
    return not missing
