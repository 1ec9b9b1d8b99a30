"""Profiles: written and read, found beside a model, and used by a method."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.pipeline.model.tiny_models import save_checkpoint
from tests.vitcop.calibration.profiles import NAMES, correlations, profile_of
from tests.vitcop.models import build, make_inputs
from vitcop import ProfileError, ViTCoP, prune
from vitcop.calibration import FILE_NAME, Profile
from vitcop.calibration.measure import summarize


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
    with pytest.raises(ProfileError, match=rf"python jobs/calibrate.py --model {tmp_path}"):
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
