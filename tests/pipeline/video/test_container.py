"""What a file holds is read from its packets; what cannot be used is named."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.video import Sampling, VideoError, container, decode, probe
from tests.pipeline.video.cases import ALL, FRAMES, Make, numbers, unusable
from tests.pipeline.videos import numbered_frame, write_video


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


def test_a_clock_that_jumps_back_keeps_the_frames_in_order(make: Make, tmp_path: Path) -> None:
    """Two broadcasts joined byte by byte: the second one's times begin anew."""
    path = tmp_path / "joined.ts"
    path.write_bytes(make("closed.ts").read_bytes() * 2)
    decoded = decode(path, ALL)
    assert [number for number in numbers(decoded) if number is not None][:FRAMES] == list(range(FRAMES))
    assert numbers(decoded)[-20:] == list(range(FRAMES))[-20:]
    assert (np.diff(decoded.timestamps) > 0).all()


def retimed(source: Path, path: Path, times: dict[int, int]) -> Path:
    """Copy packets, some of them (by decoding order) with the presentation time of another one."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        stored = [packet.pts for packet in packets]
        for place, packet in enumerate(packets):
            packet.pts, packet.stream = stored[times.get(place, place)], stream
            new.mux(packet)
    return path


@pytest.mark.parametrize("name", ["closed.mkv", "closed.mp4"])
@pytest.mark.parametrize(("struck", "other"), [(33, 34), (34, 33), (40, 41), (5, 7)])
def test_two_packets_with_one_time_leave_the_clock_of_the_others_alone(
    make: Make, tmp_path: Path, name: str, struck: int, other: int
) -> None:
    path = retimed(make(name), tmp_path / name, {struck: other})
    decoded = decode(path, ALL)
    lost = set(probe(make(name)).index.pts.searchsorted([in_decoding_order(make(name))[i] for i in (struck, other)]))
    assert numbers(decoded) == sorted(set(range(FRAMES)) - lost)
    np.testing.assert_allclose(decoded.times, np.array(numbers(decoded), dtype=float) / 25, atol=2e-3)
    assert decoded.truncated and decoded.clock and decoded.decoder == "pyav"
    assert numbers(decode(path, Sampling(num_frames=3, start=0.4, end=0.8))) == [10, 15, 20]


def in_decoding_order(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [packet.pts for packet in container.demux(video=0) if packet.size]


def test_spans_of_a_file_without_a_clock_are_refused(make: Make, tmp_path: Path) -> None:
    path = retimed(make("vp9.webm"), tmp_path / "v.mkv", {place: place // 3 * 3 + 2 for place in range(FRAMES)})
    decoded = decode(path, ALL)
    assert numbers(decoded) == list(range(FRAMES)) and not decoded.clock
    with pytest.raises(VideoError, match=r"time stamps contradict each other, so that start=0\.5") as caught:
        decode(path, Sampling(num_frames=2, start=0.5))
    assert caught.value.kind == "untimed"
    assert decode(make("closed.avi"), Sampling(num_frames=2, start=0.5)).clock  # stores no times, so none contradict


def test_a_packet_of_a_stream_that_pyav_does_not_know_is_passed_over(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Damaged:
        """Stands for a container; its packets are interrupted as PyAV does it."""

        def __init__(self, packets: list[int]) -> None:
            self.packets = packets

        def demux(self, stream: object) -> Iterator[int]:
            while self.packets:
                if (packet := self.packets.pop(0)) < 0:
                    raise IndexError("list index out of range")
                yield packet

    assert list(container.demux(Damaged([1, -1, 2, -1, -1, 3]), None)) == [1, 2, 3]  # type: ignore[arg-type]

    def unknown(self: object, kind: str) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(av.container.streams.StreamContainer, "best", unknown, raising=True)
    assert numbers(decode(make("closed.ts"), Sampling(num_frames=2))) == [0, FRAMES - 1]


def test_names_are_only_ever_file_names(tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "100%03d.mp4", "häh ?.mp4"):
        path = write_video(tmp_path / "plain.mp4", 3).rename(tmp_path / name)
        for decoder in ("auto", "pyav"):
            assert numbers(decode(path, ALL, decoder=decoder)) == [0, 1, 2]  # type: ignore[arg-type]
