"""Joining or starting a Ray cluster, and what each worker gets of it."""

import logging
import os
import socket
from dataclasses import dataclass

import ray

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How work is spread over the cluster.

    Attributes:
        workers: models loaded at once. None: one per GPU of the cluster, or one when it has none.
        gpus_per_worker: None: 1 when the cluster has GPUs, else 0.
        decode_ahead: clips that a worker has decoded beside the one it answers.
        decode_timeout: seconds from the start of a decode until its process is killed.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    decode_ahead: int = 2
    decode_timeout: float = 120.0


@dataclass(frozen=True)
class Resources:
    """The number of workers, and what each of them gets of the cluster."""

    workers: int
    gpus: float
    threads: int


def connect() -> bool:
    """Joins the cluster, or starts one on this machine; returns whether it has to be left again."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray's own choice is 15, with which the model stands still whenever the machine has something else to do.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init("local", include_dashboard=False, **quiet)
        return True
    # Checked first, because Ray would retry a wrong address for minutes.
    try:
        _check_listening(address)
        ray.init(address, **quiet)
    except (OSError, ValueError) as error:
        raise ConfigError(f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there: {error}") from error
    return True


def _check_listening(address: str) -> None:
    """Raises OSError when nothing listens at a HOST:PORT; Ray itself would try again for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def worker_resources(config: EngineConfig) -> Resources:
    """The resources that each worker gets of this cluster.

    Raises:
        ConfigError: the cluster has less than is asked for.
    """
    cluster = ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0.0), int(cluster.get("CPU", 0))
    each = config.gpus_per_worker
    if each is None:
        each = 1.0 if gpus else 0.0
    # As many models as the GPUs hold; without GPUs one, which has all CPUs.
    workers = config.workers or (max(1, int(gpus / each)) if each else 1)
    if workers * each > gpus:
        raise ConfigError(f"{workers} workers with {each:g} GPUs each need more than the {gpus:g} GPUs of this cluster")
    if not cpus:
        raise ConfigError("this cluster has no CPUs, and decoding needs one; start a node with --num-cpus")
    # CPU threads are shared out evenly; decode tasks compete for the same CPUs.
    return Resources(workers, each, max(1, cpus // workers))
