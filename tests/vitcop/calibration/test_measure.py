"""Calibration: what is measured at a layer, and what is recommended from it."""

import pytest
import torch

from tests.vitcop.calibration.profiles import NAMES, correlations, profile_of
from tests.vitcop.models import SETUPS, build, make_inputs
from vitcop.calibration.measure import calibrate, rank_correlation, summarize, watch_prefill
from vitcop.families import family_of
from vitcop.ops.scores import key_distance, key_norm

# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [9, 7, 4, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 2, 2, 4], [1, 2, 3, 4], 0.9486833),  # ties share their mean rank
        ([5, 5, 5, 5], [1, 2, 3, 4], 0),
    ],
)
def test_rank_correlation_is_spearmans(first: list[int], second: list[int], expected: float) -> None:
    rows = torch.tensor([first, second]), torch.tensor([second, first])
    assert rank_correlation(*(row.float() for row in rows)).tolist() == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("family", SETUPS)
def test_attention_and_keys_are_those_of_the_model(family: str) -> None:
    model, inputs = build(family, "eager"), make_inputs(family)
    adapter = family_of(model)
    with torch.no_grad():
        watch = watch_prefill(adapter, inputs)
        output = model.model(**inputs, output_attentions=True)
    visual, text = watch.visual[0], watch.rows[0]
    assert len(visual) == SETUPS[family].visual_tokens and len(text) == 5 + (SETUPS[family].between > 0)
    for layer, attention in enumerate(output.attentions):
        rows = attention[0][:, text][:, :, visual].mean(dim=(0, 1))
        torch.testing.assert_close(watch.attention[layer], rows, atol=1e-6, rtol=1e-4)
        keys = output.past_key_values.layers[layer].keys[:, :, visual]
        torch.testing.assert_close(watch.norm[layer], key_norm(keys)[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(watch.distance[layer], key_distance(keys)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SETUPS)
def test_every_family_can_be_calibrated_and_stays_as_it_was(family: str) -> None:
    model, inputs = build(family), make_inputs(family)
    with torch.no_grad():
        before = model(**inputs).logits
    clips = [[make_inputs(family, seed=seed), make_inputs(family, texts=(3,), seed=seed)] for seed in range(4)]
    profile = calibrate(model, clips, "tiny")
    assert [layer.layer for layer in profile.layers] == [1, 2, 3, 4]
    assert (profile.clips, profile.num_layers, profile.visual_tokens) == (4, 5, SETUPS[family].visual_tokens)
    assert all(layer.small.mean == -layer.large.mean for layer in profile.layers)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_a_score_that_orders_tokens_as_attention_does_is_found() -> None:
    """All layers see the same tokens, and keys lie in the direction of all queries: long keys get most attention."""
    model = build("llava_onevision")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            layer.input_layernorm.weight.fill_(1)
            for module in (attention.o_proj, layer.mlp.down_proj, attention.q_proj, attention.k_proj):
                for parameter in module.parameters():
                    parameter.zero_()
            # Dimension 3 of 8 turns slowest with position: nearly the same for all tokens.
            attention.q_proj.bias.view(-1, 8)[:, 3] = 4
            attention.k_proj.bias.view(-1, 8)[:, 3] = 9
            attention.k_proj.weight.view(-1, 8, 32)[:, 3, 0] = 1
    profile = calibrate(model, [[make_inputs("llava_onevision", seed=seed)] for seed in range(4)])
    assert all(layer.best == "large" and layer.large.mean > 0.9 for layer in profile.layers)
    assert profile.shallow.sure == profile.deep.sure == 1


def test_what_cannot_be_measured_is_refused_and_leaves_no_hook() -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")
    with pytest.raises(ValueError, match=r"2 clips.* 4 or more"):
        calibrate(model, [[inputs], [inputs]])
    with pytest.raises(ValueError, match="one prompt at a time, got a batch of 2"):
        calibrate(model, [[make_inputs("llava_onevision", texts=(5, 5))]])
    with pytest.raises(ValueError, match="ends with the video"):
        calibrate(model, [[make_inputs("llava_onevision", texts=(0,))]])
    with pytest.raises(ValueError, match="do not match"):
        calibrate(model, [[inputs | {"pixel_values_videos": inputs["pixel_values_videos"][:, :2]}]])
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


# -- recommending ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "distance", "score"), [(0.4, -0.1, "large"), (-0.4, 0.3, "small"), (-0.2, 0.5, "distance")]
)
def test_the_score_of_highest_correlation_is_recommended(norm: float, distance: float, score: str) -> None:
    profile = profile_of(32, norm, distance)
    for stage in (profile.shallow, profile.deep):
        assert stage.key_score == score and stage.sure == 1
        assert stage.correlation == pytest.approx(max(abs(norm), distance), abs=0.05)


def test_how_sure_falls_when_clips_disagree() -> None:
    values = correlations(6, 8, 0.0, -0.5)
    values[:3, 0] += 0.3
    values[3:, 0] -= 0.28
    profile = summarize(values, **NAMES)
    assert 0.4 < profile.shallow.sure < 0.8
    estimate = profile.layers[0].large
    assert estimate.agreeing == 0.5 and estimate.low < 0 < estimate.high and estimate.spread > 0.2


def test_the_papers_layers_stay_unless_another_is_surely_better() -> None:
    values = correlations(6, 32, 0.4, 0.0)
    assert (summarize(values, **NAMES).shallow.layer, summarize(values, **NAMES).deep.layer) == (2, 22)
    values[:, 0, 3 - 1] += 0.2  # layer 3
    values[:, 0, 20 - 1] += 0.2
    values[:, 0, 10 - 1] += 0.4  # neither shallow nor deep
    profile = summarize(values, **NAMES)
    assert (profile.shallow.layer, profile.deep.layer) == (3, 20)
