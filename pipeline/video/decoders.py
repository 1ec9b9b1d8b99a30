"""Two readers of frames by index, PyAV and decord, that give bit-identical pictures.

Both turn a frame into RGB at its stored size first and then resize that one frame, bicubic with full chroma, so a clip
is never held at full size. Resizing inside the colour conversion would be a little faster, but halves the chroma
resolution on the way, differs between the two libraries, and lets decord 3.4 fail at some widths (96 among them).
Measured on real clips, this differs by 0.1 to 0.2 of 255 on average from Pillow's bicubic, the models' own.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.video.container import FrameIndex, Orientation, VideoInfo, decode_packet, demux, open_video

_BICUBIC = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_EARLIER_KEYFRAMES = 2  # how far a second attempt goes back when frames are not decodable from their own keyframe
_DAMAGE = re.compile(rb"\[(h264|vp9) @ ")
_CHATTER = re.compile(rb"\[[\w,]+ @ 0x|\[\d\d:\d\d:\d\d\] /| +Last message repeated")  # FFmpeg's and decord's lines
_stderr_lock = threading.Lock()

Pictures = dict[int, np.ndarray]


class DecordError(Exception):
    """decord cannot read the file, or its decoder complains of damage."""


class Resizer:
    """Turns RGB frames of the stored size into upright (height, width, 3) uint8 arrays."""

    def __init__(self, orientation: Orientation, height: int, width: int) -> None:
        self.orientation = orientation
        self.height, self.width = orientation.size(height, width)
        self.to_rgb = VideoReformatter()
        self.to_size = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self.to_rgb.reformat(frame, format="rgb24")
        scaled = self.to_size.reformat(rgb, self.width, self.height, interpolation=_BICUBIC)
        # A copy: the array that PyAV hands out keeps all frames behind it alive.
        return np.array(self.orientation.apply(scaled.to_ndarray()), order="C")


def read_with_pyav(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> Pictures:
    """The whole pictures among the frames `indices` (ascending), each decoded from the nearest keyframe before it.

    A frame that the decoder reports as damaged, or that may refer to such a frame, is left out.
    """
    resize = Resizer(info.orientation, height, width)
    rows = np.flatnonzero(info.index.shown)[indices]
    pictures: Pictures = {}
    for start, members in _by_keyframe(info.index, rows):
        pictures |= _read_group(info, members, start, resize)
    index_of_row = dict(zip(rows.tolist(), indices.tolist(), strict=True))
    return {index_of_row[row]: picture for row, picture in pictures.items()}


def _by_keyframe(index: FrameIndex, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Group rows by the last keyframe that is shown no later than they are.

    The frames that follow a keyframe in decoding order but are shown before it (an open group of pictures) need the
    keyframe before; going by presentation time takes care of that.
    """
    if index.counted or not len(index.keyframes):
        yield 0, rows
        return
    by_time = np.argsort(index.keyframes[:, 1], kind="stable")
    place = np.searchsorted(index.keyframes[by_time, 1], index.pts[rows], side="right") - 1
    starts = np.where(place < 0, 0, by_time[place])
    for start in np.unique(starts):
        yield int(start), rows[starts == start]


def _read_group(info: VideoInfo, rows: np.ndarray, start: int, resize: Resizer) -> Pictures:
    """Read rows of the index from keyframe `start`; from an earlier one when that is not enough."""
    pictures, damaged = _read_run(info, rows, start, resize)
    if start and len(pictures) < len(rows):
        # The keyframe may be no real entry point: some muxers mark too many, some streams recover gradually.
        pictures, damaged = _read_run(info, rows, max(0, start - _EARLIER_KEYFRAMES), resize)
    if start and len(pictures) < len(rows) and not damaged:
        pictures, damaged = _read_run(info, rows, 0, resize)
    return pictures


