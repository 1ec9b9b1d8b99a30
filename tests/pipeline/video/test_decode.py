"""Every decoded frame is the one that its index names, in every kind of container, whole or damaged."""

import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.video import DecodedVideo, Sampling, VideoError, decode, decode_windows
from pipeline.video.size import QwenFrameSize
from tests.pipeline.video.cases import ALL, EXACT_IN_DECORD, FRAMES, MADE, X264, Make, numbers
from tests.pipeline.videos import cut_without_decoding, write_video


@pytest.mark.parametrize("name", MADE)
def test_each_frame_shows_its_own_number_at_its_own_time(make: Make, name: str) -> None:
    decoded = decode(make(name), ALL)
    assert numbers(decoded) == list(range(FRAMES))
    assert decoded.indices.tolist() == list(range(FRAMES))
    times = np.array(MADE[name].get("times", range(0, 40 * FRAMES, 40))) / 1000
    np.testing.assert_allclose(decoded.times, times - times[0], atol=2e-3)
    assert (decoded.lost, decoded.truncated, decoded.damaged) == ((), False, False)
    assert decoded.decoder == ("decord" if name in EXACT_IN_DECORD else "pyav")


def test_an_edit_list_hides_what_it_hides(make: Make, tmp_path: Path) -> None:
    for name in ("closed.mp4", "open.mp4"):
        path = cut_without_decoding(make(name), tmp_path / name, first=27)
        decoded = decode(path, ALL)
        assert numbers(decoded) == list(range(27, FRAMES))
        np.testing.assert_allclose(decoded.timestamps, np.arange(FRAMES - 27) / 25, atol=1e-6)
        assert decoded.decoder == "pyav"
        assert numbers(decode(path, Sampling(num_frames=5))) == [27, 35, 43, 51, 59]


def test_size_is_fixed_or_made_from_the_upright_source(make: Make) -> None:
    asked: list[tuple[int, int, int]] = []

    def halve(height: int, width: int, num_frames: int) -> tuple[int, int]:
        asked.append((height, width, num_frames))
        return height // 2, width // 2

    for name in ("closed.mp4", "turned.mp4"):
        decoded = decode(make(name), Sampling(num_frames=3), size=halve)
        assert decoded.frames.shape == (3, 48, 80, 3)
        assert numbers(decoded) == [0, 30, 59]
        assert decode(make(name), Sampling(num_frames=3), size=(64, 48)).frames.shape == (3, 64, 48, 3)
    assert asked == [(96, 160, 3)] * 2


