"""The long embedded model: scenes, questions, files, labels, and how it is trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.embedded import MODEL_DIR
from pipeline.embedded.demo import write_dataset as write_short_dataset
from pipeline.embedded.long.demo import FRAMES, held_out_scene, write_dataset
from pipeline.embedded.long.questions import (
    ANSWERS,
    CAPTIONS,
    KINDS,
    PARTS,
    WORDINGS,
    ask,
    caption,
    readable,
    vocabulary,
)
from pipeline.embedded.long.scenes import BITMAPS, FRAME_SIZE, SHAPES, Scene, SceneObject, render
from pipeline.embedded.long.training import train
from pipeline.embedded.long.training.batches import (
    FRAME_GROUPS,
    TOKENS_PER_FRAME,
    sample_clips,
    sample_readable,
    sample_text,
    token_labels,
)
from pipeline.embedded.long.training.growth import grid_encoding, grown, warm_start
from pipeline.embedded.long.training.train import STAGES, Record, Stage, run
from pipeline.embedded.questions import answer_type
from pipeline.embedded.scenes import collide
from pipeline.embedded.training.architecture import build_model
from pipeline.embedded.training.batches import IGNORE, make_segment, pack, prompt_prefix
from pipeline.embedded.training.evaluate import read_manifest
from pipeline.embedded.training.packed import answer_logits, layer_outputs, logits_of, patch_features, visual_tokens
from pipeline.embedded.training.tokenizer import build_tokenizer
from pipeline.video import Sampling, decode

TIMES = np.arange(32) / 32


def held_out(count: int, seed: int = 5) -> list[Scene]:
    return [held_out_scene(seed, clip)[0] for clip in range(count)]


def one_object(**changes: Any) -> Scene:
    item = {"role": "static", "color": "red", "shape": "ring", "radius": 10.0, "x": 40.0, "y": 40.0} | changes
    return Scene(objects=(SceneObject(**item),), texture_seed=3)


def one_of_each_camera() -> list[Scene]:
    return [next(scene for scene in held_out(40) if scene.camera == camera) for camera in ("static", "pan", "cuts")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(vocabulary(), train.MAX_LENGTH)


# Scenes


def test_a_seed_gives_one_scene_and_one_picture() -> None:
    first, again = held_out(2), held_out(2)
    assert first == again and first[0] != first[1]
    assert np.array_equal(render(first[0], TIMES[:3])[0], render(again[0], TIMES[:3])[0])


def test_objects_are_distinct_stay_in_the_frame_and_never_touch() -> None:
    for scene in held_out(150):
        for attribute in ("color", "shape"):
            assert len({getattr(item, attribute) for item in scene.objects}) == len(scene.objects)
        for index, item in enumerate(scene.objects):
            assert not any(collide(item, other) for other in scene.objects[:index])
            for time in np.linspace(item.start, item.end, 9):
                place = np.array(item.center(time))
                assert (place >= item.radius).all() and (place <= FRAME_SIZE - item.radius).all()


def test_an_object_belongs_to_one_shot() -> None:
    for scene in held_out(150):
        for item in scene.objects:
            assert any(start <= item.start and item.end <= end for start, end in scene.shots())


def test_what_makes_long_clips_hard_is_there() -> None:
    scenes = held_out(300)
    cameras = [scene.camera for scene in scenes]
    assert all(0.25 < cameras.count(camera) / 300 < 0.42 for camera in ("static", "pan", "cuts"))
    assert {len(scene.cuts) for scene in scenes} == {0, 1, 2}
    objects = [item for scene in scenes for item in scene.objects]
    large = np.mean([item.radius > 9 for item in objects])
    assert 0.35 < large < 0.65 and all(item.radius < 7 or item.radius > 9 for item in objects)
    assert {item.letter for item in objects if item.letter} == set(BITMAPS)
    assert {item.role for item in objects} == {"moving", "flash", "late", "left", "static"}
    flashes = [item for item in objects if item.role == "flash"]
    assert min(item.start for item in flashes) == 0 and max(item.end for item in flashes) == 1
    assert np.mean([scene.noise for scene in scenes]) > 2


def test_a_flash_shows_in_one_to_three_of_32_uniform_frames() -> None:
    sampled = np.round(np.linspace(0, FRAMES - 1, 32)) / FRAMES
    seen = [
        sum(map(item.visible, sampled)) for scene in held_out(300) for item in scene.objects if item.role == "flash"
    ]
    assert set(seen) == {1, 2, 3}


def test_noise_is_drawn_anew_in_every_frame() -> None:
    still = one_object()
    noisy = Scene(objects=still.objects, texture_seed=3, noise=5.0)
    quiet, frames = render(still, TIMES[:2])[0], render(noisy, TIMES[:2])[0]
    assert np.array_equal(quiet[0], quiet[1])
    assert 3 < np.abs(frames[0] - frames[1]).mean() < 8


def test_the_camera_moves_the_background_and_cuts_change_it() -> None:
    corner = one_object(x=14.0, y=14.0, radius=5.0).objects
    pan = Scene(objects=corner, texture_seed=3, pan=(8.0, 0.0))
    frames = render(pan, np.array([0.0, 0.5]))[0]
    assert np.array_equal(frames[0][40:, 20:60], frames[1][40:, 24:64])
    cut = Scene(objects=corner, texture_seed=3, cuts=(0.5,))
    frames = render(cut, np.array([0.0, 0.4, 0.6]))[0]
    assert np.array_equal(frames[0], frames[1])
    assert np.abs(frames[0] - frames[2]).mean() > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_where_the_owner_map_says(shape: str) -> None:
    _, owner = render(one_object(shape=shape, x=30.0, y=50.0), np.zeros(1))
    ys, xs = np.nonzero(owner[0])
    assert 100 < len(xs) < 4 * 11**2
    assert abs(xs.mean() + 0.5 - 30) < 1 and abs(ys.mean() + 0.5 - 50) < 3


def test_letters_differ_on_a_card() -> None:
    cards = {letter: render(one_object(shape="card", letter=letter), np.zeros(1))[0][0] for letter in BITMAPS}
    for first in cards:
        assert all(np.abs(cards[first] - cards[other]).max() > 100 for other in cards if other != first)


def test_larger_pictures_show_the_same_scene() -> None:
    for scene in one_of_each_camera():
        quiet = Scene(objects=scene.objects, texture_seed=scene.texture_seed, cuts=scene.cuts, pan=scene.pan)
        small, large = (render(quiet, np.array([0.7]), size)[0][0] for size in (FRAME_SIZE, 2 * FRAME_SIZE))
        halved = large.reshape(FRAME_SIZE, 2, FRAME_SIZE, 2, 3).mean((1, 3))
        assert np.abs(small - halved).mean() < 3


# Questions


def test_answers_can_be_read_from_the_pictures() -> None:
    """Every answer again, from the owner maps of 32 rendered frames; an object's colour names it."""
    asked = set()
    for number, scene in enumerate(held_out(60)):
        _, owner = render(scene, TIMES)
        seen = np.stack([(owner == index + 1).any((1, 2)) for index in range(len(scene.objects))])
        by_color = {item.color: (index, item) for index, item in enumerate(scene.objects)}
        for question in ask(scene, TIMES.tolist(), np.random.default_rng(number)):
            asked.add(question.kind)
            words = question.text.lower().replace("?", "").replace(".", "").replace(",", "").split()
            named = [by_color[word] for word in words if word in by_color]
            role, _, attribute = question.kind.partition("_")
            if role in ("moving", "flash", "late", "left"):
                (index,) = _of_role(role, scene, owner, seen)
                item = scene.objects[index]
                if attribute == "time":
                    first, last = PARTS[question.answer]
                    assert first <= np.flatnonzero(seen[index]).mean() / 31 + 1e-9 and item.end <= last + 0.1
                else:
                    assert question.answer == getattr(item, attribute)
            elif question.kind == "order_color":
                assert question.answer == min(named, key=lambda pair: seen[pair[0]].argmax())[1].color
            elif question.kind == "count":
                assert int(question.answer) == seen[:, 0 if "start" in words else -1].sum()
            elif question.kind == "position":
                ys, xs = np.nonzero(owner[0 if "start" in words else -1] == named[0][0] + 1)
                vertical, horizontal = "bottom" if ys.mean() > 39 else "top", "right" if xs.mean() > 39.5 else "left"
                assert question.answer == f"{vertical} {horizontal}"
            elif question.kind == "existence":
                assert question.answer == ("yes" if named else "no")
            elif question.kind == "letter":
                assert [question.answer] == [item.letter for item in scene.objects if item.letter]
            elif question.kind == "shape_of_color":
                assert question.answer == named[0][1].shape
            else:
                (item,) = [item for item in scene.objects if item.shape in words]
                assert question.answer == item.color
    assert asked == set(KINDS)


