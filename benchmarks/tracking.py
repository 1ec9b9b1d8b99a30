"""Peak memory of a run by the allocator's own count, and which tensors hold the peak."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Peak:
    """Most bytes at one time, above what was there before the run, and who allocated them, largest first."""

    bytes: int
    holders: tuple[tuple[str, int], ...]


def peak_memory(run: Callable[[], Any], model: nn.Module, device: torch.device) -> Peak:
    """Run once and follow every allocation.

    Every allocation and release that torch's allocator on the device reports to the profiler is added up; scratch
    memory that a library takes elsewhere is not seen. On a GPU the peak is `torch.cuda.max_memory_allocated`, of a
    run of its own, and the profiler only tells who holds it.
    """
    measured = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        measured = torch.cuda.max_memory_allocated(device) - before
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with _named_modules(model), profile(activities=activities, profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    followed = follow(sorted(_allocations(results.experimental_event_tree(), device.type)))
    return followed if measured is None else Peak(measured, followed.holders)


def follow(events: list[tuple[int, int, int, str]]) -> Peak:
    """The peak of a history of (time, signed bytes, address, who)."""
    levels = list(itertools.accumulate((size for _, size, _, _ in events), initial=0))
    peak = max(levels)
    alive: dict[int, tuple[str, int]] = {}
    for _, size, address, who in events[: levels.index(peak)]:
        if size > 0:
            alive[address] = (who, size)
        else:
            alive.pop(address, None)
    holders: Counter[str] = Counter()
    for who, size in alive.values():
        holders[who] += size
    return Peak(peak, tuple(holders.most_common()))


def _allocations(events: Any, device: str, path: tuple[str, ...] = ()) -> Iterator[tuple[int, int, int, str]]:
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == device:
                yield event.start_time_ns, fields.alloc_size, fields.ptr, _who(path)
        else:
            yield from _allocations(event.children, device, (*path, event.name))


def _who(path: tuple[str, ...]) -> str:
    """The innermost module and the outermost operation in it, layers of a stack not told apart."""
    modules = [place for place, name in enumerate(path) if name.startswith(MODULE)]
    place = modules[-1] if modules else -1
    module = re.sub(r"\.\d+\b", ".*", path[place].removeprefix(MODULE)) if modules else ""
    operation = path[place + 1] if place + 1 < len(path) else ""
    return f"{module} {operation.removeprefix('aten::')}".strip() or "outside the model"


MODULE = "module: "


def named(name: str) -> record_function:
    """A context whose allocations go under this name."""
    return record_function(MODULE + name)


@contextmanager
def _named_modules(model: nn.Module) -> Iterator[None]:
    """Mark in the profile which module is running."""
    names = {id(module): name for name, module in model.named_modules()}
    running: list[tuple[int, Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            running.append((id(module), named(names[id(module)] or "model")))
            running[-1][1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if running and running[-1][0] == id(module):
            running.pop()[1].__exit__(None, None, None)

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
