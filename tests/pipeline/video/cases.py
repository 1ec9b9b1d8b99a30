"""Videos of every kind that the decoder is tried on, and ways to damage them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.video import DecodedVideo, Sampling
from tests.pipeline.videos import read_number, write_video

FRAMES = 60
ALL = Sampling(num_frames=1000)
X264 = {"preset": "veryfast", "g": "20", "bf": "3"}
OPEN = X264 | {"x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
QUIET = "log-level=none:pools=none"
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:bframes=4"}
VP9 = {"codec": "libvpx-vp9", "options": {"g": "20", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}}
IRREGULAR = np.cumsum(np.random.default_rng(0).integers(20, 200, FRAMES)).tolist()

MADE: dict[str, dict[str, Any]] = {
    "closed.mp4": {"options": X264},
    "closed.mkv": {"options": X264},
    "fragments.mp4": {"options": X264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "keyframes_only.mp4": {"options": {"g": "1"}},
    "irregular.mp4": {"options": X264, "times": IRREGULAR},
    "irregular.mkv": {"options": X264, "times": IRREGULAR},
    "late.mp4": {"options": X264, "times": [5000 + 40 * i for i in range(FRAMES)]},
    "vp9.webm": VP9,
    "open.mp4": {"options": OPEN},
    "open.mkv": {"options": OPEN},
    "open.ts": {"options": OPEN},
    "closed.ts": {"options": X264},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=15:bframes=0"}},
    "interlaced.ts": {"options": X264 | {"x264-params": "tff=1"}},
    "stream.h264": {"options": X264},
    "closed.avi": {"options": X264},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12", "b": "800k"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12", "b": "800k"}},
    "turned.mp4": {"options": X264, "quarter_turns": 1},
    "upside_down.mp4": {"options": X264, "quarter_turns": 2},
    "turned_back.mp4": {"options": X264, "quarter_turns": 3},
    "pyramid.mkv": {"options": {"g": "48", "bf": "8", "x264-params": "b-pyramid=normal:b-adapt=0:scenecut=0"}},
    "open_hevc.mkv": {"codec": "libx265", "options": {"x265-params": f"{QUIET}:open-gop=1:keyint=24:bframes=4"}},
    "layers.mkv": {"codec": "libx265", "options": {"x265-params": f"{QUIET}:temporal-layers=2:keyint=24:bframes=3"}},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "10", "crf": "12", "g": "24", "svtav1-params": "lp=1"}},
}
EXACT_IN_DECORD = {*list(MADE)[:8], "pyramid.mkv"}

Make = Callable[[str], Path]


def numbers(decoded: DecodedVideo) -> list[int | None]:
    return [read_number(frame) for frame in decoded.frames]


def strike(source: Path, path: Path, packet: int, seed: int) -> Path:
    """Flip bits in the middle of one packet."""
    with av.open(str(source)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = packets[packet]
    data, rng = bytearray(source.read_bytes()), np.random.default_rng(seed)
    for _ in range(8):
        data[position + 30 + int(rng.integers(size - 30))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def unusable(folder: Path, kind: str) -> Path:
    """A path that cannot be used, by kind."""
    path = folder / f"{kind}.mp4"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "text":
            path = path.with_suffix(".txt")
            path.write_text("not a video\n" * 100)
        case "playlist":
            write_video(folder / "clip.mp4", 2)
            path = path.with_suffix(".m3u8")
            path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
        case "audio":
            audio_only(path)
        case "header":
            write_video(path, 10)
            path.write_bytes(path.read_bytes()[:200])
    return path
