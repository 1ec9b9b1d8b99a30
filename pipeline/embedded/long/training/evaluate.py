"""Measure the long model on held-out H.264 files: `python -m pipeline.embedded.long.training.evaluate`.

Every clip is rendered, encoded, decoded at 32 uniform frames and asked every kind of question that it allows; answers
count as in `pipeline.embedded.training.evaluate`. All kinds weigh the same. The tables are printed as Markdown:
accuracy by kind with and without the video, by camera, and what is left when visual tokens are dropped, all of them
before a layer or a random share before the language model, drawn anew for every clip.

Seeds: choices are made on --seed 1 (dev) and reported on --seed 2 (test).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pipeline.embedded import LONG_MODEL_DIR
from pipeline.embedded.long.demo import write_dataset
from pipeline.embedded.long.questions import BAG_KINDS, KINDS
from pipeline.embedded.long.scenes import FRAME_SIZE
from pipeline.embedded.training.evaluate import Verdict, judge, percent, read_clip, read_manifest

NUM_FRAMES = 32
KEEP_RATIOS = (0.5, 0.25, 0.1)
CAMERAS = ("static", "pan", "cuts")
TEST_SEED = 2


def mean_over_kinds(verdicts: Iterable[Verdict], measure: str = "by_choice", kinds: tuple[str, ...] = KINDS) -> str:
    """The mean of the kinds' accuracies, in per cent, over the kinds that were asked."""
    by_kind = defaultdict(list)
    for verdict in verdicts:
        by_kind[verdict.kind].append(getattr(verdict, measure))
    return percent([np.mean(by_kind[kind]) for kind in kinds if by_kind[kind]])


def kind_table(full: list[Verdict], blind: list[Verdict]) -> str:
    """Accuracy by kind, with and without the video."""
    lines = ["| kind | questions | choice | open | choice, no video | open, no video |", "|---|---|---|---|---|---|"]
    columns = [(verdicts, measure) for verdicts in (full, blind) for measure in ("by_choice", "open_answer")]
    for kind in KINDS:
        cells = [percent([getattr(v, measure) for v in verdicts if v.kind == kind]) for verdicts, measure in columns]
        lines.append(f"| {kind} | {sum(v.kind == kind for v in full)} | {' | '.join(cells)} |")
    hard = tuple(kind for kind in KINDS if kind not in BAG_KINDS)
    for name, kinds in (("all kinds", KINDS), ("without the bag kinds", hard)):
        cells = [mean_over_kinds(verdicts, measure, kinds) for verdicts, measure in columns]
        lines.append(f"| {name} | {sum(v.kind in kinds for v in full)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def camera_table(full: dict[str, list[Verdict]]) -> str:
    """Accuracy by kind and camera."""
    lines = ["| kind | " + " | ".join(full) + " |", "|---" * (len(full) + 1) + "|"]
    for kind in KINDS:
        cells = [percent([v.by_choice for v in verdicts if v.kind == kind]) for verdicts in full.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| all kinds | {' | '.join(mean_over_kinds(v) for v in full.values())} |"])


def main(checkpoint: Path = LONG_MODEL_DIR, clips: int = 300, drop_clips: int = 100, seed: int = TEST_SEED) -> None:
    """Measure a checkpoint and print its tables.

    Args:
        checkpoint: its folder.
        clips: held-out clips that are rendered for it.
        drop_clips: of those, how many are asked about with tokens dropped.
        seed: of the clips.
    """
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # For each layer: no visual token from there on, which tells how long the model needs them.
    drops = {
        f"none from layer {layer} on": {layer: 0.0} for layer in range(1, model.config.text_config.num_hidden_layers)
    }
    keeps = {f"{ratio:.0%} from layer 0 on": {0: ratio} for ratio in KEEP_RATIOS}
    # Answers with the video by camera, without it, and on the first clips with tokens dropped.
    by_camera: dict[str, list[Verdict]] = {camera: [] for camera in CAMERAS}
    blind: list[Verdict] = []
    dropped: dict[str, list[Verdict]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), clips, seed=seed)
        # Questions are grouped by video, so each clip is decoded once.
        for number, (video, rows) in enumerate(read_manifest(manifest).items()):
            pixels = read_clip(video, NUM_FRAMES, FRAME_SIZE)
            verdicts = judge(model, tokenizer, pixels, rows)
            by_camera[rows[0]["camera"]] += verdicts
            blind += judge(model, tokenizer, None, rows)
            if number < drop_clips:
                dropped["all"] += verdicts
                for name, keep in (drops | keeps).items():
                    dropped[name] += judge(model, tokenizer, pixels, rows, keep)
    print(kind_table([v for verdicts in by_camera.values() for v in verdicts], blind))
    print(f"\n{camera_table(by_camera)}")
    print(f"\n| visual tokens kept ({drop_clips} clips) | choice | open |\n|---|---|---|")
    for name, verdicts in dropped.items():
        print(f"| {name} | {mean_over_kinds(verdicts)} | {mean_over_kinds(verdicts, 'open_answer')} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
