"""Answer forms: what is asked of the model for a question, and how its answer is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pipeline.config import ChoiceScoring
from pipeline.manifest.options import LETTERS
from pipeline.model.choices import parse_choice
from pipeline.model.generation import AnswerRow
from pipeline.model.prompt import Prompt, PromptBuilder, Question


class Generated:
    """A text is generated: the answer to an open question, or one that names an option."""

    def read(self, question: Question, row: AnswerRow) -> tuple[str, int | None]:
        """The prediction, and the index of the option that it names (None where none can be told)."""
        assert row.text is not None
        return row.text, parse_choice(row.text, question.options) if question.options else None


class Scored(ABC):
    """One of several given answers is chosen: the one that the model is most likely to give."""

    @abstractmethod
    def candidates(self, prompts: PromptBuilder, prompt: Prompt, options: Sequence[str]) -> list[list[int]]:
        """Token ids of each option's answer to the prompt.

        Raises:
            RowError: `bad_question`, an option that can't be answered with.
        """

    def read(self, question: Question, row: AnswerRow) -> tuple[str, int | None]:
        """The prediction and its index: the option whose candidate was the most likely."""
        assert question.options and row.choice is not None
        return question.options[row.choice], row.choice


class OptionTexts(Scored):
    """The options' texts, each with the end of the turn: the probability of this answer and no longer one."""

    def candidates(self, prompts: PromptBuilder, prompt: Prompt, options: Sequence[str]) -> list[list[int]]:
        return [prompts.answer_ids(prompt, option) for option in options]


class OptionLetters(Scored):
    """The options' letters, without the end of the turn, as more may follow a letter ("B. red")."""

    def candidates(self, prompts: PromptBuilder, prompt: Prompt, options: Sequence[str]) -> list[list[int]]:
        return [prompts.answer_ids(prompt, letter, end=False) for letter in LETTERS[: len(options)]]


Form = Generated | Scored


class Forms:
    """The forms of open questions and of multiple choice.

    Args:
        scoring: how multiple choice is answered.
    """

    CHOICE: ClassVar[dict[ChoiceScoring, type[Form]]] = {
        "generate": Generated,
        "likelihood": OptionTexts,
        "likelihood-letter": OptionLetters,
    }

    def __init__(self, scoring: ChoiceScoring) -> None:
        self.scoring = scoring
        self.open, self.choice = Generated(), self.CHOICE[scoring]()

    def of(self, question: Question) -> Form:
        return self.choice if question.options else self.open

    @property
    def shows_options(self) -> bool:
        """Whether the options are part of the prompt: only the likelihood of their texts does without."""
        return not isinstance(self.choice, OptionTexts)
