"""Tests of tiny models: one thread, no gradients, no warnings about their unusual configs."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from tests.vitcop.models import SETUPS

FAMILIES = list(SETUPS)


@pytest.fixture(scope="session", autouse=True)
def quiet_single_thread() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
