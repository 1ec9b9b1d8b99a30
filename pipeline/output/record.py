"""The fingerprint of a run (the settings that decide its answers), and `run.json`, kept up to date while it runs."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

import pipeline
from pipeline.config import JobConfig, SweepJobConfig, to_mapping
from pipeline.output.events import ClipDone, Event
from pipeline.output.folder import OutputFolder

PACKAGES = ("torch", "transformers", "ray", "decord2", "av", "pyarrow", "numpy", "jinja2")

HEARTBEAT_SECONDS = 10.0
MISSED_BEATS = 6
"""A run whose heartbeat is late by so many beats is taken to be dead."""

_NO_INFLUENCE = {
    "model": ("device",),
    "frames": ("decode_timeout", "decode_threads", "decode_memory"),
    "sweep": ("kind", "cost_clips", "cost_rounds", "gallery_clips", "gallery_ratio"),
}
"""Settings that don't change an answer: where and for how long the job runs, and what its report shows."""
_NO_ANSWERS = ("input", "run")


def fingerprint(config: JobConfig | SweepJobConfig, revision: str, extras: pa.Schema) -> dict[str, Any]:
    """All settings that an answer depends on, as nested plain values.

    Args:
        revision: the commit or content hash that `config.model` stands for at this moment.
        extras: the columns that are carried through, since all parts share one schema.
    """
    settings = to_mapping(config)
    # Settings that don't change an answer are left out, so that a resumed run may change them.
    groups: dict[str, Any] = {
        group: _without(settings[group], _NO_INFLUENCE.get(group, ())) for group in settings if group not in _NO_ANSWERS
    }
    groups["model"]["revision"] = revision
    # The number of frames that uniform sampling takes, whether given or by default; None with --fps.
    groups["frames"]["num_frames"] = config.frames.uniform_frames
    groups["columns"] = {field.name: str(field.type) for field in extras}
    return groups


class RunRecord:
    """`run.json` from the start of a run to its end; a listener of the run.

    While the run lasts it says `running`, with a heartbeat every `interval` seconds and the rows that are done. At the
    end of the context it says `state` and what is in `closing`. A run that was killed stays `running`, and its
    heartbeat tells (`run_state`).

    Attributes:
        state: how the run ended; "failed" until it is set.
        closing: what the record says at the end beside the state.
    """

    def __init__(
        self,
        folder: OutputFolder,
        config: JobConfig | SweepJobConfig,
        identity: Mapping[str, object],
        *,
        rows: int,
        done: int,
        interval: float = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            rows: of the manifest; `done` of them were finished before.
            interval: seconds from one heartbeat to the next.
            clock: seconds that only grow.
        """
        self.folder, self.done, self.errors = folder, done, 0
        self.interval, self.clock, self.last_beat = interval, clock, clock()
        self.state = "failed"
        self.closing: Mapping[str, object] = {}
        # Written with every heartbeat, as the file is always replaced whole.
        self._fixed = {
            "started": now(),
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
            "config": to_mapping(config),
            "fingerprint": identity,
        }

    def __enter__(self) -> Self:
        self._beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.write_run({"state": self.state, "ended": now()} | dict(self.closing) | self._fixed)

    def __call__(self, event: Event) -> None:
        if isinstance(event, ClipDone):
            self.done += event.rows
            self.errors += event.errors
        if self.clock() - self.last_beat >= self.interval:
            self._beat()

    def _beat(self) -> None:
        self.last_beat = self.clock()
        process = {"host": platform.node(), "pid": os.getpid(), "interval": self.interval}
        progress = {"done": self.done, "errors": self.errors}
        self.folder.write_run({"state": "running", "heartbeat": now()} | progress | {"process": process} | self._fixed)


def run_state(record: Mapping[str, Any]) -> str:
    """The state of a run as its record shows it at this moment: `killed` if its heartbeat has stopped.

    Args:
        record: `run.json` as it was read.
    """
    if record["state"] != "running" or "heartbeat" not in record:
        return str(record["state"])
    # Both clocks are UTC; the extra second covers the rounding of the stored time.
    silence = (datetime.now(UTC) - datetime.fromisoformat(record["heartbeat"])).total_seconds()
    return "running" if silence < MISSED_BEATS * record["process"]["interval"] + 1 else "killed"


def now() -> str:
    """The time as `run.json` says it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for an answer."""
    own = {"python": platform.python_version(), "pipeline": pipeline.__version__}
    return own | {package: version(package) for package in PACKAGES}


def machine() -> dict[str, str]:
    """The machine that the driver runs on; workers of a cluster may run on others."""
    import torch  # late, as --help and manifests do without it

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "gpus": ", ".join(gpus) or "none",
    }


def _without(mapping: Mapping[str, object], names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name, value in mapping.items() if name not in names}