def _of_role(role: str, scene: Scene, owner: np.ndarray, seen: np.ndarray) -> list[int]:
    """The objects that behave in the frames as a role does, told from the frames alone; a pan is taken out."""
    indices = range(len(scene.objects))
    if role == "flash":
        return [index for index in indices if 0 < seen[index].sum() <= 3]
    if role == "late":
        return [index for index in indices if not seen[index, 0] and seen[index, -1] and seen[index].sum() > 3]
    if role == "left":
        return [index for index in indices if seen[index, 0] and not seen[index, -1] and seen[index].sum() > 3]
    moved = []
    for index in indices:
        frames = np.flatnonzero(seen[index])[[0, -1]]
        places = np.array([np.argwhere(owner[frame] == index + 1).mean(0)[::-1] for frame in frames])
        pan = np.outer(TIMES[frames], scene.pan)
        if np.abs(np.diff(places - pan, axis=0)).max() > 10:
            moved.append(index)
    return moved


def test_options_hold_the_answer_once_and_are_all_of_its_type() -> None:
    for number, scene in enumerate(held_out(60)):
        for question in ask(scene, TIMES.tolist(), np.random.default_rng(number)):
            assert 2 <= len(question.options) == len(set(question.options)) <= 4
            assert question.answer in question.options
            assert set(question.options) <= set(ANSWERS[answer_type(question.kind)])


