"""Both decoders give the pictures that were asked for, bit for bit, and leave out what is damaged."""

import os
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.video import Sampling, VideoError, container, decode, decoders, probe
from pipeline.video.decoders import (
    DecordError,
    read_sizes_with_decord,
    read_sizes_with_pyav,
    read_with_decord,
    read_with_pyav,
)
from tests.pipeline.video.cases import ALL, EXACT_IN_DECORD, FRAMES, MADE, QUIET, Make, numbers, strike
from tests.pipeline.videos import write_video


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


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of frames that came out of PyAV, by packet."""
    counts: list[int] = []
    decode_packet = decoders.decode_packet

    def counting(packet: av.Packet) -> list[av.VideoFrame] | None:
        frames = decode_packet(packet)
        counts.append(len(frames or ()))
        return frames

    monkeypatch.setattr(decoders, "decode_packet", counting)
    return counts


def test_few_frames_of_a_long_video_decode_little(make: Make, decoded: list[int]) -> None:
    for name in ("closed.mp4", "closed.mkv", "open.ts", "hevc.mp4"):
        decoded.clear()
        assert numbers(decode(make(name), Sampling(num_frames=1, start=1.7, end=1.75), decoder="pyav")) != [None]
        assert 0 < sum(decoded) < FRAMES / 2, name


@pytest.mark.parametrize("name", sorted(set(MADE) - {"refresh.mp4"}))
def test_no_more_is_decoded_than_what_lies_between_a_keyframe_and_the_frame(
    make: Make, name: str, decoded: list[int]
) -> None:
    info = probe(make(name))
    if info.index.counted:
        pytest.skip("a stream that is always read from its beginning")
    for index in range(0, FRAMES, 7):
        decoded.clear()
        read_with_pyav(info, np.array([index]), info.height, info.width)
        before = info.index.keyframes[info.index.keyframes[:, 1] <= info.index.pts[index]][-1, 0]
        assert sum(decoded) <= info.index.order[index] - before + 1, index


@pytest.mark.parametrize("name", ["closed.mp4", "open.ts", "pyramid.mkv", "hevc.ts", "open_hevc.mkv", "layers.mkv"])
def test_frames_that_no_other_refers_to_are_passed_over(make: Make, name: str, decoded: list[int]) -> None:
    info = probe(make(name))
    assert info.index.skippable
    read_with_pyav(info, np.array([0, FRAMES - 1]), info.height, info.width)
    assert sum(decoded) < FRAMES * 0.75


def test_hevc_pictures_of_lower_layers_may_be_referred_to_though_marked_otherwise() -> None:
    def skippable(*pictures: tuple[int, bool]) -> bool:
        blank = dict(zip(container._Packet._fields, (0, 0, 0, False, False, False, True, False, None), strict=True))
        packets = [container._Packet(**blank | {"reference": container._Reference(*each)}) for each in pictures]
        return container._tells_references(packets, "hevc")

    assert skippable((0, True), (0, False))
    assert skippable((0, True), (1, True), (2, False))
    assert not skippable((0, True), (1, False), (2, True))


def in_order(path: Path) -> dict[int, np.ndarray]:
    """Every frame by its presentation time, as PyAV gives it when nothing is sought or skipped."""
    with av.open(str(path)) as file:
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)}


@pytest.mark.parametrize("seed", range(8))
def test_any_choice_of_frames_equals_the_video_read_in_order(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    group = f"keyint={pick(5, 12, 60)}:bframes={rng.integers(0, 5)}:open-gop={rng.integers(2)}:ref={rng.integers(1, 4)}"
    codec, params = pick(("libx264", "x264-params"), ("libx265", "x265-params"))
    extra = f"b-pyramid={pick('none', 'normal')}" if codec == "libx264" else f"b-pyramid={rng.integers(2)}:{QUIET}"
    path = tmp_path / f"v.{pick('mp4', 'mkv')}"
    write_video(path, FRAMES, codec=codec, options={"preset": "ultrafast", params: f"{group}:{extra}"}, size=(64, 96))
    info, truth = probe(path), in_order(path)
    for count in (1, 2, 5):
        indices = np.sort(rng.choice(FRAMES, count, replace=False))
        pictures = read_with_pyav(info, indices, 64, 96)
        for index in indices.tolist():
            assert np.array_equal(pictures[index], truth[int(info.index.pts[index])]), (group, extra, index)


@pytest.mark.parametrize("bframes", [0, 3])
def test_gradual_refresh_is_decoded_from_a_real_keyframe(tmp_path: Path, bframes: int) -> None:
    params = f"intra-refresh=1:keyint=12:bframes={bframes}:b-adapt=0:ref=1:scenecut=0"
    path = write_video(tmp_path / "v.flv", 70, options={"x264-params": params}, size=(64, 96))
    info, truth = probe(path), in_order(path)
    assert info.keyframes.tolist() == [0]
    for index in range(3, 70, 4):
        picture = read_with_pyav(info, np.array([index]), 64, 96)[index]
        assert np.array_equal(picture, truth[int(info.index.pts[index])]), index


@pytest.mark.parametrize("name", ["closed.mp4", "open.ts", "vp9.webm", "turned.mp4", "keyframes_only.mp4", "vp8.webm"])
def test_pictures_do_not_depend_on_threads_or_on_other_sizes(make: Make, name: str) -> None:
    info, indices = probe(make(name)), np.array([0, 3, 19, 20, 33, 59])
    wanted = {(48, 80): indices, (info.height, info.width): indices[2:4]}
    for threads in (1, 2, 5):
        both = read_sizes_with_pyav(info, wanted, threads)
        for shape, chosen in wanted.items():
            alone = read_with_pyav(info, chosen, *shape)
            assert both[shape].keys() == alone.keys() == set(chosen.tolist())
            assert all(np.array_equal(both[shape][index], alone[index]) for index in alone)
    if info.decord_exact:
        both = read_sizes_with_decord(info, wanted)
        assert all(
            np.array_equal(both[48, 80][index], read_with_pyav(info, indices, 48, 80)[index]) for index in [3, 59]
        )


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


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p", "yuv444p", "yuvj420p"])
def test_colours_do_not_depend_on_the_decoder_that_auto_takes(tmp_path: Path, pix_fmt: str) -> None:
    path = write_video(tmp_path / "v.mp4", 12, pix_fmt=pix_fmt)
    info, indices = probe(path), np.array([0, 5, 11])
    assert info.decord_exact == (pix_fmt != "yuv420p10le")
    chosen, pyav = (decode(path, Sampling(num_frames=3), decoder=name) for name in ("auto", "pyav"))
    assert chosen.indices.tolist() == pyav.indices.tolist() == [0, 6, 11]
    assert np.array_equal(chosen.frames, pyav.frames)
    if info.decord_exact:
        one, other = read_with_decord(info, indices, 96, 160), read_with_pyav(info, indices, 96, 160)
        assert all(np.array_equal(one[index], other[index]) for index in one)


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
