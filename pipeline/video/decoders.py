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
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.video.container import FrameIndex, OpenVideo, Orientation, VideoInfo, decode_packet, demux, open_video

if TYPE_CHECKING:
    import decord

_BICUBIC = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_EARLIER_KEYFRAMES = 2  # how far a second attempt goes back when frames are not decodable from their own keyframe
_DAMAGE = re.compile(rb"\[(h264|vp9) @ ")
_CHATTER = re.compile(rb"\[[\w,]+ @ 0x|\[\d\d:\d\d:\d\d\] /| +Last message repeated")  # FFmpeg's and decord's lines
_stderr_lock = threading.Lock()

Pictures = dict[int, np.ndarray]
Shape = tuple[int, int]  # height, width


class DecordError(Exception):
    """decord cannot read the file, or its decoder complains of damage."""


class Resizer:
    """Turns frames into upright (height, width, 3) uint8 arrays, each frame at the sizes that it is wanted at."""

    def __init__(self, orientation: Orientation, wanted: Mapping[Shape, np.ndarray]) -> None:
        """
        Args:
            wanted: the frames that are wanted at each (height, width), by any numbers that tell them apart.
        """
        self.orientation = orientation
        self.to_rgb = VideoReformatter()
        self.to_shape = {shape: VideoReformatter() for shape in wanted}
        # One block for all frames of a size, so that a clip need not be copied to have its frames side by side.
        self.blocks = {shape: np.empty((len(frames), *shape, 3), np.uint8) for shape, frames in wanted.items()}
        self.places = {
            shape: {number: place for place, number in enumerate(frames.tolist())} for shape, frames in wanted.items()
        }

    def __call__(self, number: int, frame: av.VideoFrame) -> dict[Shape, np.ndarray]:
        rgb = self.to_rgb.reformat(frame, format="rgb24")
        return {
            shape: self._resize(rgb, shape, places[number]) for shape, places in self.places.items() if number in places
        }

    def _resize(self, rgb: av.VideoFrame, shape: Shape, place: int) -> np.ndarray:
        height, width = self.orientation.size(*shape)
        scaled = self.to_shape[shape].reformat(rgb, width, height, interpolation=_BICUBIC)
        picture: np.ndarray = self.blocks[shape][place]  # a view of the block
        picture[:] = self.orientation.apply(scaled.to_ndarray())
        return picture


def read_with_pyav(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> Pictures:
    """`read_sizes_with_pyav` for one size."""
    return read_sizes_with_pyav(info, {(height, width): indices})[height, width]


def read_sizes_with_pyav(
    info: VideoInfo, wanted: Mapping[Shape, np.ndarray], threads: int = 1, opened: OpenVideo | None = None
) -> dict[Shape, Pictures]:
    """The whole pictures among the wanted frames, each decoded from the nearest keyframe before it.

    Nothing but what lies between a keyframe and the last frame wanted after it is decoded, and of that, where the codec
    tells, not the frames that no other frame refers to. A frame that the decoder reports as damaged, or that may refer
    to such a frame, is left out. FFmpeg's decoders report all damage in H.264 that derails them; in HEVC and VP9 they
    conceal some of it without a word, and then the picture is what a player would show.

    Args:
        wanted: the frames (ascending indices) that are wanted at each (height, width).
        threads: so many groups of pictures are decoded side by side, each by a decoder of its own with one thread; the
            pictures do not depend on it.
        opened: the file where it is open already; it is closed on return.
    """
    # Frames are counted over what is shown, rows of the index over all packets, hidden ones included.
    shown = np.flatnonzero(info.index.shown)
    rows = {shape: shown[indices] for shape, indices in wanted.items()}
    groups = list(_by_keyframe(info.index, np.unique(np.concatenate(list(rows.values())))))
    workers = min(threads, len(groups))
    if workers > 1:
        # Each thread takes neighbouring groups, so that it reads the file from one place on.
        bounds = np.linspace(0, len(groups), workers + 1).astype(int)
        shares = [groups[first:last] for first, last in pairwise(bounds.tolist())]
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(partial(_read_groups, info, rows), shares, [opened] + [None] * (workers - 1)))
    else:
        parts = [_read_groups(info, rows, groups, opened)]
    pictures = {row: by_shape for part in parts for row, by_shape in part.items()}
    return {
        shape: {
            index: pictures[row][shape]
            for index, row in zip(indices.tolist(), rows[shape].tolist(), strict=True)
            if row in pictures
        }
        for shape, indices in wanted.items()
    }


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


