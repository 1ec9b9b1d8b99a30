"""Train the embedded model: `python -m pipeline.embedded.training.train --output DIR --seed 0`.

Two single-threaded processes average their gradients. Every step draws its data from (seed, rank, step), so a run that
is stopped and started again goes on as if nothing had happened. The stages follow a curriculum: the vision tower learns
to name patches, then single frames with captions and questions, then 4 and 8 frames, and in the end 8 frames of which
random visual tokens are dropped, before the language model and in it, as a pruner would.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from pipeline.embedded.questions import KINDS, vocabulary
from pipeline.embedded.scenes import COLORS, SHAPES
from pipeline.embedded.training.architecture import TOKENS_PER_FRAME, build_model, save_checkpoint
from pipeline.embedded.training.batches import CAPTION_KIND, IGNORE, Clips, prompt_prefix, sample_clips, sample_text
from pipeline.embedded.training.packed import answer_logits, patch_features, visual_tokens
from pipeline.embedded.training.tokenizer import build_tokenizer

CHECKPOINT = "training.pt"
WARMUP_STEPS = 30
MUON_RATE = 3.0  # of the matrices, against the learning rate of everything else
PATCH_LOSS_WEIGHT = 0.2
BACKGROUND_WEIGHT = 0.15


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`clips` are per process and step; the learning rate falls linearly from `start_rate` to `end_rate`."""

    name: str
    steps: int
    clips: int
    frames: int
    start_rate: float
    end_rate: float
    questions: int = 8
    captions: int = 2
    max_static: int = 3
    language: bool = True
    drop: bool = False
    emphasis: Mapping[str, float] = field(default_factory=dict)

    @property
    def work(self) -> int:
        """Rough cost of a step, for the estimate of the time left."""
        return self.clips * (self.frames + 4 * self.language)


# Kinds that are asked more often. Shapes of events are learned first; their colours need a push of their own.
ON_SHAPES = {"flash_shape": 3.0, "moving_shape": 2.0, "late_shape": 2.0, "flash_color": 2.0, "existence": 0.7}
ON_COLORS = {"flash_color": 3.0, "moving_color": 4.0, "late_color": 4.0, "flash_shape": 1.5, "existence": 0.7}
ON_EVENTS = {kind: 2.0 for kind in KINDS if kind.startswith(("moving", "flash", "late"))}

STAGES = (
    Stage(name="patches", steps=700, clips=16, frames=2, start_rate=2e-3, end_rate=2e-3, language=False),
    Stage(
        name="frames", steps=500, clips=24, frames=1, start_rate=2e-3, end_rate=2e-3, max_static=2, emphasis=ON_SHAPES
    ),
    Stage(name="shapes-4", steps=600, clips=12, frames=4, start_rate=2e-3, end_rate=1.83e-3, emphasis=ON_SHAPES),
    Stage(name="colors-4", steps=200, clips=12, frames=4, start_rate=1.8e-3, end_rate=1.8e-3, emphasis=ON_COLORS),
    Stage(name="clips-8", steps=600, clips=8, frames=8, start_rate=1.6e-3, end_rate=1.3e-3, emphasis=ON_EVENTS),
    Stage(
        name="dropped", steps=1400, clips=8, frames=8, start_rate=1.3e-3, end_rate=5e-5, drop=True, emphasis=ON_EVENTS
    ),
)


