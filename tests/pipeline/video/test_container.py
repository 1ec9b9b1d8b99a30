"""What a file holds is read from its packets; what cannot be used is named."""

import pickle
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.video import VideoError, decode, probe
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


def test_names_are_only_ever_file_names(tmp_path: Path) -> None:
    for name in ("concat:a|b.mp4", "100%03d.mp4", "häh ?.mp4"):
        path = write_video(tmp_path / "plain.mp4", 3).rename(tmp_path / name)
        for decoder in ("auto", "pyav"):
            assert numbers(decode(path, ALL, decoder=decoder)) == [0, 1, 2]  # type: ignore[arg-type]
