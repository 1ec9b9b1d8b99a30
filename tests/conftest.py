"""One local Ray for all tests that need it."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """A Ray instance in which the engine finds 2 CPUs and no GPU; its address."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # as the engine does
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