class Trainee(nn.Module):
    """The model together with two heads that name the colour and shape of every patch; the heads are thrown away."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(vocabulary())
        self.model: LlavaOnevisionForConditionalGeneration = build_model(self.tokenizer, seed)
        width = self.model.config.vision_config.hidden_size
        self.color_head = nn.Linear(width, len(COLORS) + 1)
        self.shape_head = nn.Linear(width, len(SHAPES) + 1)
        self.prefix = prompt_prefix(self.tokenizer)

    def patch_loss(self, features: torch.Tensor, clips: Clips) -> tuple[torch.Tensor, list[float]]:
        """Cross-entropy over patch colours and shapes, and the accuracy of each on objects."""
        loss, accuracy = features.new_zeros(()), []
        for head, labels in ((self.color_head, clips.patch_colors), (self.shape_head, clips.patch_shapes)):
            logits = head(features)
            # Most patches are background, which would drown the objects.
            weight = torch.ones(logits.shape[-1])
            weight[0] = BACKGROUND_WEIGHT
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)
            accuracy.append((logits.argmax(-1) == labels)[labels > 0].float().mean().item())
        return loss, accuracy


def random_keep(rng: np.random.Generator, layers: int) -> dict[int, float]:
    """Where and how much to drop: nothing in a quarter of the steps, else before the model, inside it, or both."""
    keep = {}
    if rng.random() < 0.6:
        keep[0] = float(rng.uniform(0.15, 0.9))
    if rng.random() < 0.6:
        keep[int(rng.integers(1, layers - 1))] = float(rng.uniform(0.1, 0.8))
    return keep


@dataclass
class Progress:
    """Accuracies and losses since the last printed line."""

    values: dict[str, list[float]]
    began: float
    work_done: int = 0

    def line(self, stage: Stage, step: int, work_left: int) -> str:
        seconds = time.time() - self.began
        left = seconds / max(self.work_done, 1) * work_left
        means = " ".join(f"{name} {np.mean(values):.2f}" for name, values in sorted(self.values.items()))
        self.values.clear()
        return f"[{seconds:5.0f} s, {left / 60:4.1f} min left] {stage.name} {step}/{stage.steps} {means}"


def make_optimizers(trainee: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all layers, AdamW for embeddings, norms, biases and heads."""
    # Muon is made for the matrices inside layers; embeddings and heads are none of these.
    matrices = [p for name, p in trainee.named_parameters() if p.dim() == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in trainee.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            [{"params": matrices, "scale": MUON_RATE}], lr=0.0, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([{"params": others, "scale": 1.0}], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train_step(trainee: Trainee, stage: Stage, rng: np.random.Generator, progress: Progress) -> None:
    """One forward and backward pass on fresh data; gradients are left in the parameters."""
    clips, scenes = sample_clips(rng, clips=stage.clips, frames=stage.frames, max_static=stage.max_static)
    # (clips * frames, patches, width); named by the patch heads in every stage
    features = patch_features(trainee.model, clips.pixels)
    loss, (colors, shapes) = trainee.patch_loss(features, clips)
    progress.values["patch_color"].append(colors)
    progress.values["patch_shape"].append(shapes)
    if stage.language:
        text = sample_text(
            rng,
            trainee.tokenizer,
            scenes,
            questions=stage.questions,
            captions=stage.captions,
            video_tokens=stage.frames * TOKENS_PER_FRAME + 1,
            emphasis=stage.emphasis,
        )
        layers = trainee.model.config.text_config.num_hidden_layers
        # In the last stage random tokens are dropped, as pruning will drop them.
        keep = random_keep(rng, layers) if stage.drop else {}
        visual = visual_tokens(trainee.model, features, stage.clips)
        # (targets, vocabulary) at the positions that have a target
        logits = answer_logits(trainee.model, trainee.prefix, visual, text, keep)
        trained = text.targets != IGNORE
        # The weights of answers sum to 1, and so do those of captions.
        entropy = F.cross_entropy(logits, text.targets[trained], reduction="none")
        loss = (entropy * text.weights[trained]).sum() + PATCH_LOSS_WEIGHT * loss
        progress.values["loss"].append(loss.item())
        # For the log: accuracy on words only, since the end of the turn is always easy.
        right, words = (
            logits.argmax(-1) == text.targets[trained],
            text.targets[trained] != trainee.tokenizer.eos_token_id,
        )
        for kind, correct in zip(text.kinds[trained][words].tolist(), right[words].tolist(), strict=True):
            progress.values["caption" if kind == CAPTION_KIND else KINDS[kind]].append(correct)
    loss.backward()


def average_gradients(parameters: list[nn.Parameter], ranks: int, counts: Sequence[float] = ()) -> list[float]:
    """Give every process the mean of all processes' gradients; returns the mean of their `counts`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    # One tensor, so that all gradients and counts take a single exchange.
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.tensor(counts, dtype=torch.float)])
    if ranks > 1:
        dist.all_reduce(flat)
        flat /= ranks
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, piece in zip(gradients, flat[: sum(sizes)].split(sizes), strict=True):
        gradient.copy_(piece.view_as(gradient))
    return flat[sum(sizes) :].tolist()


def learning_rate(stage: Stage, step: int) -> float:
    rate = stage.start_rate + (stage.end_rate - stage.start_rate) * step / stage.steps
    return rate * min(1.0, (step + 1) / WARMUP_STEPS)


def run(rank: int, ranks: int, output: Path, seed: int, log_every: int = 25, save_every: int = 100) -> None:
    """The training loop of one process."""
    torch.set_num_threads(1)
    disable_progress_bar()
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{output.resolve() / 'rendezvous'}", rank=rank, world_size=ranks
        )
    trainee = Trainee(seed)
    parameters = list(trainee.parameters())
    optimizers = make_optimizers(trainee)
    # Steps of an earlier run in this folder are counted but not done again.
    done = restore(output, trainee, optimizers)
    progress, step = Progress(defaultdict(list), time.time()), 0
    total = sum(stage.steps * stage.work for stage in STAGES)
    seen = 0
    for stage in STAGES:
        for local in range(stage.steps):
            step, seen = step + 1, seen + stage.work
            if step <= done:
                continue
            # Data depend on seed, process and step alone, so a continued run sees what an unbroken one would.
            rng = np.random.default_rng((seed, rank, step))
            # For the tokens that are dropped, which torch draws.
            torch.manual_seed(int(rng.integers(2**31)))
            train_step(trainee, stage, rng, progress)
            # All processes then hold the same gradients, clip them alike and stay equal.
            average_gradients(parameters, ranks)
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(stage, local)
                optimizer.step()
                optimizer.zero_grad()
            progress.work_done += stage.work
            if rank == 0 and (local + 1) % log_every == 0:
                print(progress.line(stage, local + 1, total - seen), flush=True)
            if rank == 0 and (step % save_every == 0 or local + 1 == stage.steps):
                save(output, trainee, optimizers, step)


def save(output: Path, trainee: Trainee, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write a loadable checkpoint folder and, beside it, what a continued run needs."""
    save_checkpoint(trainee.model, trainee.tokenizer, output)
    state = {"step": step, "trainee": trainee.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(state, output / f"{CHECKPOINT}.new")
    (output / f"{CHECKPOINT}.new").replace(output / CHECKPOINT)


def restore(output: Path, trainee: Trainee, optimizers: list[torch.optim.Optimizer]) -> int:
    """Load the state of an earlier run in the same folder, if there is one, and return its number of steps."""
    if not (output / CHECKPOINT).exists():
        return 0
    state = torch.load(output / CHECKPOINT)
    trainee.load_state_dict(state["trainee"])
    for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    return state["step"]


def main(output: Path, seed: int = 0, processes: int = 2) -> None:
    """Train a model, or go on with a run.

    Args:
        output: checkpoint folder; a run found there is continued.
        seed: of the weights and of everything that is drawn.
        processes: that train together; another number gives other weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "rendezvous").unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(run, args=(processes, output, seed), nprocs=processes)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