def _read_groups(
    info: VideoInfo,
    wanted: Mapping[Shape, np.ndarray],
    groups: list[tuple[int, np.ndarray]],
    opened: OpenVideo | None,
) -> dict[int, dict[Shape, np.ndarray]]:
    """The whole pictures of some groups, by row of the index and size."""
    resize = Resizer(info.orientation, wanted)
    pictures: dict[int, dict[Shape, np.ndarray]] = {}
    with _Source(info, opened) as source:
        for start, rows in groups:
            pictures |= _read_group(source, rows, start, resize)
    return pictures


def _read_group(source: "_Source", rows: np.ndarray, start: int, resize: Resizer) -> dict[int, dict[Shape, np.ndarray]]:
    """Read rows of the index from keyframe `start`; from an earlier one when that is not enough."""
    skip = source.info.index.skippable
    pictures, damaged = _read_run(source, rows, start, resize, skip=skip)
    if (start or skip) and len(pictures) < len(rows):
        # The keyframe may be no real entry point: some muxers mark too many, some streams recover gradually. And
        # decoders that guess how far frames are reordered guess better when they see all of them.
        pictures, damaged = _read_run(source, rows, max(0, start - _EARLIER_KEYFRAMES), resize, skip=False)
    if start and len(pictures) < len(rows) and not damaged:
        pictures, damaged = _read_run(source, rows, 0, resize, skip=False)
    return pictures


def _read_run(
    source: "_Source", rows: np.ndarray, start: int, resize: Resizer, *, skip: bool
) -> tuple[dict[int, dict[Shape, np.ndarray]], bool]:
    """Decode from one keyframe on until all of `rows` are settled.

    Args:
        skip: pass over the frames that no other frame refers to, unless they are wanted.

    Returns:
        The whole pictures by row, and whether damage was met on the way.
    """
    index = source.info.index
    wanted = set(rows.tolist())
    pictures: dict[int, dict[Shape, np.ndarray]] = {}
    bad: set[int] = set()
    for row, frame in source.frames(start, set(index.order[rows].tolist()), bad, skip=skip):
        if frame.is_corrupt:
            bad.add(int(index.order[row]))
        elif row in wanted:
            pictures[row] = resize(row, frame)
    # Damage is known only now: frames come out of the decoder before those that they may have been spoilt by.
    spoilt = _spoilt(index, bad | set(index.corrupt))
    return {row: by_shape for row, by_shape in pictures.items() if not spoilt[row]}, bool(bad)


