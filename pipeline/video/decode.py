"""The sampled frames of a file, decoded and resized, or the error that says why there are none."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from pipeline.video.container import OpenVideo, VideoError, VideoInfo, examine, open_video
from pipeline.video.decoders import DecordError, Pictures, read_sizes_with_decord, read_sizes_with_pyav
from pipeline.video.sampling import Mode, Sampling, sample_indices
from pipeline.video.size import ShapeError

Decoder = Literal["auto", "decord", "pyav"]
MOST_BYTES = 8 * 2**30
"""A sampling whose frames would take more memory is refused, unless another bound is given."""
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
        truncated: the file holds less than its header promises, or damage left some frames without a time.
        clock: the timestamps can be trusted; False where those of the file contradict each other.
        sampling: "keyframes" where keyframes were asked for and are many enough, else "uniform".
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
    sampling: Mode = "uniform"
    clock: bool = True

    @property
    def times(self) -> list[float]:
        """(T,) seconds of each frame from the start of the video."""
        seconds: list[float] = (self.timestamps - self.start_time).tolist()
        return seconds

    @property
    def damaged(self) -> bool:
        """Frames are missing: of those sampled, or at the end of the file."""
        return bool(self.lost) or self.truncated


def decode(
    path: str | os.PathLike[str],
    sampling: Sampling,
    size: Size | None = None,
    decoder: Decoder = "auto",
    threads: int = 1,
) -> DecodedVideo:
    """Decode the sampled frames of a file.

    A damaged video yields the frames that are whole; the others are listed in `lost`.

    Args:
        size: (height, width) of the frames; or a function of the upright source's height, its width and the number of
            sampled frames that gives it; or None for the source's own size. Frames are resized (bicubic) one by one as
            they are decoded.
        decoder: "auto" takes decord for files on which it is exact, and PyAV for the others, for keyframes and when
            decord fails.
        threads: PyAV decodes so many groups of pictures side by side; the frames do not depend on it.

    Raises:
        VideoError: the file cannot be used, fewer than `sampling.min_frames` of its frames are whole, or the sampled
            ones would take more than `MOST_BYTES`.
    """
    (video,) = decode_each(path, [sampling], size, decoder, threads)
    return video


def decode_each(
    path: str | os.PathLike[str],
    samplings: Sequence[Sampling],
    size: Size | None = None,
    decoder: Decoder = "auto",
    threads: int = 1,
) -> list[DecodedVideo]:
    """As `decode`, for several samplings of one file, which is read once for all of them.

    Raises:
        VideoError: as `decode`, for any of the samplings.
    """
    videos: list[DecodedVideo] = []
    for video in decode_windows(path, samplings, size, decoder, threads):
        if isinstance(video, VideoError):
            raise video
        videos.append(video)
    return videos


def decode_windows(
    path: str | os.PathLike[str],
    samplings: Sequence[Sampling],
    size: Size | None = None,
    decoder: Decoder = "auto",
    threads: int = 1,
    most_bytes: int = MOST_BYTES,
) -> list[DecodedVideo | VideoError]:
    """As `decode_each`, but what is wrong with one sampling does not concern the others: its result is the error.

    The file is opened and its packets are read once, and a frame that several samplings want is decoded once. Equal
    samplings share one result.

    Args:
        most_bytes: a sampling whose frames would take more than this is refused before anything is decoded.

    Raises:
        VideoError: the file cannot be used at all.
    """
    path = os.fspath(path)
    opened = open_video(path)
    with opened.container:
        info = examine(path, opened)
        requests = {sampling: _request(info, sampling, size, most_bytes) for sampling in samplings}
        # (K,) for each size the frames that any sampling wants at it, each once
        valid = [request for request in requests.values() if not isinstance(request, VideoError)]
        wanted = {
            shape: np.unique(np.concatenate([request.indices for request in valid if request.shape == shape]))
            for shape in {request.shape for request in valid}
        }
        # A keyframe costs PyAV one decoded frame, decord several.
        prefer_decord = info.decord_exact and not all(request.at_keyframes for request in valid)
        pictures, used = _read(info, wanted, decoder, prefer_decord, threads, opened) if valid else ({}, "")
    results = {
        sampling: request if isinstance(request, VideoError) else _collect(info, request, pictures[request.shape], used)
        for sampling, request in requests.items()
    }
    return [results[sampling] for sampling in samplings]


class _Request(NamedTuple):
    """The frames that a sampling takes of one file."""

    sampling: Sampling
    indices: np.ndarray
    requested: int
    shape: tuple[int, int]
    at_keyframes: bool


def _request(info: VideoInfo, sampling: Sampling, size: Size | None, most_bytes: int) -> _Request | VideoError:
    try:
        indices, requested = sample_indices(info, sampling)
        height, width = _resolve(size, info, len(indices))
        needed = len(indices) * height * width * 3
        if needed > most_bytes:
            raise VideoError(
                "too_many_frames",
                f"{info.path}: {len(indices):,} frames of {height}x{width} take {needed / 2**30:.1f} GiB, "
                f"{most_bytes / 2**30:.1f} are allowed; take fewer frames or a shorter span",
            )
    except VideoError as error:
        return error
    at_keyframes = sampling.mode == "keyframes" and bool(np.isin(indices, info.keyframes).all())
    return _Request(sampling, indices, requested, (height, width), at_keyframes)


def _collect(info: VideoInfo, request: _Request, pictures: Pictures, used: str) -> DecodedVideo | VideoError:
    indices, sampling = request.indices, request.sampling
    # (T,) those of the sampled frames that are whole
    got = np.array([index for index in indices.tolist() if index in pictures], dtype=np.int64)
    if len(got) < sampling.min_frames:
        return VideoError(
            "too_few_frames",
            f"{info.path}: {len(got)} of {len(indices)} sampled frames are whole, min_frames={sampling.min_frames}",
        )
    return DecodedVideo(
        frames=_side_by_side([pictures[index] for index in got.tolist()]),
        indices=got,
        timestamps=info.timestamps[got],
        start_time=float(info.timestamps[0]),
        fps=info.fps,
        total_frames=info.num_frames,
        duration=info.duration,
        codec=info.codec,
        decoder=used,
        requested_frames=request.requested,
        lost=tuple(index for index in indices.tolist() if index not in pictures),
        truncated=info.truncated,
        sampling="keyframes" if request.at_keyframes else "uniform",
        clock=info.index.clock,
    )


def _side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    """(T, H, W, 3): pictures of one size, without a copy when they fill the block that they were decoded into."""
    block = pictures[0].base
    if block is not None and len(block) == len(pictures) and all(picture.base is block for picture in pictures):
        return block
    return np.stack(pictures)


def _resolve(size: Size | None, info: VideoInfo, num_frames: int) -> tuple[int, int]:
    if not callable(size):
        return size or (info.height, info.width)
    try:
        return size(info.height, info.width, num_frames)
    except ShapeError as error:
        raise VideoError("extreme_shape", f"{info.path}: {error}") from error


def _read(
    info: VideoInfo,
    wanted: Mapping[tuple[int, int], np.ndarray],
    decoder: Decoder,
    prefer_decord: bool,
    threads: int,
    opened: OpenVideo,
) -> tuple[dict[tuple[int, int], Pictures], str]:
    """Pictures by size and frame index, and the decoder that made them."""
    if decoder == "decord" or (decoder == "auto" and prefer_decord):
        try:
            return read_sizes_with_decord(info, wanted), "decord"
        except DecordError as error:
            if decoder == "decord":
                raise VideoError("unreadable", f"{info.path}: {error}; decode it with pyav or auto") from error
    return read_sizes_with_pyav(info, wanted, threads, opened), "pyav"
