"""Which frames are chosen, on made-up presentation times."""

from fractions import Fraction

import numpy as np
import pytest

from pipeline.video.container import FrameIndex, Orientation, VideoError, VideoInfo
from pipeline.video.sampling import Sampling, sample_indices


def video(milliseconds: list[int], last: int = 40, keyframes: tuple[int, ...] = ()) -> VideoInfo:
    """A video whose frames are presented at these times, some of them keyframes."""
    count = len(milliseconds)
    index = FrameIndex(
        pts=np.array(milliseconds),
        order=np.arange(count),
        shown=np.ones(count, dtype=bool),
        keyframes=np.array([(i, milliseconds[i], milliseconds[i]) for i in keyframes], dtype=np.int64).reshape(-1, 3),
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


def chosen(info: VideoInfo, **settings: float | str) -> list[int]:
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


@pytest.mark.parametrize("seed", range(20))
def test_fps_takes_every_frame_that_is_nearest_to_a_tick(seed: int) -> None:
    rng = np.random.default_rng(seed)
    info = video(np.cumsum(rng.integers(1, 3000, rng.integers(1, 40))).tolist())
    fps = float(rng.choice([0.3, 1, 2, 7.5, 24, 1000]))
    times = info.timestamps
    ticks = times[0] + np.arange(int((times[-1] - times[0]) * fps + 1e-6) + 1) / fps
    nearest = {int(np.abs(times - tick).argmin()) for tick in ticks}
    indices, requested = sample_indices(info, Sampling(fps=fps))
    assert requested == len(ticks)
    assert set(indices.tolist()) == nearest


def test_fps_with_a_time_stamp_in_the_far_future_makes_no_more_than_the_frames_that_there_are() -> None:
    far = video([0, 40, 80, 9_000_000_000])
    indices, requested = sample_indices(far, Sampling(fps=1))
    assert (indices.tolist(), requested) == ([0, 2, 3], 9_000_001)
    with pytest.raises(VideoError, match=r"fps=30 asks for 270,000,001 frames of its 9e\+06 s") as caught:
        sample_indices(far, Sampling(fps=30))
    assert caught.value.kind == "too_many_frames"


GROUPS = video([40 * i for i in range(100)], keyframes=(0, 12, 20, 40, 55, 80))


def test_keyframes_are_the_nearest_to_each_uniform_position() -> None:
    assert chosen(GROUPS, num_frames=4, mode="keyframes") == [0, 40, 55, 80]  # for 0, 33, 66 and 99
    assert chosen(GROUPS, num_frames=1, mode="keyframes") == [55]  # for 50
    assert chosen(GROUPS, fps=1, mode="keyframes") == [0, 20, 55, 80]  # for 0, 25, 50, 75
    irregular = video([0, 10, 20, 1000, 1010, 2000], keyframes=(0, 2, 4))
    assert chosen(irregular, num_frames=3, mode="keyframes") == [0, 2, 4]  # 2000 ms is nearest to 1010


def test_each_keyframe_is_taken_once() -> None:
    indices, requested = sample_indices(GROUPS, Sampling(num_frames=8, mode="keyframes"))
    assert indices.tolist() == [0, 12, 20, 40, 55, 80] and requested == 8


def test_keyframes_are_those_of_the_span() -> None:
    assert chosen(GROUPS, num_frames=2, start=0.6, end=1.8, mode="keyframes") == [20, 40]


def test_sampling_stays_uniform_where_keyframes_are_too_few() -> None:
    for sparse in (video([40 * i for i in range(100)]), video([40 * i for i in range(100)], keyframes=(0, 50, 60))):
        assert chosen(sparse, num_frames=8, mode="keyframes") == chosen(STEADY, num_frames=8)
    assert chosen(GROUPS, num_frames=8, min_frames=7, mode="keyframes") == chosen(STEADY, num_frames=8)
    assert chosen(GROUPS, num_frames=4, start=2.3, end=3.1, mode="keyframes") == [58, 64, 71, 77]


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
