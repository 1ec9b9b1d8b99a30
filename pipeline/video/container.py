"""What a video file holds, read from its packets: the frames in presentation order and how each can be reached.

A container's own frame count, duration and frame rate are claims; its packets are the facts. `probe` reads every packet
of the video stream (without decoding them, but for the first frame) and keeps their presentation times, so that
"frame i" means the i-th frame that a player shows.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

# Demuxers for files that hold a video. Without the list FFmpeg also opens text (as terminal art), playlists and images,
# and a playlist may lead to other files or to the network.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,m4v,ivf,mxf,nut,rm,wtv"
)
# Containers that store presentation times. For others (AVI, raw streams) FFmpeg makes them up, wrongly for B-frames.
_MP4, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_TIMED_CONTAINERS = {_MP4, _MATROSKA, "mpegts", "flv", "gif"}
# Codecs whose packets hold exactly one shown frame each. Other codecs hide frames (VP8) or pack several together.
_ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "gif", "prores"}
_LEAST_TIMED = (
    0.9  # of the packets: with fewer that have a time of their own, the times are not what tells frames apart
)
_PROGRESSIVE = (0, 1)  # FFmpeg's field orders "unknown" and "progressive": no packet holds a single field
_SLICES, _IDR_SLICE = (1, 2, 5), 5  # H.264 NAL unit types
_INTRA_SLICE_TYPES = (2, 4)  # I and SI, modulo 5
_FIRST_RANDOM_ACCESS, _FIRST_NON_PICTURE = 16, 32  # HEVC NAL unit types; odd ones below them are reference pictures
_AVCC_VERSION = 1  # first byte of extradata in MP4 and Matroska; elsewhere it begins with a start code
_START_CODE = b"\0\0\1"
_ESCAPED_ZEROS = b"\0\0\3"
_HEADER_BYTES = 9  # of a NAL unit: enough for the first two numbers of a slice header


class VideoError(ValueError):
    """A video that cannot be used.

    `kind` is one of missing, not_a_file, empty, unreadable, no_video_stream, too_few_frames, too_many_frames,
    span_outside, untimed and extreme_shape.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class Orientation(NamedTuple):
    """How a stored picture becomes upright: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn a picture (H, W, 3) upright; a view."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after turning; its own inverse."""
        return (width, height) if self.transpose else (height, width)


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Where the frames of a stream are. P packets sorted by presentation time, hidden ones included.

    Attributes:
        pts: (P,) presentation times in units of `time_base`.
        order: (P,) the packet's place in decoding order.
        shown: (P,) False for packets outside the edit list, which are decoded but never presented.
        keyframes: (K, 3) decoding place, presentation time and decoding time of each keyframe at which decoding can
            begin, in decoding order.
        corrupt: decoding places of packets that the container itself marks as damaged.
        time_base: seconds per unit.
        untimed: how many packets are left out of the index, since damage gave them the time of another one.
        clock: the times can be trusted; False where the container stores times that contradict each other.
        last_duration: how long the last frame is shown, in units of `time_base`.
        skippable: the stream tells which of its frames no other refers to, so that a decoder may skip them.
        counted: the packets do not tell the frames apart, so frames were counted by decoding them; `order` then counts
            decoded frames, and nothing can be sought.
    """

    pts: np.ndarray
    order: np.ndarray
    shown: np.ndarray
    keyframes: np.ndarray
    corrupt: tuple[int, ...]
    time_base: Fraction
    last_duration: int
    counted: bool
    skippable: bool = False
    untimed: int = 0
    clock: bool = True


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """The main video stream of one file.

    Attributes:
        height, width: of the upright picture, in stored pixels.
        orientation: what makes the stored picture upright.
        declared_frames: the frame count in the file's header, 0 when it has none.
        decord_exact: decord is known to return the right frames for a file of this make, with the colours of PyAV.
    """

    path: str
    container: str
    codec: str
    height: int
    width: int
    orientation: Orientation
    index: FrameIndex
    declared_frames: int
    decord_exact: bool

    @cached_property
    def timestamps(self) -> np.ndarray:
        """(N,) presentation times in seconds, on the file's own clock (MPEG-TS files rarely start at 0)."""
        seconds: np.ndarray = self.index.pts[self.index.shown] * float(self.index.time_base)
        return seconds

    @cached_property
    def keyframes(self) -> np.ndarray:
        """(K,) indices of the frames that can be decoded without any other, ascending."""
        index = self.index
        rows = np.searchsorted(index.pts, np.sort(index.keyframes[:, 1]))
        numbers: np.ndarray = (np.cumsum(index.shown) - 1)[rows[index.shown[rows]]]
        return numbers

    @property
    def num_frames(self) -> int:
        return int(self.index.shown.sum())

    @property
    def duration(self) -> float:
        """Seconds from the first frame's start to the last frame's end."""
        last = self.index.last_duration * float(self.index.time_base)
        return float(self.timestamps[-1] - self.timestamps[0]) + last

    @property
    def fps(self) -> float:
        """Average frames a second; 0 when the video has no extent in time."""
        return self.num_frames / self.duration if self.duration > 0 else 0.0

    @property
    def truncated(self) -> bool:
        """The header promises more frames than the file holds, the container marks packets as damaged, or some of them
        have lost their time."""
        promised = 0 if self.index.counted else self.declared_frames  # a header counts packets
        return bool(self.index.corrupt) or self.index.untimed > 0 or promised > len(self.index.pts)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read the packets of a file's main video stream, and one frame to learn how it is turned.

    Raises:
        VideoError: missing, not_a_file, empty, unreadable or no_video_stream; the message names the path.
    """
    path = os.fspath(path)
    opened = open_video(path)
    with opened.container:
        return examine(path, opened)


def examine(path: str, opened: "OpenVideo") -> VideoInfo:
    """As `probe`, on a file that has just been opened and stays open; its packets have been read to the end.

    Raises:
        VideoError: unreadable.
    """
    container, stream = opened.container, opened.stream
    first: av.VideoFrame | None = None
    packets: list[_Packet] = []
    for packet in demux(container, stream):
        # Decoding stops at the first frame; from then on packets are only read.
        if first is None:
            first = next(iter(decode_packet(packet) or ()), None)
        if packet.size > 0:
            packets.append(_Packet.of(packet, stream.codec_context))
    if first is None:
        raise VideoError("unreadable", f"{path}: none of its {len(packets)} video packets can be decoded")
    opened.first = first
    orientation = _orientation(first)
    height, width = orientation.size(first.height, first.width)
    name = stream.codec_context.codec.canonical_name
    told_apart = (
        container.format.name in _TIMED_CONTAINERS
        and name in _ONE_FRAME_PER_PACKET
        and stream.codec_context.field_order in _PROGRESSIVE
        and _timed(packets)
    )
    # Frames are found by their packets' times where these can be trusted, and counted by decoding all where not.
    if told_apart:
        index = _index_packets(packets, stream.time_base, name)
    else:
        index = _count_frames(path, stores_times=container.format.name in _TIMED_CONTAINERS)
    common = container.format.name in (_MP4, _MATROSKA) and len(container.streams.video) == 1
    common = common and first.format.components[0].bits == 8  # deeper pictures get other colours in decord
    return VideoInfo(
        path=path,
        container=container.format.name,
        codec=name,
        height=height,
        width=width,
        orientation=orientation,
        index=index,
        declared_frames=stream.frames,
        decord_exact=common and orientation == Orientation() and _independent_groups(packets, index),
    )


@dataclass
class OpenVideo:
    """A file opened for decoding its main video stream.

    Attributes:
        first: the first frame that comes out of the decoder, kept when the file is examined.
    """

    container: av.container.InputContainer
    stream: av.VideoStream
    first: av.VideoFrame | None = None


def open_video(path: str) -> OpenVideo:
    """Open a file's main video stream for single-threaded decoding.

    Raises:
        VideoError: missing, not_a_file, empty, unreadable or no_video_stream.
    """
    av.logging.set_level(av.logging.PANIC)  # damage is reported through VideoError and DecodedVideo.lost
    _check_file(path)
    try:
        # The prefix keeps a name such as "concat:a|b" from being read as anything but a file name.
        container = av.open(
            f"file:{Path(path).absolute()}",
            container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"{path}: not a readable video file ({error.strerror})") from error
    pictures = av.stream.Disposition.attached_pic  # a cover image, not a video
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        container.close()
        raise VideoError("no_video_stream", f"{path}: the file has no video stream")
    stream = _main_stream(container, streams)
    if stream.codec_context is None:
        container.close()
        raise VideoError("unreadable", f"{path}: no decoder for its video codec; re-encode it, for instance to H.264")
    stream.codec_context.thread_count = 1
    return OpenVideo(container, stream)


def _main_stream(container: av.container.InputContainer, streams: list[av.VideoStream]) -> av.VideoStream:
    """The stream that FFmpeg takes to be the main one, if it is among these."""
    try:
        best = container.streams.best("video")
    except IndexError:  # PyAV does not know a stream that a damaged container announced late
        best = None
    return best if isinstance(best, av.VideoStream) and best in streams else streams[0]


def demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets, up to where a damaged container stops making sense."""
    while True:
        try:
            yield from container.demux(stream)
        except IndexError:  # how PyAV passes over a packet of a stream that damage made up; the next ones can be read
            continue
        except av.FFmpegError:
            pass
        return


