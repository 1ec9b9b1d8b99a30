"""Write the files of this folder again: `python -m tests.data.make RECORDED`.

RECORDED is the folder of full recordings: `vitcop_vectors.npz`, `hf_video_processors.npz` and `rivals/*.npz`, as
README.md describes them. The videos are rendered here and need none.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tests.pipeline.video.cases import MADE
from tests.pipeline.videos import cut_without_decoding, write_video

HERE = Path(__file__).parent
VITCOP_CASES = (0, 1, 2, 5, 8, 9)
LARGE = {"fastv", "kvpress", "pyramiddrop", "sparsevlm", "sparsevlm_plus"}
"""Methods with whole layers in their recordings, of which one case stands here; of the others two."""
STACKED = ("llava_onevision", "llava_next_video", "video_llava", "internvl")
"""Families of one recording: transformers gave all four the same pixels for the same frames."""
FRAMES = 60
CUT = 17
TS_DELAY = 0.08  # the muxer begins later by the two frames of reordering: decoding times are not negative there


def slim(array: np.ndarray) -> np.ndarray:
    """As float16 where nothing is lost by it; readers cast back."""
    half = array.astype(np.float16) if array.dtype == np.float32 else array
    return half if np.array_equal(half, array) else array


def write_vectors(recorded: Path) -> None:
    files = [recorded / "vitcop_vectors.npz", *sorted((recorded / "rivals").glob("*.npz"))]
    for path in files:
        cases = VITCOP_CASES if path.stem == "vitcop_vectors" else (0,) if path.stem in LARGE else (0, 1)
        with np.load(path) as arrays:
            kept = {key: slim(arrays[key]) for key in arrays if int(key.split("/")[0]) in cases}
        np.savez_compressed(HERE / "vectors" / path.name, **kept)


def write_frames(recorded: Path) -> None:
    """The first four frames of each Qwen recording: two frames become patches of their own, whatever comes after."""
    with np.load(recorded / "hf_video_processors.npz") as arrays:
        family = {
            name: [arrays[f"{name}/model_size/{key}"] for key in ("frames", "pixel_values_videos")]
            for name in (*STACKED, "qwen2_vl", "qwen3_vl")
        }
        grids = {name: arrays[f"{name}/model_size/video_grid_thw"] for name in ("qwen2_vl", "qwen3_vl")}
    first = family[STACKED[0]]
    assert all(np.array_equal(one, other) for name in STACKED for one, other in zip(family[name], first, strict=True))
    kept = {"stacked/frames": first[0], "stacked/pixel_values_videos": first[1]}
    for name, grid in grids.items():
        frames, patches = family[name]
        kept[f"{name}/frames"], kept[f"{name}/video_grid_thw"] = frames[:4], grid * [0, 1, 1] + [2, 0, 0]
        kept[f"{name}/pixel_values_videos"] = patches[: len(patches) * 2 // int(grid[0, 0])]
    np.savez_compressed(HERE / "frames.npz", **kept)


def write_videos() -> None:
    """Files that readers by frame count get wrong, and what each of their frames shows and when."""
    folder, truth = HERE / "videos", {}
    for name in ("hevc.mp4", "open.ts", "irregular.mp4", "open.mp4"):
        times = MADE[name].get("times", range(0, 40 * FRAMES, 40))
        write_video(folder / name, FRAMES, **MADE[name])
        delay = TS_DELAY if name.endswith(".ts") else 0
        truth[name] = {"numbers": list(range(FRAMES)), "seconds": [round(time / 1000 + delay, 3) for time in times]}
    cut_without_decoding(folder / "open.mp4", folder / "edit_list.mp4", first=CUT)
    (folder / "open.mp4").unlink()
    whole = truth.pop("open.mp4")
    truth["edit_list.mp4"] = {"numbers": whole["numbers"][CUT:], "seconds": whole["seconds"][: FRAMES - CUT]}
    (folder / "truth.json").write_text(json.dumps(truth) + "\n")


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]))
    write_frames(Path(sys.argv[1]))
    write_videos()
