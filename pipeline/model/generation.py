"""Decoding many rows as one batch: rows end at different steps, and no row's text depends on the others.

One step is one forward over the last token of every row. Rows may come from different clips with caches of different
lengths (`vitcop.join`); a row leaves when it ends, and new ones join between two steps. The steps from logits to tokens
are those of `generate` in transformers, whose logits processors do the work.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.errors import RowError
from vitcop import join, select

if TYPE_CHECKING:
    from pipeline.config import AnswerConfig

NOT_A_NUMBER = "the model's scores are not finite numbers; try --dtype bfloat16 or float32"


@dataclass(eq=False, kw_only=True)
class AnswerRow:
    """One row of an answer: a continuation of a prompt, or the option that was chosen.

    Attributes:
        prompt_ids: all token ids of the prompt, for the repetition penalty.
        seed: what the row's random numbers start from; not used in greedy decoding.
        new_ids: what was generated so far, the token that ends the turn included.
        text: set when the row has ended: the new tokens as text, up to a stop string.
        choice: index of the option that was chosen, where nothing is generated.
        error: why there is neither.
    """

    prompt_ids: Sequence[int]
    seed: int = 0
    new_ids: list[int] = field(default_factory=list)
    text: str | None = None
    choice: int | None = None
    error: RowError | None = None

    @property
    def ended(self) -> bool:
        return self.text is not None or self.choice is not None or self.error is not None


class TokenChooser:
    """From logits to the next token of each row, and whether that ends the row.

    Args:
        config: `max_new_tokens`, `min_new_tokens`, `temperature` (0: greedy), `top_p`, `top_k`, `repetition_penalty`
            (None: the checkpoint's) and `stop`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AnswerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        # Checkpoints name one end token, several or none.
        ends = model.generation_config.eos_token_id
        self.end_ids = [ends] if isinstance(ends, int) else list(ends or [tokenizer.eos_token_id])
        checkpoint = model.generation_config.repetition_penalty
        penalty = config.repetition_penalty if config.repetition_penalty is not None else float(checkpoint or 1.0)
        self.penalty = None if penalty == 1 else RepetitionPenaltyLogitsProcessor(penalty)
        # The order is that of `generate`: a temperature first, then what it leaves of the vocabulary.
        self.warpers = LogitsProcessorList()
        if config.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def choose(self, logits: Tensor, rows: Sequence[AnswerRow]) -> None:
        """Append the next token to each row; rows that end get their text or error.

        Args:
            logits: (R, vocabulary) of the last position of each of the R rows.
        """
        scores = logits.float()
        # A row is judged by its own scores only, before anything is masked with -inf.
        broken = scores.isnan().any(dim=1) | scores.isposinf().any(dim=1) | scores.isneginf().all(dim=1)
        scores = self._process(scores.nan_to_num(), rows)
        # (R,) token ids
        chosen = self._sample(scores, rows) if self.config.temperature else scores.argmax(dim=1)
        # The only values that are read back from the device in a step: (2, R) tokens and verdicts.
        tokens, verdicts = torch.stack((chosen, broken.long())).tolist()
        for row, token, is_broken in zip(rows, tokens, verdicts, strict=True):
            if is_broken:
                row.error = RowError("not_a_number", NOT_A_NUMBER)
            else:
                row.new_ids.append(token)
                self._end(row, token)

    def _process(self, scores: Tensor, rows: Sequence[AnswerRow]) -> Tensor:
        """The penalties and masks that depend on what a row holds so far: (R, vocabulary) scores."""
        if self.penalty is not None:
            # Shorter rows are filled up with a token of their own, which the penalty counts once as well.
            history = [torch.tensor([*row.prompt_ids, *row.new_ids]) for row in rows]
            longest = max(map(len, history))
            filled = [torch.cat((ids, ids[-1:].expand(longest - len(ids)))) for ids in history]
            # (R, longest) ids: prompt and answer so far
            scores = self.penalty(torch.stack(filled).to(scores.device), scores)
        # Rows of one batch are at different lengths, so each has its own verdict.
        early = [len(row.new_ids) < self.config.min_new_tokens for row in rows]
        if any(early):
            # (R, ends) rows that may not end yet can't choose a token that ends the turn.
            mask = torch.tensor(early, device=scores.device)[:, None].expand(-1, len(self.end_ids))
            ends = torch.tensor(self.end_ids, device=scores.device).expand(len(rows), -1)
            scores = scores.scatter(1, ends, scores.gather(1, ends).masked_fill(mask, -math.inf))
        return scores

    def _sample(self, scores: Tensor, rows: Sequence[AnswerRow]) -> Tensor:
        """(R,) tokens drawn by each row's own random numbers, so that a row draws the same in any batch."""
        scores = self.warpers(torch.empty(0), scores)  # these look at the scores alone
        # (R,) in [0, 1), made on the CPU: the device's own generator would depend on batch and hardware
        draws = torch.tensor([_uniform(row.seed, len(row.new_ids)) for row in rows], dtype=torch.float64)
        cumulated = scores.double().softmax(dim=1).cumsum(dim=1)  # (R, vocabulary)
        # The first token at which the cumulated probability passes the draw; rounding can leave a sum below 1.
        target = draws.to(scores.device)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)

    def _end(self, row: AnswerRow, token: int) -> None:
        """Give a row its text if `token` was its last one."""
        at_stop = None
        # Decoded anew each step: a stop string may begin and end inside tokens.
        if self.config.stop and len(row.new_ids) >= self.config.min_new_tokens:
            text = self.tokenizer.decode(row.new_ids, skip_special_tokens=True)
            found = [text.find(stop) for stop in self.config.stop if stop in text]
            at_stop = text[: min(found)] if found else None
        if at_stop is not None:
            row.text = at_stop.strip()
        elif token in self.end_ids or len(row.new_ids) >= self.config.max_new_tokens:
            row.text = self.tokenizer.decode(row.new_ids, skip_special_tokens=True).strip()