class _Source:
    """A file opened for decoding from one keyframe after the other."""

    def __init__(self, info: VideoInfo, opened: OpenVideo | None) -> None:
        self.info = info
        self.at_start = opened is None
        self.video = opened or open_video(info.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.video.container.close()

    def frames(self, start: int, places: set[int], bad: set[int], *, skip: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode from keyframe `start` up to the last of some packets.

        Args:
            places: the wanted packets, by their place in decoding order.
            bad: receives the places of packets that fail to decode.
            skip: of the other packets, decode only those that hold reference frames.

        Yields:
            Frames with their row in the index.
        """
        index, last = self.info.index, max(places)
        if index.counted:
            yield from self._counted_frames(last, bad)
            return
        # Only the first frame is wanted, and whoever examined the file has decoded it.
        if last == 0 and self.video.first is not None and self.video.first.key_frame:
            yield from self._with_rows([self.video.first])
            return
        for place, packet in self._packets_from(start):
            self.video.stream.codec_context.skip_frame = "NONREF" if skip and place not in places else "DEFAULT"
            frames = decode_packet(packet)
            if frames is None and place is not None:
                bad.add(place)
            yield from self._with_rows(frames or ())
            if place is not None and place >= last:
                break
        # What the decoder still holds back comes out at the end of a stream, so it is told that this is one: a frame is
        # known to be whole only when everything decoded before it has come out, which may be shown later.
        end = av.Packet()
        end.stream = self.video.stream
        yield from self._with_rows(decode_packet(end) or ())

    def _with_rows(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
        for frame in frames:
            row = _row_at(self.info.index, frame.pts)
            if row is not None:
                yield row, frame

    def _counted_frames(self, last: int, bad: set[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames 0 to `last` of a stream whose packets do not tell its frames apart."""
        self._rewind()
        count = 0
        for packet in demux(self.video.container, self.video.stream):
            frames = decode_packet(packet)
            if frames is None:
                bad.add(min(count, len(self.info.index.order) - 1))
            for frame in frames or ():
                yield count, frame
                count += 1
            if count > last:
                return

    def _packets_from(self, start: int) -> Iterator[tuple[int | None, av.Packet]]:
        """Packets from keyframe `start` on with their places in decoding order; from the very first one for 0."""
        first, *times = self.info.index.keyframes[start].tolist() if len(self.info.index.keyframes) else (-1,)
        if start == 0 and (self.at_start or first != 0):
            self._rewind()
            yield from self._packets()
            return
        # Most demuxers seek by presentation time, and land one keyframe early when given the (earlier) decoding time.
        for time in reversed(times) if self.info.container == "mpegts" else times:
            try:
                self.video.container.seek(time, stream=self.video.stream)
            except av.FFmpegError:
                continue
            self.at_start = False
            packets = dropwhile(lambda each: each[0] is None or each[0] < first, self._packets())
            place, packet = next(packets, (None, None))
            if place == first:
                yield first, packet
                yield from packets
                return
        # A stream that cannot be sought is read from its beginning.
        self._rewind()
        yield from dropwhile(lambda each: each[0] != first, self._packets())

    def _packets(self) -> Iterator[tuple[int | None, av.Packet]]:
        """The packets from where the file is, with their places in decoding order where they are known."""
        self.at_start = False
        for packet in demux(self.video.container, self.video.stream):
            row = _row_at(self.info.index, packet.pts)
            yield None if row is None else int(self.info.index.order[row]), packet

    def _rewind(self) -> None:
        if not self.at_start:
            self.video.container.close()
            self.video = open_video(self.info.path)
            self.at_start = True


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
    never = int(index.order.max()) + 1
    # (K + 1,) by group, the first damaged place; group 0 precedes every keyframe
    struck = np.full(len(keys) + 1, never)
    places = np.array(sorted(bad), dtype=np.int64)
    np.minimum.at(struck, np.searchsorted(keys, places, side="right"), places)
    group = np.searchsorted(keys, index.order, side="right")
    spoilt = index.order >= struck[group]
    if len(keys):
        leading = (group > 0) & (index.pts < index.keyframes[group - 1, 1])
        spoilt |= leading & (struck[group - 1] < never)
    return spoilt


def read_with_decord(info: VideoInfo, indices: np.ndarray, height: int, width: int) -> Pictures:
    """`read_sizes_with_decord` for one size."""
    return read_sizes_with_decord(info, {(height, width): indices})[height, width]


def read_sizes_with_decord(info: VideoInfo, wanted: Mapping[Shape, np.ndarray]) -> dict[Shape, Pictures]:
    """The pictures of the frames that are wanted (ascending indices) at each (height, width).

    For damaged data decord returns whatever its decoder made of it. The decoder's complaints on stderr are the only
    sign, so they are read.

    Raises:
        DecordError: decord fails, or its decoder complains.
    """
    import decord  # after av: loaded the other way round, PyAV binds to decord's copy of FFmpeg

    decord.logging.set_level(decord.logging.INFO)  # the level at which concealed damage is told
    try:
        with _stderr_lines() as lines:
            pictures = _read_batch(decord.VideoReader(str(Path(info.path).absolute()), num_threads=1), info, wanted)
    except decord.DECORDError as error:
        raise DecordError(str(error).strip().splitlines()[-1]) from error
    complaints = [line for line in lines if _DAMAGE.match(line)]
    if complaints:
        raise DecordError(complaints[0].decode(errors="replace"))
    return pictures


def _read_batch(
    reader: "decord.VideoReader", info: VideoInfo, wanted: Mapping[Shape, np.ndarray]
) -> dict[Shape, Pictures]:
    """One frame at a time out of a `decord.VideoReader`, which is closed on return."""
    if len(reader) != info.num_frames:
        raise DecordError(f"decord counts {len(reader)} frames where the container holds {info.num_frames}")
    resize = Resizer(Orientation(), wanted)  # decord turns pictures upright by itself
    pictures: dict[Shape, Pictures] = {shape: {} for shape in wanted}
    for index in np.unique(np.concatenate(list(wanted.values()))).tolist():
        frame = av.VideoFrame.from_ndarray(reader.get_batch([index]).asnumpy()[0], "rgb24")
        for shape, picture in resize(index, frame).items():
            pictures[shape][index] = picture
    return pictures


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
