"""Train the long embedded model: `python -m pipeline.embedded.long.training.train --output DIR --seed 0`.

It starts from the 8-frame model's weights. Two single-threaded processes average their gradients. Every step draws its
data from (seed, rank, step), so a run that is stopped and started again goes on as if nothing had happened.

The curriculum goes from patches to single frames and four frames, where motion and letters break away, and from there
in small steps to 32 frames; at last four layers are appended. A stage may end early, when its gate is passed. No token
is ever dropped. What is learned besides answers and captions are labels: of patches, of visual tokens as they enter the
language model (what object, where), and of visual tokens after layer 4 (where it moves, since when, what time it is).
Their heads are thrown away.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
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

from pipeline.embedded import MODEL_DIR as FIRST_MODEL
from pipeline.embedded.long.questions import KINDS, vocabulary
from pipeline.embedded.long.scenes import FRAME_SIZE
from pipeline.embedded.long.training.batches import PATCH_LABELS, TOKEN_EVENTS, TOKEN_LOOKS, sample_clips, sample_text
from pipeline.embedded.long.training.growth import grown, warm_start
from pipeline.embedded.training.architecture import build_model, save_checkpoint
from pipeline.embedded.training.batches import CAPTION_KIND, IGNORE, TextRow, prompt_prefix
from pipeline.embedded.training.packed import layer_outputs, logits_of, patch_features, visual_tokens
from pipeline.embedded.training.tokenizer import build_tokenizer
from pipeline.embedded.training.train import average_gradients, make_optimizers

CHECKPOINT = "training.pt"
WARMUP_STEPS = 30
NOTHING_WEIGHT = 0.15
LABEL_DEPTH = 4  # layers before the heads of visual tokens
EXIT_DEPTH = 8  # layers before the answer's second loss, so that the layers after it need not see the video
EXIT_WEIGHT = 0.5
MOST_CLIPS = 20
GATE_WINDOW = 60  # steps over which a gate's accuracies are taken
FRAMES_STREAM = 99  # of the random numbers that settle a step's frame count, the same in every process
MAX_LENGTH = 4096  # tokens


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`frames` lists the clip lengths to draw from; a process takes as many clips as fit `budget` frames.

    The learning rate falls linearly from `start_rate` to `end_rate` over `steps`. With a `gate` (kind -> accuracy) the
    stage ends, after `least` steps, as soon as all of these kinds are answered that well.
    """

    name: str
    steps: int
    frames: tuple[int, ...]
    budget: int
    start_rate: float
    end_rate: float
    questions: int = 8
    captions: int = 2
    layers: int = 8
    static_camera: float = 1 / 3
    language: bool = True
    label_weight: float = 0.2
    emphasis: Mapping[str, float] = field(default_factory=dict)
    gate: Mapping[str, float] = field(default_factory=dict)
    least: int = 0


RARELY = {"existence": 0.2, "shape_of_color": 0.4, "color_of_shape": 0.4}
BASICS = dict.fromkeys(KINDS, 0.5) | {
    "moving_color": 4.0, "moving_shape": 4.0, "moving_direction": 5.0, "letter": 8.0, "existence": 0.1,
    "position": 1.0, "shape_of_color": 0.2, "color_of_shape": 0.2,
}  # fmt: skip
EVENTS = dict.fromkeys(KINDS, 1.0) | RARELY | {
    "moving_direction": 4.0, "late_color": 3.0, "left_color": 3.0, "left_shape": 2.0, "flash_color": 2.0,
    "flash_time": 2.0, "position": 2.0, "count": 3.0,
}  # fmt: skip
EVERYTHING = dict.fromkeys(KINDS, 2.0) | RARELY | {
    "moving_direction": 4.0, "flash_time": 4.0, "position": 3.0, "late_color": 3.0, "left_color": 3.0, "count": 4.0,
}  # fmt: skip

