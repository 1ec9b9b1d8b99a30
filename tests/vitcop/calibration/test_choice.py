"""The choice of a method without labels: by the divergence of the next token, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.vitcop.calibration.profiles import profile_of
from tests.vitcop.models import SETUPS, build, make_inputs
from vitcop import UnsupportedModelError, get_method, prune
from vitcop.calibration import Preset, Profile, report
from vitcop.calibration.choice import PRESETS, choose

SOME = [
    Preset(method="vitcop_video", options={}),
    Preset(method="vitcop_video", options={"bias": 1.0}),
    Preset(method="text_only", options={}),
]


def clips(family: str, count: int = 3) -> list[list[dict[str, Tensor]]]:
    """For each clip two prompts on the same pixels."""
    made = []
    for seed in range(count):
        first, second = make_inputs(family, seed=seed), make_inputs(family, (7,), seed=seed)
        name = next(name for name in first if name.startswith("pixel"))
        made.append([first, second | {name: first[name]}])
    return made


def along(model: PreTrainedModel, inputs: dict[str, Tensor], answer: Tensor) -> Tensor:
    """Log-probabilities (8, vocabulary) of eight tokens of an answer, by one forward."""
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer[:, :7]], dim=1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in whole:
            whole[name] = torch.nn.functional.pad(whole[name], (0, 7), value=int(name == "attention_mask"))
    return model(**whole).logits[0, -8:].double().log_softmax(dim=-1)


def test_the_divergence_is_that_of_the_tokens_of_the_answer(family: str) -> None:
    model = build(family)
    choice = choose(model, clips(family), 0.3, SOME[:2])
    for preset in SOME[:2]:
        method, values = get_method(preset.method)(retention_ratio=0.3, **preset.options), []
        for prompts in clips(family):
            for inputs in prompts:
                allowed = {"suppress_tokens": [SETUPS[family].token]}
                answer = model.generate(**inputs, max_new_tokens=8, do_sample=False, **allowed)[:, -8:]
                full = along(model, inputs, answer)
                with prune(model, method):
                    pruned = along(model, inputs, answer)
                values.append(torch.nn.functional.kl_div(pruned, full, reduction="sum", log_target=True).item() / 8)
        assert choice.divergences[preset.name] == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert choice.divergences[choice.preset.name] == min(choice.divergences.values())


def test_what_drops_everything_is_not_chosen() -> None:
    choice = choose(build("llava_next_video"), clips("llava_next_video", 6), 0.9, SOME)
    assert choice.preset.method == "vitcop_video" and choice.sure > 0 and choice.retention_ratio == 0.9
    assert list(choice.divergences) == ["vitcop_video", "vitcop_video:bias=1.0", "text_only"]


def test_every_preset_is_a_method_with_a_name_of_its_own() -> None:
    for preset in PRESETS:
        get_method(preset.method)(retention_ratio=0.1, **preset.options)
    assert len({preset.name for preset in PRESETS}) == len(PRESETS) == 21
    assert {preset.options.get("bias", 0) for preset in PRESETS} == {0, 0.5, 1.0}


def test_a_bias_is_left_out_where_the_attention_takes_none() -> None:
    model = build("llava_next_video")
    text = model.config.get_text_config()
    text._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="none of the 1 presets"):
        choose(model, clips("llava_next_video"), 0.3, [SOME[1]])


def test_without_clips_there_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no clips"):
        choose(build("llava_next_video"), [], 0.3, SOME)


def test_a_choice_is_part_of_the_profile(tmp_path: Path) -> None:
    plain = profile_of()
    plain.save(tmp_path / "plain.json")
    assert Profile.load(tmp_path / "plain.json") == plain and "method:" not in report(plain)
    chosen = replace(plain, choice=choose(build("llava_next_video"), clips("llava_next_video"), 0.3, SOME))
    chosen.save(tmp_path / "chosen.json")
    assert Profile.load(tmp_path / "chosen.json") == chosen
    assert chosen.choice is not None and f"method: {chosen.choice.preset.name}, best" in report(chosen)
