"""Every decoded frame is the one that its index names, in every kind of container, whole or damaged."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.video import DecodedVideo, Sampling, VideoError, decode, decoders, probe
from pipeline.video.decoders import DecordError, read_with_decord, read_with_pyav
from pipeline.video.size import QwenFrameSize
from tests.pipeline.videos import cut_without_decoding, numbered_frame, read_number, write_video

FRAMES = 60
ALL = Sampling(num_frames=1000)
X264 = {"preset": "veryfast", "g": "20", "bf": "3"}
OPEN = X264 | {"x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:bframes=4"}
VP9 = {"codec": "libvpx-vp9", "options": {"g": "20", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}}
IRREGULAR = np.cumsum(np.random.default_rng(0).integers(20, 200, FRAMES)).tolist()

MADE: dict[str, dict[str, Any]] = {
    "closed.mp4": {"options": X264},
    "closed.mkv": {"options": X264},
    "fragments.mp4": {"options": X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "keyframes_only.mp4": {"options": {"g": "1"}},
    "irregular.mp4": {"options": X264, "times": IRREGULAR},
    "irregular.mkv": {"options": X264, "times": IRREGULAR},
    "late.mp4": {"options": X264, "times": [5000 + 40 * i for i in range(FRAMES)]},
    "vp9.webm": VP9,
    "open.mp4": {"options": OPEN},
    "open.mkv": {"options": OPEN},
    "open.ts": {"options": OPEN},
    "closed.ts": {"options": X264},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=15:bframes=0"}},
    "interlaced.ts": {"options": X264 | {"x264-params": "tff=1"}},
    "stream.h264": {"options": X264},
    "closed.avi": {"options": X264},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12", "b": "800k"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12", "b": "800k"}},
    "turned.mp4": {"options": X264, "quarter_turns": 1},
    "upside_down.mp4": {"options": X264, "quarter_turns": 2},
    "turned_back.mp4": {"options": X264, "quarter_turns": 3},
}
EXACT_IN_DECORD = set(list(MADE)[:8])

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes the named video once."""
    folder = tmp_path_factory.mktemp("videos")

    def write(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, FRAMES, **MADE[name])

    return write


def numbers(decoded: DecodedVideo) -> list[int | None]:
    return [read_number(frame) for frame in decoded.frames]


@pytest.mark.parametrize("name", MADE)
def test_each_frame_shows_its_own_number_at_its_own_time(make: Make, name: str) -> None:
    decoded = decode(make(name), ALL)
    assert numbers(decoded) == list(range(FRAMES))
    assert decoded.indices.tolist() == list(range(FRAMES))
    times = np.array(MADE[name].get("times", range(0, 40 * FRAMES, 40))) / 1000
    np.testing.assert_allclose(decoded.times, times - times[0], atol=2e-3)
    assert (decoded.lost, decoded.truncated, decoded.damaged) == ((), False, False)
    assert decoded.decoder == ("decord" if name in EXACT_IN_DECORD else "pyav")


@pytest.mark.parametrize("name", MADE)
def test_a_frame_reached_by_seeking_equals_the_one_decoded_on_the_way(make: Make, name: str) -> None:
    info = probe(make(name))
    whole = read_with_pyav(info, np.arange(FRAMES), info.height, info.width)
    assert len(whole) == FRAMES
    for index in range(0, FRAMES, 1 if not info.index.counted else 13):
        alone = read_with_pyav(info, np.array([index]), info.height, info.width)
        assert np.array_equal(alone[index], whole[index]), index


@pytest.mark.parametrize("name", sorted(EXACT_IN_DECORD))
@pytest.mark.parametrize("size", [(96, 160), (96, 96), (50, 71), (128, 224)])
def test_both_decoders_give_the_same_pixels(make: Make, name: str, size: tuple[int, int]) -> None:
    info, indices = probe(make(name)), np.array([0, 7, 19, 20, 21, 58, 59])
    one, other = read_with_pyav(info, indices, *size), read_with_decord(info, indices, *size)
    assert one.keys() == other.keys() == set(indices.tolist())
    for index in one:
        assert np.array_equal(one[index], other[index])


