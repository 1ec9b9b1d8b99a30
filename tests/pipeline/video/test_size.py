"""The size at which a model takes its frames, on worked examples."""

import pickle
import subprocess
import sys
from typing import Any

import pytest

from pipeline.video.size import FixedSize, QwenClipSize, QwenFrameSize, ShapeError, ShortestEdge, SourceSize


@pytest.mark.parametrize(
    ("rule", "source", "size"),
    [
        (SourceSize(), (90, 160, 8), (90, 160)),
        (FixedSize(384, 384), (90, 160, 8), (384, 384)),
        (ShortestEdge(224), (1080, 1920, 8), (224, 398)),
        (ShortestEdge(224), (1920, 1080, 8), (398, 224)),
        (QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**6, temporal_patch_size=2), (100, 200, 8), (112, 196)),
        (
            QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**5, temporal_patch_size=2),
            (1080, 1920, 8),
            (224, 420),
        ),
        (QwenFrameSize(factor=28, min_pixels=10**5, max_pixels=10**6, temporal_patch_size=2), (90, 160, 8), (252, 448)),
        (QwenClipSize(factor=32, min_pixels=4096, max_pixels=10**7, temporal_patch_size=2), (360, 640, 8), (352, 640)),
        (QwenClipSize(factor=32, min_pixels=4096, max_pixels=10**6, temporal_patch_size=2), (360, 640, 8), (256, 448)),
        (QwenClipSize(factor=32, min_pixels=4096, max_pixels=10**6, temporal_patch_size=2), (360, 640, 64), (64, 160)),
        (QwenClipSize(factor=32, min_pixels=4096, max_pixels=10**6, temporal_patch_size=2), (16, 64, 8), (32, 128)),
    ],
)
def test_sizes(rule: Any, source: tuple[int, int, int], size: tuple[int, int]) -> None:
    assert pickle.loads(pickle.dumps(rule))(*source) == size


def test_caps_share_the_budget_out_to_the_frames() -> None:
    frame = QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**6, temporal_patch_size=2, max_video_tokens=1000)
    # 1000 * 28 * 28 * 0.9 * 2 // 32 = 44100 pixels a frame
    height, width = frame(1080, 1920, 32)
    assert 44100 * 0.75 < height * width <= 44100
    clip = QwenClipSize(factor=32, min_pixels=4096, max_pixels=10**8, temporal_patch_size=2, max_video_tokens=100)
    height, width = clip(1080, 1920, 8)
    assert 102400 * 0.75 < height * width <= 102400


def test_a_thread_of_a_picture_is_refused() -> None:
    with pytest.raises(ShapeError, match="10x3000"):
        QwenFrameSize(factor=28, min_pixels=3136, max_pixels=10**6, temporal_patch_size=2)(10, 3000, 8)


def test_size_rules_load_without_torch() -> None:
    code = "import sys, pipeline.video.size; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