STAGES = (
    Stage(name="patches", steps=450, frames=(2,), budget=32, start_rate=2e-3, end_rate=1.5e-3, language=False),
    Stage(
        name="basics", steps=700, frames=(1, 4, 4), budget=56, start_rate=2e-3, end_rate=1.7e-3, questions=5,
        captions=1, static_camera=0.7, emphasis=BASICS, least=200,
        gate={"letter": 0.85, "moving_color": 0.9, "moving_shape": 0.9, "moving_direction": 0.85},
    ),
    Stage(
        name="events", steps=600, frames=(4, 8, 8), budget=64, start_rate=1.7e-3, end_rate=1.5e-3, emphasis=EVENTS,
        least=200,
        gate={"moving_direction": 0.85, "flash_time": 0.85, "position": 0.85, "late_color": 0.85, "left_color": 0.85,
              "flash_color": 0.85, "letter": 0.85},
    ),
    Stage(
        name="lengths", steps=500, frames=(4, 8, 16), budget=64, start_rate=1.5e-3, end_rate=1.3e-3, emphasis=EVENTS,
        least=200,
        gate={"moving_direction": 0.85, "flash_time": 0.85, "position": 0.85, "late_color": 0.85, "left_color": 0.85,
              "flash_color": 0.85, "letter": 0.85},
    ),
    Stage(
        name="long", steps=1000, frames=(8, 16, 32, 32), budget=96, start_rate=1.3e-3, end_rate=7e-4,
        emphasis=EVERYTHING,
    ),
    Stage(
        name="deep", steps=1000, frames=(16, 32, 32), budget=96, start_rate=7e-4, end_rate=2e-5, layers=12,
        emphasis=EVERYTHING, label_weight=0.05,
    ),
)  # fmt: skip


class Trainee(nn.Module):
    """The model together with heads that name the labels of patches and visual tokens; the heads are thrown away."""

    def __init__(self, seed: int, layers: int) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(vocabulary(), MAX_LENGTH)
        self.model: LlavaOnevisionForConditionalGeneration = build_model(
            self.tokenizer, seed, frame_size=FRAME_SIZE, layers=layers
        )
        config = self.model.config
        self.patch_heads = _heads(config.vision_config.hidden_size, PATCH_LABELS)
        self.look_heads = _heads(config.text_config.hidden_size, TOKEN_LOOKS)
        self.event_heads = _heads(config.text_config.hidden_size, TOKEN_EVENTS)
        self.prefix = prompt_prefix(self.tokenizer)

    @property
    def layers(self) -> int:
        return self.model.config.text_config.num_hidden_layers


def _heads(width: int, labels: Mapping[str, int | None]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, values or 2) for name, values in labels.items()})