def test_an_edit_list_hides_what_it_hides(make: Make, tmp_path: Path) -> None:
    for name in ("closed.mp4", "open.mp4"):
        path = cut_without_decoding(make(name), tmp_path / name, first=27)
        decoded = decode(path, ALL)
        assert numbers(decoded) == list(range(27, FRAMES))
        np.testing.assert_allclose(decoded.timestamps, np.arange(FRAMES - 27) / 25, atol=1e-6)
        assert decoded.decoder == "pyav"
        assert numbers(decode(path, Sampling(num_frames=5))) == [27, 35, 43, 51, 59]


def test_a_mirrored_video_is_mirrored_back(tmp_path: Path) -> None:
    path = tmp_path / "mirrored.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        stream.set_display_rotation(0, hflip=True)
        picture = np.ascontiguousarray(numbered_frame(77)[:, ::-1])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert numbers(decode(path, ALL)) == [77]


def test_the_main_stream_is_read_when_there_are_others(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        main, other = (container.add_stream("libx264", rate=25) for _ in range(2))
        for stream in (main, other):
            stream.height, stream.width, stream.pix_fmt = 96, 160, "yuv420p"
        for number in range(10):
            for stream, value in ((main, number), (other, 500)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(value), format="rgb24")))
        for stream in (main, other):
            container.mux(stream.encode(None))
    decoded = decode(path, ALL)
    assert numbers(decoded) == list(range(10))
    assert decoded.decoder == "pyav"


def test_few_frames_of_a_long_video_decode_little(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode_packet = decoders.decode_packet

    def counting(packet: av.Packet) -> list[av.VideoFrame] | None:
        frames = decode_packet(packet)
        decoded.append(len(frames or ()))
        return frames

    monkeypatch.setattr(decoders, "decode_packet", counting)
    for name in ("closed.mp4", "closed.mkv", "open.ts", "hevc.mp4"):
        decoded.clear()
        assert numbers(decode(make(name), Sampling(num_frames=1, start=1.7, end=1.75), decoder="pyav")) != [None]
        assert 0 < sum(decoded) < FRAMES / 2, name


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


def strike(source: Path, path: Path, packet: int, seed: int) -> Path:
    """Flip bits in the middle of one packet."""
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = packets[packet]
    data, rng = bytearray(source.read_bytes()), np.random.default_rng(seed)
    for _ in range(8):
        data[position + 30 + int(rng.integers(size - 30))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_frames_struck_by_damage_and_those_after_are_left_out(make: Make, tmp_path: Path, seed: int) -> None:
    info = probe(make("closed.mp4"))
    whole = read_with_pyav(info, np.arange(FRAMES), info.height, info.width)
    # The keyframe in the middle: what is struck there shows in all of its group, and in no other.
    path = strike(make("closed.mp4"), tmp_path / "struck.mp4", int(info.index.keyframes[1, 0]), seed)
    for decoder in ("auto", "pyav"):
        decoded = decode(path, ALL, decoder=decoder)  # type: ignore[arg-type]
        assert decoded.decoder == "pyav"
        assert decoded.lost == tuple(range(20, 40))
        assert decoded.damaged and not decoded.truncated
        for index, frame in zip(decoded.indices.tolist(), decoded.frames, strict=True):
            assert np.array_equal(frame, whole[index])


def test_decord_alone_refuses_damage_instead_of_returning_what_it_got(make: Make, tmp_path: Path) -> None:
    info = probe(make("closed.mp4"))
    path = strike(make("closed.mp4"), tmp_path / "struck.mp4", int(info.index.keyframes[1, 0]), 0)
    with pytest.raises(DecordError):
        read_with_decord(probe(path), np.array([30]), 96, 160)
    with pytest.raises(VideoError, match="auto") as caught:
        decode(path, ALL, decoder="decord")
    assert caught.value.kind == "unreadable"


def test_damage_in_an_open_group_reaches_the_frames_before_the_next_keyframe(make: Make, tmp_path: Path) -> None:
    info = probe(make("open.mp4"))
    whole = read_with_pyav(info, np.arange(FRAMES), info.height, info.width)
    path = strike(make("open.mp4"), tmp_path / "struck.mp4", int(info.index.keyframes[1, 0]), 1)
    decoded = decode(path, ALL)
    keyframe_of_next = np.searchsorted(info.index.pts, info.index.keyframes[2, 1])
    assert set(decoded.lost) >= set(range(20, int(keyframe_of_next)))
    for index, frame in zip(decoded.indices.tolist(), decoded.frames, strict=True):
        assert np.array_equal(frame, whole[index])


def test_what_others_write_to_stderr_meanwhile_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with decoders._stderr_lines() as lines:
        os.write(2, b"[h264 @ 0x5612] error while decoding MB 3 4\n[actor] hello\n")
    assert [line[:7] for line in lines] == [b"[h264 @", b"[actor]"]
    assert capfd.readouterr().err == "[actor] hello\n"


def test_nothing_is_said_on_stderr(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = strike(make("closed.mp4"), tmp_path / "struck.mp4", 20, 0)
    for name in (path, make("vp9.webm"), make("open.ts")):
        decode(name, ALL)
    assert capfd.readouterr() == ("", "")


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def unusable(folder: Path, kind: str) -> Path:
    """A path that cannot be used, by kind."""
    path = folder / f"{kind}.mp4"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "text":
            path = path.with_suffix(".txt")
            path.write_text("not a video\n" * 100)
        case "playlist":
            write_video(folder / "clip.mp4", 2)
            path = path.with_suffix(".m3u8")
            path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
        case "audio":
            audio_only(path)
        case "header":
            write_video(path, 10)
            path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("missing", "missing"),
        ("directory", "not_a_file"),
        ("fifo", "not_a_file"),
        ("empty", "empty"),
        ("text", "unreadable"),
        ("playlist", "unreadable"),
        ("header", "unreadable"),
        ("audio", "no_video_stream"),
    ],
)
def test_what_is_no_video_is_named_at_once(tmp_path: Path, what: str, kind: str) -> None:
    path = unusable(tmp_path, what)
    with pytest.raises(VideoError) as caught:
        decode(path, ALL)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.kind == kind
    assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_a_name_that_no_file_can_have_is_missing() -> None:
    with pytest.raises(VideoError, match="no file can have this name") as caught:
        decode("a\0b.mp4", ALL)
    assert caught.value.kind == "missing"


def test_a_stream_in_which_nothing_decodes_is_unreadable(make: Make, tmp_path: Path) -> None:
    with av.open(str(make("closed.mp4"))) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(make("closed.mp4").read_bytes())
    for position, size in packets:
        data[position : position + size] = bytes(size)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="none of its 60 video packets") as caught:
        probe(path)
    assert caught.value.kind == "unreadable"