def test_questions_are_long_and_every_wording_is_used() -> None:
    scenes = enumerate(held_out(150))
    texts = [q.text for i, scene in scenes for q in ask(scene, TIMES.tolist(), np.random.default_rng(i))]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 10 and max(lengths) <= 24 and np.mean(lengths) > 13
    for kind, wordings in WORDINGS.items():
        for wording in wordings:
            assert any(text.startswith(wording.split("{")[0]) for text in texts), (kind, wording)


def test_no_held_out_clip_is_degenerate() -> None:
    for seed in (0, 1, 2):
        for clip in range(100):
            scene, times, rng = held_out_scene(seed, clip)
            assert any(item.role != "flash" and item.visible(time) for item in scene.objects for time in times)
            assert len(list(ask(scene, times.tolist(), rng))) >= 4


@pytest.mark.parametrize("frames", [1, 4, 8, 16, 32])
def test_training_clips_show_what_is_asked(frames: int) -> None:
    """A flash is told from short shots, and nothing else is seen in a single frame of several."""
    for seed in range(60):
        scene, times = sample_readable(np.random.default_rng(seed), frames, 1 / 3)
        seen = {item.role: sum(map(item.visible, times)) for item in scene.objects if any(map(item.visible, times))}
        assert len(times) == frames and (np.diff(times) > 0).all() and times[0] >= 0 and times[-1] < 1
        lasting = [count for role, count in seen.items() if role != "flash"]
        assert lasting and (frames == 1 or min(lasting) > max(1, seen.get("flash", 0)))


def test_a_short_shot_and_a_flash_in_as_many_frames_are_not_readable() -> None:
    still = one_object(end=0.5).objects[0]
    flash = SceneObject(role="flash", color="blue", shape="bar", radius=5, x=70, y=70, start=0.75, end=1.0)
    scene = Scene(objects=(still, flash), texture_seed=0, cuts=(0.5,))
    assert not readable(scene, [0.1, 0.8]) and not readable(scene, [0.1, 0.6, 0.8])
    assert readable(scene, [0.1, 0.2, 0.3, 0.8]) and readable(scene, [0.1])


