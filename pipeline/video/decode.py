"""The sampled frames of a file, decoded and resized, or the error that says why there are none."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.video.container import VideoError, VideoInfo, probe
from pipeline.video.decoders import DecordError, Pictures, read_with_decord, read_with_pyav
from pipeline.video.sampling import Sampling, sample_indices
from pipeline.video.size import ShapeError

Decoder = Literal["auto", "decord", "pyav"]
Size = tuple[int, int] | Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """The sampled frames of one video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB, upright, at the asked size.
        indices: (T,) int64, places in presentation order.
        timestamps: (T,) float64, presentation times in seconds on the file's own clock.
        start_time: the first frame of the whole video on that clock; rarely 0 in MPEG-TS.
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
    start_time: float
    fps: float
    total_frames: int
    duration: float
    codec: str
    decoder: str
    requested_frames: int
    lost: tuple[int, ...]
    truncated: bool

    @property
    def times(self) -> list[float]:
        """(T,) seconds of each frame from the start of the video."""
        return (self.timestamps - self.start_time).tolist()

    @property
    def damaged(self) -> bool:
        """Frames are missing: of those sampled, or at the end of the file."""
        return bool(self.lost) or self.truncated


def decode(
    path: str | os.PathLike[str], sampling: Sampling, size: Size | None = None, decoder: Decoder = "auto"
) -> DecodedVideo:
    """Decode the sampled frames of a file.

    A damaged video yields the frames that are whole; the others are listed in `lost`.

    Args:
        size: (height, width) of the frames; or a function of the upright source's height, its width and the number of
            sampled frames that gives it; or None for the source's own size. Frames are resized (bicubic) one by one as
            they are decoded.
        decoder: "auto" takes decord for files on which it is exact, and PyAV for the others and when decord fails.

    Raises:
        VideoError: the file cannot be used, or fewer than `sampling.min_frames` of its frames are whole.
    """
    (video,) = decode_each(path, [sampling], size, decoder)
    return video


def decode_each(
    path: str | os.PathLike[str],
    samplings: Sequence[Sampling],
    size: Size | None = None,
    decoder: Decoder = "auto",
) -> list[DecodedVideo]:
    """As `decode`, for several samplings of one file; frames of the same size are read once for all of them.

    Raises:
        VideoError: as `decode`, for any of the samplings.
    """
    info = probe(path)
    wanted = [(sampling, *sample_indices(info, sampling)) for sampling in samplings]
    sizes = [_resolve(size, info, len(indices)) for _, indices, _ in wanted]
    read = {}
    for shape in set(sizes):
        chosen = [indices for (_, indices, _), its_size in zip(wanted, sizes, strict=True) if its_size == shape]
        read[shape] = _read(info, np.unique(np.concatenate(chosen)), *shape, decoder)
    return [_sampled(info, *each, *read[shape]) for each, shape in zip(wanted, sizes, strict=True)]


def _sampled(
    info: VideoInfo, sampling: Sampling, indices: np.ndarray, requested: int, pictures: Pictures, used: str
) -> DecodedVideo:
    got = np.array([index for index in indices.tolist() if index in pictures], dtype=np.int64)
    if len(got) < sampling.min_frames:
        raise VideoError(
            "too_few_frames",
            f"{info.path}: {len(got)} of {len(indices)} sampled frames are whole, min_frames={sampling.min_frames}",
        )
    return DecodedVideo(
        frames=np.stack([pictures[index] for index in got.tolist()]),
        indices=got,
        timestamps=info.timestamps[got],
        start_time=float(info.timestamps[0]),
        fps=info.fps,
        total_frames=info.num_frames,
        duration=info.duration,
        codec=info.codec,
        decoder=used,
        requested_frames=requested,
        lost=tuple(index for index in indices.tolist() if index not in pictures),
        truncated=info.truncated,
    )


def _resolve(size: Size | None, info: VideoInfo, num_frames: int) -> tuple[int, int]:
    if not callable(size):
        return size or (info.height, info.width)
    try:
        return size(info.height, info.width, num_frames)
    except ShapeError as error:
        raise VideoError("extreme_shape", f"{info.path}: {error}") from error


def _read(info: VideoInfo, indices: np.ndarray, height: int, width: int, decoder: Decoder) -> tuple[Pictures, str]:
    """Pictures by frame index, and the decoder that made them."""
    if decoder == "decord" or (decoder == "auto" and info.decord_exact):
        try:
            return read_with_decord(info, indices, height, width), "decord"
        except DecordError as error:
            if decoder == "decord":
                raise VideoError("unreadable", f"{info.path}: {error}; decode it with pyav or auto") from error
    return read_with_pyav(info, indices, height, width), "pyav"
