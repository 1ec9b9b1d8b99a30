"""Random scores at ViTCoP's stages."""

from __future__ import annotations

import pytest
import torch

from tests.vitcop.methods.seen import RATIO, choices, model_of, prefill
from tests.vitcop.models import make_inputs
from vitcop.methods import RandomStages, ViTCoP


def test_random_stages_keep_vitcops_counts_and_differ_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("llava_onevision"), make_inputs("llava_onevision")
    theirs = prefill(model, inputs, ViTCoP(retention_ratio=RATIO))[1]
    kept = []
    for seed in range(2):
        method = RandomStages(retention_ratio=RATIO, seed=seed)
        assert prefill(model, inputs, method)[1] == theirs
        kept.append(choices(model, inputs, method, monkeypatch)[-1])
    assert not torch.equal(*kept)
