"""Numbered videos of tests/data, and those and real clips in ../shared/videos where that folder exists."""

import json
import shutil
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from pipeline.video import DecodedVideo, Sampling, VideoError, decode, probe
from pipeline.video.decoders import read_with_pyav
from tests.pipeline.videos import read_number

ROOT = Path(__file__).parents[3]
OURS = ROOT / "tests" / "data" / "videos"
VIDEOS = ROOT.parent / "shared" / "videos"
NUMBERED = VIDEOS / "numbered"
EXACT_IN_DECORD = {"h264_small.mp4", "h264_vfr.mp4", "irregular.mp4"}
when_shared = pytest.mark.skipif(not NUMBERED.is_dir(), reason="../shared/videos is not there")

TRUTH = {
    folder / name: truth
    for folder in (OURS, NUMBERED)
    if folder.is_dir()
    for name, truth in json.loads((folder / "truth.json").read_text()).items()
}
"""For each file the `numbers` that its frames show in order of presentation, and the `seconds` when they do."""
each_video = pytest.mark.parametrize("path", sorted(TRUTH), ids=lambda path: f"{path.parent.name}/{path.name}")


def shared_reader() -> Callable[[np.ndarray], int | None]:
    """The reader of frame numbers that comes with the videos of ../shared."""
    spec = spec_from_file_location("frame_number", NUMBERED / "frame_number.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    exec(compile((NUMBERED / "frame_number.py").read_text(), spec.origin or "", "exec"), module.__dict__)

    def read(frame: np.ndarray) -> int | None:
        number, quarter_turns = module.frame_number(frame) or (None, 0)
        return None if quarter_turns else number

    return read


READERS = {OURS: read_number} | ({NUMBERED: shared_reader()} if NUMBERED.is_dir() else {})


@each_video
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
@pytest.mark.parametrize("count", [8, 32, 1000])
def test_every_sampled_frame_shows_its_own_number(path: Path, count: int, decoder: str) -> None:
    numbers, seconds = TRUTH[path]["numbers"], TRUTH[path]["seconds"]
    decoded = decode(path, Sampling(num_frames=count), decoder=decoder)  # type: ignore[arg-type]
    assert len(decoded.indices) == min(count, len(numbers))
    assert [READERS[path.parent](frame) for frame in decoded.frames] == [numbers[i] for i in decoded.indices]
    np.testing.assert_allclose(decoded.timestamps, [seconds[i] for i in decoded.indices], atol=1e-6)
    assert decoded.decoder == ("decord" if decoder == "auto" and path.name in EXACT_IN_DECORD else "pyav")
    assert decoded.total_frames == len(numbers)
    assert not decoded.damaged


@each_video
def test_any_choice_of_frames_is_exact(path: Path) -> None:
    info, rng = probe(path), np.random.default_rng(0)
    for _ in range(12):
        indices = np.sort(rng.choice(info.num_frames, int(rng.integers(1, 12)), replace=False))
        pictures = read_with_pyav(info, indices, 90, 160)
        shown = [READERS[path.parent](pictures[i]) for i in indices.tolist()]
        assert shown == [TRUTH[path]["numbers"][i] for i in indices]


@each_video
def test_what_is_left_of_a_file_cut_short_is_exact(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / path.name
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    try:
        decoded = decode(cut, Sampling(num_frames=1000))
    except VideoError as error:
        assert error.kind == "unreadable"  # the index stood at the end
        return
    numbers, seconds = (np.array(TRUTH[path][key]) for key in ("numbers", "seconds"))
    assert len(decoded.frames) < len(numbers)
    nearest = np.abs(np.array(decoded.timestamps)[:, None] - seconds).argmin(axis=1)
    assert [READERS[path.parent](frame) for frame in decoded.frames] == numbers[nearest].tolist()


@when_shared
@pytest.mark.parametrize(("name", "whole"), [("corrupt_mid.mp4", 100), ("trunc_tail.mp4", 178)])
def test_damaged_files_give_whole_frames_only(name: str, whole: int) -> None:
    for decoder in ("auto", "pyav", "auto"):
        decoded = decode(NUMBERED / name, Sampling(num_frames=1000), decoder=decoder)  # type: ignore[arg-type]
        assert [READERS[NUMBERED](frame) for frame in decoded.frames] == decoded.indices.tolist()
        assert len(decoded.indices) == whole
        assert decoded.damaged


@when_shared
@pytest.mark.parametrize(
    ("name", "kind"),
    [("zero.mp4", "empty"), ("audio_only.mp4", "no_video_stream"), ("trunc_nomoov.mp4", "unreadable")],
)
def test_hopeless_files_are_named(name: str, kind: str) -> None:
    with pytest.raises(VideoError, match=name) as caught:
        decode(NUMBERED / name, Sampling(num_frames=8))
    assert caught.value.kind == kind


def test_a_name_without_ending_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "clip"
    shutil.copy(OURS / "hevc.mp4", path)
    decoded = decode(path, Sampling(num_frames=1))
    assert [read_number(frame) for frame in decoded.frames] == decoded.indices.tolist()


@when_shared
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


@when_shared
def test_a_damaged_real_clip_gives_its_beginning() -> None:
    decoded = decode(VIDEOS / "corrupted.mp4", Sampling(num_frames=50))
    assert decoded.indices.tolist() == list(range(29))
    with pytest.raises(VideoError, match="29 of 50"):
        decode(VIDEOS / "corrupted.mp4", Sampling(num_frames=50, min_frames=30))