@pytest.mark.parametrize("form", CAPTIONS)
def test_a_caption_names_every_object_that_is_seen(form: str) -> None:
    for scene in held_out(20):
        _, text = caption(scene, TIMES.tolist(), form)
        for item in scene.objects:
            assert f"{item.color} {item.shape}" in text or f"{item.shape} {item.color}" in text
            assert item.direction is None or f"{item.direction}" in text.split()


def test_the_tokenizer_knows_every_word(tokenizer: Any) -> None:
    for number, scene in enumerate(held_out(40)):
        texts = [part for form in CAPTIONS for part in caption(scene, TIMES.tolist(), form)]
        for question in ask(scene, TIMES.tolist(), np.random.default_rng(number)):
            texts += [question.text, *question.options]
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer.encode(text), text


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("long"), 3, seed=7)


def test_files_come_back_from_the_decoder_as_they_were_drawn(files: Path) -> None:
    for clip, video in enumerate(read_manifest(files)):
        scene, times, _ = held_out_scene(7, clip)
        decoded = decode(video, Sampling(num_frames=32), (FRAME_SIZE, FRAME_SIZE))
        sampled = times[np.round(np.linspace(0, FRAMES - 1, 32)).astype(int)]
        assert len(decoded.frames) == 32 and video.stat().st_size < 1_000_000
        quiet = Scene(objects=scene.objects, texture_seed=scene.texture_seed, cuts=scene.cuts, pan=scene.pan)
        assert np.abs(decoded.frames.astype(float) - render(quiet, sampled)[0]).mean() < 8


def test_a_dataset_is_the_same_for_a_seed_and_others_for_others(files: Path, tmp_path: Path) -> None:
    again, other = write_dataset(tmp_path / "a", 3, seed=7), write_dataset(tmp_path / "b", 1, 4, seed=8)
    assert again.read_text() == files.read_text()
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    assert len(rows) == 4 and len({row["sample_id"] for row in rows}) == 4
    assert rows[0]["camera"] == held_out_scene(8, 0)[0].camera
    assert (other.parent / "clip-0000.mp4").read_bytes() != (files.parent / "clip-0000.mp4").read_bytes()


def test_the_two_models_files_show_different_scenes(tmp_path: Path) -> None:
    short, long = write_short_dataset(tmp_path / "short", 1), write_dataset(tmp_path / "long", 1)
    assert short.read_text() != long.read_text()


# Batches


def test_token_labels_say_what_has_shown_so_far() -> None:
    item = SceneObject(
        role="moving", color="blue", shape="bar", radius=10, x=20, y=40, start=0.25, direction="right", distance=30
    )
    scene = Scene(objects=(item,), texture_seed=1)
    times = np.arange(8) / 8
    labels = {name: value[0] for name, value in token_labels(scene, times, render(scene, times)[1]).items()}
    shape = 8, TOKENS_PER_FRAME
    own = labels["color"].reshape(shape) != IGNORE
    assert own.any(1).tolist() == [False] * 2 + [True] * 6 and own.sum() < 6 * 9
    direction, age, time = (labels[name].reshape(shape) for name in ("direction", "age", "time"))
    assert (direction[2] == IGNORE).all() and set(direction[own][own[2].sum() :]) == {2}  # none, left, right, ...
    assert [set(age[frame][own[frame]]) for frame in range(2, 8)] == [{1}] * 3 + [{2}] * 3
    assert all((FRAME_GROUPS[time[frame][own[frame]]] <= frame).all() for frame in range(2, 8))
    shift, place = (labels[name].reshape(*shape, 2) for name in ("shift", "place"))
    np.testing.assert_allclose(shift[7][own[7]][0] * 10, [30 * (0.875 - 0.25) / 0.75, 0], atol=1e-4)
    np.testing.assert_allclose(place[2][own[2]][0] * 10, [20 - 40, 0], atol=1e-4)
    for name, value in labels.items():
        assert (value.reshape(*shape, -1)[~own] == IGNORE).all(), name


