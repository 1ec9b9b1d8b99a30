"""Measure the embedded model on held-out H.264 files: `python -m pipeline.embedded.training.evaluate`.

Every clip is rendered, encoded, decoded and asked every kind of question that it allows. An answer counts as right
- by choice, when of the options the right one is most likely as the answer (the sum of its tokens' log-probabilities);
- open, when greedy decoding gives exactly the answer and then ends the turn.
The table is printed as Markdown, with the video removed from the prompt in its last columns, and below it the accuracy
when random visual tokens are dropped.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from pipeline.embedded import MODEL_DIR
from pipeline.embedded.demo import write_dataset
from pipeline.embedded.questions import KINDS
from pipeline.embedded.scenes import FRAME_SIZE
from pipeline.embedded.training.batches import IGNORE, make_segment, normalize, pack, prompt_prefix
from pipeline.embedded.training.packed import answer_logits, patch_features, visual_tokens
from pipeline.video import Sampling, decode

NUM_FRAMES = 8
KEEP_RATIOS = (0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    kind: str
    by_choice: bool
    open_answer: bool


def read_manifest(manifest: Path) -> dict[Path, list[dict]]:
    """Rows of a manifest that `write_dataset` wrote, by video."""
    clips = defaultdict(list)
    for line in manifest.read_text().splitlines():
        row = json.loads(line)
        clips[manifest.parent / row["video"]].append(row)
    return clips


def read_clip(video: Path, num_frames: int = NUM_FRAMES, size: int = FRAME_SIZE) -> torch.Tensor:
    """Pixel values (1, num_frames, 3, size, size) of uniformly sampled frames."""
    clip = decode(video, Sampling(num_frames=num_frames), (size, size))
    return normalize(clip.frames)[None]


@torch.inference_mode()
def judge(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixels: torch.Tensor | None,
    rows: list[dict],
    keep: dict[int, float] | None = None,
) -> list[Verdict]:
    """Answer all questions to one clip; without pixels the prompt holds no visual token at all."""
    width = model.config.text_config.hidden_size
    visual = torch.zeros(1, 0, width) if pixels is None else visual_tokens(model, patch_features(model, pixels), 1)
    # All options of all questions are packed into one row: one forward for a clip.
    options = [(row, option) for row in rows for option in row["options"]]
    segments = [make_segment(tokenizer, row["question"], option, 0) for row, option in options]
    prefix = prompt_prefix(tokenizer)
    text = pack([segments], tokenizer, first_position=prefix.shape[1] + visual.shape[1])
    logits = answer_logits(model, prefix, visual, text, keep or {}).log_softmax(-1)
    # (targets,) tokens of the options, and the number of the option that each belongs to
    trained = text.targets != IGNORE
    targets, owner = text.targets[trained], text.segments[trained] - 1
    chosen = logits.gather(1, targets[:, None])[:, 0]
    # The end of the turn is no part of an option's likelihood, but greedy decoding has to give it.
    words = targets != tokenizer.eos_token_id
    # (options,) sums over tokens: log-probabilities, and tokens that greedy decoding would miss
    scores = torch.zeros(len(options)).index_add_(0, owner[words], chosen[words]).tolist()
    missed = torch.zeros(len(options)).index_add_(0, owner, (logits.argmax(-1) != targets).float()).tolist()
    return list(_verdicts(rows, scores, missed))


def _verdicts(rows: list[dict], scores: list[float], missed: list[float]):
    """`scores` and `missed` tokens run over the options of all rows in order."""
    start = 0
    for row in rows:
        count, right = len(row["options"]), row["options"].index(row["answer"])
        best = max(range(count), key=lambda i: scores[start + i])
        yield Verdict(kind=row["kind"], by_choice=best == right, open_answer=missed[start + right] == 0)
        start += count


def percent(values: list[bool]) -> str:
    return f"{100 * np.mean(values):.1f}" if values else "-"


def table(full: list[Verdict], blind: list[Verdict]) -> str:
    """Markdown: one line per kind and one for all of them."""
    lines = ["| kind | questions | choice | open | choice, no video | open, no video |", "|---|---|---|---|---|---|"]
    for kind in (*KINDS, "all"):
        seen, unseen = ([v for v in verdicts if kind in (v.kind, "all")] for verdicts in (full, blind))
        cells = [
            percent([getattr(v, name) for v in group])
            for group in (seen, unseen)
            for name in ("by_choice", "open_answer")
        ]
        lines.append(f"| {kind} | {len(seen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(model: Path = MODEL_DIR, clips: int = 200, seed: int = 1) -> None:
    """Measure a checkpoint and print its tables.

    Args:
        model: the checkpoint's folder.
        clips: held-out clips that are rendered for it.
        seed: of those clips.
    """
    # The dropped tokens are random; so the table is the same every time.
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    results: dict[str, list[Verdict]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for video, rows in read_manifest(write_dataset(Path(folder), clips, seed=seed)).items():
            pixels = read_clip(video)
            results["full"] += judge(network, tokenizer, pixels, rows)
            results["blind"] += judge(network, tokenizer, None, rows)
            for ratio in KEEP_RATIOS:
                # Before the language model, and in a shallow layer.
                for layer in (0, 2):
                    results[f"{ratio:.0%} | {layer}"] += judge(network, tokenizer, pixels, rows, {layer: ratio})
    print(table(results.pop("full"), results.pop("blind")))
    print("\n| random tokens kept | from layer | choice | open |\n|---|---|---|---|")
    for name, verdicts in results.items():
        print(f"| {name} | {percent([v.by_choice for v in verdicts])} | {percent([v.open_answer for v in verdicts])} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
