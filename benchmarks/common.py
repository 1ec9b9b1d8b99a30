"""What the benchmarks share: the machine's name and versions, interleaved timing, and where results go."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

Measured = TypeVar("Measured")

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, accelerator and versions: what a figure depends on beside the code."""
    described: dict[str, Any] = {
        "device": str(device),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return described


def _processor() -> str:
    """The processor's name; platform.processor() is empty or only the architecture on most Linux systems."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one run, the device's queue included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(runs: Mapping[str, Callable[[], Measured]], repeats: int, warm_up: int = 1) -> dict[str, list[Measured]]:
    """Measure several variants in turn, A B A B, so that a machine that slows down slows all of them.

    Args:
        runs: each makes one measurement and returns it.
    """
    for _ in range(warm_up):
        for run in runs.values():
            run()
    measured: dict[str, list[Measured]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            measured[name].append(run())
    return measured


def medians(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median of each phase over runs."""
    phases = {phase for run in measured for phase in run}
    return {phase: statistics.median(run.get(phase, 0.0) for run in measured) for phase in sorted(phases)}


def publish(name: str, result: dict[str, Any], save: bool) -> None:
    """Print a result as JSON, and keep it as results/NAME-MACHINE.json if asked."""
    text = json.dumps(result, indent=1)
    print(text)
    if save:
        described = result["machine"]
        label = described.get("gpu") or f"{described['processor']} {described['threads']} threads"
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}-{slug}.json").write_text(text + "\n")