def test_a_batch_is_the_same_for_a_seed_and_fits_the_model(tokenizer: Any) -> None:
    batches = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        clips, scenes = sample_clips(rng, clips=2, frames=4, static_camera=0.3)
        text = sample_text(rng, tokenizer, scenes, questions=4, captions=1, emphasis={"existence": 0.0})
        batches.append((clips, text))
    (clips, text), (same_clips, same_text) = batches
    assert torch.equal(clips.pixels, same_clips.pixels) and torch.equal(text.ids, same_text.ids)
    assert clips.pixels.shape == (2, 4, 3, FRAME_SIZE, FRAME_SIZE)
    assert {value.shape for value in clips.patches.values()} == {(8, 100)}
    assert {value.shape[:2] for value in clips.tokens.values()} == {(2, 4 * TOKENS_PER_FRAME)}
    assert KINDS.index("existence") not in text.kinds.unique().tolist()


# Training


@pytest.fixture(scope="module")
def untrained(tokenizer: Any) -> Any:
    return build_model(tokenizer, 0, frame_size=FRAME_SIZE, layers=6).eval()


@torch.inference_mode()
def test_a_packed_question_gets_the_logits_that_it_gets_alone(untrained: Any, tokenizer: Any) -> None:
    frames = 4
    clips, scenes = sample_clips(np.random.default_rng(1), clips=2, frames=frames, static_camera=0.3)
    prefix = prompt_prefix(tokenizer)
    visual = visual_tokens(untrained, patch_features(untrained, clips.pixels), 2)
    rows = [
        [make_segment(tokenizer, q.text, q.answer, 0) for q in ask(scene, times.tolist(), np.random.default_rng(0))]
        for scene, times in scenes
    ]
    text = pack(rows, tokenizer, prefix.shape[1] + visual.shape[1])
    packed = answer_logits(untrained, prefix, visual, text, {})
    videos = torch.full((1, frames * TOKENS_PER_FRAME + 1), tokenizer.video_token_id)
    start = 0
    for clip, segments in enumerate(rows):
        for segment in segments:
            ids = torch.cat([prefix, videos, torch.tensor([segment.ids])], dim=1)
            pixels = clips.pixels[clip : clip + 1]
            logits = untrained(input_ids=ids, pixel_values_videos=pixels).logits[0, -len(segment.ids) :]
            alone = logits[[i for i, target in enumerate(segment.targets) if target >= 0]]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, atol=1e-4, rtol=1e-4)
            start += len(alone)
    assert start == len(packed)


@torch.inference_mode()
def test_layers_after_a_full_drop_see_no_video(untrained: Any, tokenizer: Any) -> None:
    """Two videos give equal logits when all tokens are dropped at once, and different ones when it is done later."""
    prefix = prompt_prefix(tokenizer)
    visual = torch.randn(2, 51, 96, generator=torch.Generator().manual_seed(0))
    visual[1, -1] = visual[0, -1]  # the newline stays
    segments = [make_segment(tokenizer, "Which letter is it?", "t", 0)]
    text = pack([segments, segments], tokenizer, prefix.shape[1] + 51)
    for layer, same in ((0, True), (3, False)):
        first, second = answer_logits(untrained, prefix, visual, text, {layer: 0.0}).chunk(2)
        assert torch.allclose(first, second, atol=1e-5) == same
    lengths = [hidden.shape[1] for hidden in layer_outputs(untrained, prefix, visual, text, {3: 0.0})]
    length = prefix.shape[1] + 51 + text.ids.shape[1]
    assert lengths == [length] * 3 + [length - 50] * 3


@torch.inference_mode()
def test_appended_layers_change_nothing_at_first(untrained: Any, tokenizer: Any) -> None:
    deeper = grown(untrained, tokenizer, seed=1, layers=8)
    prefix, visual = prompt_prefix(tokenizer), torch.randn(1, 26, 96)
    text = pack([[make_segment(tokenizer, "Which letter is it?", "t", 0)]], tokenizer, prefix.shape[1] + 26)
    before, after = (answer_logits(model, prefix, visual, text, {}) for model in (untrained, deeper))
    early = logits_of(deeper, list(layer_outputs(deeper, prefix, visual, text, {}))[5], text)
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(before, early)


