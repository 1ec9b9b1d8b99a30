"""Which frames are chosen, on made-up presentation times."""

from fractions import Fraction

import numpy as np
import pytest

from pipeline.video.container import FrameIndex, Orientation, VideoError, VideoInfo
from pipeline.video.sampling import Sampling, sample_indices


def video(milliseconds: list[int], last: int = 40) -> VideoInfo:
    """A video whose frames are presented at these times."""
    count = len(milliseconds)
    index = FrameIndex(
        pts=np.array(milliseconds),
        order=np.arange(count),
        shown=np.ones(count, dtype=bool),
        keyframes=np.zeros((0, 3), dtype=np.int64),
        corrupt=(),
        time_base=Fraction(1, 1000),
        last_duration=last,
        counted=False,
    )
    return VideoInfo(
        path="clip.mp4",
        container="mov",
        codec="h264",
        height=2,
        width=2,
        orientation=Orientation(),
        index=index,
        declared_frames=count,
        decord_exact=False,
    )


STEADY = video([40 * i for i in range(100)])  # 4 s at 25 frames a second


def chosen(info: VideoInfo, **settings: float) -> list[int]:
    return sample_indices(info, Sampling(**settings))[0].tolist()  # type: ignore[arg-type]


def test_uniform_sampling_includes_both_ends() -> None:
    assert chosen(STEADY, num_frames=4) == [0, 33, 66, 99]
    assert chosen(STEADY, num_frames=2) == [0, 99]
    assert chosen(STEADY, num_frames=1) == [50]


def test_more_frames_than_exist_takes_all_and_says_how_many_were_asked_for() -> None:
    indices, requested = sample_indices(video([0, 40, 80]), Sampling(num_frames=8))
    assert indices.tolist() == [0, 1, 2]
    assert requested == 8


def test_fps_goes_by_the_frames_own_times() -> None:
    slow_then_fast = video([0, 500, 1000, 1500, *range(2000, 4001, 100)])
    times = slow_then_fast.timestamps[chosen(slow_then_fast, fps=1)]
    assert times.tolist() == [0, 1, 2, 3, 4]


def test_fps_takes_the_nearest_frame_though_containers_round_times() -> None:
    rounded = video([0, 33, 67, 100, 133, 167, 200])  # 30 frames a second in Matroska's milliseconds
    assert chosen(rounded, fps=30) == [0, 1, 2, 3, 4, 5, 6]
    assert chosen(rounded, fps=15) == [0, 2, 4, 6]


def test_fps_above_the_videos_own_gives_each_frame_once() -> None:
    indices, requested = sample_indices(video([0, 1000, 2000]), Sampling(fps=10))
    assert indices.tolist() == [0, 1, 2]
    assert requested == 21


def test_max_frames_thins_evenly_and_keeps_both_ends() -> None:
    assert chosen(STEADY, fps=25, max_frames=4) == [0, 33, 66, 99]
    assert chosen(STEADY, num_frames=50, max_frames=2) == [0, 99]


def test_span_bounds_are_included() -> None:
    assert chosen(STEADY, num_frames=99, start=1, end=1.12) == [25, 26, 27, 28]
    assert chosen(STEADY, num_frames=2, start=3.9) == [98, 99]
    assert chosen(STEADY, num_frames=2, end=0.04) == [0, 1]
    assert chosen(STEADY, fps=2, start=1, end=2) == [25, 37, 50]  # 1.5 s is as near to 37 as to 38


def test_span_is_on_the_files_own_clock() -> None:
    late = video([5000 + 40 * i for i in range(50)])
    assert chosen(late, num_frames=99, start=5, end=5.08) == [0, 1, 2]


def test_span_between_two_frames_takes_the_one_on_screen() -> None:
    slides = video([0, 10_000, 20_000], last=10_000)
    assert chosen(slides, num_frames=4, start=12, end=13) == [1]
    assert chosen(slides, num_frames=4, start=25, end=29) == [2]


@pytest.mark.parametrize("span", [{"start": 4.5}, {"end": -1.0}, {"start": 100.0, "end": 101.0}])
def test_span_outside_the_video_is_an_error_that_says_what_there_is(span: dict[str, float]) -> None:
    with pytest.raises(VideoError, match=r"clip\.mp4: .*from 0 to 4 s") as caught:
        chosen(STEADY, num_frames=4, **span)
    assert caught.value.kind == "span_outside"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "num_frames=None and fps=None"),
        ({"num_frames": 8, "fps": 2.0}, "num_frames=8 and fps=2"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"fps": -1.0}, "fps=-1"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": float("inf")}, "fps=inf must be 1000 at most"),
        ({"fps": 1.0, "max_frames": 0}, "max_frames=0"),
        ({"num_frames": 4, "min_frames": 0}, "min_frames=0"),
        ({"num_frames": 4, "min_frames": 5}, "below min_frames=5"),
        ({"num_frames": 4, "start": 3.0, "end": 3.0}, "end=3.0 must be after start=3.0"),
    ],
)
def test_contradictions_are_refused_at_once(settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Sampling(**settings)  # type: ignore[arg-type]


def test_average_rate_and_duration_come_from_the_frames() -> None:
    assert STEADY.duration == pytest.approx(4.0)
    assert STEADY.fps == pytest.approx(25.0)
    assert video([0], last=0).fps == 0
