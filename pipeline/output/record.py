"""What has to be the same for two results to stand in one folder, and what made them."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pyarrow as pa

import pipeline
from pipeline.config import JobConfig, SweepJobConfig, to_mapping

PACKAGES = ("torch", "transformers", "ray", "decord2", "av", "pyarrow", "numpy")

_NO_INFLUENCE = {
    "model": ("device",),
    "frames": ("decode_timeout",),
    "sweep": ("kind", "cost_clips", "cost_rounds", "gallery_clips", "gallery_ratio"),
}
"""Settings that say where, for how long, or what is made of the answers; not what is answered."""
_NO_ANSWERS = ("input", "run")


def fingerprint(config: JobConfig | SweepJobConfig, revision: str, extras: pa.Schema) -> dict[str, Any]:
    """Everything that an answer depends on, as nested plain values.

    Args:
        revision: the commit or content hash that `config.model` stands for at this moment.
        extras: the columns that are carried through, since all parts share one schema.
    """
    settings = to_mapping(config)
    groups: dict[str, Any] = {
        group: _without(settings[group], _NO_INFLUENCE.get(group, ())) for group in settings if group not in _NO_ANSWERS
    }
    groups["model"]["revision"] = revision
    groups["frames"]["num_frames"] = config.frames.uniform_frames
    groups["columns"] = {field.name: str(field.type) for field in extras}
    return groups


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for an answer."""
    own = {"python": platform.python_version(), "pipeline": pipeline.__version__}
    return own | {package: version(package) for package in PACKAGES}


def machine() -> dict[str, str]:
    """What the driver runs on; the workers of a cluster may run on others."""
    import torch  # late, as --help and manifests do without it

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "gpus": ", ".join(gpus) or "none",
    }


def _without(mapping: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}