def test_a_warm_start_takes_over_what_fits(tokenizer: Any) -> None:
    model = build_model(tokenizer, 0, frame_size=FRAME_SIZE)
    unknown = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("letter")].clone()
    warm_start(model, tokenizer, MODEL_DIR)
    source = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).state_dict()
    state = model.state_dict()
    changed = [name for name in state if state[name].shape != source[name].shape]
    assert all(torch.equal(state[name], source[name]) for name in set(state) - set(changed))
    assert all("position_embedding" in name or "embed_tokens" in name or "lm_head" in name for name in changed)
    words = model.get_input_embeddings().weight
    assert torch.equal(words[tokenizer.convert_tokens_to_ids("letter")], unknown)
    known = json.loads((MODEL_DIR / "tokenizer.json").read_text())["model"]["vocab"]
    red = source["model.language_model.embed_tokens.weight"][known["red"]]
    assert torch.equal(words[tokenizer.convert_tokens_to_ids("red")], red)


def test_the_grid_encoding_tells_places_apart_and_near_ones_least() -> None:
    table = grid_encoding(10, 64)
    assert table.shape == (100, 64)
    distance = torch.cdist(table, table) + 100 * torch.eye(100)
    nearest = distance.argmin(1)
    assert distance.min() > 0.5
    assert set((nearest - torch.arange(100)).abs().tolist()) <= {1, 10}


def test_a_gate_opens_when_every_kind_in_it_is_answered_well() -> None:
    record = Record()
    right, asked = [0.0] * len(KINDS), [0.0] * len(KINDS)
    right[0], asked[0], right[1], asked[1] = 9.0, 10.0, 5.0, 10.0
    record.window.extend([[*right, *asked]] * (train.GATE_WINDOW - 1))
    assert not record.passes({KINDS[0]: 0.8})  # the window is not full yet
    record.window.append([*right, *asked])
    assert record.passes({KINDS[0]: 0.8}) and not record.passes({KINDS[0]: 0.8, KINDS[1]: 0.8})
    assert not record.passes({})


def test_stages_grow_and_end_at_a_small_rate() -> None:
    assert [stage.layers for stage in STAGES] == sorted(stage.layers for stage in STAGES)
    assert STAGES[-1].layers == 12 and 32 in STAGES[-1].frames
    assert train.learning_rate(STAGES[-1], STAGES[-1].steps - 1) < 0.1 * STAGES[-1].start_rate
    assert all(set(stage.gate) | set(stage.emphasis) <= set(KINDS) for stage in STAGES)
    assert all(stage.least < stage.steps for stage in STAGES)


def test_a_continued_run_gives_the_weights_of_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a stage, and again after the model has grown."""
    rates = {"start_rate": 1e-3, "end_rate": 1e-4, "questions": 3, "captions": 1, "budget": 2}
    stages = (
        Stage(name="patches", steps=1, frames=(2,), language=False, **rates),
        Stage(name="short", steps=2, frames=(1, 2), **rates),
        Stage(name="deep", steps=2, frames=(2,), layers=9, **rates),
    )
    monkeypatch.setattr(train, "STAGES", stages)
    run(0, 1, tmp_path / "unbroken", seed=0, save_every=1)
    take_step = train.Run.take_step
    for last in (2, 3, 4):

        def stop_after(self: train.Run, stage: Stage, last: int = last) -> None:
            if self.place.step == last:
                raise KeyboardInterrupt
            take_step(self, stage)

        with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
            stopping.setattr(train.Run, "take_step", stop_after)
            run(0, 1, tmp_path / "continued", seed=0, save_every=1)
    run(0, 1, tmp_path / "continued", seed=0, save_every=1)
    first, second = (AutoModelForImageTextToText.from_pretrained(tmp_path / n) for n in ("unbroken", "continued"))
    assert first.config.text_config.num_hidden_layers == 9
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.model.language_model.layers[8].self_attn.o_proj.weight.any()  # appended layers learn
