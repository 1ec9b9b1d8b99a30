"""The answer to one question: prediction, error and costs; and whether it is correct."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.errors import RowError
from pipeline.model.choices import same_answer
from pipeline.model.prompt import Question


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one question, or its error, with the tokens, seconds and memory that it took.

    Attributes:
        prediction: the generated text, or the text of the most likely option.
        choice: index of the chosen option; None for open questions and outputs that name no option.
        correct: None when the right answer is not known.
        error: why there is no answer.
        samples: all texts where several were asked for; the first is the prediction.
        visual_tokens_full: visual tokens of the clip.
        visual_tokens_kept: of those, how many the language model kept, averaged over its layers.
        visual_tokens_stages: how many were left after each stage of pruning.
        prompt_tokens: tokens of the prompt that are not visual.
        generated_tokens: new tokens, the one that ends the turn included; 0 when options were scored.
        seconds_vision, seconds_selection, seconds_prefill, seconds_generate: the vision tower; choosing tokens; the
            language model's pass over the prompt; new tokens or the scoring of options. What the questions of a clip
            share (the vision tower, the pass over the video) counts for the first of them; what rows share in one
            forward is divided among them.
        peak_memory_bytes: on a GPU the most that was allocated since the clip began; on the CPU the most that the
            process ever held.
    """

    prediction: str = ""
    choice: int | None = None
    correct: bool | None = None
    error: RowError | None = None
    samples: list[str] | None = None
    visual_tokens_full: int = 0
    visual_tokens_kept: float = 0.0
    visual_tokens_stages: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds_vision: float = 0.0
    seconds_selection: float = 0.0
    seconds_prefill: float = 0.0
    seconds_generate: float = 0.0
    peak_memory_bytes: int = 0


def is_correct(question: Question, prediction: str, choice: int | None) -> bool | None:
    """Whether the answer is right; None where the right one is not known."""
    if question.options:
        right = question.right_option
        return None if right is None else choice == right
    return None if question.answer is None else same_answer(prediction, question.answer)
