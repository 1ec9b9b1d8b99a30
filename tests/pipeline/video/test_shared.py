"""The numbered videos and real clips in ../shared/videos, where that folder exists."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from pipeline.video import DecodedVideo, Sampling, VideoError, decode, probe
from pipeline.video.decoders import read_with_pyav

VIDEOS = Path(__file__).parents[3].parent / "shared" / "videos"
NUMBERED = VIDEOS / "numbered"
pytestmark = pytest.mark.skipif(not NUMBERED.is_dir(), reason="../shared/videos is not there")

TRUTH = json.loads((NUMBERED / "truth.json").read_text()) if NUMBERED.is_dir() else {}
EXACT_IN_DECORD = {"h264_small.mp4", "h264_vfr.mp4"}


@pytest.fixture(scope="module")
def frame_number() -> Callable[[np.ndarray], tuple[int, int] | None]:
    """The reader of frame numbers that comes with the videos."""
    spec = spec_from_file_location("frame_number", NUMBERED / "frame_number.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module.frame_number


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("count", [8, 32, 1000])
@pytest.mark.parametrize("name", sorted(TRUTH))
def test_every_sampled_frame_shows_its_own_number(name: str, count: int, decoder: str, frame_number: Callable) -> None:
    truth = TRUTH[name]
    decoded = decode(NUMBERED / name, Sampling(num_frames=count), decoder=decoder)  # type: ignore[arg-type]
    assert len(decoded.indices) == min(count, truth["frames"])
    assert [frame_number(frame) for frame in decoded.frames] == [(truth["numbers"][i], 0) for i in decoded.indices]
    np.testing.assert_allclose(decoded.timestamps, [truth["seconds"][i] for i in decoded.indices], atol=1e-6)
    assert decoded.decoder == ("decord" if decoder == "auto" and name in EXACT_IN_DECORD else "pyav")
    assert decoded.total_frames == truth["frames"]
    assert not decoded.damaged


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_any_choice_of_frames_is_exact(name: str, frame_number: Callable) -> None:
    info, rng = probe(NUMBERED / name), np.random.default_rng(0)
    for _ in range(12):
        indices = np.sort(rng.choice(info.num_frames, int(rng.integers(1, 12)), replace=False))
        pictures = read_with_pyav(info, indices, 90, 160)
        assert [frame_number(pictures[i]) for i in indices.tolist()] == [
            (TRUTH[name]["numbers"][i], 0) for i in indices
        ]


@pytest.mark.parametrize(("name", "whole"), [("corrupt_mid.mp4", 100), ("trunc_tail.mp4", 178)])
def test_damaged_files_give_whole_frames_only(name: str, whole: int, frame_number: Callable) -> None:
    for decoder in ("auto", "pyav", "auto"):
        decoded = decode(NUMBERED / name, Sampling(num_frames=1000), decoder=decoder)  # type: ignore[arg-type]
        assert [frame_number(frame) for frame in decoded.frames] == [(i, 0) for i in decoded.indices]
        assert len(decoded.indices) == whole
        assert decoded.damaged


@pytest.mark.parametrize(
    ("name", "kind"),
    [("zero.mp4", "empty"), ("audio_only.mp4", "no_video_stream"), ("trunc_nomoov.mp4", "unreadable")],
)
def test_hopeless_files_are_named(name: str, kind: str) -> None:
    with pytest.raises(VideoError, match=name) as caught:
        decode(NUMBERED / name, Sampling(num_frames=8))
    assert caught.value.kind == kind


def test_a_name_without_ending_is_no_obstacle(tmp_path: Path, frame_number: Callable) -> None:
    path = tmp_path / "clip"
    shutil.copy(NUMBERED / "hevc.mp4", path)
    assert frame_number(decode(path, Sampling(num_frames=1)).frames[0]) is not None


@pytest.mark.parametrize(
    ("name", "codec", "frames", "size", "decoder"),
    [
        ("nasa_13013.mp4", "h264", 390, (270, 480), "pyav"),
        ("nasa_13013_rotated.mp4", "h264", 17, (480, 270), "pyav"),
        ("flipping_a_pancake.mkv", "h264", 310, (240, 426), "decord"),
        ("av1_video.mkv", "av1", 125, (360, 640), "pyav"),
        ("h265_video.mp4", "hevc", 10, (128, 128), "pyav"),
        ("testsrc2_vp9.webm", "vp9", 30, (720, 1280), "decord"),
    ],
)
def test_real_clips(name: str, codec: str, frames: int, size: tuple[int, int], decoder: str) -> None:
    decoded: DecodedVideo = decode(VIDEOS / name, Sampling(num_frames=4))
    assert (decoded.codec, decoded.total_frames, decoded.decoder) == (codec, frames, decoder)
    assert decoded.frames.shape == (4, *size, 3)
    assert not decoded.damaged


def test_a_damaged_real_clip_gives_its_beginning() -> None:
    decoded = decode(VIDEOS / "corrupted.mp4", Sampling(num_frames=50))
    assert decoded.indices.tolist() == list(range(29))
    with pytest.raises(VideoError, match="29 of 50"):
        decode(VIDEOS / "corrupted.mp4", Sampling(num_frames=50, min_frames=30))