def _read_run(info: VideoInfo, rows: np.ndarray, start: int, resize: Resizer) -> tuple[Pictures, bool]:
    """Decode from one keyframe on until all of `rows` are settled.

    Returns:
        The whole pictures by row, and whether damage was met on the way.
    """
    index = info.index
    wanted = set(rows.tolist())
    # A frame is known to be whole only when everything decoded before it has come out, which may be shown later.
    end = index.pts[index.order <= index.order[rows].max()].max()
    pictures: Pictures = {}
    bad: set[int] = set()
    container, stream = open_video(info.path)
    with container:
        if start > 0:
            with suppress(av.FFmpegError):  # a stream that cannot be sought is read from its beginning
                container.seek(int(index.keyframes[start, 2]), stream=stream)
        for row, frame in _rows_of_frames(index, container, stream, bad):
            if frame.is_corrupt:
                bad.add(int(index.order[row]))
            elif row in wanted:
                pictures[row] = resize(frame)
            if index.pts[row] >= end:
                break
    spoilt = _spoilt(index, bad | set(index.corrupt))
    return {row: picture for row, picture in pictures.items() if not spoilt[row]}, bool(bad)


def _rows_of_frames(
    index: FrameIndex, container: av.container.InputContainer, stream: av.VideoStream, bad: set[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decoded frames with their row in the index; the places of packets that fail to decode go into `bad`."""
    count = 0
    for packet in demux(container, stream):
        frames = decode_packet(packet)
        if frames is None:
            row = count if index.counted else _row_at(index, packet.pts)
            bad.update(index.order[[] if row is None else [min(row, len(index.order) - 1)]].tolist())
        for frame in frames or ():
            row = count if index.counted else _row_at(index, frame.pts)
            count += 1
            if row is not None:
                yield row, frame


def _row_at(index: FrameIndex, pts: int | None) -> int | None:
    if pts is None:
        return None
    row = int(np.searchsorted(index.pts, pts))
    return row if row < len(index.pts) and index.pts[row] == pts else None


def _spoilt(index: FrameIndex, bad: set[int]) -> np.ndarray:
    """(P,) bool: the row is damaged, or may refer to a damaged one.

    Damage spreads in decoding order to the end of its group of pictures, and into the frames of the next group that are
    shown before that group's keyframe. A decoder conceals damage and flags only the frame that it struck.
    """
    keys = index.keyframes[:, 0]
    never = len(index.order)
    struck = np.full(len(keys) + 1, never)  # by group, the first damaged place; group 0 precedes every keyframe
    places = np.array(sorted(bad), dtype=np.int64)
    np.minimum.at(struck, np.searchsorted(keys, places, side="right"), places)
    group = np.searchsorted(keys, index.order, side="right")
    spoilt = index.order >= struck[group]
    if len(keys):
        leading = (group > 0) & (index.pts < index.keyframes[group - 1, 1])
        spoilt |= leading & (struck[group - 1] < never)
    return spoilt


def read_with_decord(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> Pictures:
    """The pictures of the frames `indices`.

    For damaged data decord returns whatever its decoder made of it. The decoder's complaints on stderr are the only
    sign, so they are read.

    Raises:
        DecordError: decord fails, or its decoder complains.
    """
    import decord  # after av: loaded the other way round, PyAV binds to decord's copy of FFmpeg

    resize = Resizer(Orientation(), height, width)  # decord turns pictures upright by itself
    decord.logging.set_level(decord.logging.INFO)  # the level at which concealed damage is told
    try:
        with _stderr_lines() as lines:
            pictures = _read_batch(
                decord.VideoReader(str(Path(info.path).absolute()), num_threads=1), info, indices, resize
            )
    except decord.DECORDError as error:
        raise DecordError(str(error).strip().splitlines()[-1]) from error
    complaints = [line for line in lines if _DAMAGE.match(line)]
    if complaints:
        raise DecordError(complaints[0].decode(errors="replace"))
    return pictures


def _read_batch(reader: Any, info: VideoInfo, indices: np.ndarray, resize: Resizer) -> Pictures:
    """One frame at a time out of a `decord.VideoReader`, which is closed on return."""
    if len(reader) != info.num_frames:
        raise DecordError(f"decord counts {len(reader)} frames where the container holds {info.num_frames}")
    frames = ((index, reader.get_batch([index]).asnumpy()[0]) for index in indices.tolist())
    return {index: resize(av.VideoFrame.from_ndarray(frame, "rgb24")) for index, frame in frames}


@contextmanager
def _stderr_lines() -> Iterator[list[bytes]]:
    """Collects what is written to file descriptor 2; on exit passes on what is not a decoder's chatter."""
    lines: list[bytes] = []
    with _stderr_lock, tempfile.TemporaryFile() as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            log.seek(0)
            lines += log.read().splitlines(keepends=True)
            os.write(2, b"".join(line for line in lines if not _CHATTER.match(line)))
