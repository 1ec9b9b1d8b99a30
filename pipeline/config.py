"""Settings of the jobs: frozen dataclasses, each one a group of `--help`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from pipeline.errors import ConfigError

Scalar = bool | int | float | str
ChoiceScoring = Literal["generate", "likelihood", "likelihood-letter"]

DEFAULT_NUM_FRAMES = 8
CALIBRATED = "calibrated"
"""The method that the profile beside the model recommends."""


def parse_options(words: list[str]) -> dict[str, Scalar]:
    """`["seed=3", "key_score=large"]` as `{"seed": 3, "key_score": "large"}`; values are read as YAML scalars."""
    pairs = [word.partition("=") for word in words]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ValueError(f"method options are written KEY=VALUE, got {key + equals!r}")
    return {key: yaml.safe_load(value) for key, _, value in pairs}


Options = Annotated[
    Mapping[str, Scalar],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE",
        instance_from_str=parse_options,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda options: [f"{key}={value}" for key, value in options.items()],
    ),
]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Which questions are asked."""

    manifest: str | None = None
    """Questions: a .jsonl, .parquet or .csv file, a glob, or a folder of such files. None: the rendered demo."""
    limit: int | None = None
    """Only the first N rows of the manifest."""
    bad_rows: Literal["error", "refuse"] = "error"
    """A row that can't be asked (an empty question or option, options that repeat, an answer that is none of them, a
    span that ends before it starts) becomes a row with an error, or nothing is started. What is wrong with a file (not
    readable, a column missing or of the wrong type, an id that repeats) is always refused."""

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit > 0, "limit", self.limit, "a positive number of rows")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint answers, and how it is loaded."""

    model: str = "embedded"
    """`embedded`, `embedded-long` (give it 32 frames), a local folder, or a Hugging Face model id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: as the checkpoint says."""
    device: str = "auto"
    """auto: the worker's GPU, or the CPU when it has none."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ... None: what transformers picks."""


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """Which frames of a video are seen."""

    num_frames: int | None = None
    """This many frames, uniformly over the clip. None: 8, unless --fps is given."""
    fps: float | None = None
    """Frames per second of the clip, instead of a fixed number."""
    max_frames: int | None = None
    """At most this many frames when sampling by --fps."""
    min_frames: int = 1
    """A damaged video is still answered when at least this many frames can be read."""
    sampling: Literal["uniform", "keyframes"] = "uniform"
    """keyframes: the keyframe nearest to each of these, far cheaper to decode; uniform where keyframes are too few."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """auto: decord for the containers it reads exactly, PyAV for the others and for keyframes."""
    decode_threads: int = 1
    """Groups of pictures of a clip that PyAV decodes side by side; the frames do not depend on it."""
    decode_memory: float = 8.0
    """GiB that the frames of a clip may take; a clip that asks for more is refused before it is decoded."""
    decode_timeout: float = 120.0
    """Seconds a decode may take before its process is killed."""
    resize: Literal["decoder", "processor"] = "decoder"
    """Where frames get the model's size: in the decoder, or in the checkpoint's own processor (needs torchvision)."""

    def __post_init__(self) -> None:
        both = self.num_frames is not None and self.fps is not None
        _require(not both, "num_frames", self.num_frames, "left out when fps is given (max_frames caps fps)")
        capped = self.max_frames is None or self.fps is not None
        _require(capped, "max_frames", self.max_frames, "used with fps; num_frames is a cap by itself")
        for name in ("num_frames", "max_frames", "min_frames"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "a positive number of frames")
        cap = self.uniform_frames or self.max_frames
        _require(
            cap is None or self.min_frames <= cap, "min_frames", self.min_frames, f"at most the {cap} frames taken"
        )
        _require(self.fps is None or 0 < self.fps <= 1000, "fps", self.fps, "in (0, 1000]")
        _require(self.decode_threads > 0, "decode_threads", self.decode_threads, "a positive number of threads")
        _require(self.decode_memory > 0, "decode_memory", self.decode_memory, "a positive number of GiB")
        _require(self.decode_timeout > 0, "decode_timeout", self.decode_timeout, "a positive number of seconds")

    @property
    def uniform_frames(self) -> int | None:
        """The number of uniformly spaced frames; None when frames are taken by `fps`."""
        return DEFAULT_NUM_FRAMES if self.num_frames is None and self.fps is None else self.num_frames


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which visual tokens the language model keeps."""

    method: str = "vitcop"
    """A pruning method of `vitcop.methods`, or `calibrated`: the one that the profile beside the model recommends.
    `none` keeps all. `vitcop` is the published one, with the paper's results; `vitcop_video` is this project's variant,
    which no real checkpoint has been measured with yet. On the embedded model 93 against 74 % of the answers are right
    at 10 % of the tokens, and 86 against 57 at 5 %."""
    keep_ratio: float = 0.25
    """Fraction of visual tokens kept, averaged over the language model's layers, in (0, 1]."""
    method_options: Options = field(default_factory=dict)
    """Further settings of the method, as KEY=VALUE."""
    frame_chunk: int = 16
    """Frames that go through the vision tower at once; fewer need less memory."""

    def __post_init__(self) -> None:
        _require(0 < self.keep_ratio <= 1, "keep_ratio", self.keep_ratio, "in (0, 1]")
        _require(self.frame_chunk > 0, "frame_chunk", self.frame_chunk, "positive")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How a question is put to the model, and how its answer is read."""

    choice_scoring: Literal["auto", "generate", "likelihood", "likelihood-letter"] = "auto"
    """Multiple choice. generate: the model is shown the options, and the letter or option is read from what it
    generates, as public benchmarks do. likelihood-letter: it is shown the options, and the most likely letter counts.
    likelihood: it is not shown them, and the most likely option text counts, which compares with no published number.
    auto: generate, unless the checkpoint's config.json has another `choice_scoring` (embedded: likelihood)."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    min_new_tokens: int = 0
    """Shortest generated answer, in tokens."""
    temperature: float = 0.0
    """0: always the most likely token. Above: tokens are drawn, from flatter probabilities the higher it is."""
    top_p: float = 1.0
    """Draw among the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw among this many most likely tokens. 0: all."""
    seed: int = 0
    """Seed of the random numbers. A row draws the same tokens whatever else is answered beside it."""
    num_samples: int = 1
    """Texts drawn for each question; all of them are in the column `samples`, the first is the prediction."""
    repetition_penalty: float | None = None
    """Above 1: tokens that are there already become less likely. None: as the checkpoint says."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    prompt: str = "{{ question }}"
    """What the user says after the video: a Jinja2 template over all columns of the manifest, such as
    "{{ category }}: {{ question }}", or @FILE with one. {{ question }} is followed by the options where they are shown,
    unless the template writes them itself: {{ options | lettered("({letter}) {option}") }}. Columns whose names are no
    Python names: {{ row["option 0"] }}."""
    system: str | None = None
    """System message, when the chat template has one: a template or @FILE, as --prompt."""

    def __post_init__(self) -> None:
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "positive")
        fits = 0 <= self.min_new_tokens <= self.max_new_tokens
        _require(fits, "min_new_tokens", self.min_new_tokens, f"from 0 to max_new_tokens, {self.max_new_tokens}")
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "in [0, 100]")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        _require(self.num_samples > 0, "num_samples", self.num_samples, "positive")
        differ = self.num_samples == 1 or self.temperature > 0
        _require(differ, "num_samples", self.num_samples, "1 at temperature 0, where all samples are alike")
        penalty = self.repetition_penalty
        _require(penalty is None or 0 < penalty <= 100, "repetition_penalty", penalty, "in (0, 100]")
        _require(all(self.stop), "stop", self.stop, "texts that are not empty")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the work is done and where its results go."""

    output: Path | None = None
    """Folder for part-*.parquet and run.json; results of the same configuration are continued. Demo: output/demo."""
    overwrite: bool = False
    """Delete the results that are already in --output and start anew."""
    retry_errors: bool = False
    """Do the rows again that ended in an error."""
    max_error_rate: float = 0.05
    """Exit with 2 when a larger fraction of rows has an error."""
    workers: int | None = None
    """Processes that each load the model. None: one per GPU, or one on the CPU."""
    gpus_per_worker: float | None = None
    """None: 1 when the cluster has GPUs, else 0."""
    batch_rows: Literal["auto"] | int = "auto"
    """Answers that a worker generates at the same time; more need more memory. auto: what suits the device."""
    memory_fraction: float = 0.9
    """Of a GPU's memory, what a worker may use."""
    decode_ahead: int = 2
    """Clips that a worker has decoded in advance."""
    shard_size: int = 256
    """Questions per output file, at least (a clip's questions stay together)."""
    progress_interval: float = 5.0
    """Seconds between progress lines when there is no terminal."""

    def __post_init__(self) -> None:
        _require(0 <= self.max_error_rate <= 1, "max_error_rate", self.max_error_rate, "in [0, 1]")
        _require(self.workers is None or self.workers > 0, "workers", self.workers, "positive")
        gpus = self.gpus_per_worker
        _require(gpus is None or gpus >= 0, "gpus_per_worker", gpus, "0 or more")
        _require(self.batch_rows == "auto" or self.batch_rows > 0, "batch_rows", self.batch_rows, "auto or positive")
        _require(0 < self.memory_fraction <= 1, "memory_fraction", self.memory_fraction, "in (0, 1]")
        _require(self.decode_ahead >= 0, "decode_ahead", self.decode_ahead, "0 or more")
        _require(self.shard_size > 0, "shard_size", self.shard_size, "positive")
        _require(self.progress_interval > 0, "progress_interval", self.progress_interval, "positive")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which pruning methods are compared, and at which budgets."""

    methods: tuple[str, ...] = ("all",)
    """Pruning methods, with options as NAME:KEY=VALUE,KEY=VALUE; all stands for every one. The unpruned
    model (full) is always compared."""
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.15, 0.1, 0.05, 0.02)
    """Fractions of visual tokens kept, averaged over the language model's layers."""
    frame_counts: tuple[int, ...] = ()
    """Frames of a clip, one comparison for each. Empty: as --num-frames or --fps say."""
    seeds: int = 3
    """Runs of each method that draws at random."""
    kind: str = "kind"
    """The manifest's column that groups questions, where there is one of that name."""
    cost_clips: int = 4
    """Clips on which times and memory are measured; 0 leaves costs out."""
    cost_rounds: int = 3
    """Measurements of each cell on each of those clips, the cells taking turns."""
    gallery_clips: int = 4
    """Clips of which the report shows what each method kept."""
    gallery_ratio: float = 0.1
    """The keep ratio shown there, or the nearest one of --keep-ratios."""

    def __post_init__(self) -> None:
        _require(bool(self.methods), "methods", self.methods, "at least one method")
        ratios = bool(self.keep_ratios) and all(0 < ratio < 1 for ratio in self.keep_ratios)
        _require(ratios, "keep_ratios", self.keep_ratios, "numbers between 0 and 1")
        _require(all(n > 0 for n in self.frame_counts), "frame_counts", self.frame_counts, "positive numbers of frames")
        _require(self.seeds > 0, "seeds", self.seeds, "positive")
        _require(self.cost_clips >= 0, "cost_clips", self.cost_clips, "0 or more")
        _require(self.cost_rounds > 0, "cost_rounds", self.cost_rounds, "positive")
        _require(self.gallery_clips >= 0, "gallery_clips", self.gallery_clips, "0 or more")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """All settings of `jobs/videoqa.py`."""

    input: InputConfig = field(default_factory=InputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, kw_only=True)
class SweepJobConfig:
    """All settings of `jobs/sweep.py`."""

    input: InputConfig = field(default_factory=InputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FrameConfig = field(default_factory=FrameConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def to_mapping(config: JobConfig | SweepJobConfig) -> dict[str, Any]:
    """Nested plain values (JSON and YAML can hold them) from which `from_mapping` makes an equal config."""
    # `asdict` goes through groups and containers; `_plain` changes what JSON has no word for.
    return dataclasses.asdict(config, dict_factory=lambda pairs: {key: _plain(value) for key, value in pairs})


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}")