@dataclass
class Record:
    """What the steps since the last printed line gave, and how often each kind was right over the gate's window."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    window: deque[list[float]] = field(default_factory=lambda: deque(maxlen=GATE_WINDOW))

    def line(self) -> str:
        means = " ".join(f"{name} {np.mean(values):.2f}" for name, values in sorted(self.values.items()) if values)
        self.values.clear()
        return means

    def passes(self, gate: Mapping[str, float]) -> bool:
        """Whether every kind in a gate, which must not be empty, was answered well enough in the last steps."""
        if not gate or len(self.window) < GATE_WINDOW:
            return False
        # (kinds,) words that were right, and that were asked, over the window's steps
        right, asked = np.array(self.window).sum(0).reshape(2, len(KINDS))
        return all(right[KINDS.index(kind)] >= least * asked[KINDS.index(kind)] for kind, least in gate.items())


def label_loss(
    heads: nn.ModuleDict, states: torch.Tensor, labels: dict[str, torch.Tensor], where: str, record: Record
) -> torch.Tensor:
    """The sum of all heads' losses on states (..., width): cross-entropy, or of lengths the smooth L1 distance.

    Where there is nothing (background, no letter, no motion) the label is 0 and counts little.
    """
    loss = states.new_zeros(())
    for name, head in heads.items():
        label = labels[name]
        # Tokens of the background have no label, nor has what a frame can't tell yet.
        known = label != IGNORE
        if label.is_floating_point():
            given, target = head(states)[known], label[known]
            loss = loss + F.smooth_l1_loss(given, target, beta=0.3)
            record.values[f"{where}_{name}"].append((given - target).abs().mean().item())
            continue
        logits, target = head(states[known]), label[known]
        # Most patches are background and most tokens bear no letter and don't move; they count little.
        weight = torch.ones(logits.shape[-1])
        weight[0] = NOTHING_WEIGHT if where == "patch" or name in ("letter", "direction") else 1.0
        entropy = F.cross_entropy(logits, target, weight, reduction="sum")
        loss = loss + entropy / weight[target].sum().clamp(min=1)
        # Accuracy over what is there, where the label 0 stands for nothing.
        shown = target > 0 if weight[0] < 1 else target >= 0
        record.values[f"{where}_{name}"] += (logits.argmax(-1) == target)[shown].tolist()
    return loss


def train_step(trainee: Trainee, stage: Stage, rng: np.random.Generator, frames: int, record: Record) -> list[float]:
    """One forward and backward pass on fresh data; gradients are left in the parameters.

    Returns how many words of each kind were right, and after them how many were asked.
    """
    clips = min(MOST_CLIPS, max(1, stage.budget // frames))
    data, scenes = sample_clips(rng, clips=clips, frames=frames, static_camera=stage.static_camera)
    features = patch_features(trainee.model, data.pixels)
    visual = visual_tokens(trainee.model, features, clips)
    labels = label_loss(trainee.patch_heads, features, data.patches, "patch", record)
    labels = labels + label_loss(trainee.look_heads, _normed(visual[:, :-1]), data.tokens, "look", record)
    counts: Counter[tuple[str, int]] = Counter()
    loss = labels
    if stage.language:
        text = sample_text(
            rng, trainee.tokenizer, scenes, questions=stage.questions, captions=stage.captions,
            emphasis=stage.emphasis,
        )  # fmt: skip
        outputs = list(layer_outputs(trainee.model, trainee.prefix, visual, text, {}))
        start = trainee.prefix.shape[1]
        tokens = outputs[LABEL_DEPTH - 1][:, start : start + visual.shape[1] - 1]  # without the newline
        labels = labels + label_loss(trainee.event_heads, _normed(tokens), data.tokens, "event", record)
        loss = stage.label_weight * labels + answer_loss(trainee, outputs[-1], text, record, counts)
        if len(outputs) > EXIT_DEPTH:
            loss = loss + EXIT_WEIGHT * answer_loss(trainee, outputs[EXIT_DEPTH - 1], text, record, None)
    loss.backward()
    return [counts[group, kind] for group in ("right", "asked") for kind in range(len(KINDS))]


def _normed(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:])


def answer_loss(
    trainee: Trainee, hidden: torch.Tensor, text: TextRow, record: Record, counts: Counter[tuple[str, int]] | None
) -> torch.Tensor:
    """The weighted loss of answers and captions from hidden states; with `counts` the right words are counted too."""
    logits, trained = logits_of(trainee.model, hidden, text), text.targets != IGNORE
    targets = text.targets[trained]
    loss = (F.cross_entropy(logits, targets, reduction="none") * text.weights[trained]).sum()
    record.values["early_loss" if counts is None else "loss"].append(loss.item())
    if counts is not None:
        # Words only: the end of the turn is easy and would flatter every kind.
        words = targets != trainee.tokenizer.eos_token_id
        right = (logits.argmax(-1) == targets)[words].tolist()
        for kind, correct in zip(text.kinds[trained][words].tolist(), right, strict=True):
            record.values["caption" if kind == CAPTION_KIND else KINDS[kind]].append(correct)
            if kind != CAPTION_KIND:
                counts["right", kind] += correct
                counts["asked", kind] += 1
    return loss


def learning_rate(stage: Stage, step: int) -> float:
    rate = stage.start_rate + (stage.end_rate - stage.start_rate) * step / stage.steps
    return rate * min(1.0, (step + 1) / WARMUP_STEPS)


@dataclass
class Place:
    """Where a run stands: `step` of all, the stage, and the steps done in it."""

    step: int = 0
    stage: int = 0
    local: int = 0


class Run:
    """A training run of one process, and its checkpoint."""

    def __init__(self, rank: int, ranks: int, output: Path, seed: int) -> None:
        self.rank, self.ranks, self.output, self.seed = rank, ranks, output, seed
        self.place, self.record, self.seconds = Place(), Record(), 0.0
        state = torch.load(output / CHECKPOINT) if (output / CHECKPOINT).exists() else None
        # The number of layers grows during a run, so a continued one begins with those it had.
        self.trainee = Trainee(seed, state["layers"] if state else STAGES[0].layers)
        # A new run starts from the first model's weights.
        if not state:
            warm_start(self.trainee.model, self.trainee.tokenizer, FIRST_MODEL)
        self.optimizers = make_optimizers(self.trainee)
        if state:
            # Everything that the next step depends on, so that it is as if nothing had stopped the run.
            self.place, self.seconds = Place(**state["place"]), state["seconds"]
            self.record.window.extend(state["window"])
            self.trainee.load_state_dict(state["trainee"])
            for optimizer, content in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(content)
        self.began = time.time() - self.seconds

    def train(self, log_every: int, save_every: int) -> None:
        """Every step that is left, of all stages."""
        while self.place.stage < len(STAGES):
            stage = STAGES[self.place.stage]
            # New layers need optimizers of their own; the old ones' moments are dropped.
            if stage.layers > self.trainee.layers:
                self.trainee.model = grown(self.trainee.model, self.trainee.tokenizer, self.seed + 1, stage.layers)
                self.optimizers = make_optimizers(self.trainee)
            self.take_step(stage)
            place = self.place
            # Counts are averaged over processes, so all of them pass a gate at the same step.
            passed = place.local >= stage.least and self.record.passes(stage.gate)
            ended = passed or place.local == stage.steps
            if self.rank == 0 and (place.local % log_every == 0 or ended):
                seconds = time.time() - self.began
                print(f"[{seconds:5.0f} s] {stage.name} {place.local}/{stage.steps} {self.record.line()}", flush=True)
            if ended:
                self.place = Place(step=place.step, stage=place.stage + 1)
                self.record.window.clear()
            if self.rank == 0 and (self.place.step % save_every == 0 or ended):
                self.save()

    def take_step(self, stage: Stage) -> None:
        step = self.place.step + 1
        # The same length in every process, or one would wait for the other; different clips in each.
        frames = int(np.random.default_rng((self.seed, FRAMES_STREAM, step)).choice(stage.frames))
        rng = np.random.default_rng((self.seed, self.rank, step))
        counts = train_step(self.trainee, stage, rng, frames, self.record)
        # Heads that a stage does not use have no gradient.
        parameters = [p for p in self.trainee.parameters() if p.grad is not None]
        self.record.window.append(average_gradients(parameters, self.ranks, counts))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * learning_rate(stage, self.place.local)
            optimizer.step()
            optimizer.zero_grad()
        self.place = Place(step=step, stage=self.place.stage, local=self.place.local + 1)

    def save(self) -> None:
        """Write a loadable checkpoint folder and, beside it, what a continued run needs."""
        save_checkpoint(self.trainee.model, self.trainee.tokenizer, self.output)
        state = {
            "place": vars(self.place),
            "seconds": time.time() - self.began,
            "layers": self.trainee.layers,
            "window": list(self.record.window),
            "trainee": self.trainee.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.output / f"{CHECKPOINT}.new")
        (self.output / f"{CHECKPOINT}.new").replace(self.output / CHECKPOINT)


def run(rank: int, ranks: int, output: Path, seed: int, log_every: int = 25, save_every: int = 50) -> None:
    """The training loop of one process."""
    torch.set_num_threads(1)
    disable_progress_bar()
    if ranks > 1:
        # A name of its own, should workers of a killed run live on.
        rendezvous = output.resolve() / f"rendezvous-{os.getppid()}"
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    Run(rank, ranks, output, seed).train(log_every, save_every)


def main(output: Path, seed: int = 0, processes: int = 2) -> None:
    """Train a model, or go on with a run.

    Args:
        output: checkpoint folder; a run found there is continued.
        seed: of the weights and of everything that is drawn.
        processes: that train together; another number gives other weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    for left_over in output.glob("rendezvous-*"):
        left_over.unlink()
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(run, args=(processes, output, seed), nprocs=processes)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
