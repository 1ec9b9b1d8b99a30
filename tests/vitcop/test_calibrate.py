"""Calibration: what is measured at a layer, what is recommended from it, and how a method uses the profile."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pipeline.embedded.demo import write_video
from pipeline.embedded.scenes import sample_scene
from pipeline.model.frames import load_frame_processor
from tests.pipeline.model.tiny_models import save_checkpoint
from tests.vitcop.models import SETUPS, build, make_inputs
from vitcop import ViTCoP, prune
from vitcop.calibrate import calibrate, main, rank_correlation, summarize, watch_prefill
from vitcop.clips import PATCHED, STACKED, ClipInputs, read_frames
from vitcop.errors import ProfileError, UnsupportedInputError
from vitcop.families import family_of
from vitcop.ops.scores import key_distance, key_norm
from vitcop.profiles import FILE_NAME, Profile

NAMES = {"model": "tiny", "model_type": "llava_onevision", "frames": 4, "visual_tokens": 64}


def correlations(clips: int, layers: int, norm: float, distance: float) -> torch.Tensor:
    """Correlations (clips, 2, layers - 1) about the given means."""
    noise = 0.02 * torch.randn(clips, 2, layers - 1, generator=torch.Generator().manual_seed(1))
    return noise.double() + torch.tensor([norm, distance]).view(1, 2, 1)


def profile_of(layers: int = 5, norm: float = 0.4, distance: float = -0.1) -> Profile:
    return summarize(correlations(6, layers, norm, distance), **NAMES)


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


# -- profiles and methods ----------------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written(tmp_path) -> None:
    profile = profile_of()
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 0}'])
def test_what_is_no_profile_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=r"profile\.json"):
        Profile.load(path)
    with pytest.raises(ProfileError, match=r"missing\.json"):
        ViTCoP(retention_ratio=0.5, key_score="profile", profile=tmp_path / "missing.json")


def test_a_method_takes_layers_and_scores_from_its_profile(tmp_path) -> None:
    values = correlations(6, 32, 0.4, 0.0)
    values[:, 1, 20 - 1] += 0.7
    summarize(values, **NAMES).save(tmp_path / FILE_NAME)
    method = ViTCoP(retention_ratio=0.2, key_score="profile", profile=tmp_path / FILE_NAME)
    assert method.layers(32) == (2, 20)
    assert "large before layer 2, distance before layer 20" in method.describe()
    chosen = ViTCoP(retention_ratio=0.2, key_score="profile", profile=method.profile, deep_layer=22)
    assert chosen.layers(32) == (2, 22) and chosen.profile.best(22) == "large"


def test_the_profiles_score_decides_what_is_kept() -> None:
    model, inputs = build("llava_onevision"), make_inputs("llava_onevision")

    def logits(**settings) -> torch.Tensor:
        with torch.no_grad(), prune(model, ViTCoP(retention_ratio=0.3, **settings)):
            return model(**inputs).logits

    for norm, distance, score in ((0.4, -0.1, "large"), (-0.4, 0.3, "small"), (-0.2, 0.5, "distance")):
        given = logits(key_score="profile", profile=profile_of(5, norm, distance))
        assert torch.equal(given, logits(key_score=score))
    assert not torch.equal(logits(key_score="small"), logits(key_score="large"))


def test_prune_finds_the_profile_beside_the_model(tmp_path) -> None:
    save_checkpoint("llava_onevision", tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    method = ViTCoP(retention_ratio=0.5, key_score="profile")
    with pytest.raises(ProfileError, match=rf"python -m vitcop.calibrate --model {tmp_path}"):
        prune(model, method)
    profile_of(5).save(tmp_path / FILE_NAME)
    assert prune(model, method).method.profile == profile_of(5)
    assert method.profile is None
    profile_of(9).save(tmp_path / FILE_NAME)
    with pytest.raises(ProfileError, match="for 9 layers, this model has 5"):
        prune(model, method)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="a profile goes with key_score='profile'"):
        ViTCoP(retention_ratio=0.5, profile=profile_of())
    with pytest.raises(ValueError, match="'median'"):
        ViTCoP(retention_ratio=0.5, key_score="median")
    with pytest.raises(RuntimeError, match="without a profile"):
        ViTCoP(retention_ratio=0.5, key_score="profile").layers(8)


# -- clips and the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list:
    """Two videos, an array and an archive."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(2):
        scene = sample_scene(np.random.default_rng(seed))
        write_video(folder / f"{seed}.mp4", scene, np.arange(12) / 12, 64)
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    np.save(folder / "2.npy", frames)
    np.savez(folder / "3.npz", frames=frames[::-1], indices=np.arange(5))
    return sorted(folder.iterdir())


