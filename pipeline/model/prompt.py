"""From a question to the tokens that a model reads: the chat template, the video first and the question after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.config import AnswerConfig
from pipeline.errors import ConfigError, RowError
from pipeline.manifest.options import resolve_answer
from pipeline.model.template import lettered, message_templates

CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a clip: multiple choice when it has `options`; checked when its answer is known.

    Attributes:
        answer: the right answer; of multiple choice the option's text, letter or index.
        answer_index: of the right option, where that is already known.
        columns: what else the prompt's templates use, by column.
        name: tells the question from others; random numbers start from it. Without one, from the prompt.
    """

    question: str
    options: tuple[str, ...] | None = None
    answer: str | None = None
    answer_index: int | None = None
    columns: Mapping[str, object] = field(default_factory=dict, hash=False)
    name: str = ""

    @property
    def right_option(self) -> int | None:
        """Index of the right option; None for open questions and where it is not known.

        Raises:
            RowError: `bad_answer`, the answer is none of the options.
        """
        if not self.options or self.answer_index is not None or self.answer is None:
            return self.answer_index
        return resolve_answer(self.answer, self.options)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        ids: token ids, the visual placeholders included.
        prefix_length: leading tokens that are the same for all questions on a clip: those up to the last placeholder,
            and what the chat template writes between that and the question.
        tail: the text after the video, with the opening of the assistant's turn.
    """

    ids: tuple[int, ...]
    prefix_length: int
    tail: str


class PromptBuilder:
    """Renders prompts with one tokenizer's chat template.

    Args:
        config: the templates of the user's message and the system message.
        show_options: whether the options of multiple choice are part of the question.
        video: what the chat template writes for a video.
        visual_token: the token that stands for one visual token.

    Raises:
        ConfigError: the chat template can't hold a video, the tokenizer has no token that ends a turn, or one of the
            templates can't be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: AnswerConfig,
        *,
        show_options: bool = True,
        video: str,
        visual_token: str,
    ) -> None:
        self.tokenizer, self.show_options, self.video, self.visual_token = tokenizer, show_options, video, visual_token
        self.prompt, self.system = message_templates(config)
        self.visual_id = tokenizer.convert_tokens_to_ids(visual_token)
        self.control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # Two prompts that differ in their question only: what they share stands before every question.
        try:
            samples = [self._render(text, "Be brief." if self.system else "") for text in ("Why?", "0")]
        except (TemplateError, TypeError) as error:
            raise ConfigError(f"the chat template does not take a video and a text in one message: {error}") from error
        if (count := samples[0].count(video)) != 1:
            raise ConfigError(f"the chat template writes {video!r} {count} times for one video; it must write it once")
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no eos_token, so it can't be told where an answer ends")
        self.samples = samples

    def build(self, question: Question, placeholders: str) -> Prompt:
        """The prompt of a question, with `placeholders` (all visual tokens of the clip) in the video's place.

        Raises:
            RowError: `bad_question`, a control token in the text, more options than letters, or values with which a
                template can't be filled in.
        """
        text = self._render(*self._messages(question))
        video, rest = self._halves(text, placeholders)
        return Prompt(
            ids=(*video, *rest),
            # The clip's cache ends where the tokens of this prompt first differ from those before every question.
            prefix_length=len(video) + len(_common(rest, self._before_question(placeholders))),
            tail=text.partition(self.video)[2],
        )

    def answer_ids(self, prompt: Prompt, answer: str, *, end: bool = True) -> list[int]:
        """The tokens by which the assistant would give `answer`.

        The answer is tokenized behind the end of the prompt, after a space unless that ends in white space.

        Args:
            end: whether the token that ends the assistant's turn follows.

        Raises:
            RowError: `bad_question`, the answer holds a control token or melts into the prompt's last token.
        """
        self._check_text(answer)
        space = "" if prompt.tail[-1:].isspace() else " "
        # Tokens of a text depend on what stands before it, so the answer is cut out of the whole.
        start, whole = self._encode(prompt.tail), self._encode(prompt.tail + space + answer.strip())
        if whole[: len(start)] != start:
            raise RowError(
                "bad_question", f"option {answer!r} melts into the prompt's last token; use --choice-scoring generate"
            )
        return [*whole[len(start) :], *([self.tokenizer.eos_token_id] if end else [])]

    def _messages(self, question: Question) -> tuple[str, str]:
        """The text of the user's message after the video, and the system message (empty without one).

        Where options are shown, they follow the question, unless the prompt's template writes them itself.
        """
        # The row's own values win over carried-through columns of the same name.
        own = {"question": question.question, "options": question.options, "answer": question.answer}
        columns = {**question.columns, **own}
        text = question.question
        if question.options and self.show_options and "options" not in self.prompt.names:
            text = "\n".join([text, lettered(question.options), CHOICE_INSTRUCTION])
        user = self.prompt.render({**columns, "question": text})
        system = self.system.render(columns) if self.system else ""
        self._check_text(user)
        self._check_text(system)
        return user, system

    def _check_text(self, text: str) -> None:
        for token in self.control_tokens:
            if token in text:
                raise RowError(
                    "bad_question", f"the text holds the control token {token!r}, which it must not: {text!r}"
                )

    def _render(self, text: str, system: str) -> str:
        first = {"role": "system", "content": [{"type": "text", "text": system}]}
        user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
        messages = [first, user] if system else [user]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _before_question(self, placeholders: str) -> list[int]:
        """The token ids that every prompt has between the last visual token and the question."""
        last = self.visual_token + placeholders.rpartition(self.visual_token)[2]
        return _common(*(self._halves(sample, last)[1] for sample in self.samples))

    def _halves(self, text: str, placeholders: str) -> tuple[list[int], list[int]]:
        """The token ids of a rendered prompt up to its last visual token, and those behind it."""
        # Searched from the end: the last placeholder is where the video ends.
        ids = self._encode(text.replace(self.video, placeholders))
        end = len(ids) - ids[::-1].index(self.visual_id)
        return ids[:end], ids[end:]

    def _encode(self, text: str) -> list[int]:
        # Some chat templates write the first token themselves, and it must not stand there twice.
        begins = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begins).input_ids


def _common(first: list[int], second: list[int]) -> list[int]:
    """The longest common beginning of two lists."""
    differ = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return first[: next(differ, min(len(first), len(second)))]