def test_a_picture_too_narrow_for_the_model_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ribbon.mp4", 2, size=(4, 1000))
    rule = QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**6, temporal_patch_size=2)
    with pytest.raises(VideoError, match=r"ribbon\.mp4: a 4x1000 picture") as caught:
        decode(path, ALL, size=rule)
    assert caught.value.kind == "extreme_shape"


def test_a_clock_that_jumps_back_keeps_the_frames_in_order(make: Make, tmp_path: Path) -> None:
    """Two broadcasts joined byte by byte: the second one's times begin anew."""
    path = tmp_path / "joined.ts"
    path.write_bytes(make("closed.ts").read_bytes() * 2)
    decoded = decode(path, ALL)
    assert [number for number in numbers(decoded) if number is not None][:FRAMES] == list(range(FRAMES))
    assert numbers(decoded)[-20:] == list(range(FRAMES))[-20:]
    assert (np.diff(decoded.timestamps) > 0).all()


def test_names_are_only_ever_file_names(tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "100%03d.mp4", "häh ?.mp4"):
        path = write_video(tmp_path / "plain.mp4", 3).rename(tmp_path / name)
        for decoder in ("auto", "pyav"):
            assert numbers(decode(path, ALL, decoder=decoder)) == [0, 1, 2]  # type: ignore[arg-type]


def test_decoding_processes_stay_light() -> None:
    code = "import sys, pipeline.video; print([name for name in ('torch', 'ray', 'decord') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