def test_frames_are_read_from_videos_and_arrays(clips) -> None:
    shapes = [read_frames(path, 4).shape for path in clips]
    assert shapes == [(4, 64, 64, 3)] * 4
    assert read_frames(clips[2], 99).shape[0] == 5
    assert np.array_equal(read_frames(clips[2], 2), np.load(clips[2])[[0, 4]])
    every = read_frames(clips[0], 12)
    assert np.array_equal(read_frames(clips[0], 2), every[[0, 11]])


def test_files_without_frames_are_refused(tmp_path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    for name, message in (("text.mp4", "decoded"), ("float.npy", "uint8"), ("other.npz", "only pictures")):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            read_frames(tmp_path / name, 4)


@pytest.mark.parametrize("family", STACKED + PATCHED)
def test_inputs_equal_those_of_the_pipeline(tmp_path, family: str) -> None:
    """On frames that need no resizing."""
    save_checkpoint(family, tmp_path)
    model, tokenizer = (auto.from_pretrained(tmp_path) for auto in (AutoModelForImageTextToText, AutoTokenizer))
    side = getattr(model.config.vision_config, "image_size", 32)
    frames = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
    ours = ClipInputs(model, tokenizer)(frames, ["Why?"])[0]
    processor = load_frame_processor(tmp_path)
    theirs = processor.to_model_inputs(torch.from_numpy(frames), times=range(5))
    torch.testing.assert_close(ours["pixel_values_videos"], theirs["pixel_values_videos"], atol=1e-5, rtol=0)
    text = tokenizer.decode(ours["input_ids"][0])
    assert processor.placeholders(theirs, times=range(5)) in text and text.endswith(
        "Why?<|im_end|>\n<|im_start|>assistant\n"
    )
    if "video_grid_thw" in theirs:
        assert torch.equal(ours["video_grid_thw"], theirs["video_grid_thw"])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_the_command_writes_a_profile_that_prune_uses(tmp_path, clips, family: str, capsys) -> None:
    save_checkpoint(family, tmp_path)
    arguments = [
        "--model",
        str(tmp_path),
        "--device",
        "cpu",
        "--num-frames",
        "2",
        "--question",
        "Why?",
        "--question",
        "Who?",
    ]
    assert main([*arguments, "--videos", *map(str, clips)]) == 0
    printed = capsys.readouterr().out
    profile = Profile.load(tmp_path / FILE_NAME)
    assert profile.clips == 4 and f"shallow stage: {profile.shallow.key_score}" in printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = ClipInputs(model, AutoTokenizer.from_pretrained(tmp_path))(read_frames(clips[0], 2), ["Why?"])[0]
    with prune(model, ViTCoP(retention_ratio=0.5, key_score="profile")) as stats:
        model.generate(**inputs, max_new_tokens=2)
    assert repr(profile) in stats.last.method


def test_the_command_says_what_is_wrong(tmp_path, clips, capsys) -> None:
    save_checkpoint("llava_onevision", tmp_path)
    videos = ["--videos", *map(str, clips)]
    assert main(["--model", str(tmp_path), "--videos", str(clips[0])]) == 1
    assert "4 or more" in capsys.readouterr().err
    assert main(["--model", "no/such", *videos]) == 1
    assert "--output" in capsys.readouterr().err
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["--model", str(tmp_path), *videos]) == 1
    assert "--prompt" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), *videos, "--num-frames", "2", "--prompt", "{video} {question}"]) == 0


def test_frames_of_other_families_are_left_to_the_caller() -> None:
    model = build("internvl")
    with pytest.raises(UnsupportedInputError, match=r"internvl.*calibrate"):
        ClipInputs(model, None)