class DecodeBatch:
    """Rows that are being decoded together, inside a `prune` context of the model.

    Attributes:
        rows: those that have not ended, in the order of the cache's rows.
    """

    def __init__(self, model: PreTrainedModel, chooser: TokenChooser) -> None:
        self.model, self.chooser = model, chooser
        self.rows: list[AnswerRow] = []
        self._cache: Cache | None = None

    def add(self, rows: Sequence[AnswerRow], cache: Cache, logits: Tensor) -> list[AnswerRow]:
        """Take in rows whose prompts have been read; returns those that ended with their first token.

        Args:
            cache: of the R rows' prompts.
            logits: (R, vocabulary) after each prompt.
        """
        # The logits after the prompt give each row's first token, so no forward is needed yet.
        self.chooser.choose(logits, rows)
        # Only rows that go on enter the joint cache.
        going = [number for number, row in enumerate(rows) if not row.ended]
        if going:
            new = cache if len(going) == len(rows) else select(cache, going)
            self._cache = new if self._cache is None else join([self._cache, new])
            self.rows += [rows[number] for number in going]
        return [row for row in rows if row.ended]

    def step(self) -> list[AnswerRow]:
        """One more token for every row; returns the rows that ended and left the batch."""
        if not self.rows:
            return []
        # (R, 1) the last token of each row, the only one that the cache has not seen
        last = torch.tensor([[row.new_ids[-1]] for row in self.rows], device=self.model.device)
        output = self.model(input_ids=last, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.chooser.choose(output.logits[:, -1], self.rows)
        ended = [row for row in self.rows if row.ended]
        if ended:
            self._keep([number for number, row in enumerate(self.rows) if not row.ended])
        return ended

    def drop(self, rows: Sequence[AnswerRow]) -> None:
        """Take rows out before they have ended."""
        gone = set(map(id, rows))
        self._keep([number for number, row in enumerate(self.rows) if id(row) not in gone])

    def _keep(self, numbers: list[int]) -> None:
        if len(numbers) < len(self.rows):
            self.rows = [self.rows[number] for number in numbers]
            # A batch without rows has no cache; the next `add` brings one.
            self._cache = select(self._cache, numbers) if numbers else None


def row_seed(seed: int, *names: object) -> int:
    """A seed for one row: the job's seed and what tells the row from others (its id, the number of the sample)."""
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on the row's seed and the step alone, on every machine and device."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    # 53 bits: as many as a double holds exactly, so the result stays below 1.
    return (int.from_bytes(digest[:8]) >> 11) / 2**53