def decode_packet(packet: av.Packet) -> list[av.VideoFrame] | None:
    """The frames that a packet completes, or None when it is damaged."""
    try:
        frames: list[av.VideoFrame] = packet.decode()
    except av.FFmpegError:
        return None
    return frames


def _check_file(path: str) -> None:
    """Raise unless `path` is a regular file with something in it; a FIFO would block its reader for ever."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise VideoError("missing", f"{path}: cannot be opened ({error.strerror})") from error
    except ValueError as error:
        raise VideoError("missing", f"{path!r}: no file can have this name ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        what = "directory" if stat.S_ISDIR(status.st_mode) else "special file (FIFO, socket or device)"
        raise VideoError("not_a_file", f"{path}: is a {what}, not a video file")
    if status.st_size == 0:
        raise VideoError("empty", f"{path}: the file is empty (0 bytes)")


class _Packet(NamedTuple):
    """What is kept of a packet."""

    pts: int | None
    dts: int | None
    duration: int
    keyframe: bool
    entry: bool
    independent: bool
    shown: bool
    corrupt: bool
    reference: "_Reference | None"

    @classmethod
    def of(cls, packet: av.Packet, codec: av.VideoCodecContext) -> "_Packet":
        keyframe, hevc = packet.is_keyframe, codec.name == "hevc"
        return cls(
            pts=packet.pts,
            dts=packet.dts,
            duration=packet.duration or 0,
            keyframe=keyframe,
            entry=keyframe and _is_intra(packet, codec),
            independent=keyframe and _is_clean_start(packet, codec),
            shown=not packet.is_discard,
            corrupt=packet.is_corrupt,
            reference=_reference(packet, codec) if hevc else None,
        )


def _timed(packets: list[_Packet]) -> bool:
    """Every packet has a presentation time, nearly every one a time of its own, and the clock never jumps back.

    It does so in joined broadcasts. A damaged time may be the same as another's.
    """
    shared = _shared_times(packets)
    timed = sum(packet.pts not in shared for packet in packets)
    keyframes = [packet.pts for packet in packets if packet.keyframe and packet.pts not in shared]
    known = all(packet.pts is not None for packet in packets)
    return known and timed >= _LEAST_TIMED * len(packets) and _ascending(keyframes)  # type: ignore[arg-type]


def _shared_times(packets: list[_Packet]) -> set[int | None]:
    """The presentation times that more than one packet has."""
    counts = Counter(packet.pts for packet in packets)
    return {pts for pts, count in counts.items() if count > 1}


def _index_packets(packets: list[_Packet], time_base: Fraction, codec: str) -> FrameIndex:
    shared = _shared_times(packets)
    # (P,) decoding places of the packets with a time of their own, then sorted by it
    timed = np.array([place for place, packet in enumerate(packets) if packet.pts not in shared])
    pts = np.array([packets[place].pts for place in timed.tolist()], dtype=np.int64)
    by_time = np.argsort(pts)
    pts, order = pts[by_time], timed[by_time]
    # Matroska stores no decoding times; FFmpeg leaves them out where it can't work them out.
    keys = [
        (i, p.pts, p.pts if p.dts is None else p.dts) for i, p in enumerate(packets) if p.entry and p.pts not in shared
    ]
    return FrameIndex(
        pts=pts,
        order=order,
        shown=np.array([packet.shown for packet in packets])[order],
        keyframes=np.array(keys, dtype=np.int64).reshape(-1, 3),
        corrupt=tuple(i for i, packet in enumerate(packets) if packet.corrupt),
        time_base=time_base,
        last_duration=packets[order[-1]].duration or _usual_step(pts),
        counted=False,
        skippable=_tells_references(packets, codec),
        untimed=len(packets) - len(timed),
    )


def _count_frames(path: str, *, stores_times: bool) -> FrameIndex:
    """The index of a stream whose packets do not tell its frames apart, from decoding all of it.

    Args:
        stores_times: the container is of a kind that stores presentation times.
    """
    opened = open_video(path)
    container, stream = opened.container, opened.stream
    frames: list[tuple[int | None, bool, bool]] = []
    clock: list[int] = []
    with container:
        for packet in demux(container, stream):
            clock += [packet.dts] if packet.size > 0 and packet.dts is not None else []
            frames += [(frame.pts, frame.key_frame, frame.is_corrupt) for frame in decode_packet(packet) or ()]
        time_base, rate = stream.time_base, Fraction(stream.average_rate or 25)
    times = [pts for pts, _, _ in frames if pts is not None]
    # The decoder's times when they make sense, else the packets' in ascending order, else the nominal frame rate.
    sound = len(times) == len(frames) and _ascending(times)
    if not sound:
        # Packets come in decoding order, frames in the order in which they are shown.
        clock = sorted(clock)
        stored = len(clock) == len(frames) and _ascending(clock)
        times, time_base = (clock, time_base) if stored else (list(range(len(frames))), 1 / rate)
    pts = np.array(times, dtype=np.int64)
    keys = [(i, pts[i], pts[i]) for i, (_, keyframe, _) in enumerate(frames) if keyframe]
    return FrameIndex(
        pts=pts,
        order=np.arange(len(frames)),
        shown=np.ones(len(frames), dtype=bool),
        keyframes=np.array(keys, dtype=np.int64).reshape(-1, 3),
        corrupt=tuple(i for i, (_, _, corrupt) in enumerate(frames) if corrupt),
        time_base=time_base,
        last_duration=_usual_step(pts),
        counted=True,
        clock=sound or not stores_times,
    )


def _ascending(times: Sequence[int]) -> bool:
    return bool((np.diff(times) > 0).all())


def _usual_step(pts: np.ndarray) -> int:
    return int(np.median(np.diff(pts))) if len(pts) > 1 else 0


def _is_clean_start(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Nothing after this keyframe refers to what came before it: any VP9 keyframe, an IDR picture in H.264.

    Only length-prefixed H.264 is looked into, as MP4 and Matroska store it; all else counts as unproven.
    """
    if codec.codec.canonical_name == "vp9":
        return True
    if codec.codec.canonical_name != "h264" or not _length_bytes(codec):
        return False
    return any(header[0] & 0x1F == _IDR_SLICE for header in _unit_headers(packet, codec))


