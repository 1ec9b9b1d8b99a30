"""What the workers of a sweep do with a clip, and what it takes to add a method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest
import torch

from pipeline.config import SweepConfig, SweepJobConfig
from pipeline.manifest import Clip, Row, group_clips, load_manifest
from pipeline.sweep.costs import SweepMeasurer, merge_costs
from pipeline.sweep.worker import SweepAnswerer, SweepModel
from vitcop.budget import Geometry, Plan, single_stage
from vitcop.methods import METHODS, Method
from vitcop.selection import Selection
from vitcop.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FirstTokens(Method):
    """A method as a user would add it: keeps the first tokens."""

    name: ClassVar[str] = "first_tokens"

    def plan(self, geometry: Geometry) -> Plan:
        return single_stage(geometry, self.retention_ratio)

    def select_frames(self, tokens: VisualTokens, plan: Plan, geometry: Geometry) -> Selection:
        return Selection(keep=torch.arange(plan.entering).expand(len(tokens.features), -1))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, FirstTokens.name, FirstTokens)
    return FirstTokens.name


def test_a_registered_method_runs_through_the_sweep(dataset: Path, added: str) -> None:
    settings = SweepConfig(methods=(added,), keep_ratios=(0.25,), cost_rounds=1)
    config = SweepJobConfig(sweep=settings)
    (clip, *_) = group_clips(load_manifest(str(dataset)).rows)
    answerer = SweepAnswerer(config, True, 1)
    full, ours = answerer.answer(clip, answerer.decode(clip))
    assert [cell.name for cell in answerer.cells] == ["none", f"{added}-0.25"] and len(ours) == len(clip.rows)
    assert all(row["status"] == "ok" and row["visual_tokens_kept"] == 72 for row in ours)
    assert all(row["visual_tokens_kept"] == row["visual_tokens_full"] == 288 for row in full)

    measurer = SweepMeasurer(config, False, 1)
    measured = measurer.answer(clip, measurer.decode(clip))
    assert np.array_equal(measured.gallery[f"{added}-0.25"]["stages"]["vision"], np.arange(72))
    costs: Any = merge_costs([measured, measured])[f"{added}-0.25"]
    assert costs["cost_runs"] == 2 * costs["cost_rounds"] >= 4, "one round can't be checked, so there are more"
    assert costs["seconds_total_low"] <= costs["seconds_total"] <= costs["seconds_total_high"]


def test_frame_counts_share_one_decoding(dataset: Path) -> None:
    config = SweepJobConfig(sweep=SweepConfig(methods=("vitcop",), keep_ratios=(0.25,), frame_counts=(4, 8)))
    (clip, *_) = group_clips(load_manifest(str(dataset)).rows)
    answerer = SweepAnswerer(config, True, 1)
    answers = answerer.answer(clip, answerer.decode(clip))
    assert [(cell.name, rows[0]["num_frames"]) for cell, rows in zip(answerer.cells, answers, strict=True)] == [
        ("none-4f", 4),
        ("none-8f", 8),
        ("vitcop-0.25-4f", 4),
        ("vitcop-0.25-8f", 8),
    ]


@pytest.mark.parametrize("kind", [SweepAnswerer, SweepMeasurer])
def test_device_error_ends_a_sweeps_worker(kind: type[SweepModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_device(*_: object) -> NoReturn:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(SweepModel, "by_frames", lose_device)
    clip = Clip("v.mp4", None, None, (Row(index=0, sample_id="a", video="v.mp4", path="v.mp4", question="q"),))
    with pytest.raises(SystemExit, match="illegal memory access"):
        kind.__new__(kind).answer(clip, [])
