"""Both decoders give the pictures that were asked for, bit for bit, and leave out what is damaged."""

import os
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.video import Sampling, VideoError, decode, decoders, probe
from pipeline.video.decoders import DecordError, read_with_decord, read_with_pyav
from tests.pipeline.video.cases import ALL, EXACT_IN_DECORD, FRAMES, MADE, Make, numbers, strike


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