def _is_intra(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """Decoding can begin at this keyframe.

    H.264 streams with periodic intra refresh mark as keyframes what only begins a gradual recovery. What a decoder
    gives after that may still differ a little from the real pictures, so those with a predicted slice don't count.
    """
    if codec.codec.canonical_name != "h264":
        return True
    slices = [unit for unit in _unit_headers(packet, codec) if unit[0] & 0x1F in _SLICES]
    return all(_slice_type(unit[1:]) % 5 in _INTRA_SLICE_TYPES for unit in slices)


def _slice_type(header: bytes) -> int:
    """The second number of an H.264 slice header (ITU-T H.264, 7.3.3); both are Exp-Golomb codes (9.1)."""
    bits = "".join(f"{byte:08b}" for byte in header.replace(_ESCAPED_ZEROS, b"\0\0"))
    for _ in ("first_mb_in_slice", "slice_type"):
        zeros = len(bits) - len(bits.lstrip("0"))
        number, bits = int(bits[zeros : 2 * zeros + 1] or "1", 2) - 1, bits[2 * zeros + 1 :]
    return number


class _Reference(NamedTuple):
    """Who may refer to an HEVC picture."""

    sublayer: int
    within_sublayer: bool


def _reference(packet: av.Packet, codec: av.VideoCodecContext) -> _Reference | None:
    """What the NAL unit header of an HEVC picture says (ITU-T H.265, 7.3.1.2 and table 7-1); None without a picture."""
    for first, second, *_ in _unit_headers(packet, codec):
        unit_type, layer = first >> 1 & 0x3F, (first & 1) << 5 | second >> 3
        if unit_type < _FIRST_NON_PICTURE and layer == 0:
            return _Reference((second & 7) - 1, unit_type >= _FIRST_RANDOM_ACCESS or unit_type % 2 == 1)
    return None


def _tells_references(packets: list[_Packet], codec: str) -> bool:
    """Whether FFmpeg's decoder knows by itself which frames no other refers to, when told to skip those.

    In H.264 `nal_ref_idc` says so for every frame. In HEVC a sub-layer non-reference picture may still be referred to
    from higher temporal sub-layers, so there must be none. The other codecs' marks are not enough: in VP9 such a frame
    may still change the probabilities that the next one is decoded with.
    """
    if codec != "hevc":
        return codec == "h264"
    known = [packet.reference for packet in packets if packet.reference is not None]
    highest = max((each.sublayer for each in known), default=0)
    return len(known) == len(packets) and all(each.within_sublayer or each.sublayer == highest for each in known)


def _length_bytes(codec: av.VideoCodecContext) -> int:
    """Bytes of the length before each NAL unit in H.264 and HEVC; 0 where start codes stand instead."""
    extradata = codec.extradata
    if not extradata or extradata[0] != _AVCC_VERSION:
        return 0
    at = 4 if codec.codec.canonical_name == "h264" else 21  # ISO/IEC 14496-15, 5.3.3.1.2 and 8.3.3.1.2
    return (extradata[at] & 3) + 1 if len(extradata) > at else 0


def _unit_headers(packet: av.Packet, codec: av.VideoCodecContext) -> Iterator[bytes]:
    """The beginning of each NAL unit of a packet, at least two bytes."""
    data, prefix = bytes(packet), _length_bytes(codec)
    skip = prefix or len(_START_CODE)
    at = 0 if prefix else data.find(_START_CODE)
    while at >= 0:
        header = data[at + skip : at + skip + _HEADER_BYTES]
        if len(header) < 2:
            return
        yield header
        at = at + prefix + int.from_bytes(data[at : at + prefix], "big") if prefix else data.find(_START_CODE, at + 3)


def _independent_groups(packets: list[_Packet], index: FrameIndex) -> bool:
    """decord seeks to keyframes and trusts them, and knows no edit lists: here neither can go wrong.

    Every packet is shown and undamaged, every keyframe is a clean start, and no frame is shown before the keyframe that
    precedes it in decoding order (closed groups of pictures).
    """
    if index.counted or index.corrupt or index.untimed or not index.shown.all() or not packets[0].keyframe:
        return False
    if not all(packet.independent for packet in packets if packet.keyframe):
        return False
    group = np.searchsorted(index.keyframes[:, 0], index.order, side="right") - 1
    return bool((index.pts >= index.keyframes[group, 1]).all())


def _orientation(frame: av.VideoFrame) -> Orientation:
    """Read a frame's display matrix (ISO/IEC 14496-12, 6.2.2), to the nearest quarter turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    transpose = abs(b) > abs(a)
    return Orientation(transpose, (c if transpose else a) < 0, (b if transpose else d) < 0)
