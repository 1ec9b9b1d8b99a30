"""The embedded model: scenes, questions, tokenizer, checkpoint folder, and answers on real H.264 files."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaOnevisionForConditionalGeneration

from pipeline.embedded import MODEL_DIR
from pipeline.embedded.demo import write_dataset
from pipeline.embedded.questions import ANSWERS, CAPTIONS, KINDS, WORDINGS, answer_type, ask, caption, vocabulary
from pipeline.embedded.scenes import COLORS, FRAME_SIZE, SHAPES, SceneObject, collide, render, sample_scene
from pipeline.embedded.training import train
from pipeline.embedded.training.architecture import GRID, TOKENS_PER_FRAME, build_config, build_model, save_checkpoint
from pipeline.embedded.training.batches import make_segment, normalize, pack, prompt_prefix
from pipeline.embedded.training.evaluate import judge, read_clip, read_manifest
from pipeline.embedded.training.packed import answer_logits, patch_features, random_order, visual_tokens
from pipeline.embedded.training.tokenizer import build_tokenizer
from pipeline.embedded.training.train import STAGES, Stage, learning_rate, run

TIMES = list(np.arange(32) / 32)


def scenes(count, seed=0):
    return [sample_scene(np.random.default_rng((seed, index))) for index in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, pipeline.embedded; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_seed_gives_one_scene_and_one_picture():
    first, again = scenes(2), scenes(2)
    assert first == again and first[0] != first[1]
    assert np.array_equal(render(first[0], TIMES[:3])[0], render(again[0], TIMES[:3])[0])


def test_objects_have_distinct_colors_and_shapes_and_never_touch():
    for scene in scenes(100):
        assert len({item.color for item in scene.objects}) == len({item.shape for item in scene.objects})
        assert len({item.color for item in scene.objects}) == len(scene.objects)
        for index, item in enumerate(scene.objects):
            assert not any(collide(item, other) for other in scene.objects[:index])
            left, top, right, bottom = item.swept_box(item.start, item.end)
            assert min(left, top) >= -1e-9 and max(right, bottom) <= FRAME_SIZE + 1e-9


def test_a_flash_shows_in_exactly_one_of_eight_uniform_frames():
    sampled = np.round(np.linspace(0, 31, 8)) / 32
    flashes = [item for scene in scenes(100) for item in scene.objects if item.role == "flash"]
    assert len(flashes) > 30
    assert all(sum(item.visible(time) for time in sampled) == 1 for item in flashes)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_color_where_the_owner_map_says(shape):
    item = SceneObject(role="static", color="red", shape=shape, radius=11, x=40, y=60)
    scene = dataclasses.replace(scenes(1)[0], objects=(item,))
    frames, owner = render(scene, [0.0])
    mean = frames[owner == 1].mean(0)
    assert 100 < (owner == 1).sum() < 4 * 11**2
    assert np.abs(mean - COLORS["red"]).max() < 40
    ys, xs = np.nonzero(owner[0])
    assert abs(xs.mean() + 0.5 - 40) < 1 and abs(ys.mean() + 0.5 - 60) < 3


def test_shapes_have_distinct_silhouettes():
    drawn = {}
    for shape in SHAPES:
        item = SceneObject(role="static", color="red", shape=shape, radius=11, x=48, y=48)
        drawn[shape] = render(dataclasses.replace(scenes(1)[0], objects=(item,)), [0.0])[1][0] == 1
    for first in SHAPES:
        for second in SHAPES[SHAPES.index(first) + 1 :]:
            common, both = drawn[first] & drawn[second], drawn[first] | drawn[second]
            assert common.sum() / both.sum() < 0.85, (first, second)


def test_larger_pictures_show_the_same_scene():
    scene = scenes(1)[0]
    small, large = render(scene, [0.5])[0][0], render(scene, [0.5], size=2 * FRAME_SIZE)[0][0]
    halved = large.reshape(FRAME_SIZE, 2, FRAME_SIZE, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 3


def test_answers_follow_from_the_scene():
    asked = set()
    for index, scene in enumerate(scenes(60)):
        by_role = {item.role: item for item in scene.objects}
        lasting = [item for item in scene.objects if item.role != "flash"]
        for question in ask(scene, TIMES, np.random.default_rng(index)):
            asked.add(question.kind)
            role, _, attribute = question.kind.partition("_")
            words = question.text.lower().replace("?", "").replace(".", "").split()
            named = [item for item in scene.objects if item.color in words or item.shape in words]
            if role in by_role:
                assert question.answer == getattr(by_role[role], attribute)
            elif question.kind == "count":
                assert int(question.answer) == len(lasting)
            elif question.kind == "existence":
                assert question.answer == ("yes" if named else "no")
            elif question.kind == "position":
                assert question.answer == named[0].position(1.0) and named[0].role in ("static", "late")
            else:
                assert question.answer == getattr(named[0], question.kind.split("_of_")[0]) and named[0] in lasting
    assert asked == set(KINDS)


def test_options_hold_the_answer_once_and_are_all_of_its_type():
    places = []
    for index, scene in enumerate(scenes(60)):
        for question in ask(scene, TIMES, np.random.default_rng(index)):
            assert 2 <= len(question.options) == len(set(question.options)) <= 4
            assert set(question.options) <= set(ANSWERS[answer_type(question.kind)])
            places.append(question.options.index(question.answer))
    assert set(places) == {0, 1, 2, 3}


def test_every_wording_is_used():
    texts = [q.text for i, scene in enumerate(scenes(150)) for q in ask(scene, TIMES, np.random.default_rng(i))]
    for kind, wordings in WORDINGS.items():
        for wording in wordings:
            assert any(text.startswith(wording.split("{")[0]) for text in texts), (kind, wording)


@pytest.mark.parametrize("form", CAPTIONS)
def test_a_caption_names_every_object_that_is_seen(form):
    scene = scenes(1)[0]
    _, text = caption(scene, TIMES, form)
    for item in scene.objects:
        assert f"{item.color} {item.shape}" in text or f"{item.shape} {item.color}" in text


def test_the_tokenizer_knows_every_word_in_any_case_and_spacing(tokenizer):
    assert tokenizer.encode("What color is the moving object?") == tokenizer.encode("what COLOR is the moving object ?")
    for wordings in WORDINGS.values():
        for wording in wordings:
            ids = tokenizer.encode(wording.format(color="red", shape="ring"))
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" ", "") == wording.format(color="red", shape="ring").lower().replace(
                " ", ""
            )
    assert tokenizer.encode("zebra") == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer.encode("top left")) == "top left"


def test_the_saved_tokenizer_is_the_one_that_the_code_builds(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer(vocabulary()).get_vocab()
    assert tokenizer.chat_template == build_tokenizer(vocabulary()).chat_template
    assert set(vocabulary()) < set(tokenizer.get_vocab())


def test_the_chat_template_puts_the_video_once_before_the_question(tokenizer):
    parts = [{"type": "text", "text": "Is there a red object?"}, {"type": "video"}]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:3] == ["<|im_start|>", "user", "<video>"] and words.count("<video>") == 1
    assert words[3:] == ["is", "there", "a", "red", "object", "?", "<|im_end|>", "<|im_start|>", "assistant"]


def test_the_folder_is_an_ordinary_small_checkpoint(model, tokenizer):
    assert isinstance(model, LlavaOnevisionForConditionalGeneration)
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 10e6
    assert model.config.text_config.num_hidden_layers == 8
    assert model.config.video_token_id == tokenizer.video_token_id
    built = build_config(build_tokenizer(vocabulary()))
    for part in ("vision_config", "text_config"):
        saved, expected = getattr(model.config, part).to_dict(), getattr(built, part).to_dict()
        assert {k: v for k, v in saved.items() if k != "dtype"} == {k: v for k, v in expected.items() if k != "dtype"}


def test_processor_files_agree_with_the_model(model):
    processor = json.loads((MODEL_DIR / "processor_config.json").read_text())
    video = json.loads((MODEL_DIR / "video_preprocessor_config.json").read_text())
    assert processor["num_image_tokens"] == GRID**2 == model.config.vision_config.image_size**2 // 8**2
    assert processor["vision_feature_select_strategy"] == model.config.vision_feature_select_strategy
    assert video["size"] == {"height": FRAME_SIZE, "width": FRAME_SIZE}


def test_a_packed_question_gets_the_logits_that_it_gets_alone(model, tokenizer):
    scene = scenes(1)[0]
    pixels = normalize(render(scene, [0.1, 0.6])[0])[None]
    questions = [q for q in ask(scene, [0.1, 0.6], np.random.default_rng(0)) if q.kind in ("moving_shape", "position")]
    prefix = prompt_prefix(tokenizer)
    with torch.inference_mode():
        visual = visual_tokens(model, patch_features(model, pixels), 1)
        segments = [make_segment(tokenizer, q.text, q.answer, 0) for q in questions]
        text = pack([segments], tokenizer, prefix.shape[1] + visual.shape[1])
        packed = answer_logits(model, prefix, visual, text, {})
        videos = torch.full((1, 2 * TOKENS_PER_FRAME + 1), tokenizer.video_token_id)
        start = 0
        for segment in segments:
            ids = torch.cat([prefix, videos, torch.tensor([segment.ids])], dim=1)
            logits = model(input_ids=ids, pixel_values_videos=pixels).logits[0, -len(segment.ids) :]
            count = sum(target >= 0 for target in segment.targets)
            alone = logits[[i for i, target in enumerate(segment.targets) if target >= 0]]
            torch.testing.assert_close(packed[start : start + count], alone, atol=1e-4, rtol=1e-4)
            start += count


def test_random_order_keeps_the_asked_share_and_all_text():
    order = random_order(rows=3, start=2, stop=42, length=50, share=0.25)
    assert order.shape == (3, 2 + 10 + 8)
    assert (order.diff(dim=1) > 0).all()
    assert order[:, :2].tolist() == [[0, 1]] * 3 and order[:, -8:].tolist() == [list(range(42, 50))] * 3


def test_the_learning_rate_warms_up_and_falls():
    stage = STAGES[-1]
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert rates[0] < 0.1 * max(rates) and rates[-1] < 0.1 * max(rates)


def test_a_saved_model_loads_with_equal_weights(tmp_path):
    tokenizer = build_tokenizer(vocabulary())
    model = build_model(tokenizer, seed=3)
    save_checkpoint(model, tokenizer, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_a_continued_training_run_gives_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    rates = {"start_rate": 1e-3, "end_rate": 1e-3, "clips": 1, "steps": 2}
    patches = Stage(name="patches", frames=1, language=False, **rates)
    dropped = Stage(name="dropped", frames=2, drop=True, **rates)
    for name, plans in (("unbroken", [(patches, dropped)]), ("continued", [(patches,), (patches, dropped)])):
        (tmp_path / name).mkdir()
        for plan in plans:
            monkeypatch.setattr(train, "STAGES", plan)
            run(0, 1, tmp_path / name, seed=0, log_every=1)
    first, second = (AutoModelForImageTextToText.from_pretrained(tmp_path / n) for n in ("unbroken", "continued"))
    untrained = build_model(build_tokenizer(vocabulary()), seed=0).state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, untrained["lm_head.weight"])


def test_a_dataset_is_the_same_for_a_seed_and_bounded(tmp_path):
    first, again = (write_dataset(tmp_path / name, 3, 4, seed=7) for name in "ab")
    assert first.read_text() == again.read_text()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert len({row["sample_id"] for row in rows}) == len(rows) == 12
    assert all((tmp_path / "a" / row["video"]).stat().st_size > 1000 for row in rows)


def test_held_out_files_are_answered_and_need_the_video(tmp_path, model, tokenizer):
    manifest = write_dataset(tmp_path, 12, seed=99)
    full, blind = [], []
    for video, rows in read_manifest(manifest).items():
        full += judge(model, tokenizer, read_clip(video), rows)
        blind += judge(model, tokenizer, None, rows)
    assert len(full) > 90
    assert np.mean([v.by_choice for v in full]) > 0.95
    assert np.mean([v.open_answer for v in full]) > 0.95
    assert np.mean([v.by_choice for v in blind]) < 0.5


def test_generate_gives_the_open_answer(tmp_path, model, tokenizer):
    video, rows = next(iter(read_manifest(write_dataset(tmp_path, 1, seed=5)).items()))
    pixels = read_clip(video)
    for row in rows:
        content = [{"type": "video"}, {"type": "text", "text": row["question"]}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        prompt = prompt.replace("<video>", "<video>" * (8 * TOKENS_PER_FRAME + 1))
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, pixel_values_videos=pixels, do_sample=False, max_new_tokens=4)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert (text == row["answer"]) == judge(model, tokenizer, pixels, [row])[0].open_answer
