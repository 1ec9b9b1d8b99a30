"""Exact frames of a video file at the model's size.

Frame i is the i-th frame that a player shows, with its own presentation time. `python -m pipeline.video` writes the
frames of one file.
"""

from pipeline.video.container import VideoError, VideoInfo, probe
from pipeline.video.decode import DecodedVideo, Size, decode, decode_each, decode_windows
from pipeline.video.sampling import Sampling, sample_indices

__all__ = [
    "DecodedVideo",
    "Sampling",
    "Size",
    "VideoError",
    "VideoInfo",
    "decode",
    "decode_each",
    "decode_windows",
    "probe",
    "sample_indices",
]
