"""Exact frames of a video file at the model's size.

Frame i is the i-th frame that a player shows, with its own presentation time. Two decoders give the same frames: PyAV,
which reads every file, and decord, which is used where its seeking is known to be right. Run as a program:

    python -m pipeline.video clip.mp4 --num-frames 8 --out frames.npz
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.container import FrameIndex, Orientation, VideoError, VideoInfo, decode_packet, demux, open_video, probe
from pipeline.sampling import Sampling, sample_indices

__all__ = ["DecodedVideo", "Sampling", "VideoError", "VideoInfo", "decode", "probe", "sample_indices"]

Decoder = Literal["auto", "decord", "pyav"]
Size = tuple[int, int] | Callable[[int, int], tuple[int, int]]
_EARLIER_KEYFRAMES = 2  # how far a second attempt goes back when frames are not decodable from their own keyframe


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """The sampled frames of one video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB, upright, at the asked size.
        indices: (T,) int64, places in presentation order.
        timestamps: (T,) float64, presentation times in seconds on the file's own clock.
        fps: average frames a second of the whole video.
        total_frames: frames in the whole video.
        duration: seconds of the whole video.
        decoder: "decord" or "pyav", the one that made the frames.
        requested_frames: how many frames the sampling asked for, before caps and the video's own length.
        lost: sampled indices that could not be decoded whole and are left out.
        truncated: the file holds less than its header promises.
    """

    frames: np.ndarray
    indices: np.ndarray
    timestamps: np.ndarray
    fps: float
    total_frames: int
    duration: float
    codec: str
    decoder: str
    requested_frames: int
    lost: tuple[int, ...]
    truncated: bool

    @property
    def damaged(self) -> bool:
        return bool(self.lost) or self.truncated


def decode(
    path: str | os.PathLike[str], sampling: Sampling, size: Size | None = None, decoder: Decoder = "auto"
) -> DecodedVideo:
    """Decode the sampled frames of a file.

    A damaged video yields the frames that are whole: a frame that the decoder reports as damaged, or that depends on
    such a frame, is left out and listed in `lost`.

    Args:
        size: (height, width) of the frames; or a function of the upright source's (height, width) that gives it; or
            None for the source's own size. Frames are resized (bicubic) one by one as they are decoded.
        decoder: "auto" takes decord where it is exact and the file is whole, PyAV otherwise.

    Raises:
        VideoError: the file cannot be used, or fewer than `sampling.min_frames` of its frames are whole.
    """
    info = probe(path)
    indices, requested = sample_indices(info, sampling)
    height, width = size(info.height, info.width) if callable(size) else size or (info.height, info.width)
    used, pictures = decoder, None
    if decoder == "decord" or (decoder == "auto" and info.decord_exact):
        used, pictures = "decord", _decode_with_decord(info, indices, height, width)
    if pictures is None:
        if decoder == "decord":
            raise VideoError("unreadable", f"{info.path}: decord finds damage in it; use --decoder pyav or auto")
        used, pictures = "pyav", _decode_with_pyav(info, indices, height, width)
    got = np.array([index for index in indices if index in pictures], dtype=np.int64)
    if len(got) < sampling.min_frames:
        raise VideoError(
            "too_few_frames",
            f"{info.path}: {len(got)} of {len(indices)} sampled frames are whole, min_frames={sampling.min_frames}",
        )
    return DecodedVideo(
        frames=np.stack([pictures[index] for index in got]),
        indices=got,
        timestamps=info.timestamps[got],
        fps=info.fps,
        total_frames=info.num_frames,
        duration=info.duration,
        codec=info.codec,
        decoder=used,
        requested_frames=requested,
        lost=tuple(int(index) for index in indices if index not in pictures),
        truncated=info.truncated,
    )


def _decode_with_pyav(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> dict[int, np.ndarray]:
    """The whole frames among `indices`, each decoded from the nearest keyframe before it."""
    rows = np.flatnonzero(info.index.shown)[indices]
    convert = _Converter(info.orientation, height, width)
    pictures: dict[int, np.ndarray] = {}
    for start, members in _by_keyframe(info.index, rows):
        pictures |= _decode_rows(info, members, start, convert)
    frame_of_row = dict(zip(rows.tolist(), indices.tolist(), strict=True))
    return {frame_of_row[row]: picture for row, picture in pictures.items()}


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


def _decode_rows(info: VideoInfo, rows: np.ndarray, start: int, convert: "_Converter") -> dict[int, np.ndarray]:
    """Decode rows of the index from keyframe `start`; from an earlier one when that is not enough."""
    pictures, damaged = _decode_run(info, rows, start, convert)
    if start and len(pictures) < len(rows):
        # The keyframe may be no real entry point (some muxers mark too many, some streams recover gradually).
        pictures, damaged = _decode_run(info, rows, max(0, start - _EARLIER_KEYFRAMES), convert)
    if start and len(pictures) < len(rows) and not damaged:
        pictures, damaged = _decode_run(info, rows, 0, convert)
    return pictures


def _decode_run(
    info: VideoInfo, rows: np.ndarray, start: int, convert: "_Converter"
) -> tuple[dict[int, np.ndarray], bool]:
    """Decode from one keyframe on until all of `rows` are settled.

    Returns:
        The whole pictures by row, and whether damage was met on the way.
    """
    index = info.index
    wanted = set(rows.tolist())
    # Everything decoded up to the last wanted frame must have come out before that frame can be called whole.
    end = index.pts[index.order <= index.order[rows].max()].max()
    pictures: dict[int, np.ndarray] = {}
    bad = set(index.corrupt)
    container, stream = open_video(info.path)
    with container:
        if start > 0:
            container.seek(int(index.keyframes[start, 2]), stream=stream)
        for row, frame in _rows_of_frames(index, container, stream, bad):
            if frame.is_corrupt:
                bad.add(int(index.order[row]))
            elif row in wanted:
                pictures[row] = convert(frame)
            if index.pts[row] >= end:
                break
    spoilt = _spoilt(index, bad)
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
            bad.update([] if row is None or row >= len(index.order) else [int(index.order[row])])
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
    shown before that group's keyframe. A decoder conceals damage and flags only the frame it struck.
    """
    first_bad: dict[int, int] = {}
    key_places = index.keyframes[:, 0]
    for place in sorted(bad, reverse=True):
        first_bad[int(np.searchsorted(key_places, place, side="right")) - 1] = place
    group = np.searchsorted(key_places, index.order, side="right") - 1
    never = len(index.order)
    struck = np.array([first_bad.get(g, never) for g in range(-1, len(key_places))])
    spoilt = index.order >= struck[group + 1]
    if len(key_places):
        leading = (group >= 0) & (index.pts < index.keyframes[group, 1])
        spoilt |= leading & (struck[group] < never)
    return spoilt


class _Converter:
    """Turns decoded frames into upright RGB pictures (height, width, 3) of one size, with one scaler for all."""

    def __init__(self, orientation: Orientation, height: int, width: int) -> None:
        self.orientation = orientation
        self.height, self.width = orientation.size(height, width)
        self.scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        scaled = self.scaler.reformat(frame, self.width, self.height, "rgb24", interpolation=Interpolation.BICUBIC)
        return np.ascontiguousarray(self.orientation.apply(scaled.to_ndarray()))


def _decode_with_decord(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> dict[int, np.ndarray] | None:
    """The frames at `indices`, or None when decord meets damage in the file."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(Path(info.path).absolute()), width=width, height=height, num_threads=1)
        frames = reader.get_batch(indices.tolist()).asnumpy()
    except decord.DECORDError:
        return None
    return dict(zip(indices.tolist(), frames, strict=True))