def test_frames_are_resized_like_pillow_does_it(make: Make) -> None:
    from PIL import Image

    source, small = (decode(make("closed.mp4"), Sampling(num_frames=4), size=size) for size in (None, (48, 64)))
    for large, frame in zip(source.frames, small.frames, strict=True):
        reference = np.asarray(Image.fromarray(large).resize((64, 48), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(frame - reference).mean() < 0.5
        assert np.abs(frame - reference).max() <= 4


def test_facts_about_the_video(make: Make) -> None:
    decoded = decode(make("late.mp4"), Sampling(num_frames=4))
    assert decoded.codec == "h264"
    assert (decoded.total_frames, decoded.requested_frames) == (FRAMES, 4)
    assert decoded.start_time == pytest.approx(5.0)
    assert decoded.duration == pytest.approx(2.4)
    assert decoded.fps == pytest.approx(25.0)
    assert decode(make("closed.mp4"), ALL).requested_frames == 1000
    assert pickle.loads(pickle.dumps(decoded)).indices.tolist() == decoded.indices.tolist()


def test_a_truncated_file_gives_what_it_has(make: Make, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", FRAMES, options=X264, container_options={"movflags": "+faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    decoded = decode(cut, ALL)
    assert decoded.truncated and decoded.damaged
    assert 20 < len(decoded.frames) < FRAMES
    # The last frames there may lack some that were to be shown before them; their times are right all the same.
    assert numbers(decoded) == [round(25 * seconds) for seconds in decoded.times]
    with pytest.raises(VideoError, match="min_frames=60") as caught:
        decode(cut, Sampling(num_frames=1000, min_frames=60))
    assert caught.value.kind == "too_few_frames"


def test_a_picture_too_narrow_for_the_model_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ribbon.mp4", 2, size=(4, 1000))
    rule = QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**6, temporal_patch_size=2)
    with pytest.raises(VideoError, match=r"ribbon\.mp4: a 4x1000 picture") as caught:
        decode(path, ALL, size=rule)
    assert caught.value.kind == "extreme_shape"


def test_decoding_processes_stay_light() -> None:
    code = "import sys, pipeline.video; print([name for name in ('torch', 'ray', 'decord') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize(
    "name", ["closed.mp4", "open.mp4", "hevc.ts", "vp9.webm", "av1.mkv", "mpeg4.avi", "turned.mp4"]
)
def test_keyframes_have_their_own_pictures_and_times(make: Make, name: str) -> None:
    every = decode(make(name), ALL)
    decoded = decode(make(name), Sampling(num_frames=4, mode="keyframes"))
    assert decoded.sampling == "keyframes" and decoded.requested_frames == 4
    assert 2 <= len(decoded.indices) <= 4
    assert numbers(decoded) == decoded.indices.tolist()
    np.testing.assert_array_equal(decoded.timestamps, every.timestamps[decoded.indices])
    np.testing.assert_array_equal(decoded.frames, every.frames[decoded.indices])


def test_too_few_keyframes_leave_the_sampling_uniform(make: Make) -> None:
    decoded = decode(make("closed.mp4"), Sampling(num_frames=8, mode="keyframes"))
    assert decoded.sampling == "uniform" and decoded.decoder == "decord"
    assert decoded.indices.tolist() == decode(make("closed.mp4"), Sampling(num_frames=8)).indices.tolist()


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_windows_of_a_file_are_as_if_each_were_decoded_alone(make: Make, decoder: str) -> None:
    samplings = [
        Sampling(num_frames=4),
        Sampling(num_frames=5, start=0.4, end=1.2),
        Sampling(num_frames=3, start=90.0),
        Sampling(fps=5, start=1.0),
        Sampling(num_frames=4),
        Sampling(num_frames=2, mode="keyframes"),
        Sampling(num_frames=20, min_frames=20, start=0.0, end=0.1),
    ]

    def size(height: int, width: int, num_frames: int) -> tuple[int, int]:
        return height // (1 + num_frames % 2), width

    videos = decode_windows(make("closed.mp4"), samplings, size, decoder)  # type: ignore[arg-type]
    assert [video.kind for video in videos if isinstance(video, VideoError)] == ["span_outside", "too_few_frames"]
    for sampling, video in zip(samplings, videos, strict=True):
        if isinstance(video, DecodedVideo):
            alone = decode(make("closed.mp4"), sampling, size, decoder)  # type: ignore[arg-type]
            np.testing.assert_array_equal(video.frames, alone.frames)
            np.testing.assert_array_equal(video.timestamps, alone.timestamps)
    assert videos[0] is videos[4]  # equal samplings share their frames


def test_one_file_is_opened_once_for_all_its_windows(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *args, **settings: opened.append(args[0]) or open_file(*args, **settings))
    samplings = [Sampling(num_frames=2, start=start / 10, end=2.0) for start in range(10)]
    decode_windows(make("open.mp4"), samplings, size=lambda height, width, _: (height // 2, width // 2))
    assert len(opened) == 1


def test_frames_that_would_take_too_much_memory_are_refused_unread(make: Make) -> None:
    few, many = Sampling(num_frames=2), Sampling(fps=25)
    small, refused = decode_windows(make("closed.mp4"), [few, many], most_bytes=10 * 96 * 160 * 3)
    assert isinstance(small, DecodedVideo)
    assert isinstance(refused, VideoError) and refused.kind == "too_many_frames"
    assert "60 frames of 96x160 take 0.0 GiB" in refused.message
